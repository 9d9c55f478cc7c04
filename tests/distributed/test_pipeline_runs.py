"""Runs over stages and divided matrices: checkpoints go on in any layout, exports are the same bytes, a dead rank is
missed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines
from tests.media_rows import write_media_rows
from tests.run_server import RunServer

TOLERANCE = 1e-5  # of the loss, as in test_training_ranks.py
INTERLEAVED = ("parallel.pipeline_schedule=interleaved", "parallel.stages_per_rank=2")


LAYOUTS = {
    "alone": (1, ()),
    "staged": (2, ("parallel.pipeline=2",)),
    "divided": (2, ("parallel.tensor=2",)),
    "ring": (2, ("parallel.context.ring=2",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, server: RunServer) -> Path:
    """Four steps in several layouts, each with a checkpoint after two; the head is the embedding."""
    folder = tmp_path_factory.mktemp("stages")
    make_tiny("qwen3_vl", folder / "model")
    write_media_rows(folder, hears=False)
    chosen = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    for layout in ("staged", "divided", "alone"):
        if any(layout in (params.get("layout"), params.get("first")) for params in chosen):
            train(server, folder, layout, layout)
    return folder


def train(server: RunServer, folder: Path, name: str, layout: str, *more: str) -> list[dict]:
    nproc, axes = LAYOUTS[layout]
    rows = next(path for path in folder.iterdir() if path.suffix in (".json", ".jsonl"))
    words = (
        *(f"model.path={folder / 'model'}", f"data.train={rows}"),
        *(f"train.run_dir={folder / name}", "train.steps=4", "train.packs_per_step=2", "data.pack_tokens=512"),
        *("data.workers=0", "train.learning_rate=1e-3", "data.image.max_pixels=4096", "data.video.max_pixels=4096"),
        *("model.dtype=float32", "checkpoint.every=2", "log.tensorboard=false", *axes, *more),
    )
    run = server.run(words, folder / f"{name}.logs", num_ranks=nproc)
    assert set(run.wait()) == {0}, run.tail()
    return read_lines(folder / name / "metrics.jsonl")


@pytest.mark.parametrize("layout", ["staged", pytest.param("divided", marks=pytest.mark.full)])
def test_an_export_is_the_same_bytes_as_one_rank_makes_of_the_checkpoint(
    server: RunServer, folder: Path, layout: str
) -> None:
    exported, own = folder / f"{layout}_exported", folder / layout / "hf"
    run = server.run([str(folder / layout), str(exported)], folder / "export.logs", verb="export")
    assert run.wait() == [0], run.tail()
    files = sorted(path.name for path in own.glob("*.safetensors"))
    assert files
    for name in files:
        assert (exported / name).read_bytes() == (own / name).read_bytes(), name


FULL = [
    *(("staged", "alone"), ("alone", "staged"), ("alone", "divided")),
    *(("divided", "alone"), ("divided", "ring"), ("divided", "staged")),
]


@pytest.mark.parametrize(
    ("first", "second"),
    [("staged", "divided"), *(pytest.param(*pair, marks=pytest.mark.full) for pair in FULL)],
)
def test_a_checkpoint_goes_on_in_another_layout(server: RunServer, folder: Path, first: str, second: str) -> None:
    expected = read_lines(folder / first / "metrics.jsonl")
    stored = folder / first / "checkpoints" / "step_00000002"
    found = train(server, folder, f"{first}_{second}", second, f"checkpoint.resume={stored}", "checkpoint.export=false")
    assert [line["step"] for line in found] == [2, 3]
    for one, other in zip(expected[2:], found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_a_step_larger_than_the_data_takes_the_passes_that_its_schedule_is_made_for(
    server: RunServer, tmp_path: Path
) -> None:
    model = make_tiny("qwen3_vl", tmp_path / "model", overrides={"text_config.num_hidden_layers": 4})
    rows = [{"query": f"What is {number}?", "response": f"It is {number}."} for number in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))  # a pack each, where rounds are of two packs
    losses = []
    for nproc, axes in ((1, ()), (2, ("parallel.pipeline=2", *INTERLEAVED))):
        words = [
            *(f"model.path={model}", f"data.train={tmp_path / 'rows.json'}", f"train.run_dir={tmp_path / str(nproc)}"),
            *("model.modalities=[text]", "model.dtype=float32", "train.steps=1", "train.packs_per_step=6"),
            *("data.workers=0", "data.pack_tokens=32", "checkpoint.every=0", "checkpoint.export=false"),
            *("log.tensorboard=false", *axes),
        ]
        run = server.run(words, tmp_path / f"{nproc}.logs", num_ranks=nproc)
        assert set(run.wait()) == {0}, run.tail()
        losses += [line["loss"] for line in read_lines(tmp_path / str(nproc) / "metrics.jsonl")]
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)


BODY = """
import os, sys, time, torch
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.mesh import build_layout, init_distributed, says_rank_is_gone
from omniloom.parallel.pipeline import Message, _Mail
from omniloom.parallel.watchdog import Watchdog

ranks = init_distributed(timeout_seconds=30)
layout = build_layout(Degrees(pipeline=3), ranks)
mail = _Mail(layout, torch.zeros(4, 2), {1: [Message(0, 0, True)]})
try:
    with Watchdog(ranks, timeout_seconds=5.0):
        if layout.rank == 1:
            layout.barrier()
            time.sleep(1.0)  # until the others have left the barrier
            os._exit(9)
        layout.barrier()
        if layout.rank == 0:
            mail.receive(Message(0, 0, True), 1)
        layout.barrier()  # as where no stage waits for a certain one
except RuntimeError as error:
    print(says_rank_is_gone(error), *error.__notes__, sep="; ")
if layout.rank == 0:
    time.sleep(3.0)  # it keeps the store
"""


def test_a_rank_that_dies_in_a_pipeline_is_named_by_all_others() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["PYTHONPATH"] = str(Path(__file__).parents[2])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", BODY],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    awaited = "stage 0 waited for the gradient of its rows of pack 0 from rank 1"
    assert said == [f"True; {awaited}; gone: rank 1", "", "True; gone: rank 1"]
