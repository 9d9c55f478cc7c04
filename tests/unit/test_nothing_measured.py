"""Where nothing was measured no number says otherwise: neither a step's loss nor an evaluation's, nor the exit code."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omniloom.checkpoint.dcp import MODEL
from omniloom.checkpoint.stored import load_tensors, open_stored
from omniloom.config import load_config
from omniloom.run.trainer import run
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_vl", tmp_path_factory.mktemp("tiny") / "model", num_words=300)


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_rows(path: Path, images: list[str | None]) -> Path:
    rows: list[dict] = [{"query": "What is this?", "response": "It is that."} for _ in images]
    for row, image in zip(rows, images, strict=True):
        if image is not None:
            row |= {"query": "<image>What?", "images": [image]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def weights_after(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    stored = open_stored(run_dir / "checkpoints" / f"step_{step:08d}")
    names = [name for name in stored.shapes if name.startswith(MODEL)]
    tensors = {name: torch.empty(stored.shapes[name], dtype=stored.dtype(name)) for name in names}
    load_tensors(stored, tensors)
    return tensors


def test_a_step_and_an_evaluation_whose_rows_all_fail_measure_nothing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torn.png").write_bytes(picture()[:2000])  # its header is sound, so it fails after planning
    held_out = write_rows(tmp_path / "held_out.jsonl", ["torn.png", "torn.png"])
    words = [
        *(f"model.path={model}", f"data.eval={held_out}"),
        *(f"data.train={write_rows(tmp_path / 'rows.jsonl', [None, None, 'torn.png', None])}", "data.shuffle=false"),
        *("data.pack_tokens=32", "data.workers=0", "data.max_bad_fraction=0.5", "data.image.max_pixels=4096"),
        *(f"train.run_dir={tmp_path / 'run'}", "train.packs_per_step=1", "train.epochs=1", "train.weight_decay=0.1"),
        *("train.learning_rate=1e-2", "train.schedule=constant", "checkpoint.every=1", "checkpoint.keep=9"),
        *("model.dtype=float32", "log.tensorboard=false"),
    ]
    with pytest.raises(
        ValueError, match=r"evaluation after step \d+ measured nothing: 2 of 2 held-out rows could not be read"
    ):
        run(load_config(None, words))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    (step,) = [line["step"] for line in lines if line["loss"] is None]
    assert 0 < step < len(lines) - 1
    assert f"step {step + 1} trained nothing: 1 of its 1 samples could not be read" in capsys.readouterr().out
    before, at, after = (weights_after(tmp_path / "run", number) for number in (step, step + 1, step + 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in at.items())
    assert not all(torch.equal(after[name], tensor) for name, tensor in at.items())
    assert "eval_loss" not in read_lines(tmp_path / "run" / "evaluations.jsonl")[-1]
    assert (tmp_path / "run" / "hf" / "config.json").is_file()
    bad = [json.loads(line)["file"] for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert bad.count(str(held_out)) == 2

    (tmp_path / "torn.png").write_bytes(picture())
    assert run(load_config(None, words)) == 0
    assert read_lines(tmp_path / "run" / "evaluations.jsonl")[-1]["eval_loss.image"] > 0
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == lines


def test_held_out_rows_of_no_use_are_said_before_training_and_listed(tmp_path: Path, model: Path) -> None:
    words = [
        f"model.path={model}",
        f"data.train={write_rows(tmp_path / 'rows.jsonl', [None] * 4)}",
        f"data.eval={write_rows(tmp_path / 'held_out.jsonl', ['absent.png'] * 3)}",
        *("data.workers=0", f"train.run_dir={tmp_path / 'run'}", "data.pack_tokens=64", "train.packs_per_step=1"),
    ]
    with pytest.raises(ValueError, match=r"held-out rows \(data\.eval, data\.split\): none of the 3 rows") as told:
        run(load_config(None, words))
    assert str(told.value).endswith("All are listed in bad_samples.jsonl of the run directory.")
    assert len((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_rows_that_were_bad_for_a_start_that_failed_are_not_those_of_the_run(tmp_path: Path, model: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [None, None])
    words = [
        *(f"model.path={model}", f"data.train={rows}", "data.workers=0", "train.packs_per_step=1", "train.steps=1"),
        *(f"train.run_dir={tmp_path / 'run'}", "checkpoint.export=false", "log.tensorboard=false"),
    ]
    listed = tmp_path / "run" / "bad_samples.jsonl"
    with pytest.raises(ValueError, match="smaller than every sample"):
        run(load_config(None, [*words, "data.pack_tokens=8"]))
    assert len(read_lines(listed)) == 2
    with pytest.raises(ValueError, match="expected at least one row"):  # a file that says which rows to leave out stays
        run(load_config(None, [*words, f"data.exclude={tmp_path / 'run' / '..' / 'run' / listed.name}"]))
    assert len(read_lines(listed)) == 2
    assert run(load_config(None, words)) == 0
    assert not read_lines(listed)
