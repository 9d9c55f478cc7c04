"""Rows that come one after another: spilled in blocks, planned by any ranks, resumed after a kill at any step."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import pickle
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from omniloom.config import Config, ConfigError, DataConfig, DataSource, load_config
from omniloom.data.agreement import PlanningRanks
from omniloom.data.planner import PlanError, Planner
from omniloom.data.sources import Sources, open_sources
from omniloom.data.spilled_rows import BLOCK_ROWS, StreamFeed
from omniloom.run.trainer import run
from omniloom.tools.convert import convert_file
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines
from omniloom.types import Extent, StepPlan
from tests.plan_config import plan_config
from tests.unit.rank_threads import Rendezvous, run_on_ranks

URLS = DataConfig(allow_urls=True)


def extent_of(words: str) -> Extent:
    tokens = 20 + len(words) * 7 % 90
    return Extent(num_tokens=tokens, num_loss_tokens=5, weight_sum=5.0, cost=tokens, clips=())


def write_pieces(folder: Path, sizes: list[int]) -> str:
    """Rows of unlike lengths in files of these sizes; the URL of all."""
    for piece, size in enumerate(sizes):
        lines = [json.dumps({"n": f"{piece}.{row}" + "x" * (row * piece % 13)}) for row in range(size)]
        (folder / f"{piece}.jsonl").write_text("\n\n".join([*lines, ""]))  # blank lines are no rows
    return f"file://{folder}/{{0..{len(sizes) - 1}}}.jsonl"


def options(**changes: Any) -> Config:
    return plan_config(**{"pack_tokens": 512, "packs_per_step": 2, "window": 96, "steps": 10_000, **changes})


def open_streams(url: str, folder: Path, shards: int = 8) -> Sources:
    return open_sources([url], replace(URLS, stream_shards=shards), spill=folder / "spill")


def drain(
    sources: Sources, config: Config, *, world_size: int = 1, limit: int = 10_000, state: Any = None, keep: int = 1
) -> tuple[list[StepPlan], Any]:
    """Some steps on so many ranks, and the state after each, as JSON. Every fourth step is a checkpoint."""
    meeting, results = Rendezvous(world_size), [None] * world_size

    def run(rank: int) -> None:
        def measure(rows: list[int]) -> list[Extent]:
            return [extent_of(str(own.read_row(row)[0]["n"])) for row in rows]

        own = pickle.loads(pickle.dumps(sources))
        planner = Planner(
            rows_per_source=own.sizes,
            config=config,
            measure=measure,
            locate=own.locate,
            ranks=PlanningRanks(exchange=meeting.exchange(rank), rank=rank, world_size=world_size),
            feed=StreamFeed(own.parts, rank=rank, world_size=world_size, kept_checkpoints=keep),
            data_fingerprint=own.fingerprint,
        )
        try:
            if state is not None:
                planner.load_state_dict(json.loads(json.dumps(state)))
            steps, saved = [], state
            while len(steps) < limit and (step := planner.next_step()) is not None:
                steps.append(step)
                if step.step % 4 == 3:
                    saved = planner.state_dict()
                    planner.release(planner.state)
            results[rank] = steps, saved
            planner.close()
        except (ValueError, OSError, RuntimeError) as error:
            results[rank] = error

    run_on_ranks(run, world_size)
    for result in results:
        if isinstance(result, Exception):
            raise result
    assert all(result == results[0] for result in results)
    return results[0]


def rows_of(steps: list[StepPlan]) -> list[int]:
    return [sample.row for step in steps for pack in step.packs for sample in pack.samples]


@given(
    sizes=st.lists(st.integers(0, 230), min_size=1, max_size=4).filter(any),
    shards=st.integers(1, 4),
    shuffle=st.booleans(),
    legs=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), max_size=4),
    loses_blocks=st.booleans(),
)
@example([129, 59, 38, 173], 4, True, [(1, 5), (2, 4), (1, 1), (1, 4)], True)  # rows planned behind a last block
@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_any_ranks_killed_at_any_step_plan_each_row_of_a_stream_once_and_the_same_packs(
    sizes: list[int], shards: int, shuffle: bool, legs: list[tuple[int, int]], loses_blocks: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url, config = write_pieces(folder, sizes), options(shuffle=shuffle)
        (folder / "spill").mkdir()
        whole, _ = drain(open_streams(url, folder, shards), config)
        shutil.rmtree(folder / "spill")
        sources = open_streams(url, folder, shards)
        state, taken = None, 0
        for world_size, limit in [*legs, (2, 10_000)]:
            steps, saved = drain(sources, config, world_size=world_size, limit=limit, state=state)
            assert steps == whole[taken : taken + len(steps)]
            if saved != state:  # what came after the checkpoint is lost, as in a kill
                state, taken = saved, taken + (len(steps) + taken) // 4 * 4 - taken
            if loses_blocks:  # as where a checkpoint is moved to another directory
                shutil.rmtree(folder / "spill", ignore_errors=True)
        assert taken + len(steps) >= len(whole)
        rows = rows_of(whole)
        assert len(rows) == len(set(rows)) == sum(sizes)


def test_blocks_go_once_no_checkpoint_needs_them(tmp_path: Path) -> None:
    sources = open_streams(write_pieces(tmp_path, [900, 700]), tmp_path)
    steps, _ = drain(sources, options(), keep=1)
    assert len(rows_of(steps)) == 1600
    assert len(list((tmp_path / "spill").rglob("*.rows"))) < 1600 / BLOCK_ROWS / 2


def test_a_stream_that_is_another_one_after_a_stop_is_refused(tmp_path: Path) -> None:
    url = write_pieces(tmp_path, [600])
    sources = open_streams(url, tmp_path)
    _, state = drain(sources, options(), limit=8, keep=9)
    text = (tmp_path / "0.jsonl").read_text()
    (tmp_path / "0.jsonl").write_text(text.replace('"0.2"', '"0.two"'))
    with pytest.raises(ValueError, match=r"gives other rows than this run has read from it, before row 64; give it"):
        drain(sources, options(), state=state)


@pytest.mark.parametrize("packed", [False, True])
def test_a_pipe_gives_its_rows_and_ends_the_run(tmp_path: Path, packed: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    write_pieces(tmp_path, [300])
    data = (tmp_path / "0.jsonl").read_bytes()

    def feed() -> None:
        pipe.write_bytes(gzip.compress(data) if packed else data)

    thread = threading.Thread(target=feed)
    thread.start()
    sources = open_sources([str(pipe)], spill=tmp_path / "spill")
    assert sources.described_size == "1 stream"
    steps, _ = drain(sources, options())
    thread.join()
    assert sorted(rows_of(steps)) == list(range(300))
    assert sources.locate(70) == (str(pipe), 71)


def test_a_pipe_that_nobody_writes_to_can_be_left(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    sources = open_sources([str(pipe)], spill=tmp_path / "spill")
    feed = StreamFeed(sources.parts)
    planner = Planner(
        rows_per_source=sources.sizes, config=options(), measure=lambda rows: [], locate=sources.locate, feed=feed
    )
    threading.Timer(0.3, planner.stop_reading).start()
    with pytest.raises(RuntimeError, match="the run ended while rows of a pipe were waited for"):
        planner.next_step()


def test_other_verbs_read_a_pipe_whole(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    write_pieces(tmp_path, [130])
    thread = threading.Thread(target=lambda: pipe.write_bytes((tmp_path / "0.jsonl").read_bytes()))
    thread.start()
    sources = open_sources([str(pipe)], DataConfig(max_samples=129, scratch=str(tmp_path / "scratch")))
    thread.join()
    assert [sources.read_row(row)[0]["n"] for row in (0, 64, 128)] == ["0.0", "0.64", "0.128"]
    assert len(sources) == 129


def test_rows_come_over_http_where_urls_are_allowed(tmp_path: Path) -> None:
    write_pieces(tmp_path, [80, 3])
    handler = lambda *words: http.server.SimpleHTTPRequestHandler(*words, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{{0,1}}.jsonl"
        with pytest.raises(
            ValueError, match=r"is not of this machine; save it to a file, or set data\.allow_urls=true"
        ):
            open_sources([url], spill=tmp_path / "spill")
        steps, _ = drain(open_streams(url, tmp_path), options())
        assert len(rows_of(steps)) == 83
        with pytest.raises(ValueError, match=r"nothing\.jsonl: cannot be read after row 0: HTTP Error 404"):
            drain(open_streams(url.replace("{0,1}", "nothing"), tmp_path), options())
        server.shutdown()


def test_datasets_are_streamed_with_their_media_as_bytes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    pixels = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    features = datasets.Features({"query": datasets.Value("string"), "images": [datasets.Image()]})
    rows = [{"query": f"<image>{number}?", "images": [pixels]} for number in range(70)]
    made = datasets.Dataset.from_list(rows, features=features)
    for piece in range(2):
        made.shard(2, piece).to_parquet(tmp_path / "set" / f"train-0000{piece}-of-00002.parquet")
    streamed = open_sources([DataSource(path=str(tmp_path / "set"), stream=True)], spill=tmp_path / "spill")
    assert streamed.parts[0].stream.num_readers == 2  # type: ignore[attr-defined]
    feed = StreamFeed(streamed.parts)
    feed.spill(range(128), (128,))
    stored = open_sources([str(tmp_path / "set")])
    numbers = [*range(35), *range(64, 64 + 35)]
    assert [streamed.read_row(row)[0] for row in numbers] == [stored.read_row(row)[0] for row in range(70)]


def config_of(tmp_path: Path, *words: str) -> Config:
    return load_config({"data": {"train": ["-"]}, "train": {"run_dir": str(tmp_path / "run")}}, words)


def faults_of(config: Config) -> Iterator[str]:
    from omniloom.run.rows import _stream_faults

    return iter(_stream_faults(config))


def test_what_a_stream_cannot_do_is_said_before_the_run(tmp_path: Path) -> None:
    words = ["data.train=-,rows.jsonl", "data.split=0.1"]
    found = list(faults_of(config_of(tmp_path, *words)))
    assert [fault.partition(":")[0] for fault in found] == ["train.steps", "data.split", "data.train"]
    assert not list(faults_of(config_of(tmp_path, "train.steps=5")))
    assert next(faults_of(config_of(tmp_path, "train.steps=5", "data.eval=-"))).startswith("data.eval: - is a stream")
    with pytest.raises(ConfigError):
        config_of(tmp_path, "data.stream_shards=0")


@pytest.mark.parametrize(
    ("text", "fault"), [("[\n{}\n]\n", "it begins as an array"), ("", "ended after 0 rows, none of use$")]
)
def test_a_stream_of_no_use_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "0.jsonl").write_text(text)
    with pytest.raises((ValueError, PlanError), match=fault):
        drain(open_streams(f"file://{tmp_path}/0.jsonl", tmp_path), options())


def test_a_file_is_not_taken_for_the_name_of_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text("{}\n")
    source = DataSource(path=str(tmp_path / "0.jsonl"), stream=True)
    with pytest.raises(ValueError, match=r"0\.jsonl: stream: true is for .* this is a file; leave stream out"):
        open_sources([source], spill=tmp_path / "spill")


# ---------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same rows, some with a picture, in every kind of storage; and a model."""
    import pyarrow.parquet
    from PIL import Image

    folder = tmp_path_factory.mktemp("stored")
    make_tiny("qwen3_vl", folder / "model", num_words=300)
    rows = []
    for number in range(150):
        picture = number % 5 == 0
        row = {"id": str(number), "query": "<image>" * picture + f"What is {number}?", "response": f"{number}. " * 3}
        rows.append(row | {"images": [f"{number}.png"] if picture else []})
        if picture:
            Image.fromarray(np.full((40, 40, 3), number, dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=40)
    assert convert_file("webdataset", folder / "rows.jsonl", folder / "shards") == (150, [], 0)
    paths = {name: str(folder / name) for name in ("rows.jsonl", "rows.parquet", "shards")}
    return {"model": str(folder / "model"), **paths, "stream": f"file://{folder}/rows.jsonl", "folder": str(folder)}


def train(stored: dict[str, str], run_dir: Path, kind: str, steps: int = 6, **data: Any) -> list[float]:
    tree = {
        "model": {"path": stored["model"], "dtype": "float32"},
        "data": {
            "train": [stored[kind]],
            "pack_tokens": 256,
            "workers": 0,
            "window": 64,
            "shuffle": False,
            "allow_urls": True,
            "media_dir": stored["folder"],
            **data,
        },
        "train": {
            "run_dir": str(run_dir),
            "packs_per_step": 2,
            "steps": steps,
            "learning_rate": 1e-3,
            "schedule": "constant",
        },
        "checkpoint": {"export": False, "every": 2},
        "log": {"tensorboard": False},
    }
    losses: list[float] = []
    assert run(load_config(tree), lambda line: losses.append(line.loss or 0.0)) == 0
    return losses


def test_the_same_rows_give_the_same_losses_from_any_storage(stored: dict[str, str], tmp_path: Path) -> None:
    kinds = ("rows.jsonl", "rows.parquet", "shards", "stream")
    losses = {kind: train(stored, tmp_path / kind, kind) for kind in kinds}
    assert all(losses[kind] == losses["rows.jsonl"] for kind in kinds)
    epochs = {kind: read_lines(tmp_path / kind / "metrics.jsonl")[-1].get("epoch") for kind in kinds}
    assert epochs.pop("stream") is None  # nobody knows how long it is
    assert all(epochs.values())


def test_a_run_on_a_stream_goes_on_exactly_and_with_other_workers(stored: dict[str, str], tmp_path: Path) -> None:
    whole = train(stored, tmp_path / "whole", "stream", steps=5, shuffle=True)
    begun = train(stored, tmp_path / "begun", "stream", steps=2, shuffle=True)
    assert begun + train(stored, tmp_path / "begun", "stream", steps=5, shuffle=True, workers=1) == whole
