"""A stall names the rank that causes it, and a run ends within its limit."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from omniloom.parallel.mesh import Ranks
from omniloom.parallel.watchdog import Heartbeat, Watchdog, describe_stall


def ranks_of(rank: int, store: dist.Store) -> Ranks:
    return Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"), store=store)


def beat(step: int, phase: str, since: float) -> Heartbeat:
    return Heartbeat(step=step, phase=phase, since=since)


def test_heartbeat_survives_the_store() -> None:
    original = beat(7, "waiting\tfor data", 123.5)
    assert Heartbeat.decode(original.encode()) == original


def test_the_rank_behind_is_named() -> None:
    beats = [beat(5, "forward", 20.0), beat(4, "waiting for data", 10.0), beat(5, "forward", 21.0)]
    report = describe_stall(beats, now=50.0, timeout_seconds=30.0)
    assert report.startswith("no progress for 30 s: rank 1 is behind, at step 4")
    assert "  rank 1: step 4, waiting for data for 40 s" in report


def test_among_equals_the_one_longest_in_its_phase_is_named() -> None:
    beats = [beat(5, "gradients", 20.0), beat(5, "waiting for data", 10.0)]
    assert "rank 1 has been in 'waiting for data' longest" in describe_stall(beats, now=50.0, timeout_seconds=30.0)


def test_a_rank_that_never_reported_is_named() -> None:
    assert "rank 1 never reported" in describe_stall([beat(0, "starting", 0.0), None], now=9.0, timeout_seconds=5.0)


def test_a_stuck_rank_is_reported_once_and_a_working_one_is_left_alone() -> None:
    store = dist.HashStore()
    ended, reports = threading.Event(), []

    def end(report: str) -> None:
        reports.append(report)
        ended.set()

    working = Watchdog(ranks_of(0, store), timeout_seconds=0.4, end=reports.append)
    stuck = Watchdog(ranks_of(1, store), timeout_seconds=0.4, end=end)
    stuck.enter(3, "waiting for data")
    deadline = time.monotonic() + 30.0
    step = 3
    while not ended.is_set() and time.monotonic() < deadline:
        step += 1
        working.enter(step, "forward")
        time.sleep(0.01)
    working.close()
    stuck.close()
    assert len(reports) == 1
    assert "rank 1 is behind, at step 3" in reports[0]


def test_a_clock_that_is_set_forward_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []
    alone = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), store=dist.HashStore())
    watchdog = Watchdog(alone, timeout_seconds=2.0, end=reports.append)
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    time.sleep(0.8)
    watchdog.close()
    assert reports == []
