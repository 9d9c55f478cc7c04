"""An error beside the steps ends a run as a signal does: all ranks leave, every step is saved, the command goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omniloom.config import Config, load_config
from omniloom.data.loader import Loader
from omniloom.exit_codes import LOST_RANK
from omniloom.models.fusion import OmniModel
from omniloom.run import evaluation
from omniloom.run.best import read_evaluations
from omniloom.run.optimizer_step import OptimizerStep
from omniloom.run.trainer import run
from omniloom.training.metrics import StepFigures, StepMetrics
from omniloom.types import RunError, StepPlan
from tests.faults.conftest import write_rows
from tests.faults.test_kills import assert_same_end, with_values
from tests.faults.test_stops import losses, newest_step

METRIC = """import os
from pathlib import Path


def share(rows):
    if Path("{broken}").exists() and os.environ.get("RANK", "0") == "{rank}":
        return rows[0]["colour"]
    return sum("yes" in row["answer"] for row in rows) / len(rows)
"""


@pytest.fixture
def evaluated(words, tmp_path) -> list[str]:
    """Eight steps with an evaluation in the middle, and no checkpoint before the end."""
    held_out = write_rows(tmp_path / "held_out.json", 4)
    words = with_values(words, train__steps="8", checkpoint__every="0", data__eval=str(held_out))
    words = with_values(words, train__eval_every="4", train__eval_answers="4", train__eval_answer_tokens="2")
    return with_values(words, train__packs_per_step="2", train__schedule="constant")


def with_metric(words: list[str], tmp_path: Path, rank: int) -> tuple[list[str], Path]:
    """A metric of one's own that fails on one rank as long as a file is there."""
    broken = tmp_path / "broken"
    broken.touch()
    (tmp_path / "my_metrics.py").write_text(METRIC.format(broken=broken, rank=rank))
    return with_values(words, train__eval_metrics=f"[{tmp_path / 'my_metrics.py'}:share]"), broken


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_error_in_a_metric_of_ones_own_costs_no_step(server, evaluated, tmp_path, num_ranks) -> None:
    words, broken = with_metric(evaluated, tmp_path, rank=num_ranks - 1)
    stopped = server.run(words, tmp_path, num_ranks=num_ranks)
    assert stopped.wait() == [LOST_RANK, 2][-num_ranks:], stopped.tail()
    error, note = stopped.log(num_ranks - 1).splitlines()[-2:]
    where = f"{tmp_path / 'my_metrics.py'}:share failed: KeyError: 'colour' (my_metrics.py:7)"
    assert error.startswith(f"error: train.eval_metrics: {where}"), error
    assert note == "stopped after step 4, which is saved; the same command goes on from there"
    if num_ranks > 1:
        assert f"error: rank 1 ended the run: ValueError: train.eval_metrics: {where}" in stopped.log()
    assert newest_step(tmp_path / "run") == 4
    assert not read_evaluations(tmp_path / "run")
    assert not (tmp_path / "run" / "stopped.json").exists()

    broken.unlink()
    assert set(server.run(words, tmp_path, num_ranks=num_ranks).wait()) == {0}
    expected = tmp_path / "expected"
    never = server.run(with_values(words, train__run_dir=str(expected)), expected, num_ranks=num_ranks)
    assert set(never.wait()) == {0}
    assert_same_end(tmp_path / "run", expected)
    assert read_evaluations(tmp_path / "run") == read_evaluations(expected)


def test_an_evaluation_that_cannot_be_written_on_the_first_rank_ends_both(server, evaluated, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "answers").touch()  # where a directory belongs
    stopped = server.run(evaluated, tmp_path, num_ranks=2)
    assert stopped.wait() == [2, LOST_RANK], stopped.tail()
    assert "answers'" in stopped.log().splitlines()[-2]
    assert newest_step(tmp_path / "run") == 4
    assert not read_evaluations(tmp_path / "run")
    (tmp_path / "run" / "answers").unlink()
    assert set(server.run(evaluated, tmp_path, num_ranks=2).wait()) == {0}
    assert list(read_evaluations(tmp_path / "run")) == [4, 8]


