"""Decides which samples make up which pack of which step, before anything is decoded.

A function of the data, the seed and the options alone: ranks measure a window's rows together (each its share) and
then compute the same plan from the same numbers, which they check by a hash. Knows no tensors, no media and no
processes; `measure` and `exchange` are handed in. Next in the flow is the loader, which turns `PackPlan`s into tensors.

A window of rows yields whole steps; rows that found no place are carried into the next one. An epoch ends by packing
everything, its last step filled up with empty packs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from omniloom.config import Config, DataConfig, DataSource, TrainConfig
from omniloom.data.agreement import PlanningRanks
from omniloom.data.dataclass_json import from_json, to_json
from omniloom.data.packing import pack_window, plan_steps
from omniloom.data.row_order import PlanPosition, RowOrder
from omniloom.data.spilled_rows import StreamFeed
from omniloom.types import BadSample, Extent, PackPlan, PlannedSample, StepPlan, Window

Measure = Callable[[list[int]], list[Extent | BadSample]]
Locate = Callable[[int], tuple[str, int]]

_FIXED = {  # keys that decide the plan: they may not change between a checkpoint and its resumption
    "data": ("pack_tokens", "window", "shuffle", "overlong"),
    "train": ("packs_per_step", "seed", "loss"),
}
_STATE_VERSION = 4


class PlanError(ValueError):
    """A window that cannot be planned. `bad_rows` are those to list before the run ends."""

    def __init__(self, message: str, bad_rows: tuple[BadSample, ...] = ()) -> None:
        super().__init__(message)
        self.bad_rows = bad_rows


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Samples that could not be loaded, of the window and the epoch whose steps are being taken."""

    window: int = 0
    epoch: int = 0
    in_window: int = 0
    in_epoch: int = 0

    def add(self, bad: tuple[BadSample, ...], step: StepPlan, options: DataConfig) -> Failures:
        """Those of a step as well. Raises: PlanError where too many are, beside the rows that planning found bad."""
        window = step.window
        after = Failures(
            window=window.number,
            epoch=window.epoch,
            in_window=len(bad) + self.in_window * (self.window == window.number),
            in_epoch=len(bad) + self.in_epoch * (self.epoch == window.epoch),
        )
        if bad:
            num_failed = after.in_epoch if window.is_small else after.in_window
            _check_share(options, bad, window.num_bad + num_failed, window.num_rows)
        return after


@dataclass(frozen=True, kw_only=True)
class PlannerState:
    """Everything that decides what comes next: cheap to keep per step, turned into JSON only for a checkpoint."""

    position: PlanPosition  # after the current window
    steps: tuple[StepPlan, ...]  # what is left of the current window
    fixed: dict[str, Any] = field(repr=False)  # the options that must not change
    failures: Failures = Failures()  # in the steps before

    def to_json(self) -> dict[str, Any]:
        return {"version": _STATE_VERSION, **to_json(self)}


