"""Cutting a tower's batch into its segments and putting a batch together from segments of several ranks.

A segment is what a tower treats independently: a frame of patches, a window of audio chunks. The null segment, always
the last one, stays where it is, so that every tower call has something to do. All shapes are known on the host before
the step: what segments there are, how batches of several packs become one, and what a batch is rebuilt from. Knows the
media batches of `types` and no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omniloom.types import AudioBatch, Segments, TowerRoute, VisionBatch

Ints = NDArray[np.int64]
ATTENTION_SCALE = 6144  # rows at which a tower's attention costs as much as its products: 6 x hidden, hidden about 1024


@dataclass(frozen=True, kw_only=True)
class TowerSizes:
    """The segments of one tower's batch, in order, as ranks tell each other: host arrays, small.

    `units` are what is sent to a tower (patches, or chunks), `rows` what it returns. Null segments are left out.
    """

    unit_starts: Ints  # [S]
    unit_lengths: Ints  # [S]
    row_starts: Ints  # [S]
    row_lengths: Ints  # [S]
    lengths: Ints  # [S], as the tower's attention counts them
    runs: (
        Ints  # [2, R]: first token row and length of each run of consecutive ones that tower rows fill, in their order
    )
    num_units: int  # null segments included
    num_rows: int
    num_null: int  # length of the last null segment, as attention counts it
    chunk_rows: Ints | None = None  # audio: valid rows of each unit
    is_fixed: bool = False  # segments stay where they are: geometry that this module cannot cut

    @property
    def cost(self) -> Ints:
        """[S], in rows of a segment too short for attention to matter."""
        return self.lengths + self.lengths * self.lengths // ATTENTION_SCALE

    def tokens(self) -> Ints:
        """The token row of each row of a real segment, in the order of tower rows."""
        return spread(self.runs[0], self.runs[1])


def spread(starts: Ints, lengths: Ints) -> Ints:
    """Consecutive numbers from each start, as many as its length."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def measure_vision(batch: VisionBatch, patches_per_row: int) -> TowerSizes:
    """Frames of a batch on the host."""
    bounds = _real_bounds(batch.segments)
    units = batch.patches.shape[0]
    return _sizes(
        bounds,
        bounds // patches_per_row,
        bounds,
        batch.token_index,
        num_units=units,
        num_rows=units // patches_per_row,
        num_null=int(units - bounds[-1]),
        is_fixed=batch.window_segments is not None,
    )


def measure_audio(batch: AudioBatch, rows_per_chunk: int) -> TowerSizes:
    """Windows of a batch on the host. A window holds whole chunks.

    Where rows are pooled, a window at a clip's end may have none: it then counts with the one before it.
    """
    bounds, pool = _real_bounds(batch.segments), batch.pool_index
    rows = bounds if pool is None else np.searchsorted(pool[:, 0].numpy(), bounds)
    makes_rows = np.append(np.diff(rows) > 0, True)
    bounds, rows = bounds[makes_rows], rows[makes_rows]
    chunk_of_row = batch.valid_index.numpy() // rows_per_chunk
    return _sizes(
        chunk_of_row[bounds],  # the null segment's first row follows the last real one
        rows,
        bounds,
        batch.token_index,
        num_units=batch.features.shape[0],
        num_rows=len(chunk_of_row) if pool is None else pool.shape[0],
        num_null=int(len(chunk_of_row) - bounds[-1]),
        chunk_rows=np.bincount(chunk_of_row, minlength=batch.features.shape[0]),
        is_fixed=pool is not None,
    )


def _real_bounds(segments: Segments) -> Ints:
    """Bounds of all segments but the last, which is the null segment."""
    return np.array(segments.bounds[:-1], dtype=np.int64)


def _sizes(
    units: Ints,
    rows: Ints,
    bounds: Ints,
    token_index: Tensor,
    *,
    num_units: int,
    num_rows: int,
    num_null: int,
    is_fixed: bool,
    chunk_rows: Ints | None = None,
) -> TowerSizes:
    tokens = token_index.numpy()
    assert rows[-1] == len(tokens), f"{rows[-1]} tower rows before the null segment, {len(tokens)} tokens"
    first = np.flatnonzero(np.diff(tokens, prepend=-2) != 1)
    return TowerSizes(
        unit_starts=units[:-1],
        unit_lengths=np.diff(units),
        row_starts=rows[:-1],
        row_lengths=np.diff(rows),
        lengths=np.diff(bounds),
        runs=np.stack([tokens[first], np.diff(first, append=len(tokens))]),
        num_units=num_units,
        num_rows=num_rows,
        num_null=num_null,
        chunk_rows=chunk_rows,
        is_fixed=is_fixed,
    )


# ---------------------------------------------------------------------------------------- batches of several packs


