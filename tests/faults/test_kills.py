"""A run that is killed again and again ends bit for bit as one that never was, with every row trained on once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from omniloom.checkpoint.stored import find_latest, load_tensors
from omniloom.exit_codes import LOST_RANK
from omniloom.training.metrics import read_lines
from tests.faults.conftest import write_rows
from tests.run_server import ROOT, Hook, Run, RunServer, read_events, wait_for

EXACT = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "num_loss_tokens", "num_samples", "router_loss")
NUM_ROWS = 200


def with_values(words: Sequence[str], **values: str) -> list[str]:
    """The words with these settings in place of their earlier values; `__` stands for the dot."""
    settings = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    settings |= {name.replace("__", "."): value for name, value in values.items()}
    return [f"{name}={value}" for name, value in settings.items()]


def tensors_of(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors of the newest checkpoint (weights, moments, generators) and what else is in it."""
    stored, notes = find_latest(run_dir)
    assert stored is not None
    assert not [note for note in notes if "damaged" in note], notes
    tensors = {name: torch.empty(shape, dtype=stored.dtype(name)) for name, shape in stored.shapes.items()}
    load_tensors(stored, tensors)
    return tensors, {"step": stored.step, "data": stored.extras["data"]}


def assert_same_end(run_dir: Path, expected: Path) -> None:
    lines, expected_lines = (read_lines(path / "metrics.jsonl") for path in (run_dir, expected))
    assert [[line.get(key) for key in EXACT] for line in lines] == [
        [line.get(key) for key in EXACT] for line in expected_lines
    ]
    (tensors, extras), (expected_tensors, expected_extras) = tensors_of(run_dir), tensors_of(expected)
    assert extras == expected_extras
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected_tensors[name]), name


def assert_each_row_once(folder: Path, num_rows: int = NUM_ROWS) -> None:
    """Steps that were done again had the same rows and random numbers; those that count have every row once."""
    by_step: dict[int, tuple] = {}
    for event in read_events(folder):
        done = (event["rows"], event["draw"])
        assert by_step.setdefault(event["step"], done) == done, event["step"]
    assert sorted(by_step) == list(range(len(by_step)))
    rows = sorted(row for step_rows, _ in by_step.values() for _, row in step_rows)
    assert rows == list(range(num_rows))


# ---------------------------------------------------------------------------------------- when to strike


def unfinished_saves(run_dir: Path) -> set[tuple[str, int]]:
    """Saves under way or left by a kill, told apart by inode."""
    found = set()
    for path in (run_dir / "checkpoints").glob("*.partial"):
        try:
            found.add((path.name, path.stat().st_ino))
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def wait_for_moment(run: Run, run_dir: Path, kind: str, rng: random.Random, start_seconds: float) -> None:
    """Return at a random moment of this kind: while the run starts, within a step, or within a save."""
    steps_before, saves_before = len(read_events(run.folder)), unfinished_saves(run_dir)
    if kind == "start":
        time.sleep(rng.random() * start_seconds)
    elif kind == "step":
        count = steps_before + rng.randint(1, 2)
        wait_for(lambda: len(read_events(run.folder)) >= count or run.is_over(), "a step")
        time.sleep(rng.random() * 0.03)
    else:
        wait_for(lambda: unfinished_saves(run_dir) - saves_before or run.is_over(), "a save")
        time.sleep(rng.random() * 0.004)


def pauses(run_dir: Path, num_ranks: int = 1) -> list[Hook]:
    """Keep a run from getting on by more than three steps, should this process be too slow to kill it before."""
    committed = [int(path.parent.name[-8:]) for path in run_dir.glob("checkpoints/step_????????/COMMITTED")]
    return [Hook(step=max(committed, default=0) + 2, action="pause", rank=rank) for rank in range(num_ranks)]


def start_of(run: Run) -> float:
    """Seconds until the first step of a run is done."""
    begin, before = time.monotonic(), len(read_events(run.folder))
    wait_for(lambda: len(read_events(run.folder)) > before, "the first step")
    return time.monotonic() - begin


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return found


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# ---------------------------------------------------------------------------------------- the test


