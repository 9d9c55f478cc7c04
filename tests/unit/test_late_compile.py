"""`memory.compile: auto`: when the blocks of a model are compiled, and when they are left alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from omniloom.config import load_config
from omniloom.run import compiling
from omniloom.run.compiling import WATCHED_STEPS, LateCompile
from omniloom.run.trainer import run
from omniloom.tools.tiny import make_tiny


class Clock:
    """A step takes ten seconds."""

    seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 10.0
        return self.seconds


def says_of(
    monkeypatch: pytest.MonkeyPatch,
    *,
    steps: int,
    words: tuple[str, ...] = (),
    faults: tuple[str | None, ...] = (None,),
    stored: Any = None,
) -> dict[int, str]:
    """What is said after which of 20 steps of a run of `steps`, -1 before the first. `faults` are of each rank."""
    monkeypatch.setattr(compiling, "time", Clock())
    layout: Any = SimpleNamespace(
        device=torch.device("cpu"),
        exchange=lambda value: list(faults) if value == "of this rank" else [value],
    )
    monkeypatch.setattr(compiling, "compiler_fault", lambda: "of this rank")
    model, compiled = nn.ModuleDict({"text": nn.ModuleList([nn.Linear(1, 1)])}), []
    monkeypatch.setattr(nn.Module, "compile", lambda module, backend: compiled.append(module))
    plan: Any = SimpleNamespace(blocks=("text.*",))
    said: dict[int, str] = {}
    step = -1
    config = load_config(None, list(words))
    late = LateCompile(config, layout, model, plan, lambda text: said.update({step: text}))  # type: ignore[arg-type]
    late.go_on(stored)
    for step in range(20):
        late.after_step((step + 1) / steps)
    assert late.is_on == bool(compiled)
    assert compiled == [model.text[0]] * any(each.startswith("compiling") for each in said.values())
    return said


def test_a_long_run_compiles_its_blocks_once_after_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    said = says_of(monkeypatch, steps=1000, faults=(None, None))
    assert list(said) == [WATCHED_STEPS]
    assert "about 166 minutes left" in said[WATCHED_STEPS]


@pytest.mark.parametrize(
    ("steps", "words", "faults"),
    [
        (100, (), (None,)),  # 16 minutes
        (1000, (), (None, "")),  # one machine has no compiler
        (1000, ("memory.compile=false",), (None,)),
        (1000, ("memory.compile=true",), (None,)),  # from the start, elsewhere
        (1000, ("train.deterministic=true",), (None,)),
    ],
)
def test_other_runs_compute_as_they_began(
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    words: tuple[str, ...],
    faults: tuple[str | None, ...],
) -> None:
    assert says_of(monkeypatch, steps=steps, words=words, faults=faults) == {}


def test_a_compiler_that_fails_on_one_rank_is_said_and_used_on_none(monkeypatch: pytest.MonkeyPatch) -> None:
    said = says_of(monkeypatch, steps=1000, faults=(None, "InductorError: no space"))
    assert list(said) == [WATCHED_STEPS]
    assert said[WATCHED_STEPS].startswith("warning: the blocks are not compiled, for the compiler fails: InductorError")


def test_a_run_that_goes_on_from_compiled_blocks_compiles_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(says_of(monkeypatch, steps=100, stored=SimpleNamespace(extras={"compiled": True}))) == [-1]
    assert says_of(monkeypatch, steps=100, stored=SimpleNamespace(extras={"compiled": False})) == {}


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiling.compiler_fault() == ""


def test_what_the_compiler_says_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(_: object) -> None:
        raise RuntimeError("g++: no space left\nand more")

    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", compile_nothing)
    assert compiling.compiler_fault() == "RuntimeError: g++: no space left"


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at inputs'
@pytest.mark.skipif(not compiling.has_compiler(), reason="no C++ compiler")
def test_a_run_that_compiled_on_its_way_resumes_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "LONG_RUN_SECONDS", 0.0)
    (tmp_path / "rows.json").write_text(
        json.dumps([{"query": f"q{n}", "response": f"r{n} " * (n + 1)} for n in range(9)])
    )
    tree: dict[str, Any] = {
        "model": {"path": str(make_tiny("qwen3_vl_moe", tmp_path / "model")), "dtype": "float32"},
        "data": {"train": [str(tmp_path / "rows.json")], "workers": 0, "pack_tokens": 64},
        "train": {"steps": 11, "packs_per_step": 1, "learning_rate": 1e-2, "run_dir": str(tmp_path / "whole")},
        "checkpoint": {"every": 8, "keep": 2, "export": False},
        "log": {"tensorboard": False},
    }
    assert run(load_config(tree)) == 0
    assert "compiling the model's blocks, since" in capsys.readouterr().out
    tree["train"]["run_dir"] = str(tmp_path / "resumed")
    tree["checkpoint"]["resume"] = str(tmp_path / "whole" / "checkpoints" / "step_00000008")
    assert run(load_config(tree)) == 0
    assert "compiling the model's blocks, as they were before the checkpoint" in capsys.readouterr().out
    whole, resumed = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "resumed")
    )
    assert [("compiled_graphs" in step) for step in whole] == [False] * WATCHED_STEPS + [False] + [True] * 5
    assert [step["loss"] for step in resumed] == [step["loss"] for step in whole[8:]]
