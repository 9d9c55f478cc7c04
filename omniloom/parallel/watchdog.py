"""Says which rank hangs, at which step and waiting for what, and ends the run within a time limit.

Each rank's heartbeat (its phase) goes to the job's store from a thread of its own; a rank whose phase is older than the
limit writes one report naming the stragglers to standard error and ends its process, which ends the job. Sits beside
the training loop; takes part in no collective, since those are what hangs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch.distributed as dist

from omniloom.exit_codes import HUNG
from omniloom.parallel.mesh import Ranks, says_rank_is_gone

ANSWER_SECONDS = 5.0  # that the store is given to answer before the report is written without it


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Where a rank is: the step, what it does, since when (seconds since the epoch), and how often it has said so."""

    step: int
    phase: str
    since: float
    count: int = 0

    def encode(self) -> str:
        return f"{self.count}\t{self.step}\t{self.since}\t{self.phase}"

    @staticmethod
    def decode(text: str) -> Heartbeat:
        count, step, since, phase = text.split("\t", 3)
        return Heartbeat(step=int(step), phase=phase, since=float(since), count=int(count))


def describe_stall(
    beats: list[Heartbeat | None], now: float, timeout_seconds: float, mute: Collection[int] = ()
) -> str:
    """One line per rank, those that keep the others waiting first and named.

    `mute` are ranks whose heart has stopped: not even the thread beside their training loop runs. Else the rank that
    waits for nobody is at the lowest step; among those, the one that entered its phase first.
    """
    lines = [f"no progress for {timeout_seconds:.0f} s: {_verdict(beats, mute)}"]
    for rank, beat in enumerate(beats):
        if beat is None:
            lines.append(f"  rank {rank}: no heartbeat")
        else:
            stopped = ", no heartbeat since" if rank in mute else ""
            lines.append(f"  rank {rank}: step {beat.step}, {beat.phase} for {now - beat.since:.0f} s{stopped}")
    return "\n".join(lines)


def _verdict(beats: list[Heartbeat | None], mute: Collection[int]) -> str:
    known = {rank: beat for rank, beat in enumerate(beats) if beat is not None}
    silent = [rank for rank, beat in enumerate(beats) if beat is None]
    lowest = min((beat.step for beat in known.values()), default=0)
    behind = [rank for rank, beat in known.items() if beat.step == lowest]
    if mute:
        where = [f"rank {r} at step {known[r].step} in {known[r].phase!r}" for r in sorted(mute) if r in known]
        return f"{' and '.join(where)} does not answer; its process is stopped or its machine is gone"
    if silent:
        return f"rank {', '.join(map(str, silent))} never reported"
    if len(behind) < len(known):
        return f"rank {', '.join(map(str, behind))} is behind, at step {lowest}"
    oldest = min(known, key=lambda rank: (known[rank].since, rank))
    if len({beat.phase for beat in known.values()}) > 1:
        return f"all are at step {lowest}; rank {oldest} has been in {known[oldest].phase!r} longest"
    return f"all are at step {lowest} in {known[oldest].phase!r}"


