"""Which rows come when: epochs, shuffles, the sources' shares, and the windows in which rows are planned together.

A function of the sources' sizes, the seed and the options; knows no row's content, no pack and no rank. Each source has
an order and a cursor of its own: an epoch mixes them in proportion to their sizes, so that a source's next row does not
depend on how far the others are.

Windows have `data.window` rows; the first three of a run have an eighth, a quarter and half of that, so that
training starts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy import int64
from numpy.typing import NDArray

from omniloom.config import Config
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

    @property
    def num_read(self) -> int:
        """Rows of this epoch already read."""
        return sum(self.cursors)


@dataclass(frozen=True, kw_only=True)
class _EpochOrder:
    epoch: int
    source_of: NDArray[int64] | None  # [rows]: the source that each row of the epoch is taken from; None: in turn
    rows_of: tuple[NDArray[int64], ...]  # of each source: its rows in the order of this epoch


class RowOrder:
    """The rows of every window of a run. Row numbers count through all sources, one after another."""

    def __init__(self, rows_per_source: Sequence[int], config: Config) -> None:
        self.rows_per_source = tuple(rows_per_source)
        self.num_rows = sum(rows_per_source)
        if self.num_rows < 1:
            raise ValueError("data.train: expected at least one row, got none; name a file that has samples")
        self._config = config
        self._starts = [0, *accumulate(rows_per_source)]
        epochs = config.train.epochs or 1.0
        self.total_rows = None if config.train.steps is not None else round(epochs * self.num_rows)
        if self.total_rows == 0:
            raise ValueError(f"train.epochs: {epochs:g} epochs of {self.num_rows} rows are not one row; raise it")
        self._cached: _EpochOrder | None = None

    def at_end(self, position: PlanPosition) -> bool:
        if self._config.train.steps is not None:
            return position.step >= self._config.train.steps
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
        order = self._epoch_order(position.epoch)
        if order.source_of is None:
            source_of = np.searchsorted(self._starts[1:], np.arange(start, stop), side="right")
        else:
            source_of = order.source_of[start:stop]
        rows = np.empty(stop - start, dtype=np.int64)
        cursors = list(position.cursors or (0,) * len(self.rows_per_source))
        for source in np.unique(source_of).tolist():
            places = np.flatnonzero(source_of == source)
            begin, cursors[source] = cursors[source], cursors[source] + len(places)
            rows[places] = self._starts[source] + order.rows_of[source][begin : cursors[source]]
        taken: list[int] = rows.tolist()
        return taken, tuple(cursors)

    def _epoch_order(self, epoch: int) -> _EpochOrder:
        if self._cached is None or self._cached.epoch != epoch:
            seed, sizes = self._config.train.seed, self.rows_per_source
            if not self._config.data.shuffle:
                self._cached = _EpochOrder(
                    epoch=epoch, source_of=None, rows_of=tuple(np.arange(size, dtype=np.int64) for size in sizes)
                )
            else:
                mixed = shuffled_rows(self.num_rows, seed, epoch, len(sizes)) if len(sizes) > 1 else None
                self._cached = _EpochOrder(
                    epoch=epoch,
                    source_of=None if mixed is None else np.searchsorted(self._starts[1:], mixed, side="right"),
                    rows_of=tuple(shuffled_rows(size, seed, epoch, source) for source, size in enumerate(sizes)),
                )
        return self._cached


def shuffled_rows(num_rows: int, seed: int, epoch: int, stream: int = 0) -> NDArray[int64]:
    """An order of `num_rows` rows, int64 [num_rows]; `stream` tells apart what is drawn for one seed and epoch.

    From raw PCG64 output, whose stream numpy keeps across versions; `Generator.permutation` has no such promise.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])).random_raw(num_rows)
    return np.argsort(keys, kind="stable")