class Planner:
    """Yields the steps of a run, the same ones on every rank of every layout.

    `measure(rows)` gives one Extent or BadSample per row; `locate(row)` its file and line, for messages;
    `data_fingerprint` tells on resume whether the rows are still the same, `row_options` (JSON, by their names in the
    config, those at their defaults left out) whether they still become the same samples; `entries` what an epoch takes
    of each source; `feed` has the rows of streams on disk before they are measured.

    All ranks must call `next_step` equally often: with `world_size > 1` each window costs two calls of
    `exchange` (three where a file is missing), made on a thread of the planner's own, one window ahead of need.

    Which rows come when is `row_order`'s, which samples share a pack `packing`'s, what ranks tell each other
    `agreement`'s: this class joins them, holds the state, and runs ahead.
    """

    def __init__(
        self,
        *,
        rows_per_source: Sequence[int],
        config: Config,
        measure: Measure,
        locate: Locate,
        ranks: PlanningRanks | None = None,
        feed: StreamFeed | None = None,
        data_fingerprint: str = "",
        row_options: Mapping[str, Any] | None = None,
        entries: Sequence[DataSource] = (),
    ) -> None:
        self.config = config
        self.order = RowOrder(rows_per_source, config, entries)
        self.data_fingerprint = data_fingerprint
        self.row_options = dict(row_options or {})
        self._measure = measure
        self._locate = locate
        self._ranks = ranks or PlanningRanks()
        self._feed = feed or None
        self._position = PlanPosition()
        self._steps: tuple[StepPlan, ...] = ()
        self.failures = Failures()  # before the first step that is given out
        self._ahead: Future[tuple[tuple[StepPlan, ...], PlanPosition]] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    # ------------------------------------------------------------------------------------ steps and state

    def next_step(self) -> StepPlan | None:
        """The next step, or None at the end of the run. Raises: PlanError, ValueError, the same on every rank."""
        if not self._steps and not self.order.at_end(self._position):
            planned = self._ahead.result() if self._ahead is not None else self._plan_steps(self._position)
            self._ahead = None
            self._steps, self._position = planned
        if self._ahead is None and not self.order.at_end(self._position):
            self._plan_ahead(self._position)
        if not self._has_step:
            return None
        step, self._steps = self._steps[0], self._steps[1:]
        return step

    @property
    def is_ready(self) -> bool:
        """Whether `next_step` would return at once, instead of waiting for a window."""
        is_planned = self._ahead is not None and self._ahead.done()
        return bool(self._steps) or is_planned or self.order.at_end(self._position)

    @property
    def state(self) -> PlannerState:
        """What follows the last step that was given out."""
        return PlannerState(position=self._position, steps=self._steps, fixed=self._fixed_options())

    def state_dict(self) -> dict[str, Any]:
        return self.state.to_json()

    def load_state_dict(self, record: dict[str, Any]) -> None:
        """Continue where the state was taken, on any number of ranks. Raises: ValueError if the plan would differ."""
        assert self._ahead is None, "load the state before the first step"
        _check_record(record, self._fixed_options())
        self._position = from_json(PlanPosition, record["position"])
        self._steps = tuple(from_json(StepPlan, step) for step in record["steps"])
        self.failures = from_json(Failures, record.get("failures", {}))  # left out where it is as it began
        if (feed := self._feed) is not None:  # blocks that are not there, as in another directory, are read once more
            planned, cursors = _planned_rows(self.state), self._position.cursors
            self._ranks.share(lambda: feed.spill(planned, cursors), "read its streams")

    def release(self, state: PlannerState) -> None:
        """A checkpoint was written of this state: what no checkpoint needs of streams may go."""
        if self._feed is not None:
            self._feed.release(_planned_rows(state), state.position.cursors)

    def stop_reading(self) -> None:
        """Wait for no more rows of streams."""
        if self._feed is not None:
            self._feed.stop()

    @property
    def is_over(self) -> bool:
        """Whether the run's last step has been given out."""
        return not self._has_step and self.order.at_end(self._position)

    @property
    def _has_step(self) -> bool:
        return bool(self._steps) and (self.config.train.steps is None or self._steps[0].step < self.config.train.steps)

    @property
    def unreported_bad_rows(self) -> tuple[BadSample, ...]:
        """Bad rows that no step carried, to be listed once the run has come to its end."""
        return self._position.unreported if not self._steps else ()

    def progress(self, step: StepPlan) -> float:
        """Share of the run that is done after `step`, from 0 to 1."""
        if self.config.train.steps is not None:
            return min(1.0, (step.step + 1) / self.config.train.steps)
        assert self.order.total_rows is not None
        return step.rows_planned / self.order.total_rows

    def close(self, *, timeout_seconds: float = 30.0, failed: bool = False) -> None:
        """End the planning that runs ahead. All ranks call it, and none is left in an exchange that others left out.

        With `failed` nothing is exchanged any more, since a rank may be gone.
        """
        deadline = time.monotonic() + timeout_seconds
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        broken = self._ahead is not None and self._ahead.done() and self._ahead.exception() is not None
        if failed or broken or self._closed or self._ranks.world_size == 1:
            return
        self._closed = True
        # Another rank may be one window ahead of this one and wait in its exchange: this call is the answer.
        farewell = threading.Thread(target=self._ranks.say_stopped, name="omniloom-planner-end", daemon=True)
        farewell.start()
        farewell.join(max(0.0, deadline - time.monotonic()))

    def _fixed_options(self) -> dict[str, Any]:
        keys = [(section, key) for section, names in _FIXED.items() for key in names]
        return {
            "rows_per_source": list(self.order.rows_per_source),
            "taken_per_source": list(self.order.taken_per_source),
            "data_fingerprint": self.data_fingerprint,
            **{f"{section}.{key}": getattr(getattr(self.config, section), key) for section, key in keys},
            "row_options": self.row_options,
        }

    def _plan_ahead(self, position: PlanPosition) -> None:
        future: Future[tuple[tuple[StepPlan, ...], PlanPosition]] = Future()

        def plan() -> None:
            try:
                future.set_result(self._plan_steps(position))
            except BaseException as error:  # noqa: BLE001 - handed over whole, raised by the next `next_step`
                future.set_exception(error)

        self._ahead = future
        # A daemon, because a peer that died leaves the exchange waiting and the interpreter must still be able to end.
        self._thread = threading.Thread(target=plan, name="omniloom-planner", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------ one window

    def _plan_steps(self, position: PlanPosition) -> tuple[tuple[StepPlan, ...], PlanPosition]:
        """Read windows until they yield steps, or the run ends."""
        while not self.order.at_end(position):
            steps, position = self._plan_window(position)
            if steps:
                return steps, position
        return (), position

    def _plan_window(self, position: PlanPosition) -> tuple[tuple[StepPlan, ...], PlanPosition]:
        rows, cursors, ended = self._next_rows(position)
        samples, bad = self._measure_window(rows, position)
        bad_in_epoch, num_read = position.bad_in_epoch + len(bad), sum(cursors)
        window = _judge(self.config.data, bad, position, num_rows=len(rows), num_read=num_read)
        ends_epoch = ended or num_read == self.order.epoch_rows(position.epoch)
        # A part of an epoch that ends the run stays open: a resumption with more epochs goes on in its middle.
        closes_epoch = num_read == self.order.num_rows
        if ended and not samples and not position.carried and not position.step:
            raise PlanError(_describe_bad(bad, f"the streams ended after {bad_in_epoch} rows, none of use"), bad)
        if ends_epoch and bad_in_epoch == num_read:
            raise PlanError(_describe_bad(bad, f"none of the {num_read} rows of an epoch can be used"), bad)
        steps, carried, num_packed = self._pack(samples, bad, position, leave_nothing=ends_epoch)
        after = PlanPosition(
            epoch=position.epoch + closes_epoch,
            cursors=() if closes_epoch else cursors,
            window=position.window + 1,
            step=position.step + len(steps),
            rows_planned=position.rows_planned + len(bad) + num_packed,
            bad_in_epoch=0 if closes_epoch else bad_in_epoch,
            carried=carried,
            unreported=() if steps else position.unreported + bad,
            ended=ended,
        )
        return tuple(replace(step, window=window) for step in steps), after

    def _pack(
        self, samples: list[PlannedSample], bad: tuple[BadSample, ...], position: PlanPosition, *, leave_nothing: bool
    ) -> tuple[tuple[StepPlan, ...], tuple[PlannedSample, ...], int]:
        """Steps of what was carried here and of a window's samples, what is carried on, and how many were packed."""
        data, train = self.config.data, self.config.train
        packs, carried = pack_window(
            [*position.carried, *samples],
            num_carried=len(position.carried),
            pack_tokens=data.pack_tokens,
            packs_per_step=train.packs_per_step,
            leave_nothing=leave_nothing,
        )
        steps = plan_steps(
            packs,
            packs_per_step=train.packs_per_step,
            first_step=position.step,
            rows_before=position.rows_planned + len(bad),
            bad_rows=position.unreported + bad,
            loss=train.loss,
        )
        self._ranks.compare(lambda: [self._fixed_options(), to_json(steps), to_json(carried)])
        return steps, carried, sum(map(len, packs))

    def _next_rows(self, position: PlanPosition) -> tuple[list[int], tuple[int, ...], bool]:
        """The rows of a window, the cursors after it, and whether every stream has ended."""
        rows, cursors = self.order.next_window(position)
        if (feed := self._feed) is None:
            return rows, cursors, False
        is_first = position.window == 0
        spilled = self._ranks.share(lambda: feed.spill(rows, cursors, anew=is_first), "read its streams")
        there, ended = feed.those_there(rows, cursors, spilled)
        return there, cursors, ended

    def _measure_window(
        self, rows: list[int], position: PlanPosition
    ) -> tuple[list[PlannedSample], tuple[BadSample, ...]]:
        """All ranks' measures, in row order: what can be placed, and what cannot."""

        def measure(share: list[int]) -> list[Extent | BadSample]:
            pairs = zip(share, self._measure(share), strict=True)
            return [_fit(extent, row, self.config.data.pack_tokens, self._locate) for row, extent in pairs]

        measured = self._ranks.measure(rows, measure)
        samples: list[PlannedSample] = []
        bad: list[BadSample] = []
        for row, extent in zip(rows, measured, strict=True):
            if isinstance(extent, BadSample):
                bad.append(replace(extent, epoch=position.epoch, row=row))
            else:
                samples.append(PlannedSample(row=row, epoch=position.epoch, extent=extent, weight_scale=1.0))
        return samples, tuple(bad)


def _fit(extent: Extent | BadSample, row: int, pack_tokens: int, locate: Locate) -> Extent | BadSample:
    """A row that is too long or has nothing to learn from is a bad one."""
    if isinstance(extent, BadSample):
        return extent
    if extent.num_tokens > pack_tokens:
        file, line = locate(row)
        reason = f"{extent.num_tokens} tokens, more than data.pack_tokens={pack_tokens}"
        return BadSample(file=file, line=line, field="num_tokens", reason=reason, num_tokens=extent.num_tokens)
    if extent.num_loss_tokens == 0:
        file, line = locate(row)
        return BadSample(file=file, line=line, field="labels", reason="no answer to train on")
    return extent


def _judge(
    options: DataConfig, bad: tuple[BadSample, ...], position: PlanPosition, *, num_rows: int, num_read: int
) -> Window:
    """By what a window of `num_rows` is judged; of its epoch `num_read` are read. Raises: PlanError where too much of
    it is lost."""
    overlong = [row for row in bad if row.num_tokens]
    if position.window == 0 and overlong and len(bad) == num_rows:
        shortest = min(row.num_tokens for row in overlong)
        raise PlanError(
            f"data.pack_tokens={options.pack_tokens} is smaller than every sample: the shortest of the first "
            f"{num_rows} rows has {shortest} tokens; raise data.pack_tokens to at least that",
            bad,
        )
    if overlong and options.overlong == "error":
        first = overlong[0]
        raise PlanError(
            f"{first.file}:{first.line}: {first.reason}, and data.overlong is error; raise data.pack_tokens, or "
            "set data.overlong to drop or shrink",
            bad,
        )
    is_small = num_rows < options.window  # too few for a verdict of their own: a tail, or the first of a run
    num_bad = len(bad) + position.bad_in_epoch * is_small
    num_rows = num_read if is_small else num_rows
    _check_share(options, bad, num_bad, num_rows)
    return Window(number=position.window, epoch=position.epoch, num_rows=num_rows, num_bad=num_bad, is_small=is_small)


def _check_share(options: DataConfig, bad: tuple[BadSample, ...], num_bad: int, num_rows: int) -> None:
    """Raises: PlanError where `num_bad` rows are too many; `bad` are those found last."""
    if num_bad > options.max_bad_fraction * num_rows:
        is_long = any(row.num_tokens for row in bad)
        raise PlanError(
            _describe_bad(
                bad,
                f"{num_bad} of {num_rows} rows are bad, more than data.max_bad_fraction={options.max_bad_fraction:g} "
                f"allows; correct them, {'raise data.pack_tokens for the long ones, ' * is_long}or leave them "
                "out (omniloom check --write-excludes, data.exclude)",
            ),
            bad,
        )


# ---------------------------------------------------------------------------------------- around the planner


def check_pack_counts(packs_per_step: int, data_world: int) -> str | None:
    """A warning where packs do not divide over the data-parallel ranks, else None."""
    if packs_per_step % data_world == 0:
        return None
    num_empty = -packs_per_step % data_world
    return (
        f"train.packs_per_step={packs_per_step} does not divide over {data_world} data-parallel ranks: each step "
        f"computes {num_empty} empty packs; {packs_per_step + num_empty} would waste none"
    )


def assign_packs(
    packs: Sequence[PackPlan], data_rank: int, data_world: int, *, keep_empty: bool = False
) -> tuple[PackPlan, ...]:
    """The packs of one data-parallel rank: every `data_world`-th, filled up with empty ones to the same count.

    Empty packs at the end of a step are left out where each rank would have one, but for the first, or unless
    `keep_empty`. Empty packs that were added here have negative indexes.
    """
    if not keep_empty:
        packs = packs[: max((number + 1 for number, pack in enumerate(packs) if pack.samples), default=1)]
    missing = -len(packs) % data_world
    filled = [*packs, *(PackPlan(index=-1 - extra, samples=()) for extra in range(missing))]
    return tuple(filled[data_rank::data_world])


def plan_all(
    *,
    num_rows: int,
    pack_tokens: int,
    measure: Measure,
    locate: Locate,
    ranks: PlanningRanks | None = None,
    window: int = 2048,
) -> tuple[list[PackPlan], tuple[BadSample, ...]]:
    """Packs that hold every usable row exactly once, in a fixed order, and the rows that are not usable.

    For evaluation and scoring: no shuffling, token weights, no limit on bad rows.
    """
    config = Config(
        data=DataConfig(pack_tokens=pack_tokens, window=window, shuffle=False, max_bad_fraction=1.0),
        train=TrainConfig(packs_per_step=1, epochs=1.0),
    )
    planner = Planner(rows_per_source=(num_rows,), config=config, measure=measure, locate=locate, ranks=ranks)
    packs: list[PackPlan] = []
    bad: list[BadSample] = []
    while (step := planner.next_step()) is not None:
        packs += step.packs
        bad += step.bad_rows
    return packs, (*bad, *planner.unreported_bad_rows)


def _planned_rows(state: PlannerState) -> list[int]:
    """Rows that are planned or carried."""
    planned = (sample for step in state.steps for pack in step.packs for sample in pack.samples)
    return [sample.row for sample in (*state.position.carried, *planned)]


def _check_record(record: Mapping[str, Any], fixed: dict[str, Any]) -> None:
    """Raises: ValueError where a checkpoint's plan is not the one that this run's `fixed` options would make."""
    if record.get("version") != _STATE_VERSION:
        raise ValueError(
            f"the checkpoint's data plan is of version {record.get('version')!r}, which another omniloom wrote; "
            f"expected {_STATE_VERSION}. Resume with that one, or start anew in another train.run_dir, from this "
            "run's weights if model.path is its hf/"
        )
    if changed := _changes(record["fixed"], fixed):
        raise ValueError(
            "the checkpoint's data plan does not fit this run: "
            + "; ".join(changed)
            + ". Resume with the old values, or start anew in another train.run_dir or with --overwrite, from this "
            "run's weights if model.path is its hf/"
        )


def _changes(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between two runs' fixed options, in words."""
    changed = []
    if ours["data_fingerprint"] != theirs["data_fingerprint"]:
        changed.append("the rows of data.train are others, or in another order")
    for name in ours.keys() - {"data_fingerprint", "row_options"}:
        if ours[name] != theirs.get(name):
            changed.append(f"{name} was {theirs.get(name)!r}, is {ours[name]!r}")
    before, now = theirs.get("row_options", {}), ours["row_options"]
    for name in before.keys() | now.keys():
        if before.get(name) != now.get(name):
            was, is_now = (repr(found[name])[:80] if name in found else "the default" for found in (before, now))
            changed.append(f"{name} was {was}, is {is_now}")
    return sorted(changed)


def _describe_bad(bad: tuple[BadSample, ...], fault: str) -> str:
    first = "".join(f"\n  {row.file}:{row.line}: {row.field}: {row.reason}" for row in bad[:3])
    more = f"\n  and {len(bad) - 3} more of this window" if len(bad) > 3 else ""
    return f"{fault}{':' * bool(bad)}{first}{more}"
