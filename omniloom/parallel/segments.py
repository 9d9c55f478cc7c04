"""Cutting a tower's batch into its segments and putting a batch together from segments of several ranks.

A segment is what a tower treats independently: a frame of patches, a window of audio chunks. The null segment, always
the last one, stays where it is, so that every tower call has something to do. Sizes are read on the host; knows the
media batches of `types` and no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omniloom.parallel.staging import to_device
from omniloom.types import AudioBatch, Segments, VisionBatch

ATTENTION_SCALE = 6144  # rows at which a tower's attention costs as much as its products: 6 x hidden, hidden about 1024


@dataclass(frozen=True, kw_only=True)
class SegmentSizes:
    """The real segments of one tower's batch, in order; the null segment is left out. Host arrays, int64.

    `units` are what is sent to a tower (patches, or chunks), `rows` what it returns; both as bounds [S + 1].
    """

    units: np.ndarray
    rows: np.ndarray
    cost: np.ndarray  # [S], in rows of a segment too short for attention to matter
    token_index: np.ndarray  # [rows[-1]], token row of each tower row
    num_null: int  # length of the null segment as the tower's attention counts it


def measure_vision(batch: VisionBatch, patches_per_row: int) -> SegmentSizes:
    """Frames of a batch on the host."""
    bounds = _real_bounds(batch.segments)
    return _sizes(bounds, bounds // patches_per_row, bounds, batch.patches.shape[0], batch.token_index)


def measure_audio(batch: AudioBatch, rows_per_chunk: int) -> SegmentSizes:
    """Windows of a batch on the host. A window holds whole chunks.

    Where rows are pooled, a window at a clip's end may have none: it then counts with the one before it.
    """
    bounds = _real_bounds(batch.segments)
    rows = bounds if batch.pool_index is None else np.searchsorted(batch.pool_index[:, 0].numpy(), bounds)
    makes_rows = np.append(np.diff(rows) > 0, True)
    bounds, rows = bounds[makes_rows], rows[makes_rows]
    chunk_of_row = batch.valid_index.numpy() // rows_per_chunk
    units = chunk_of_row[bounds]  # the null segment's first row follows the last real one
    return _sizes(units, rows, bounds, batch.valid_index.shape[0], batch.token_index)


def _real_bounds(segments: Segments) -> np.ndarray:
    """Bounds of all segments but the last, which is the null segment."""
    return np.array(segments.bounds[:-1], dtype=np.int64)


def _sizes(
    units: np.ndarray, rows: np.ndarray, bounds: np.ndarray, num_attending: int, token_index: Tensor
) -> SegmentSizes:
    assert rows[-1] == len(token_index), f"{rows[-1]} tower rows before the null segment, {len(token_index)} tokens"
    lengths = np.diff(bounds)
    cost = lengths + lengths * lengths // ATTENTION_SCALE
    return SegmentSizes(
        units=units, rows=rows, cost=cost, token_index=token_index.numpy(), num_null=int(num_attending - bounds[-1])
    )


Move = Callable[[Tensor], Tensor]


def rebuild_vision(batch: VisionBatch, lengths: np.ndarray, num_null: int, move: Move) -> VisionBatch:
    """A batch of the segments that `move` brings here, then this rank's null segment of `num_null` patches.

    `move` takes a tensor of this rank's real patches and returns the one of the segments that are to be encoded here,
    whose patch counts are `lengths`. `token_index` is left empty: where rows go is no longer a matter of order.
    """

    def join(field: Tensor) -> Tensor:
        kept = field.shape[0] - num_null
        return torch.cat([move(field[:kept]), field[kept:]])

    return dataclasses.replace(
        batch,
        patches=join(batch.patches),
        rotary_index=join(batch.rotary_index),
        interpolation_index=join(batch.interpolation_index),
        interpolation_weights=join(batch.interpolation_weights),
        segments=_segments(lengths, num_null, batch.segments),
        token_index=batch.token_index[:0],
    )


def rebuild_audio(batch: AudioBatch, lengths: np.ndarray, num_null: int, rows_per_chunk: int, move: Move) -> AudioBatch:
    """As `rebuild_vision`, by chunks; `lengths` are rows. The null segment is the last chunk."""

    def join(field: Tensor) -> Tensor:
        return torch.cat([move(field[:-1]), field[-1:]])

    slots = torch.zeros(batch.features.shape[0] * rows_per_chunk, dtype=torch.bool, device=batch.valid_index.device)
    is_valid = join(slots.index_fill(0, batch.valid_index, True).view(-1, rows_per_chunk))
    num_rows = int(lengths.sum()) + num_null
    slot = torch.arange(is_valid.numel(), device=is_valid.device)
    # as nonzero, but of a length known on the host: the valid slots come first, in order
    order = (slot + ~is_valid.flatten() * is_valid.numel()).sort().indices
    return dataclasses.replace(
        batch,
        features=join(batch.features),
        chunk_frames=join(batch.chunk_frames),
        valid_index=order[:num_rows],
        segments=_segments(lengths, num_null, batch.segments),
        token_index=batch.token_index[:0],
    )


def _segments(lengths: np.ndarray, num_null: int, like: Segments) -> Segments:
    return to_device(Segments.from_lengths([*lengths.tolist(), num_null]), like.cu_seqlens.device)
