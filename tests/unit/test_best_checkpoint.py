"""A run keeps the checkpoint of its best evaluation, ends when nothing gets better, and exports that one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

import omniloom
from omniloom.checkpoint.files import read_json
from omniloom.exit_codes import STOPPED_EARLY
from omniloom.run.best import read_evaluations
from omniloom.run.trainer import run
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import StepMetrics

RUN = "my run: ü, #1"  # a directory may be called anything
SCORES = "values = iter([0.2, 0.9, 0.5, 0.4, 0.3])\n\n\ndef quality(rows):\n    return next(values)\n"


def test_the_best_checkpoint_is_kept_exported_and_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": f"q{n}", "response": f"r{n}"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "mine.py").write_text(SCORES)
    config = omniloom.load_config(
        None,
        [
            *(f"model.path={make_tiny('qwen3_vl', tmp_path / 'model')}", f"data.train={tmp_path / 'rows.json'}"),
            *(f"data.eval={tmp_path / 'rows.json'}", "data.workers=0", "data.pack_tokens=64", "model.dtype=float32"),
            *("train.steps=20", "train.packs_per_step=1", "train.learning_rate=1e-2", "train.eval_every=2"),
            *("train.eval_answers=1", "train.eval_answer_tokens=2", f"train.eval_metrics={tmp_path}/mine.py:quality"),
            *("checkpoint.best=eval_quality", "checkpoint.keep=1", "train.patience=2", "log.tensorboard=false"),
            *(f"train.run_dir={tmp_path / RUN}", "checkpoint.every=0"),
        ],
    )
    assert run(config) == 0
    said = capsys.readouterr().out
    assert "ended after step 8: eval_quality was no better than after 4" in said
    assert "evaluation after step 4: " in said
    assert f" parameters of {tmp_path / 'model'} on " in said
    found = {step: figures["eval_quality"] for step, figures in read_evaluations(tmp_path / RUN).items()}
    assert found == {2: 0.2, 4: 0.9, 6: 0.5, 8: 0.4}
    kept = sorted(path.name for path in (tmp_path / RUN / "checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000008"]
    assert read_json(tmp_path / RUN / "finished.json")["step"] == 8
    omniloom.export(tmp_path / RUN, tmp_path / "best", best=True)
    omniloom.export(tmp_path / RUN / "checkpoints" / kept[0], tmp_path / "fourth")
    best, fourth = (
        [path.read_bytes() for path in sorted((tmp_path / name).glob("*.safetensors"))] for name in ("best", "fourth")
    )
    assert best
    assert best == fourth
    with pytest.raises(ValueError, match=r"best is not empty; choose another one, or --overwrite"):
        omniloom.export(tmp_path / RUN, tmp_path / "best")
    omniloom.export(tmp_path / RUN, tmp_path / "best", overwrite=True)
    for source in (tmp_path / RUN, tmp_path):  # neither the run itself nor what lies around it is an earlier export
        with pytest.raises(ValueError, match="is not empty and no earlier export"):
            omniloom.export(tmp_path / RUN, source, overwrite=True)
    assert run(config) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_an_evaluation_that_a_signal_left_out_is_made_before_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"query": f"q{n}", "response": f"r{n}"} for n in range(4)]))
    words = [
        *(f"model.path={make_tiny('qwen3_vl', tmp_path / 'model')}", f"data.train={tmp_path / 'rows.json'}"),
        *(f"data.eval={tmp_path / 'rows.json'}", "data.workers=0", "data.pack_tokens=64", "model.dtype=float32"),
        *("train.steps=6", "train.packs_per_step=1", "train.learning_rate=1e-2", "train.eval_every=2"),
        *("checkpoint.best=eval_loss", "checkpoint.keep=1", "log.tensorboard=false", "checkpoint.export=false"),
    ]
    whole, left = (omniloom.load_config(None, [*words, f"train.run_dir={tmp_path / name}"]) for name in ("a", "b"))
    assert run(whole) == 0

    def stop_in_the_fourth(metrics: StepMetrics) -> None:
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # until the thread that reads signals has it

    assert run(left, stop_in_the_fourth) == STOPPED_EARLY
    assert list(read_evaluations(tmp_path / "b")) == [2]
    assert run(left) == 0
    assert read_evaluations(tmp_path / "b") == read_evaluations(tmp_path / "a")
    assert list(read_evaluations(tmp_path / "b")) == [2, 4, 6]
