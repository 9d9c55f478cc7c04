"""The training loop's view of the data: one step after another, loaded, agreed and counted, ahead of time.

Joins planner and loader. Two threads run ahead of the loop: the planner's own (next window), and one that starts the
packs of planned steps, waits for those of the oldest and agrees on it with the other ranks while the step before it
computes. It calls in one order on all ranks, whatever their speed. Knows no model and no process group; the exchanges
are handed in.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omniloom.data.agreement import (
    STOPPED,
    Exchange,
    RanksStopped,
    StepAgreement,
    gather,
    report_pack,
    settle,
)
from omniloom.data.loader import Loader, Pending
from omniloom.data.planner import PlanError, Planner, PlannerState, assign_packs, check_pack_counts
from omniloom.data.worker_pool import PoolClosed
from omniloom.types import BadSample, LoadedPack, PackedBatch, PackPlan, StepPlan

_log = logging.getLogger(__name__)
_JOIN_SECONDS = 30.0
Attempt = Callable[[Callable[[], Any]], Any]  # does work whose failure ends the run when that costs nothing
LISTED = "All are listed in bad_samples.jsonl of the run directory."


@dataclass(frozen=True, kw_only=True)
class LoadedStep:
    """One optimizer step's data on this rank."""

    plan: StepPlan
    packs: tuple[LoadedPack, ...]  # this rank's, the same number on every data-parallel rank
    agreement: StepAgreement
    bad: tuple[BadSample, ...]  # of all ranks: rows found bad while planning, then samples that failed to load
    progress: float  # share of the run that is done after this step, for schedules
    data_wait_seconds: float = 0.0  # how long the loop stood still for it


@dataclass(frozen=True, kw_only=True)
class _Planned:
    plan: StepPlan
    state: PlannerState
    pending: tuple[Pending, ...]


_Ready = tuple[LoadedStep, PlannerState]  # and what follows it