def join_sizes(sizes: Sequence[TowerSizes], pack_tokens: int) -> TowerSizes:
    """The sizes of `join_vision` or `join_audio` of the batches; token rows count on from pack to pack."""
    if len(sizes) == 1:
        return sizes[0]
    units = list(accumulate((part.num_units for part in sizes), initial=0))
    rows = list(accumulate((part.num_rows for part in sizes), initial=0))
    moved = [np.array([[number * pack_tokens], [0]]) + part.runs for number, part in enumerate(sizes)]
    chunk_rows = [part.chunk_rows for part in sizes if part.chunk_rows is not None]
    return TowerSizes(
        unit_starts=np.concatenate([part.unit_starts + start for part, start in zip(sizes, units, strict=False)]),
        unit_lengths=np.concatenate([part.unit_lengths for part in sizes]),
        row_starts=np.concatenate([part.row_starts + start for part, start in zip(sizes, rows, strict=False)]),
        row_lengths=np.concatenate([part.row_lengths for part in sizes]),
        lengths=np.concatenate([part.lengths for part in sizes]),
        runs=np.concatenate(moved, axis=1),
        num_units=units[-1],
        num_rows=rows[-1],
        num_null=sizes[-1].num_null,
        chunk_rows=np.concatenate(chunk_rows) if chunk_rows else None,
        is_fixed=sizes[-1].is_fixed,
    )


def join_vision(batches: Sequence[VisionBatch]) -> VisionBatch:
    """The media of several packs in one batch, null segments where they were. `token_index` means nothing any more."""
    last, windows = batches[-1], [batch.window_segments for batch in batches if batch.window_segments is not None]
    return dataclasses.replace(
        last,
        patches=torch.cat([batch.patches for batch in batches]),
        segments=_join_segments([batch.segments for batch in batches]),
        rotary_index=torch.cat([batch.rotary_index for batch in batches]),
        interpolation_index=torch.cat([batch.interpolation_index for batch in batches]),
        interpolation_weights=torch.cat([batch.interpolation_weights for batch in batches]),
        token_index=last.token_index[:0],
        window_segments=_join_segments(windows) if windows else None,
    )


def join_audio(batches: Sequence[AudioBatch], rows_per_chunk: int) -> AudioBatch:
    """As `join_vision`."""
    chunks = accumulate((batch.features.shape[0] for batch in batches), initial=0)
    rows = accumulate((batch.valid_index.shape[0] for batch in batches), initial=0)
    pools = [batch.pool_index + row for batch, row in zip(batches, rows, strict=False) if batch.pool_index is not None]
    return AudioBatch(
        features=torch.cat([batch.features for batch in batches]),
        chunk_frames=torch.cat([batch.chunk_frames for batch in batches]),
        valid_index=torch.cat(
            [batch.valid_index + chunk * rows_per_chunk for batch, chunk in zip(batches, chunks, strict=False)]
        ),
        segments=_join_segments([batch.segments for batch in batches]),
        token_index=batches[-1].token_index[:0],
        pool_index=torch.cat(pools) if pools else None,
    )


def _join_segments(segments: Sequence[Segments]) -> Segments:
    return Segments.from_lengths(high - low for one in segments for low, high in pairwise(one.bounds))


# ---------------------------------------------------------------------------------------- what is encoded here


def valid_rows(chunk_rows: Ints, rows_per_chunk: int) -> Tensor:
    """`AudioBatch.valid_index` of chunks with so many valid rows each."""
    starts = np.arange(len(chunk_rows)) * rows_per_chunk
    return torch.from_numpy(spread(starts, chunk_rows))


Move = Callable[[Tensor], Tensor]


def rebuild_vision(batch: VisionBatch, route: TowerRoute, move: Move) -> VisionBatch:
    """A batch of the segments that `move` brings here, then this rank's last null segment.

    `move` takes a tensor of all of this rank's patches and returns the one of the segments that are to be encoded here.
    `token_index` is left empty: where rows go is no longer a matter of order.
    """
    assert route.segments is not None, "a fixed tower is not rebuilt"

    def join(field: Tensor) -> Tensor:
        return torch.cat([move(field), field[field.shape[0] - route.num_null_units :]])

    return dataclasses.replace(
        batch,
        patches=join(batch.patches),
        rotary_index=join(batch.rotary_index),
        interpolation_index=join(batch.interpolation_index),
        interpolation_weights=join(batch.interpolation_weights),
        segments=route.segments,
        token_index=batch.token_index[:0],
    )


def rebuild_audio(batch: AudioBatch, route: TowerRoute, move: Move) -> AudioBatch:
    """As `rebuild_vision`, by chunks. The null segment is the last chunk."""
    assert route.segments is not None, "a fixed tower is not rebuilt"
    assert route.valid_index is not None, "the route of another tower"
    return dataclasses.replace(
        batch,
        features=torch.cat([move(batch.features), batch.features[-1:]]),
        chunk_frames=torch.cat([move(batch.chunk_frames), batch.chunk_frames[-1:]]),
        valid_index=route.valid_index,
        segments=route.segments,
        token_index=batch.token_index[:0],
    )
