"""Whatever rows lie in, whoever reads them and whenever that ends: each comes once, and the packs are the same."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.config import Config, DataConfig
from omniloom.data.agreement import PlanningRanks
from omniloom.data.loader import Loader
from omniloom.data.planner import Planner
from omniloom.data.sources import Sources, open_sources
from omniloom.data.spilled_rows import StreamFeed
from omniloom.tools.convert import convert_file
from omniloom.types import StepPlan
from tests.plan_config import plan_config
from tests.unit.rank_threads import Rendezvous, run_on_ranks
from tests.unit.storage_reader import IdReader

ROWS = [{"query": f"What is {n}?", "response": f"It is {n}, " + "x" * (n * n % 37)} for n in range(40)]
ODD = 'a "quoted", long\nanswer; with\ttabs'  # what tables have to quote
CHECKPOINT_STEPS = 2


def write_every_kind(folder: Path) -> dict[str, str]:
    """The path of each kind of storage; ids of rows begin with its name."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    def rows_of(name: str) -> list[dict[str, str]]:
        return [{"id": f"{name} {n}", **row, **({"response": ODD} if n == 7 else {})} for n, row in enumerate(ROWS)]

    def lines(name: str) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows_of(name)).encode()

    def table(name: str, delimiter: str) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows_of(name)[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows_of(name))
        return text.getvalue().encode()

    def packed(data: bytes) -> bytes:
        return pyarrow.compress(data, codec="zstd", asbytes=True)

    contents = {
        "array.json": json.dumps(rows_of("array.json"), indent=1).encode(),
        "lines.jsonl": lines("lines.jsonl"),
        "lines.jsonl.gz": gzip.compress(lines("lines.jsonl.gz")),
        "lines.jsonl.zst": packed(lines("lines.jsonl.zst")),
        "table.csv": table("table.csv", ","),
        "table.tsv": table("table.tsv", "\t"),
        "table.csv.gz": gzip.compress(table("table.csv.gz", ",")),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    columns = pyarrow.Table.from_pylist(rows_of("columns.parquet"))
    pyarrow.parquet.write_table(columns, folder / "columns.parquet", row_group_size=9)
    datasets.Dataset.from_list(rows_of("saved")).save_to_disk(folder / "saved")
    (folder / "shards.jsonl").write_bytes(lines("shards"))
    assert convert_file("webdataset", folder / "shards.jsonl", folder / "shards")[:2] == (len(ROWS), [])
    (folder / "pieces").mkdir()
    for piece in range(2):
        half = lines("pieces").splitlines(keepends=True)[piece::2]
        (folder / "pieces" / f"{piece}.jsonl").write_bytes(b"".join(half))
    return {name: str(folder / name) for name in (*contents, "columns.parquet", "saved", "shards", "pieces")}


@dataclass
class Leg:
    """What some ranks did until they were killed."""

    steps: list[StepPlan] = field(default_factory=list)
    loaded: list[list[list[str]]] = field(default_factory=list)  # by step and pack: ids of rows
    state: Any = None  # of the last checkpoint
    num_kept: int = 0  # steps up to there


def run_leg(sources: Sources, config: Config, ranks: int, workers: int, limit: int = 10_000, state: Any = None) -> Leg:
    """Steps of so many ranks, each with workers of its own. With workers one of them is killed on the way."""
    meeting, legs, faults = Rendezvous(ranks), [Leg(state=state) for _ in range(ranks)], []

    def run(rank: int) -> None:
        own: Sources = pickle.loads(pickle.dumps(sources))
        loader, leg = Loader(IdReader(own), workers=workers), legs[rank]
        feed = StreamFeed(own.parts, rank=rank, world_size=ranks)
        planner = Planner(
            rows_per_source=own.sizes, config=config, measure=loader.measure, locate=own.locate, feed=feed,
            ranks=PlanningRanks(exchange=meeting.exchange(rank), rank=rank, world_size=ranks),
            data_fingerprint=own.fingerprint,
        )  # fmt: skip
        try:
            if state is not None:
                planner.load_state_dict(json.loads(json.dumps(state)))
            while len(leg.steps) < limit and (step := planner.next_step()) is not None:
                if workers and len(leg.steps) == 1:
                    os.kill(loader.pids[0], signal.SIGKILL)
                leg.steps.append(step)
                leg.loaded.append([loader.submit(pack).result() for pack in step.packs[rank::ranks]])
                if step.step % CHECKPOINT_STEPS == CHECKPOINT_STEPS - 1:
                    leg.state, leg.num_kept = planner.state_dict(), len(leg.steps)
        except (ValueError, OSError, RuntimeError) as error:
            faults.append(error)
        finally:
            planner.close()
            loader.close()

    run_on_ranks(run, ranks)
    if faults:
        raise faults[0]
    first = legs[0]
    assert all(leg.steps == first.steps and leg.state == first.state for leg in legs)
    for number, step in enumerate(first.steps):
        packs: list[list[str]] = [[]] * len(step.packs)
        for rank, leg in enumerate(legs):
            packs[rank::ranks] = leg.loaded[number]
        first.loaded[number] = packs
    return first


def options(**changes: Any) -> Config:
    return plan_config(**{"pack_tokens": 512, "packs_per_step": 2, "window": 96, "epochs": 1, **changes})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_every_kind(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def chained(stored: dict[str, str]) -> tuple[Sources, Leg]:
    """All kinds in one run, and what comes of it undisturbed."""
    sources = open_sources(list(stored.values()))
    return sources, run_leg(sources, options(), ranks=1, workers=0)


def check_legs(chained: tuple[Sources, Leg], legs: list[tuple[int, int, int]]) -> None:
    """Runs of (ranks, workers, steps until the kill), each going on from the checkpoint of the one before."""
    sources, whole = chained
    state, done = None, 0
    for ranks, workers, limit in [*legs, (1, 0, 10_000)]:
        leg = run_leg(sources, options(), ranks, workers, limit, state)
        assert leg.steps == whole.steps[done : done + len(leg.steps)]
        assert leg.loaded == whole.loaded[done : done + len(leg.steps)]
        state, done = leg.state, done + leg.num_kept
    assert len(leg.steps) + done - leg.num_kept == len(whole.steps)


def test_every_row_of_every_storage_comes_once(chained: tuple[Sources, Leg], stored: dict[str, str]) -> None:
    loaded = [row for packs in chained[1].loaded for pack in packs for row in pack]
    assert sorted(loaded) == sorted(f"{name} {number}" for name in stored for number in range(len(ROWS)))


@given(legs=st.lists(st.tuples(st.integers(1, 3), st.just(0), st.integers(1, 20)), max_size=4))
@settings(max_examples=5, deadline=None)
def test_any_ranks_killed_at_any_step_see_the_same_packs(
    chained: tuple[Sources, Leg], legs: list[tuple[int, int, int]]
) -> None:
    check_legs(chained, legs)


def test_any_workers_some_of_them_killed_see_the_same_packs(chained: tuple[Sources, Leg]) -> None:
    check_legs(chained, [(2, 1, 3), (1, 3, 3)])


def test_the_same_rows_are_packed_alike_in_every_storage(stored: dict[str, str], tmp_path: Path) -> None:
    def packs_of(name: str, **changes: Any) -> list[list[list[str]]]:
        path, data = stored[name], DataConfig(allow_urls=True)
        if changes:
            path = f"file://{path}"
        sources = open_sources([path], data, spill=tmp_path / name)
        loaded = run_leg(sources, options(shuffle=False, **changes), ranks=1, workers=0).loaded
        return [[[row.split()[1] for row in pack] for pack in packs] for packs in loaded]

    usual = packs_of("lines.jsonl")
    assert sum(len(pack) for packs in usual for pack in packs) == len(ROWS)
    assert {name: packs_of(name) == usual for name in stored if name != "pieces"} == dict.fromkeys(
        [name for name in stored if name != "pieces"], True
    )
    for name in ("lines.jsonl", "lines.jsonl.gz", "lines.jsonl.zst"):
        assert packs_of(name, epochs=None, steps=10_000) == usual, f"{name} as a stream"