class StepStream:
    """Iterates over the steps of a run.

    `state_dict()` is what follows the step that was yielded last, however far loading is ahead: take it after the
    optimizer's step. With several ranks `exchange` is an all-gather of a process group of its own (not the planner's).
    `keep_empty` loads the empty packs of an epoch's last step, too. `clips_of` says which (sample, clip) pairs of a
    pack this rank decodes, where ranks of a group share packs; None is all of them. `measure` gives what other ranks
    must know of a pack's media; `stage` makes this rank's packs ready for the device from what all ranks measured, pack
    by pack, on the thread that runs ahead. Use it as a context manager,
    or call `close()`.
    """

    def __init__(
        self,
        planner: Planner,
        loader: Loader,
        *,
        data_rank: int = 0,
        data_world: int = 1,
        keep_empty: bool = False,
        exchange: Exchange | None = None,
        prefetch_packs: int = 4,
        bad_samples: BadSampleFile | None = None,
        clips_of: Callable[[PackPlan], frozenset[tuple[int, int]] | None] = lambda _: None,
        measure: Callable[[PackedBatch], Any] = lambda batch: None,
        stage: Callable[[list[PackedBatch], list[list[Any]]], list[PackedBatch]] = lambda batches, measured: batches,
    ) -> None:
        warning = check_pack_counts(planner.config.train.packs_per_step, data_world)
        if warning is not None and data_rank == 0:
            _log.warning("%s", warning)
        self._planner = planner
        self._loader = loader
        self._assign = partial(assign_packs, data_rank=data_rank, data_world=data_world, keep_empty=keep_empty)
        self._exchange: Exchange = exchange or (lambda value: [value])
        self._bad_samples = bad_samples
        self._clips_of = clips_of
        self._measure, self._stage = measure, stage
        self._failures = planner.failures
        self._before = self._state = planner.state
        self._stop = threading.Event()
        packs_per_rank = -(-planner.config.train.packs_per_step // data_world)
        self._depth = 1 + max(1, -(-prefetch_packs // packs_per_rank))  # steps being loaded
        self._ready: queue.Queue[_Ready | BaseException | None] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        self._head: tuple[_Ready | BaseException | None] | None = None  # what `prepare` has waited for
        self._ended = False
        self.failed_alone = False  # whether `next` raised what the other ranks were not told, since one may be gone

    def __iter__(self) -> Iterator[LoadedStep]:
        return self

    def prepare(self) -> None:
        """Wait until the first step is loaded and agreed on, so that data of no use end a run before it begins.

        Raises: as `next`.
        """
        if self._thread is None:
            self._start()
        self._head = self._head or (self._ready.get(),)
        if isinstance(self._head[0], BaseException):
            next(self)

    def __next__(self) -> LoadedStep:
        """The next step. Raises: StopIteration; PlanError and RuntimeError, on every rank unless `failed_alone`."""
        if self._ended:
            raise StopIteration
        if self._thread is None:
            self._start()
        begin = time.perf_counter()
        (item,), self._head = self._head or (self._ready.get(),), None
        waited = time.perf_counter() - begin
        self._ended = not isinstance(item, tuple)
        if item is None:
            self._write_bad(self._planner.unreported_bad_rows)
            raise StopIteration
        try:
            if isinstance(item, BaseException):
                raise item
            step, state = item
            self._write_bad(step.bad)
            self._failures = self._failures.add(step.agreement.bad, step.plan, self._planner.config.data)
        except PlanError as error:
            self._ended = True
            self._write_bad(error.bad_rows)
            raise PlanError(f"{error}\n{LISTED}" if error.bad_rows else str(error), error.bad_rows) from None
        self._before, self._state = self._state, replace(state, failures=self._failures)
        return replace(step, data_wait_seconds=waited)

    @property
    def state(self) -> PlannerState:
        """What follows the step that was yielded last."""
        return self._state

    def put_back(self) -> None:
        """The step that was yielded last was not taken: it is what follows."""
        self._state = self._before

    def state_dict(self) -> dict[str, Any]:
        """The same as JSON; `Planner.load_state_dict` takes it."""
        return self._state.to_json()

    def close(self, *, failed: bool = False) -> None:
        """End thread and workers. All ranks call it; with `failed` none is waited for, since one may be gone."""
        self._ended = True
        self._stop.set()
        self._planner.stop_reading()
        self._loader.close()
        deadline = time.monotonic() + (1.0 if failed else _JOIN_SECONDS)
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        self._planner.close(timeout_seconds=max(0.0, deadline - time.monotonic()), failed=failed)
        if self._thread is not None and self._thread.is_alive() and not failed:
            _log.warning("the data thread did not end within %g s; is a rank missing?", _JOIN_SECONDS)

    def __enter__(self) -> StepStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _write_bad(self, bad: tuple[BadSample, ...]) -> None:
        if self._bad_samples is not None and bad:
            self._bad_samples.append(bad)

    # ------------------------------------------------------------------------------------ the thread

    def _start(self) -> None:
        # A daemon, because a collective whose peer died cannot be interrupted and the process must be able to end.
        self._thread = threading.Thread(target=self._run_ahead, name="omniloom-steps", daemon=True)
        self._thread.start()

    def _run_ahead(self) -> None:
        """Loaded and agreed steps into `_ready`, then None or an exception."""
        ahead: deque[_Planned | BaseException | None] = deque()
        while True:
            while not ahead or (
                len(ahead) < self._depth and isinstance(ahead[-1], _Planned) and self._planner.is_ready
            ):
                ahead.append(self._take_step())  # what waits for the next window holds up no step that is loaded
            try:
                outcome = self._agree_on(ahead.popleft())
            except BaseException as error:  # noqa: BLE001 - raised by the training loop
                outcome, self.failed_alone = error, True
            self._put(outcome)
            if not isinstance(outcome, tuple):
                return

    def _take_step(self) -> _Planned | BaseException | None:
        """The next step, its packs being loaded; what `next_step` raises is told to the other ranks first."""
        try:
            plan = None if self._stop.is_set() else self._planner.next_step()
            if plan is None:
                return None
            pending = tuple(self._loader.submit(pack, self._clips_of(pack)) for pack in self._assign(plan.packs))
        except BaseException as error:  # noqa: BLE001 - raised by the training loop
            return error
        return _Planned(plan=plan, state=self._planner.state, pending=pending)

    def _agree_on(self, item: _Planned | BaseException | None) -> _Ready | BaseException | None:
        """One exchange per step, and one more at the end, whatever the end is: no rank is left waiting for another."""
        packs, cause, failure = [], None, None
        if self._stop.is_set() or item is None:
            failure = STOPPED
        elif isinstance(item, BaseException):
            cause = item
        else:
            try:
                packs = [pending.result() for pending in item.pending]
            except PoolClosed:
                failure = STOPPED
            except BaseException as error:  # noqa: BLE001 - told to the other ranks, then raised by the training loop
                cause = error
        if cause is not None:
            failure = f"{type(cause).__name__}: {cause}"
        try:
            reports = [report_pack(pack, self._measure(pack.batch)) for pack in packs]
            gathered = gather(self._exchange, reports, failure=failure)
        except RanksStopped as stopped:
            at_end = item is None and stopped.wanted
            self.failed_alone = stopped.wanted and not at_end
            return cause if cause is not None else None if at_end else stopped
        except RuntimeError as broken:  # the exchange itself: a rank is gone
            self.failed_alone = True
            return cause or broken
        assert isinstance(item, _Planned)
        agreement, kept = settle(item.plan, packs, gathered, pack_means=self._planner.config.train.loss == "batch")
        measured = [[report.media for report in reports] for reports in gathered]
        batches = self._stage([pack.batch for pack in kept], measured)
        kept = tuple(replace(pack, batch=batch) for pack, batch in zip(kept, batches, strict=True))
        step = LoadedStep(
            plan=item.plan,
            packs=kept,
            agreement=agreement,
            bad=(*item.plan.bad_rows, *agreement.bad),
            progress=self._planner.progress(item.plan),
        )
        return step, item.state

    def _put(self, outcome: _Ready | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(outcome, timeout=0.1)
                return
            except queue.Full:
                continue


class BadSampleFile:
    """`bad_samples.jsonl`: one line per row and epoch, also over resumed runs. Written by rank 0 alone.

    `origin` gives data set and number of a row, as `data.exclude` takes them: this file can be given to it.
    """

    def __init__(
        self,
        path: str | Path,
        origin: Callable[[int], tuple[str, int]],
        attempt: Attempt = lambda work: work(),
        *,
        anew: bool = False,
    ) -> None:
        self._path = Path(path)
        self._origin, self._attempt = origin, attempt
        self._known: set[tuple[str, int, int]] = set()
        if anew:
            self._path.unlink(missing_ok=True)
        if not self._path.exists():
            return
        *lines, rest = self._path.read_bytes().split(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
                self._known.add((record["source"], record["row"], record["epoch"]))
            except (ValueError, KeyError, TypeError):  # not a line of ours
                continue
        if rest:  # cut off by a kill; what is appended would become part of it, and its row will be found again
            with self._path.open("r+b") as handle:
                handle.truncate(sum(len(line) + 1 for line in lines))

    def append(self, bad: tuple[BadSample, ...]) -> None:
        lines = []
        for row in bad:
            key = (*self._origin(row.row), row.epoch)
            if key in self._known:
                continue
            self._known.add(key)
            record: dict[str, Any] = {"source": key[0], "row": key[1]}
            record |= {name: getattr(row, name) for name in ("file", "line", "field", "reason", "epoch")}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        if lines:
            self._attempt(partial(self._write, "".join(lines)))

    def _write(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(text)