class Watchdog:
    """Keeps this rank's heartbeat and watches its age from a thread. `enter` costs two attribute writes.

    `end(report)` is called where a phase lasts longer than `timeout_seconds`; by default it prints the report and ends
    the process with HUNG.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        timeout_seconds: float,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.world_size, self.timeout_seconds = ranks.rank, ranks.world_size, timeout_seconds
        self._spans_machines = ranks.local_world_size < ranks.world_size  # else the launcher tells who ended
        # a socket of its own: a waiting main thread holds its
        self._store = dist.PrefixStore("watchdog", ranks.store.clone())  # type: ignore[attr-defined]
        self.enter(0, "starting")
        self._known: list[Heartbeat | None] = [None] * self.world_size  # as last read, all ranks
        self._answered = time.monotonic()  # when the store last did
        self._changed = [self._answered] * self.world_size  # when each rank's count was last seen to move
        self._stopped = threading.Event()
        self._end = _print_and_exit if end is None else end
        self._interval_seconds = min(max(timeout_seconds / 10, 0.05), 10.0)
        # Two, because a store that lies in a stopped process answers never: who watches the time must not ask it.
        self._threads = [
            threading.Thread(target=body, name=name, daemon=True)
            for name, body in (("watchdog", self._watch), ("heartbeat", self._tell))
        ]
        for thread in self._threads:
            thread.start()

    def enter(self, step: int, phase: str) -> None:
        """Say what this rank does from now on, e.g. `enter(12, "waiting for data")`."""
        self._entered = time.monotonic()  # first, by which the age is told: a clock that is set ends no run
        self._beat = Heartbeat(step=step, phase=phase, since=time.time())

    def close(self) -> None:
        """Stop watching. Call before leaving the job."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(ANSWER_SECONDS)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        """Close; before, an error that a lost rank has caused is told which one, if other machines may have had it."""
        if isinstance(error, RuntimeError) and says_rank_is_gone(error) and self._spans_machines:
            error.add_note(self._name_lost())
        self.close()

    def _name_lost(self) -> str:
        """Ranks whose hearts beat no more, as the first to miss one found; who then misses that one reads its words."""
        try:
            if not self._store.check(["lost"]):
                self._read_all()
                before = list(self._known)
                time.sleep(3 * self._interval_seconds)
                self._read_all()
                pairs = enumerate(zip(before, self._known, strict=True))
                lost = [str(rank) for rank, (old, new) in pairs if old == new and rank != self.rank]
                self._store.compare_set("lost", "", f"gone: rank {', '.join(lost)}" if lost else "all ranks answer")
            return self._store.get("lost").decode()
        except dist.DistError:
            return "gone: rank 0, or the launcher on its machine, which keeps the job's store"

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            beat, now = self._beat, time.monotonic()
            if now - self._entered <= self.timeout_seconds:
                continue
            while self._answered < now and time.monotonic() < now + ANSWER_SECONDS and not self._stopped.is_set():
                time.sleep(0.05)
            if self._stopped.is_set() or self._beat is not beat:
                continue
            self._end(self._describe(now))
            return

    def _describe(self, asked: float) -> str:
        beats = list(self._known)
        beats[self.rank] = self._beat
        report = describe_stall(beats, time.time(), self.timeout_seconds, self._mute())
        if self._answered < asked:
            report += "\n  rank 0, or the launcher on its machine, keeps the job's store and does not answer"
        return report

    def _mute(self) -> list[int]:
        """Ranks whose count stood still while the store answered; it is read from half the limit on."""
        limit = max(3 * self._interval_seconds, self.timeout_seconds / 4)
        others = [rank for rank in range(self.world_size) if rank != self.rank and self._known[rank] is not None]
        return [rank for rank in others if self._answered - self._changed[rank] > limit]

    def _tell(self) -> None:
        count = 0
        while not self._stopped.is_set():
            beat, count = self._beat, count + 1
            try:
                self._store.set(str(self.rank), replace(beat, count=count).encode())
                if time.monotonic() - self._entered > self.timeout_seconds / 2:
                    self._read_all()
            except dist.DistError:  # rank 0 has gone, at the end of a run or before it; collectives find out themselves
                return
            self._stopped.wait(self._interval_seconds)

    def _read_all(self) -> None:
        for rank in range(self.world_size):
            key = str(rank)
            beat = Heartbeat.decode(self._store.get(key).decode()) if self._store.check([key]) else None
            known = self._known[rank]
            if known is None or beat is None or beat.count != known.count:
                self._changed[rank] = time.monotonic()
            self._known[rank] = beat
        self._answered = time.monotonic()


def _print_and_exit(report: str) -> None:
    sys.stderr.write(f"error: {report}\n")
    sys.stderr.flush()
    os._exit(HUNG)  # the main thread sits in a collective and cannot be interrupted
