"""`memory.compile: auto`: blocks are compiled once a run has shown that it is long enough to earn it back.

On CPU only, where it was measured, in layouts whose compiled blocks are tested. Elsewhere a run computes as it began.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import time
from pathlib import Path

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
    """Watches the first steps of a run; `after_step` says when the blocks are compiled."""

    def __init__(self, config: Config, layout: Layout, model: OmniModel, plan: ShardingPlan) -> None:
        degrees = layout.degrees
        divided = degrees.context * degrees.tensor * degrees.expert * degrees.pipeline > 1
        able = layout.device.type == "cpu" and not divided and not config.train.deterministic and has_compiler()
        self._steps_left = WATCHED_STEPS + 1 if config.memory.compile == "auto" and able else 0
        self._layout, self._model, self._plan = layout, model, plan
        self._start = 0.0, 0.0  # time and progress

    def after_step(self, progress: float) -> str | None:
        """What to say where the blocks have just been set to be compiled at their next call, else None.

        `progress` is the share of the run that is over. Collective over all ranks after the last step that is watched.
        """
        if not self._steps_left:
            return None
        now, self._steps_left = time.monotonic(), self._steps_left - 1
        if self._steps_left == WATCHED_STEPS:
            self._start = now, progress
        if self._steps_left:
            return None
        begun, before = self._start
        left = (now - begun) * (1 - progress) / max(progress - before, 1e-9)
        left = self._layout.exchange(left)[0]  # all ranks compute alike
        if left < LONG_RUN_SECONDS:
            return None
        compile_blocks(self._model, self._plan)
        return (
            f"compiling the model's blocks, since the run has about {left / 60:.0f} minutes left (memory.compile: auto)"
        )


def has_compiler() -> bool:
    """Whether what PyTorch compiles for CPUs can be built here: a C++ compiler, and Python's own headers."""
    compiler = os.environ.get("CXX", "g++")  # as PyTorch looks for it
    return shutil.which(compiler) is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
