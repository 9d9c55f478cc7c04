"""Runs of families draw on four ranks the loss curve of one: shards, tensors, experts, and the pool over all ranks.

Gradients of every family in every layout are compared in `test_layouts.py`, curves of Qwen3-Omni in
`test_training_ranks.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines
from tests.media_rows import write_media_rows
from tests.run_server import RunServer

STEPS = 6
TOLERANCE = 1e-5  # of the loss, as in test_training_ranks.py, where Qwen3-Omni is
LAYOUTS = {  # a dense family with all media, one with experts, and one with a delta rule
    "qwen2_5_omni": ("parallel.tensor=2",),  # beside it, two shards
    "qwen3_vl_moe": ("parallel.tensor=2", "parallel.expert=4"),
    "qwen3_5_moe": ("parallel.pipeline=2", "parallel.expert=2"),
}


def curve(server: RunServer, model: Path, rows: Path, nproc: int, layout: tuple[str, ...]) -> list[dict]:
    run_dir = rows.parent / f"{nproc}"
    words = [
        *(f"model.path={model}", f"data.train={rows}", f"train.run_dir={run_dir}", f"train.steps={STEPS}"),
        *("train.packs_per_step=4", "data.pack_tokens=512", "data.workers=0", "train.learning_rate=1e-3"),
        *("data.image.max_pixels=4096", "data.video.max_pixels=4096", "model.dtype=float32", "checkpoint.every=0"),
        *("checkpoint.export=false", "log.tensorboard=false", "parallel.encoder_pool=data", *layout),
    ]
    run = server.run(words, run_dir.with_suffix(".logs"), num_ranks=nproc)
    assert set(run.wait()) == {0}, run.tail()
    return read_lines(run_dir / "metrics.jsonl")


@pytest.mark.full
@pytest.mark.parametrize("family", LAYOUTS)
def test_four_ranks_draw_the_loss_curve_of_one(server: RunServer, family: str, tmp_path: Path) -> None:
    model = make_tiny(family, tmp_path / "model")
    rows = write_media_rows(tmp_path, hears="omni" in family)
    one, four = curve(server, model, rows, 1, ()), curve(server, model, rows, 4, LAYOUTS[family])
    assert one[0]["video_frames"] > 0
    assert one[0]["num_images"] > 0
    assert (one[0]["audio_seconds"] > 0) == ("omni" in family)
    for alone, many in zip(one, four, strict=True):
        assert many["num_tokens"] == alone["num_tokens"]
        assert many["num_bad_samples"] == alone["num_bad_samples"] == 0
        assert many["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE), alone["step"]
        assert many["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4), alone["step"]
    assert one[-1]["loss"] < 0.95 * one[0]["loss"]