def kill_one_rank(server: RunServer, words: list[str], run_dir: Path, folder: Path, times: int) -> Counter[str]:
    """Kill a run of one process `times` times, each a new start, then let it end. Returns what was hit."""
    rng, struck = random.Random(0), Counter[str]()
    start_seconds = None
    for number in range(times):
        run = server.start(words, folder, hooks=pauses(run_dir))
        start_seconds = start_seconds or start_of(run)
        kind = ("step", "save", "start")[number % 3]
        wait_for_moment(run, run_dir, kind, rng, start_seconds)
        run.kill()
        assert run.wait() == [-signal.SIGKILL], f"the run was over after {number} kills: {run.tail()}"
        struck[kind] += 1
        struck["left an unfinished save"] += bool(unfinished_saves(run_dir))
    run = server.run(words, folder)
    assert run.wait() == [0], run.tail()
    return struck


def kill_ranks_of_two(server: RunServer, words: list[str], run_dir: Path, folder: Path, times: int) -> Counter[str]:
    """Kill one of two ranks; the other has to notice and end by itself."""
    rng, struck = random.Random(1), Counter[str]()
    for number in range(times):
        run = server.start(words, folder, num_ranks=2, hooks=pauses(run_dir, 2))
        kind, rank = ("step", "save")[number // 2 % 2], number % 2
        wait_for_moment(run, run_dir, kind, rng, 0.0)
        run.kill(rank)
        codes = run.wait()
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] == LOST_RANK, run.tail(1 - rank)
        assert "lost another rank" in run.log(1 - rank)
        assert "Traceback" not in run.log(1 - rank)
        struck[f"rank {rank} in a {kind}"] += 1
    return struck


def kill_launcher(words: list[str], run_dir: Path) -> None:
    """Kill the process that started two ranks once they have done a step; they must not outlive it."""
    before = len(read_lines(run_dir / "metrics.jsonl"))
    command = [sys.executable, "-m", "omniloom.cli", "train", "--nproc", "2", *words]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(read_lines(run_dir / "metrics.jsonl")) > before or launcher.poll() is not None, "a step")
        assert launcher.poll() is None, f"the run was over: {launcher.returncode}"
        ranks = children_of(launcher.pid)
        assert len(ranks) == 2
    finally:
        launcher.kill()
        launcher.wait()
    wait_for(lambda: all(is_gone(pid) for pid in ranks), "the end of the launcher's ranks")


def kill_workers(server: RunServer, words: list[str], folder: Path, times: int) -> None:
    """Kill data workers under a run that goes on; it ends by itself."""
    run, killed = server.start(words, folder), 0
    while killed < times:
        count = len(read_events(folder))
        wait_for(lambda count=count: len(read_events(folder)) > count or run.is_over(), "a step")
        assert not run.is_over(), run.tail()
        workers = [worker for process in children_of(run.pids[0]) for worker in children_of(process)]
        for worker in workers[:1]:
            os.kill(worker, signal.SIGKILL)
            killed += 1
    assert run.wait() == [0], run.tail()
    assert "data worker 0 died" in run.log()


@pytest.mark.parametrize(
    ("of_one", "of_launcher", "of_two"), [(9, 1, 2), pytest.param(21, 2, 4, marks=pytest.mark.full)], ids=["15", "30"]
)
def test_kills_of_ranks_launcher_and_workers_change_nothing(
    server, words, tmp_path, record_property, of_one, of_launcher, of_two
) -> None:
    rows = write_rows(tmp_path / "many.json", NUM_ROWS)
    words = with_values(words, data__train=str(rows), train__epochs="1")
    expected, alone, workers = (tmp_path / name for name in ("expected", "alone", "workers"))
    assert server.run(with_values(words, train__run_dir=str(expected)), expected).wait() == [0]
    assert_each_row_once(expected)

    struck = kill_one_rank(server, with_values(words, train__run_dir=str(alone)), alone, alone, of_one)
    assert struck["left an unfinished save"] >= of_one // 7, struck
    assert_same_end(alone, expected)
    assert_each_row_once(alone)

    of_workers = with_values(words, train__run_dir=str(workers), data__workers="1")
    kill_workers(server, of_workers, workers, 3)
    assert_same_end(workers, expected)
    assert_each_row_once(workers)

    words = with_values(words, train__packs_per_step="2")
    expected, pair = tmp_path / "expected_pair", tmp_path / "pair"
    assert server.run(with_values(words, train__run_dir=str(expected)), expected, num_ranks=2).wait() == [0, 0]
    of_pair = with_values(words, train__run_dir=str(pair))
    for _ in range(of_launcher):
        kill_launcher(of_pair, pair)
    struck += kill_ranks_of_two(server, of_pair, pair, pair, of_two)
    assert server.run(of_pair, pair, num_ranks=2).wait() == [0, 0]
    assert_same_end(pair, expected)
    record_property("struck", dict(struck))
