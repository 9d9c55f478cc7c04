"""Which rows come when: epochs, shuffles, the sources' shares, and the windows in which rows are planned together.

A function of the sources' sizes, the seed and the options; knows no row's content, no pack and no rank. Each source has
orders and a cursor of its own, so that its next row does not depend on how far the others are: it is gone through again
and again, in a new order each time. An epoch takes from each source as many rows as it has, times `repeat`, or a share
of as many rows by `weight`, and where it ends in the middle of a source the next one goes on there. Each window has the
proportions of the epoch, to a row.

Windows have `data.window` rows; the first three of a run have an eighth, a quarter and half of that, so that
training starts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy import int32, int64
from numpy.typing import NDArray

from omniloom.config import Config, DataSource
from omniloom.data.spilled_rows import STREAM_ROWS
from omniloom.types import BadSample, PlannedSample

_FIRST_WINDOWS = (8, 4, 2)  # divisors of the window size for the first windows of a run
_LEAST_WINDOW = 64  # rows, unless the window itself is smaller: fewer say nothing about the share of bad ones


@dataclass(frozen=True, kw_only=True)
class PlanPosition:
    """Where planning stands between two windows."""

    epoch: int = 0
    cursors: tuple[int, ...] = ()  # rows of this epoch already read, of each source; empty before the first
    window: int = 0  # windows read since the start of the run
    step: int = 0  # number of the next step
    rows_planned: int = 0
    bad_in_epoch: int = 0
    carried: tuple[PlannedSample, ...] = ()
    unreported: tuple[BadSample, ...] = ()  # found in windows that yielded no step to report them
    ended: bool = False  # whether every stream is

    @property
    def num_read(self) -> int:
        """Rows of this epoch already read."""
        return sum(self.cursors)


class RowOrder:
    """The rows of every window of a run. Row numbers count through all sources, one after another."""

    def __init__(self, rows_per_source: Sequence[int], config: Config, entries: Sequence[DataSource] = ()) -> None:
        """`entries` say how often or how much of each source an epoch takes; without them it is each row once."""
        self.rows_per_source = tuple(rows_per_source)
        if sum(rows_per_source) < 1:
            raise ValueError("data.train: expected at least one row, got none; name a file that has samples")
        self.taken_per_source = _taken_rows(rows_per_source, entries)
        self.num_rows = sum(self.taken_per_source)  # of an epoch
        self._config = config
        self._starts = [0, *accumulate(rows_per_source)]
        self._ends = list(accumulate(self.taken_per_source))
        self._mixes = (
            config.data.shuffle or any(entry.weight for entry in entries) or STREAM_ROWS in self.rows_per_source
        )
        epochs = config.train.epochs or 1.0
        self.total_rows = None if config.train.steps is not None else round(epochs * self.num_rows)
        if self.total_rows == 0:
            raise ValueError(f"train.epochs: {epochs:g} epochs of {self.num_rows} rows are not one row; raise it")
        self._orders: dict[int, tuple[int, NDArray[int32]]] = {}  # of each source: a pass through it, and its order

    def at_end(self, position: PlanPosition) -> bool:
        if self._config.train.steps is not None:
            return position.ended or position.step >= self._config.train.steps
        return position.num_read >= self.epoch_rows(position.epoch)

    def epoch_rows(self, epoch: int) -> int:
        """Rows that this epoch covers: all of them, or a part in the last of a fractional number of epochs."""
        if self.total_rows is None:
            return self.num_rows
        return max(0, min(self.num_rows, self.total_rows - epoch * self.num_rows))

    def next_window(self, position: PlanPosition) -> tuple[list[int], tuple[int, ...]]:
        """The rows of the window that begins at a position, and the sources' cursors after it."""
        size = self._config.data.window
        if position.window < len(_FIRST_WINDOWS):
            size = max(size // _FIRST_WINDOWS[position.window], min(size, _LEAST_WINDOW))
        start = position.num_read
        stop = min(start + size, self.epoch_rows(position.epoch))
        cursors = list(position.cursors or (0,) * len(self.rows_per_source))
        if self._mixes:
            counts = self._shares(cursors, stop)
            turns = shuffled_rows(stop - start, self._config.train.seed, position.epoch, len(counts) + start)
            source_of = np.repeat(np.arange(len(counts)), counts)[turns]
        else:
            source_of = np.searchsorted(self._ends, np.arange(start, stop), side="right")
        rows = np.empty(stop - start, dtype=np.int64)
        for source in np.unique(source_of).tolist():
            own = np.flatnonzero(source_of == source)
            begin = position.epoch * self.taken_per_source[source] + cursors[source]
            rows[own] = self._starts[source] + self._rows_of(source, begin, begin + len(own))
            cursors[source] += len(own)
        taken: list[int] = rows.tolist()
        return taken, tuple(cursors)

    def _shares(self, cursors: Sequence[int], stop: int) -> NDArray[int64]:
        """Rows to take of each source so that up to the place `stop` of the epoch each has its share, to a row."""
        due = np.maximum([taken * stop / self.num_rows for taken in self.taken_per_source] - np.array(cursors), 0)
        counts = np.floor(due).astype(np.int64)
        order = np.argsort(counts - due, kind="stable")  # whose next row is nearest first
        missing = stop - sum(cursors) - int(counts.sum())
        counts[order[: max(0, missing)]] += 1
        for source in order[::-1]:  # whoever was ahead of its share leaves too little for the others
            if missing < 0 and counts[source]:
                counts[source], missing = counts[source] - 1, missing + 1
        return counts

    def _rows_of(self, source: int, begin: int, end: int) -> NDArray[int64]:
        """Rows of a source by how many were taken of it before since the start of the run."""
        size = self.rows_per_source[source]
        if not self._config.data.shuffle:
            return np.arange(begin, end) % size
        if size == STREAM_ROWS:  # which has no later rows yet: mixed within the window
            return begin + shuffled_rows(end - begin, self._config.train.seed, begin, source)
        found = []
        for number in range(begin // size, -(-end // size)):
            if self._orders.get(source, (None,))[0] != number:
                order = shuffled_rows(size, self._config.train.seed, number, source)
                self._orders[source] = (number, order.astype(np.int32))
            found.append(self._orders[source][1][max(0, begin - number * size) : end - number * size])
        return np.concatenate(found).astype(np.int64)


def _taken_rows(rows_per_source: Sequence[int], entries: Sequence[DataSource]) -> tuple[int, ...]:
    """How many rows an epoch takes of each source. Raises: ValueError where that is none at all."""
    if not entries:
        return tuple(rows_per_source)
    if not any(entry.weight for entry in entries):
        taken = [round(size * entry.repeat) for size, entry in zip(rows_per_source, entries, strict=True)]
    else:
        weights = [entry.weight or 0.0 for entry in entries]
        ends = [sum(rows_per_source) * end / sum(weights) for end in accumulate(weights)]
        taken = [round(end) - round(start) for start, end in zip([0.0, *ends[:-1]], ends, strict=True)]
    if not sum(taken):
        raise ValueError("data.train: an epoch takes no row of any data set; raise their repeat")
    return tuple(taken)


def shuffled_rows(num_rows: int, seed: int, epoch: int, stream: int = 0) -> NDArray[int64]:
    """An order of `num_rows` rows, int64 [num_rows]; `stream` tells apart what is drawn for one seed and epoch.

    From raw PCG64 output, whose stream numpy keeps across versions; `Generator.permutation` has no such promise.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])).random_raw(num_rows)
    return np.argsort(keys, kind="stable")
