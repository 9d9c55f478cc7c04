"""A run directory stays true: finished runs stay, used directories are not begun anew, configs keep their steps."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from omniloom.checkpoint.files import write_text
from omniloom.config import Config, dump_config, load_config
from omniloom.exit_codes import STOPPED_EARLY
from omniloom.run import evaluation
from omniloom.run.directory import (
    changes_of,
    check_all_done,
    check_anew,
    check_start,
    find_finished,
    record_config,
    remove_own_files,
    write_finished,
)
from omniloom.run.provenance import record_start
from omniloom.run.trainer import run
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines


def config_of(*words: str) -> Config:
    return load_config(None, ["model.path=m", "data.train=r.json", "train.steps=10", *words])


def learning_rate_of(path: Path) -> float:
    return yaml.safe_load(path.read_text())["train"]["learning_rate"]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(
        dump_config(config_of("train.learning_rate=1e-3", "policy.vision.merger.freeze=true"))
    )
    write_finished(tmp_path, 10)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    return tmp_path


SAME = ("train.learning_rate=1e-3", "policy.vision.merger.freeze=true")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), None),
        (("log.every=5", "data.workers=9", "parallel.shard=1", "policy.text.recompute=true"), "log.every was 1, is 5"),
        (("checkpoint.resume=auto", "model.path=./m", "data.train=./r.json"), None),
    ],
)
def test_a_finished_run_called_again_has_nothing_to_do(finished: Path, words: tuple[str, ...], named: str) -> None:
    said = find_finished(finished, config_of(*SAME, *words))
    assert said is not None
    assert "finished after step 10, nothing to do" in said
    assert named is None or f"{named}" in said
    assert named is not None or "was" not in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("train.learning_rate=1e-2",), "train.learning_rate was 0.001, is 0.01"),
        (("train.steps=8",), "train.steps was 10, is 8"),
        (("policy.vision.merger.freeze=false",), "policy.vision.merger.freeze was True, is False"),
        (("policy.text.freeze=true",), "policy.text.freeze was None, is True"),
        (("policy.vision.merger.freeze=null",), "policy.vision.merger.freeze was True, is None"),
        (("data.eval=e.json",), "data.eval was [], is ['e.json']"),
        (("checkpoint.resume=somewhere/step_00000002",), "checkpoint.resume was 'auto'"),
        (("data.train=q.json",), "data.train was ['r.json'], is ['q.json']"),
    ],
)
def test_what_differs_from_a_finished_run_is_named_and_refused(
    finished: Path, words: tuple[str, ...], named: str
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(ValueError, match="finished after step 10; nothing was trained or written") as told:
        find_finished(finished, config_of(*SAME, *words))
    assert named in str(told.value)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_the_result_that_is_offered_is_there_or_said_how_to_be_had(finished: Path) -> None:
    with pytest.raises(ValueError, match=rf"set as model\.path what `omniloom export {finished} DIR` writes"):
        find_finished(finished, config_of(*SAME, "checkpoint.export=false"))
    (finished / "hf").mkdir()
    with pytest.raises(ValueError, match=rf"set model\.path={finished}/hf"):
        find_finished(finished, config_of(*SAME, "checkpoint.export=false"))


def test_more_steps_go_on_from_a_finished_run(finished: Path) -> None:
    assert find_finished(finished, config_of(*SAME, "train.steps=11")) is None
    assert find_finished(finished, config_of(*SAME, "train.steps=null", "train.epochs=2")) is None
    (finished / "config.yaml").write_text(dump_config(config_of(*SAME, "train.steps=null")))
    assert find_finished(finished, config_of(*SAME, "train.steps=null", "train.epochs=1.5")) is None
    with pytest.raises(ValueError, match=r"train\.epochs was None, is 0\.5"):
        find_finished(finished, config_of(*SAME, "train.steps=null", "train.epochs=0.5"))


def test_results_that_are_missing_are_written_by_the_config_that_trained(finished: Path) -> None:
    (finished / "finished.json").unlink()
    check_all_done(finished, config_of(*SAME, "data.eval=e.json", "log.every=2"), 10)
    with pytest.raises(ValueError, match=r"all 10 steps are done, with other values: train\.seed was 0, is 1"):
        check_all_done(finished, config_of(*SAME, "train.seed=1"), 10)


def test_a_run_that_ended_early_goes_on_with_other_patience(finished: Path) -> None:
    write_finished(finished, 6)
    assert find_finished(finished, config_of(*SAME, "train.patience=3")) is None
    write_finished(finished, 10)
    with pytest.raises(ValueError, match=r"finished after step 10; .* train\.patience was None, is 3"):
        find_finished(finished, config_of(*SAME, "train.patience=3"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "hf", "checkpoints/step_00000001"])
@pytest.mark.parametrize("resume", ["none", "elsewhere/checkpoints/step_00000001"])
def test_a_used_directory_is_not_begun_anew_without_overwriting(tmp_path: Path, name: str, resume: str) -> None:
    config = config_of(f"checkpoint.resume={resume}")
    check_start(tmp_path, config, overwrite=False)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("something")
    with pytest.raises(ValueError, match=rf"checkpoint\.resume={resume}: .* which would be lost; .* --overwrite"):
        check_start(tmp_path, config, overwrite=False)
    check_start(tmp_path, config, overwrite=True)
    check_start(tmp_path, config_of(), overwrite=False)
    check_start(tmp_path, config_of(f"checkpoint.resume={tmp_path}/checkpoints/step_00000001"), overwrite=False)


def test_results_whose_checkpoints_are_gone_are_not_trained_over(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"finished\.json.* no checkpoint to go on from"):
        check_anew(finished)
    remove_own_files(finished)
    check_anew(finished)


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    own = ["checkpoints/step_00000001/x", "hf/model", "metrics.jsonl", "config_until_step_00000004.yaml"]
    own += ["tensorboard/events.out", "answers/step_1.jsonl", "nonfinite_step_00000001.json", "stopped.json"]
    kept = ("notes.txt", "cache/extents", "run.lock", "my_config.yaml", "rows/train.jsonl")
    for name in (*own, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    remove_own_files(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(kept)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_config_that_no_run_wrote_is_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "config.yaml").write_text("# mine\ntrain: {run_dir: .}\n")
    with pytest.raises(ValueError, match=r"config\.yaml was written by no run, .* set another train\.run_dir"):
        check_start(tmp_path, config_of(), overwrite=overwrite)
    record_start(tmp_path, {"time": "now"})  # which a run writes first
    check_start(tmp_path, config_of(), overwrite=overwrite)


@pytest.mark.parametrize("key", ["model.path", "data.train", "checkpoint.resume"])
def test_overwriting_what_the_run_reads_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match=rf"--overwrite would remove .*/hf/x, from which {key} reads"):
        check_start(tmp_path, config_of(f"{key}={tmp_path}/hf/x"), overwrite=True)


def test_each_config_stays_with_the_steps_that_it_trained(tmp_path: Path) -> None:
    def begin(step: int, rate: str) -> dict[str, float]:
        record_config(tmp_path, config_of(f"train.learning_rate={rate}"), step)
        return {path.stem: learning_rate_of(path) for path in tmp_path.glob("*.yaml")}

    until = "config_until_step_{:08d}".format
    assert begin(0, "1e-3") == {"config": 1e-3}
    assert begin(0, "2e-3") == {"config": 2e-3}  # no step counted under the first
    assert begin(5, "2e-3") == {"config": 2e-3}
    assert begin(5, "3e-3") == {"config": 3e-3, until(5): 2e-3}
    assert begin(5, "4e-3") == {"config": 4e-3, until(5): 2e-3}  # stopped before a step was saved
    assert begin(9, "5e-3") == {"config": 5e-3, until(5): 2e-3, until(9): 4e-3}
    assert begin(7, "6e-3") == {"config": 6e-3, until(5): 2e-3, until(7): 4e-3}  # back to an earlier step
    assert begin(5, "2e-3") == {"config": 2e-3}
    assert begin(0, "7e-3") == {"config": 7e-3}


def test_neutral_changes_are_not_told_and_damaged_records_change_nothing(tmp_path: Path) -> None:
    record_config(tmp_path, config_of(), 0)
    assert record_config(tmp_path, config_of("log.every=7"), 4) == ()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["log"]["every"] == 7
    assert [change.key for change in changes_of(tmp_path / "config.yaml", config_of("train.seed=3"))] == [
        "log.every", "train.seed"]  # fmt: skip
    (tmp_path / "config.yaml").write_text("train: [")
    assert changes_of(tmp_path / "config.yaml", config_of()) == []
    (tmp_path / "finished.json").write_text(json.dumps({"steps": "?"}))
    assert find_finished(tmp_path, config_of()) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_vl", tmp_path_factory.mktemp("tiny") / "model", num_words=300)


def contents_of(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "run.lock"}


def test_a_run_called_again_leaves_its_record_until_it_is_overwritten(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"query": f"{n}?", "response": f"It is {n}."}) + "\n" for n in range(20))
    )
    (tmp_path / "bad.jsonl").write_text('{"query": 1}\n' * 20)
    run_dir = tmp_path / "run"

    def train(*words: str, overwrite: bool = False) -> int:
        usual = [
            f"model.path={model}",
            f"data.train={tmp_path / 'rows.jsonl'}",
            f"train.run_dir={run_dir}",
        ]
        usual += ["train.steps=2", "train.packs_per_step=1", "data.pack_tokens=64", "data.workers=0"]
        return run(load_config(None, [*usual, "model.dtype=float32", *words]), overwrite=overwrite)

    assert train() == 0
    before = contents_of(run_dir)
    assert train() == 0
    assert "finished after step 2, nothing to do" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match=r"train\.learning_rate was 1e-05, is 0\.1"):
        train("train.learning_rate=0.1")
    with pytest.raises(ValueError, match="--overwrite"):
        train("checkpoint.resume=none")
    with pytest.raises(ValueError, match=r"20 of 20 rows"):
        train(f"data.train={tmp_path / 'bad.jsonl'}", overwrite=True)
    after = contents_of(run_dir)
    assert str(run_dir / "bad_samples.jsonl") in after
    assert {name: after[name] for name in before} == before
    assert train("train.learning_rate=0.1", overwrite=True) == 0
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    assert len(list((run_dir / "tensorboard").iterdir())) == 1
    assert learning_rate_of(run_dir / "config.yaml") == 0.1
    assert not (run_dir / "bad_samples.jsonl").exists()
    assert train("train.steps=3", "train.learning_rate=0.2") == 0
    assert learning_rate_of(run_dir / "config_until_step_00000002.yaml") == 0.1
    assert "train.learning_rate was 0.1, is 0.2" in capsys.readouterr().out


def test_a_signal_ends_an_evaluation_and_leaves_the_step_before_it_saved(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(json.dumps({"query": f"{n}?", "response": f"It is {n}."}) + "\n" for n in range(30))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = [f"model.path={model}", f"data.train={tmp_path / 'rows.jsonl'}", "data.workers=0"]
    words += [f"data.eval={tmp_path / 'rows.jsonl'}", f"train.run_dir={tmp_path / 'run'}", "train.steps=2"]
    words += ["train.packs_per_step=1", "data.pack_tokens=32", "model.dtype=float32", "train.eval_every=1"]
    measured, measure = 0, evaluation.evaluate

    def signalled_at_the_first(*arguments: Any) -> Any:
        nonlocal measured
        measured += 1
        if measured == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return measure(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "evaluate", signalled_at_the_first)
        assert run(load_config(None, words)) == STOPPED_EARLY
    assert measured < 5  # of 30 packs
    record = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert (record["reason"], record["step"]) == ("SIGTERM", 1)
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    assert run(load_config(None, words)) == 0
    assert read_lines(tmp_path / "run" / "evaluations.jsonl")[-1]["step"] == 2


def test_a_file_that_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'a'}'"):
        write_text(tmp_path / "a", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