def test_too_many_bad_rows_cost_no_step(server, words, tmp_path) -> None:
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows[64:80]:
        row["messages"] = []
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = with_values(words, data__shuffle="false", train__epochs="1", checkpoint__every="0")
    words = with_values(words, train__packs_per_step="2")
    stopped = server.run(words, tmp_path, num_ranks=2)
    assert stopped.wait() == [2, 2], stopped.tail()
    assert "16 of 16 rows are bad" in stopped.log()
    step = newest_step(tmp_path / "run")
    assert step == len(losses(tmp_path / "run")) > 4
    assert f"stopped after step {step}, which is saved" in stopped.log(1)
    assert len((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()) == 16
    more = server.run(with_values(words, data__max_bad_fraction="1"), tmp_path, num_ranks=2)
    assert more.wait() == [0, 0], more.tail()
    assert "resumed after step" in more.log()


# ---------------------------------------------------------------------------------------- in this process


def config_of(words: list[str]) -> Config:
    return load_config(None, with_values(words, train__packs_per_step="1"))


TRACKER = """class Run:
    def log(self, figures, step):
        if step == 2:
            raise ConnectionResetError(104, "reset by peer")


def init(**about):
    return Run()


def finish():
    raise ConnectionResetError("nobody to say farewell to")
"""


def test_an_error_of_a_tracker_costs_no_step(evaluated, tmp_path, monkeypatch) -> None:
    (tmp_path / "swanlab.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match=r"log\.swanlab: ConnectionResetError: .*reset by peer") as told:
        run(config_of(with_values(evaluated, log__swanlab="mine")))
    assert told.value.__notes__ == ["stopped after step 4, which is saved; the same command goes on from there"]
    assert newest_step(tmp_path / "run") == 4  # an error of closing it takes the place of nothing


def test_an_error_of_the_callers_own_function_costs_no_step(evaluated, tmp_path) -> None:
    def on_step(metrics: StepMetrics) -> None:
        raise KeyError(f"no step {metrics.step}")

    with pytest.raises(KeyError, match="no step 0") as told:
        run(config_of(evaluated), on_step)
    assert told.value.__notes__ == ["stopped after step 2, which is saved; the same command goes on from there"]
    assert newest_step(tmp_path / "run") == 2
    assert run(config_of(evaluated)) == 0


def test_a_list_of_skipped_samples_that_cannot_be_written_costs_no_step(evaluated, tmp_path, monkeypatch) -> None:
    take = OptimizerStep.take

    def finds_nan(self: OptimizerStep, plan: StepPlan, *args: object, **options: object) -> tuple[StepFigures, bool]:
        figures, stop = take(self, plan, *args, **options)
        return replace(figures, grad_norm=math.nan if plan.step == 1 else figures.grad_norm), stop

    monkeypatch.setattr(OptimizerStep, "take", finds_nan)
    listed = tmp_path / "run/nonfinite_step_00000002.json"
    listed.mkdir(parents=True)  # where a file belongs
    with pytest.raises(IsADirectoryError, match=listed.name) as told:
        run(config_of(with_values(evaluated, train__nonfinite="skip")))
    assert told.value.__notes__ == ["stopped after step 3, which is saved; the same command goes on from there"]
    assert newest_step(tmp_path / "run") == 3


@pytest.mark.parametrize("part", ["load", "describe"])
def test_held_out_rows_that_can_no_longer_be_read_cost_no_step(evaluated, tmp_path, monkeypatch, part) -> None:
    def fails(*args: object, **options: object) -> None:
        raise OSError(5, "Input/output error", "held_out.json")

    def fails_to_load(*args: object, **options: object) -> Iterator[None]:
        yield fails()

    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == 2 and part == "load":
            monkeypatch.setattr(Loader, "load_in_order", fails_to_load)
        elif metrics.step == 2:
            monkeypatch.setattr(evaluation, "describe_question", fails)

    with pytest.raises(OSError, match=r"held_out\.json") as told:
        run(config_of(evaluated), on_step)
    assert told.value.__notes__ == ["stopped after step 4, which is saved; the same command goes on from there"]
    assert newest_step(tmp_path / "run") == 4
    monkeypatch.undo()
    assert run(config_of(evaluated)) == 0
    assert list(read_evaluations(tmp_path / "run")) == [4, 8]


def take_all_memory(self: object, *_: object, **__: object) -> None:
    torch.empty(2**55)


@pytest.mark.parametrize(("part", "saved"), [("in step 7", 6), ("in the evaluation after step 4", 4)])
def test_short_memory_costs_no_step_on_a_lone_rank_and_is_told_with_what_helps(
    evaluated, tmp_path, monkeypatch, part, saved
) -> None:
    def on_step(metrics: StepMetrics) -> None:
        if metrics.step + 1 == saved:
            monkeypatch.setattr(OmniModel, "decode", take_all_memory)

    if part == "in the evaluation after step 4":
        monkeypatch.setattr(evaluation.Evaluation, "run", take_all_memory)
    with pytest.raises(RunError) as told:
        run(config_of(evaluated), on_step)
    words = str(told.value)
    assert words.startswith("rank 0 has too little memory on cpu: "), words
    assert "tried to allocate" in words
    assert "set memory.recompute to selective or full; lower data.pack_tokens (it is " in words
    where = f"stopped after step {saved}, which is saved; the same command goes on from there"
    assert told.value.__notes__ == [part, where]
    assert newest_step(tmp_path / "run") == saved
    monkeypatch.undo()
    assert run(config_of(evaluated)) == 0
    expected = with_values(evaluated, train__run_dir=str(tmp_path / "expected"))
    assert run(config_of(expected)) == 0
    assert_same_end(tmp_path / "run", tmp_path / "expected")
    assert read_evaluations(tmp_path / "run") == read_evaluations(tmp_path / "expected")


def test_an_error_after_gradients_leaves_the_checkpoints_as_they_are(evaluated, tmp_path, monkeypatch) -> None:
    take = OptimizerStep.take

    def fails(self: OptimizerStep, plan: object, *args: object, **options: object) -> object:
        done = take(self, plan, *args, **options)
        if plan.step == 6:
            raise RuntimeError("out of memory")
        return done

    monkeypatch.setattr(OptimizerStep, "take", fails)
    words = with_values(evaluated, checkpoint__every="3")
    with pytest.raises(RuntimeError, match="out of memory") as told:
        run(config_of(words))
    assert not getattr(told.value, "__notes__", ())
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert kept == ["step_00000003", "step_00000006"]
