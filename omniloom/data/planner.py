"""Decides which samples make up which pack of which step, before anything is decoded.

A function of the data, the seed and the options alone: ranks measure a window's rows together (each its share) and
then compute the same plan from the same numbers, which they check by a hash. Knows no tensors, no media and no
processes; `measure` and `exchange` are handed in. Next in the flow is the loader, which turns `PackPlan`s into tensors.

Rows are read in windows (`PlanOptions.window` rows; the first three of a run have an eighth, a quarter and half of
that, so that training starts at once). A window yields whole steps; rows that found no place are carried into the next
one. An epoch ends by packing everything, its last step filled up with empty packs.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from omniloom.config import Config
from omniloom.data.agreement import STOPPED, Exchange, RanksStopped, gather
from omniloom.data.packing import LEFT_OVER, fill_packs, pack_everything
from omniloom.data.plan_json import (
    bad_from_json,
    bad_to_json,
    sample_from_json,
    sample_to_json,
    step_from_json,
    step_to_json,
)
from omniloom.types import BadSample, Extent, PackPlan, PlannedSample, StepPlan

Measure = Callable[[list[int]], list[Extent | BadSample]]

_FIRST_WINDOWS = (8, 4, 2)  # divisors of the window size for the first windows of a run
_LEAST_WINDOW = 64  # rows, unless the window itself is smaller: fewer say nothing about the share of bad ones
_FREE_OPTIONS = ("steps", "epochs", "max_bad_fraction")  # may change between a checkpoint and its resumption
_STATE_VERSION = 1


class PlanError(ValueError):
    """A window that cannot be planned. `bad_rows` are those to list before the run ends."""

    def __init__(self, message: str, bad_rows: tuple[BadSample, ...] = ()) -> None:
        super().__init__(message)
        self.bad_rows = bad_rows


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    pack_tokens: int
    packs_per_step: int
    window: int = 2048  # rows
    seed: int = 0
    shuffle: bool = True
    loss: Literal["token", "sample", "sqrt", "batch"] = "token"
    overlong: Literal["drop", "shrink", "error"] = "drop"  # "shrink" is done by `measure`; what stays too long drops
    max_bad_fraction: float = 0.05
    steps: int | None = None
    epochs: float | None = None  # one epoch where `steps` is not set either


def plan_options(config: Config) -> PlanOptions:
    return PlanOptions(
        pack_tokens=config.data.pack_tokens,
        packs_per_step=config.train.packs_per_step,
        window=config.data.window,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        loss=config.train.loss,
        overlong=config.data.overlong,
        max_bad_fraction=config.data.max_bad_fraction,
        steps=config.train.steps,
        epochs=config.train.epochs,
    )


@dataclass(frozen=True, kw_only=True)
class PlanPosition:
    """Where planning stands between two windows."""

    epoch: int = 0
    cursor: int = 0  # rows of this epoch already read
    window: int = 0  # windows read since the start of the run
    step: int = 0  # number of the next step
    rows_planned: int = 0
    bad_in_epoch: int = 0
    carried: tuple[PlannedSample, ...] = ()
    unreported: tuple[BadSample, ...] = ()  # found in windows that yielded no step to report them


@dataclass(frozen=True, kw_only=True)
class PlannerState:
    """Everything that decides what comes next: cheap to keep per step, turned into JSON only for a checkpoint."""

    position: PlanPosition  # after the current window
    steps: tuple[StepPlan, ...]  # what is left of the current window
    fixed: dict[str, Any] = field(repr=False)  # the options that must not change

    def to_json(self) -> dict[str, Any]:
        position = {name: getattr(self.position, name) for name in PlanPosition.__dataclass_fields__}
        position["carried"] = [sample_to_json(sample) for sample in self.position.carried]
        position["unreported"] = [bad_to_json(bad) for bad in self.position.unreported]
        return {
            "version": _STATE_VERSION,
            "fixed": self.fixed,
            "position": position,
            "steps": [step_to_json(step) for step in self.steps],
        }


class Planner:
    """Yields the steps of a run, the same ones on every rank of every layout.

    `measure(rows)` gives one Extent or BadSample per row; `locate(row)` its file and line, for messages;
    `data_fingerprint` tells on resume whether the rows are still the same, `row_options` (JSON, by their names in the
    config, those at their defaults left out) whether they still become the same samples. All ranks must call
    `next_step` equally often: with `world_size > 1` each window costs two calls of `exchange`, made on a thread of the
    planner's own, one window ahead of need.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        options: PlanOptions,
        measure: Measure,
        locate: Callable[[int], tuple[str, int]],
        exchange: Exchange | None = None,
        rank: int = 0,
        world_size: int = 1,
        data_fingerprint: str = "",
        row_options: Mapping[str, Any] | None = None,
    ) -> None:
        if num_rows < 1:
            raise ValueError("data.train: expected at least one row, got none; name a file that has samples")
        assert exchange is not None or world_size == 1, "several ranks need an exchange"
        self.options = options
        self.num_rows = num_rows
        self.data_fingerprint = data_fingerprint
        self.row_options = dict(row_options or {})
        self.total_rows = None if options.steps is not None else round((options.epochs or 1.0) * num_rows)
        if self.total_rows == 0:
            raise ValueError(f"train.epochs: {options.epochs:g} epochs of {num_rows} rows are not one row; raise it")
        self._measure = measure
        self._locate = locate
        self._exchange = exchange or (lambda value: [value])
        self._rank = rank
        self._world_size = world_size
        self._position = PlanPosition()
        self._steps: tuple[StepPlan, ...] = ()
        self._ahead: Future | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._order: tuple[int, np.ndarray] | None = None  # an epoch and the order of its rows

    # ------------------------------------------------------------------------------------ steps and state

    def next_step(self) -> StepPlan | None:
        """The next step, or None at the end of the run. Raises: PlanError, ValueError, the same on every rank."""
        if not self._steps and not self._at_end(self._position):
            planned = self._ahead.result() if self._ahead is not None else self._plan_steps(self._position)
            self._ahead = None
            self._steps, self._position = planned
        if self._ahead is None and not self._at_end(self._position):
            self._plan_ahead(self._position)
        if not self._steps or self._steps[0].step >= (self.options.steps or np.inf):
            return None
        step, self._steps = self._steps[0], self._steps[1:]
        return step

    @property
    def is_ready(self) -> bool:
        """Whether `next_step` would return at once, instead of waiting for a window."""
        return bool(self._steps) or (self._ahead is not None and self._ahead.done()) or self._at_end(self._position)

    @property
    def state(self) -> PlannerState:
        """What follows the last step that was given out."""
        return PlannerState(position=self._position, steps=self._steps, fixed=self._fixed_options())

    def state_dict(self) -> dict[str, Any]:
        return self.state.to_json()

    def load_state_dict(self, record: dict[str, Any]) -> None:
        """Continue where the state was taken, on any number of ranks. Raises: ValueError if the plan would differ."""
        assert self._ahead is None, "load the state before the first step"
        if record.get("version") != _STATE_VERSION:
            raise ValueError(f"data state: expected version {_STATE_VERSION}, got {record.get('version')!r}")
        ours, theirs = self._fixed_options(), record["fixed"]
        changed = _changes(theirs, ours)
        if changed:
            raise ValueError(
                "the checkpoint's data plan does not fit this run: "
                + "; ".join(changed)
                + ". Resume with the old values, or start anew in another train.run_dir or with --overwrite"
            )
        position = dict(record["position"])
        position["carried"] = tuple(sample_from_json(sample) for sample in position["carried"])
        position["unreported"] = tuple(bad_from_json(bad) for bad in position["unreported"])
        self._position = PlanPosition(**position)
        self._steps = tuple(step_from_json(step) for step in record["steps"])

    @property
    def is_over(self) -> bool:
        """Whether the run's last step has been given out."""
        has_step = bool(self._steps) and self._steps[0].step < (self.options.steps or np.inf)
        return not has_step and self._at_end(self._position)

    @property
    def unreported_bad_rows(self) -> tuple[BadSample, ...]:
        """Bad rows that no step carried, to be listed once the run has come to its end."""
        return self._position.unreported if not self._steps else ()

    def progress(self, step: StepPlan) -> float:
        """Share of the run that is done after `step`, from 0 to 1."""
        if self.options.steps is not None:
            return min(1.0, (step.step + 1) / self.options.steps)
        assert self.total_rows is not None
        return step.rows_planned / self.total_rows

    def close(self, *, timeout_seconds: float = 30.0, failed: bool = False) -> None:
        """End the planning that runs ahead. All ranks call it, and none is left in an exchange that others left out.

        With `failed` nothing is exchanged any more, since a rank may be gone.
        """
        deadline = time.monotonic() + timeout_seconds
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        broken = self._ahead is not None and self._ahead.done() and self._ahead.exception() is not None
        if failed or broken or self._closed or self._world_size == 1:
            return
        self._closed = True
        # Another rank may be one window ahead of this one and wait in its exchange: this call is the answer.
        farewell = threading.Thread(target=self._say_stopped, name="omniloom-planner-end", daemon=True)
        farewell.start()
        farewell.join(max(0.0, deadline - time.monotonic()))

    def _say_stopped(self) -> None:
        try:
            gather(self._exchange, None, failure=STOPPED)
        except RuntimeError:  # RanksStopped from all who stopped, or a rank that is gone: this is the end either way
            return

    def _fixed_options(self) -> dict[str, Any]:
        fixed = {name: value for name, value in asdict(self.options).items() if name not in _FREE_OPTIONS}
        return {
            "num_rows": self.num_rows,
            "data_fingerprint": self.data_fingerprint,
            **fixed,
            "row_options": self.row_options,
        }

    def _at_end(self, position: PlanPosition) -> bool:
        if self.options.steps is not None:
            return position.step >= self.options.steps
        return position.cursor >= self._epoch_rows(position.epoch)

    def _epoch_rows(self, epoch: int) -> int:
        """Rows that this epoch covers: all of them, or a part in the last of a fractional number of epochs."""
        if self.total_rows is None:
            return self.num_rows
        return max(0, min(self.num_rows, self.total_rows - epoch * self.num_rows))

    def _plan_ahead(self, position: PlanPosition) -> None:
        future: Future = Future()

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
        while not self._at_end(position):
            steps, position = self._plan_window(position)
            if steps:
                return steps, position
        return (), position

    def _plan_window(self, position: PlanPosition) -> tuple[tuple[StepPlan, ...], PlanPosition]:
        rows = self._window_rows(position)
        cursor = position.cursor + len(rows)
        samples, bad = self._measure_window(rows, position)
        bad_in_epoch = position.bad_in_epoch + len(bad)
        self._judge(bad, bad_in_epoch, len(rows), cursor, position.window)
        ends_epoch = cursor == self._epoch_rows(position.epoch)
        # A part of an epoch that ends the run stays open: a resumption with more epochs goes on in its middle.
        closes_epoch = cursor == self.num_rows
        if ends_epoch and bad_in_epoch == cursor:
            raise PlanError(_describe_bad(bad, f"none of the {cursor} rows of an epoch can be used"), bad)
        bad = tuple(BadSample(**{name: getattr(row, name) for name in BadSample.__dataclass_fields__}) for row in bad)
        packs, carried = self._pack([*position.carried, *samples], len(position.carried), ends_epoch)
        steps = self._make_steps(packs, position, bad)
        self._compare(steps, carried)
        after = replace(
            position,
            epoch=position.epoch + closes_epoch,
            cursor=0 if closes_epoch else cursor,
            window=position.window + 1,
            step=position.step + len(steps),
            rows_planned=position.rows_planned + len(bad) + sum(len(pack) for pack in packs),
            bad_in_epoch=0 if closes_epoch else bad_in_epoch,
            carried=carried,
            unreported=() if steps else position.unreported + bad,
        )
        return steps, after

    def _window_rows(self, position: PlanPosition) -> list[int]:
        size = self.options.window
        if position.window < len(_FIRST_WINDOWS):
            size = max(size // _FIRST_WINDOWS[position.window], min(size, _LEAST_WINDOW))
        stop = min(position.cursor + size, self._epoch_rows(position.epoch))
        if not self.options.shuffle:
            return list(range(position.cursor, stop))
        if self._order is None or self._order[0] != position.epoch:
            self._order = (position.epoch, shuffled_rows(self.num_rows, self.options.seed, position.epoch))
        return self._order[1][position.cursor : stop].tolist()

    def _measure_window(
        self, rows: list[int], position: PlanPosition
    ) -> tuple[list[PlannedSample], tuple[BadSample, ...]]:
        """All ranks' measures, in row order: what can be placed, and what cannot."""
        share = rows[self._rank :: self._world_size]
        own, fault = [], None
        try:
            own = [self._fit(row, extent) for row, extent in zip(share, self._measure(share), strict=True)]
        except (ValueError, OSError, RuntimeError) as error:
            fault = error
        failure = None if fault is None else f"could not measure its share of a window: {fault}"
        try:
            gathered = gather(self._exchange, own, failure=failure)
        except RanksStopped as stopped:
            raise fault or stopped from None
        measured: list[Any] = [None] * len(rows)
        for rank, part in enumerate(gathered):
            measured[rank :: self._world_size] = part
        samples, bad = [], []
        for row, extent in zip(rows, measured, strict=True):
            if isinstance(extent, BadSample):
                bad.append(replace(extent, epoch=position.epoch, row=row))
            else:
                samples.append(PlannedSample(row=row, epoch=position.epoch, extent=extent, weight_scale=1.0))
        return samples, tuple(bad)

    def _fit(self, row: int, extent: Extent | BadSample) -> Extent | BadSample:
        if isinstance(extent, BadSample):
            return extent
        if extent.num_tokens > self.options.pack_tokens:
            file, line = self._locate(row)
            limit = f"more than data.pack_tokens={self.options.pack_tokens}"
            return _Overlong(
                file=file,
                line=line,
                field="num_tokens",
                reason=f"{extent.num_tokens} tokens, {limit}",
                num_tokens=extent.num_tokens,
            )
        if extent.num_loss_tokens == 0:
            file, line = self._locate(row)
            return BadSample(file=file, line=line, field="labels", reason="no answer to train on")
        return extent

    def _judge(
        self, bad: tuple[BadSample, ...], bad_in_epoch: int, num_rows: int, num_rows_in_epoch: int, window: int
    ) -> None:
        """Stop where too much is lost. Raises: PlanError."""
        overlong = [row for row in bad if isinstance(row, _Overlong)]
        limit = self.options.pack_tokens
        if window == 0 and overlong and len(bad) == num_rows:
            shortest = min(row.num_tokens for row in overlong)
            raise PlanError(
                f"data.pack_tokens={limit} is smaller than every sample: the shortest of the first {num_rows} rows has "
                f"{shortest} tokens; raise data.pack_tokens to at least that",
                bad,
            )
        if overlong and self.options.overlong == "error":
            first = overlong[0]
            raise PlanError(
                f"{first.file}:{first.line}: {first.reason}, and data.overlong is error; raise data.pack_tokens, or "
                "set data.overlong to drop or shrink",
                bad,
            )
        if num_rows < self.options.window:  # too few for a verdict of their own: a tail, or the first of a run
            num_bad, num_rows = bad_in_epoch, num_rows_in_epoch
        else:
            num_bad = len(bad)
        if num_bad > self.options.max_bad_fraction * num_rows:
            share = f"{num_bad} of {num_rows} rows are bad, more than data.max_bad_fraction="
            raise PlanError(_describe_bad(bad, share + f"{self.options.max_bad_fraction:g} allows"), bad)

    def _pack(
        self, pool: list[PlannedSample], num_carried: int, ends_epoch: bool
    ) -> tuple[list[list[PlannedSample]], tuple[PlannedSample, ...]]:
        """Packs for whole steps, and what is carried on; at the end of an epoch nothing is."""
        tokens = np.array([sample.extent.num_tokens for sample in pool], dtype=np.int64)
        costs = np.array([sample.extent.cost for sample in pool], dtype=np.int64)
        size, per_step = self.options.pack_tokens, self.options.packs_per_step
        if ends_epoch:
            places = pack_everything(tokens, costs, pack_tokens=size)
        else:
            num_packs = int(tokens.sum()) // size // per_step * per_step
            places = fill_packs(tokens, costs, pack_tokens=size, num_packs=num_packs, num_carried=num_carried)
        packs: dict[int, list[PlannedSample]] = {}
        carried = []
        # Packs stand in the order of their longest sample in the pool: unbiased where rows are shuffled.
        longest_first = np.lexsort((np.arange(len(pool)), -tokens)) if len(pool) else []
        rank_of_pack: dict[int, int] = {}
        for item in longest_first:
            rank_of_pack.setdefault(int(places[item]), int(item))
        for sample, place in zip(pool, places.tolist(), strict=True):
            if place == LEFT_OVER:
                carried.append(sample)
            else:
                packs.setdefault(place, []).append(sample)
        ordered = [packs[place] for place in sorted(packs, key=lambda place: rank_of_pack[place])]
        ordered += [[] for _ in range(-len(ordered) % per_step)]
        return ordered, tuple(carried)

    def _make_steps(
        self, packs: list[list[PlannedSample]], position: PlanPosition, bad: tuple[BadSample, ...]
    ) -> tuple[StepPlan, ...]:
        per_step = self.options.packs_per_step
        rows_planned = position.rows_planned + len(bad)
        steps = []
        for start in range(0, len(packs), per_step):
            step = position.step + len(steps)
            chosen = packs[start : start + per_step]
            rows_planned += sum(len(pack) for pack in chosen)
            steps.append(
                StepPlan(
                    step=step,
                    packs=tuple(
                        PackPlan(index=step * per_step + offset, samples=_weigh(samples, self.options.loss))
                        for offset, samples in enumerate(chosen)
                    ),
                    rows_planned=rows_planned,
                    bad_rows=position.unreported + bad if start == 0 else (),
                )
            )
        return tuple(steps)

    def _compare(self, steps: tuple[StepPlan, ...], carried: tuple[PlannedSample, ...]) -> None:
        """Raises: PlanError unless every rank made the same plan."""
        if self._world_size == 1:
            return
        record = [
            self._fixed_options(),
            [step_to_json(step) for step in steps],
            [sample_to_json(sample) for sample in carried],
        ]
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        digests = gather(self._exchange, digest)
        if len(set(digests)) > 1:
            groups = {text: [rank for rank, other in enumerate(digests) if other == text] for text in set(digests)}
            raise PlanError(
                "ranks planned different packs from the same rows: "
                + "; ".join(f"ranks {ranks} have {text[:12]}" for text, ranks in sorted(groups.items()))
                + ". Check that all machines have the same config and the same version of every package"
            )


@dataclass(frozen=True, kw_only=True)
class _Overlong(BadSample):
    num_tokens: int


# ---------------------------------------------------------------------------------------- around the planner


def shuffled_rows(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's rows, int64 [num_rows].

    From raw PCG64 output, whose stream numpy keeps across versions; `Generator.permutation` has no such promise.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    return np.argsort(keys, kind="stable")


def check_pack_counts(packs_per_step: int, data_world: int) -> str | None:
    """A warning where packs do not divide over the data-parallel ranks, else None. Raises: ValueError."""
    if data_world > packs_per_step:
        raise ValueError(
            f"train.packs_per_step={packs_per_step} leaves {data_world - packs_per_step} of {data_world} data-parallel "
            f"ranks without a pack; set it to {data_world} or a multiple, or use fewer ranks"
        )
    if packs_per_step % data_world == 0:
        return None
    num_empty = -packs_per_step % data_world
    return (
        f"train.packs_per_step={packs_per_step} does not divide over {data_world} data-parallel ranks: each step "
        f"computes {num_empty} empty packs; {packs_per_step + num_empty} would waste none"
    )


def assign_packs(packs: Sequence[PackPlan], data_rank: int, data_world: int) -> tuple[PackPlan, ...]:
    """The packs of one data-parallel rank: every `data_world`-th, filled up with empty ones to the same count.

    Empty packs that were added here have negative indexes.
    """
    missing = -len(packs) % data_world
    filled = [*packs, *(PackPlan(index=-1 - extra, samples=()) for extra in range(missing))]
    return tuple(filled[data_rank::data_world])


def plan_all(
    *,
    num_rows: int,
    pack_tokens: int,
    measure: Measure,
    locate: Callable[[int], tuple[str, int]],
    exchange: Exchange | None = None,
    rank: int = 0,
    world_size: int = 1,
    window: int = 2048,
) -> tuple[list[PackPlan], tuple[BadSample, ...]]:
    """Packs that hold every usable row exactly once, in a fixed order, and the rows that are not usable.

    For evaluation and scoring: no shuffling, token weights, no limit on bad rows.
    """
    options = PlanOptions(
        pack_tokens=pack_tokens, packs_per_step=1, window=window, shuffle=False, max_bad_fraction=1.0, epochs=1.0
    )
    planner = Planner(
        num_rows=num_rows,
        options=options,
        measure=measure,
        locate=locate,
        exchange=exchange,
        rank=rank,
        world_size=world_size,
    )
    packs: list[PackPlan] = []
    bad: list[BadSample] = []
    while (step := planner.next_step()) is not None:
        packs += step.packs
        bad += step.bad_rows
    return packs, (*bad, *planner.unreported_bad_rows)


def _weigh(samples: list[PlannedSample], loss: str) -> tuple[PlannedSample, ...]:
    """Express the loss mode as a scale of each sample's weights."""
    in_pack = sum(sample.extent.num_loss_tokens for sample in samples)

    def scale(sample: PlannedSample) -> float:
        valid = sample.extent.num_loss_tokens
        return {"token": 1.0, "sample": 1.0 / valid, "sqrt": valid**-0.5, "batch": 1.0 / in_pack}[loss]

    return tuple(replace(sample, weight_scale=scale(sample)) for sample in samples)


def _changes(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between two runs' fixed options, in words."""
    changed = []
    if ours["data_fingerprint"] != theirs["data_fingerprint"]:
        changed.append("the rows of data.train are others, or in another order (data_fingerprint)")
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
    return f"{fault}:{first}{more}"
