"""`memory.compile: auto`: blocks are compiled once a run has shown that it is long enough to earn it back.

On CPU only, where it was measured, in any layout. Elsewhere a run computes as it began.
Compiled blocks round otherwise. Checkpoints say whether they were, and a run that goes on from one compiles at once.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch

from omniloom.checkpoint.stored import StoredCheckpoint
from omniloom.config import Config
from omniloom.models.fusion import OmniModel
from omniloom.parallel.apply import compile_blocks
from omniloom.parallel.mesh import Layout
from omniloom.sharding import ShardingPlan

WATCHED_STEPS = 5  # after the first, which makes what later ones find there
# Compiling took half a minute where a step became a quarter to a third shorter, on two quiet cores; on busy ones it
# takes several times as long.
LONG_RUN_SECONDS = 1200.0


class LateCompile:
    """Watches the first steps of a run, after which the blocks may be compiled. All methods are collective."""

    def __init__(
        self, config: Config, layout: Layout, model: OmniModel, plan: ShardingPlan, say: Callable[[str], None]
    ) -> None:
        able = layout.device.type == "cpu" and not config.train.deterministic
        self._steps_left = WATCHED_STEPS + 1 if config.memory.compile == "auto" and able else 0
        self._layout, self._model, self._plan, self._say = layout, model, plan, say
        self._start = 0.0, 0.0  # time and progress
        self.is_on = False  # whether the blocks are compiled, at their next call

    def go_on(self, stored: StoredCheckpoint | None) -> None:
        """Compile at once, where the run did that has left the checkpoint."""
        if self._steps_left and stored is not None and stored.extras.get("compiled"):
            self._compile("as they were before the checkpoint")

    def after_step(self, progress: float) -> None:
        """Compile, where steps so far say that it is worth it. `progress` is the share of the run that is over."""
        if not self._steps_left:
            return
        now, self._steps_left = time.monotonic(), self._steps_left - 1
        if self._steps_left == WATCHED_STEPS:
            self._start = now, progress
        if self._steps_left:
            return
        begun, before = self._start
        left = (now - begun) * (1 - progress) / max(progress - before, 1e-9)
        left = self._layout.exchange(left)[0]  # all ranks compute alike
        if left >= LONG_RUN_SECONDS:
            self._compile(f"since the run has about {left / 60:.0f} minutes left")

    def _compile(self, why: str) -> None:
        self._steps_left = 0
        faults = [fault for fault in self._layout.exchange(compiler_fault()) if fault is not None]
        if not faults:
            compile_blocks(self._model, self._plan.blocks)
            self.is_on = True
            self._say(f"compiling the model's blocks, {why} (memory.compile: auto)")
        elif fault := max(faults):
            self._say(f"warning: the blocks are not compiled, for the compiler fails: {fault}; repair it, or set "
                      "memory.compile=false")  # fmt: skip


def compiler_fault() -> str | None:
    """What the compiler says of a small function, None where it can do it; empty where there is no compiler."""
    if not has_compiler():
        return ""
    try:
        torch.compile(lambda rows: rows.sin() + 1)(torch.ones(8))
    except (RuntimeError, OSError) as error:  # as PyTorch wraps what its compiler says
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def has_compiler() -> bool:
    """Whether what PyTorch compiles for CPUs can be built here: a C++ compiler, and Python's own headers."""
    compiler = os.environ.get("CXX", "g++")  # as PyTorch looks for it
    return shutil.which(compiler) is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
