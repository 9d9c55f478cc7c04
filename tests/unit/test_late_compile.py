"""`memory.compile: auto`: when the blocks of a model are compiled, and when they are left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from omniloom.config import load_config
from omniloom.run import compiling
from omniloom.run.compiling import WATCHED_STEPS, LateCompile


class Clock:
    """A step takes ten seconds."""

    seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 10.0
        return self.seconds


def says_of(monkeypatch: pytest.MonkeyPatch, *, steps: int, words: tuple[str, ...] = (), **degrees: int) -> list[Any]:
    """What is said after each of 20 steps of a run of `steps`, and whether the block is compiled after it."""
    monkeypatch.setattr(compiling, "time", Clock())
    usual = dict.fromkeys(("replicate", "shard", "context", "tensor", "expert", "pipeline"), 1)
    layout: Any = SimpleNamespace(
        device=torch.device("cpu"), degrees=SimpleNamespace(**{**usual, **degrees}), exchange=lambda value: [value]
    )
    model, compiled = nn.ModuleDict({"text": nn.ModuleList([nn.Linear(1, 1)])}), []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    plan: Any = SimpleNamespace(blocks=("text.*",))
    late = LateCompile(load_config(None, ["memory.compile=auto", *words]), layout, model, plan)  # type: ignore[arg-type]
    said = [late.after_step((step + 1) / steps) for step in range(20)]
    assert compiled == [model.text[0]] * sum(each is not None for each in said)
    return said


def test_a_long_run_compiles_its_blocks_once_after_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    said = says_of(monkeypatch, steps=1000)
    assert [step for step, each in enumerate(said) if each is not None] == [WATCHED_STEPS]
    assert "about 166 minutes left" in said[WATCHED_STEPS]


@pytest.mark.parametrize(
    ("has", "steps", "words", "degrees"),
    [
        (True, 100, (), {}),  # 16 minutes
        (False, 1000, (), {}),
        (True, 1000, ("memory.compile=false",), {}),
        (True, 1000, ("memory.compile=true",), {}),  # from the start, elsewhere
        (True, 1000, ("train.deterministic=true",), {}),
        (True, 1000, (), {"expert": 2}),
        (True, 1000, (), {"tensor": 2}),
    ],
)
def test_other_runs_compute_as_they_began(
    monkeypatch: pytest.MonkeyPatch, has: bool, steps: int, words: tuple[str, ...], degrees: dict[str, int]
) -> None:
    monkeypatch.setattr(compiling, "has_compiler", lambda: has)
    assert says_of(monkeypatch, steps=steps, words=words, **degrees) == [None] * 20


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not compiling.has_compiler()
