"""Clips of a pack as one batch for each tower, with the geometry that the towers need.

Everything that depends on grids and lengths is computed here, on the CPU, where batches are collated; the towers are
tensor functions of what comes out. Knows the dims of a tower, and no tower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omniloom.dims import AudioTowerConfig, VisionTowerConfig
from omniloom.types import AudioBatch, AudioClip, Segments, VisionBatch, VisionClip

# ---------------------------------------------------------------------------------------- pictures


def vision_batch(
    clips: Sequence[VisionClip], config: VisionTowerConfig, pixel_rules: Tensor | None = None
) -> VisionBatch:
    """All clips of a pack as one batch, a null segment of one merged patch last.

    Patches are uint8 with `pixel_rules` (see `VisionBatch`), else float32.
    `token_index` of the clips counts rows of the pack. Tensors are on the CPU.
    """
    merge = config.spatial_merge_size
    for number, clip in enumerate(clips):
        _check_picture(number, clip, config)
    grids = torch.tensor([*(clip.grid_thw for clip in clips), (1, merge, merge)])
    row, column, heights, widths = _patch_coordinates(grids, merge)
    dtype = torch.float32 if pixel_rules is None else torch.uint8
    patches = torch.cat([*(clip.patches for clip in clips), torch.zeros(merge**2, config.patch_dim, dtype=dtype)])
    token_index = torch.cat([*(clip.token_index for clip in clips), torch.zeros(0, dtype=torch.int64)])
    frame_lengths = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
    window_segments = None
    if config.window_size:
        order, window_lengths = _window_order(row, column, frame_lengths, merge, config.window_squares)
        patches, row, column, heights, widths = (
            tensor.reshape(-1, merge**2, *tensor.shape[1:])[order].flatten(0, 1)
            for tensor in (patches, row, column, heights, widths)
        )
        token_index = token_index[order[:-1]]  # the null segment, one square, is the last frame and stays last
        window_segments = Segments.from_lengths(window_lengths.tolist())
    index, weights = _interpolation(row, column, heights, widths, round(config.num_position_embeddings**0.5))
    return VisionBatch(
        patches=patches,
        segments=Segments.from_lengths(frame_lengths.tolist()),
        rotary_index=torch.stack((row, column), dim=1),
        interpolation_index=index,
        interpolation_weights=weights,
        token_index=token_index,
        window_segments=window_segments,
        pixel_rules=pixel_rules,
    )


def _window_order(row: Tensor, column: Tensor, frame_lengths: Tensor, merge: int, side: int) -> tuple[Tensor, Tensor]:
    """Order int64 [P / merge^2] that puts the merged squares of each frame window by window, and patches per window.

    Windows of `side` x `side` squares come by rows, as do the squares within one; those at a frame's edges are smaller.
    Source: transformers, vision_utils.get_vision_window_index.
    """
    frame = torch.repeat_interleave(torch.arange(frame_lengths.shape[0]), frame_lengths)[:: merge**2]
    window_row, window_column = (place[:: merge**2] // (merge * side) for place in (row, column))
    width = int(window_column.max()) + 1
    window = (frame * (int(window_row.max()) + 1) + window_row) * width + window_column
    ordered, order = window.sort(stable=True)
    return order, torch.unique_consecutive(ordered, return_counts=True)[1] * merge**2


def _check_picture(number: int, clip: VisionClip, config: VisionTowerConfig) -> None:
    merge, num_patches = config.spatial_merge_size, math.prod(clip.grid_thw)
    assert clip.grid_thw[1] % merge == clip.grid_thw[2] % merge == 0, (number, clip.grid_thw, merge)
    assert clip.patches.shape == (num_patches, config.patch_dim), (number, clip.grid_thw, clip.patches.shape)
    assert len(clip.token_index) == num_patches // merge**2, (number, clip.grid_thw, len(clip.token_index))


def _patch_coordinates(grids: Tensor, merge: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, column, and the height and width of its frame, for each patch: int64 [P] each.

    Patches of a frame come square by square of merge x merge, squares and patches within them by rows.
    """
    counts = grids.prod(dim=1)
    heights, widths = (torch.repeat_interleave(grids[:, axis], counts) for axis in (1, 2))
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    within = (torch.arange(starts.shape[0]) - starts) % (heights * widths)
    square, inner = within // merge**2, within % merge**2
    squares_per_row = widths // merge
    row = square // squares_per_row * merge + inner // merge
    column = square % squares_per_row * merge + inner % merge
    return row, column, heights, widths


def _interpolation(row: Tensor, column: Tensor, heights: Tensor, widths: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where each patch lies among the learned positions, a square of `side`, its corners on the frame's corners.

    Returns: index int64 [P, 4] into the flattened square, weights float32 [P, 4] (bilinear); [P, 0] if side is 0.
    """
    if not side:
        return row.new_zeros(row.shape[0], 0), torch.zeros(row.shape[0], 0)
    index, weights = [], []
    for place, size in ((row, heights), (column, widths)):
        exact = place.float() * (side - 1) / (size - 1).clamp(min=1)
        low = exact.floor()
        index.append(torch.stack((low, low + 1), dim=1).long().clamp(max=side - 1))
        weights.append(torch.stack((1 - (exact - low), exact - low), dim=1))
    corners = index[0][:, :, None] * side + index[1][:, None, :]
    return corners.flatten(1), (weights[0][:, :, None] * weights[1][:, None, :]).flatten(1)


# ---------------------------------------------------------------------------------------- sound


def audio_batch(clips: Sequence[AudioClip], config: AudioTowerConfig) -> AudioBatch:
    """All clips of a pack as one batch of chunks, a null segment of two tower rows last.

    `token_index` of the clips counts rows of the pack. Tensors are on the CPU.
    """
    size, null_frames = config.chunk_frames, config.null_frames
    for number, clip in enumerate(clips):
        _check_sound(number, clip, config)
    features = [*(clip.features for clip in clips), torch.zeros(config.num_mel_bins, null_frames)]
    frames = torch.tensor([part.shape[1] for part in features])
    num_chunks = -(-frames // size)
    last_chunk = num_chunks.cumsum(0) - 1
    real = torch.full((int(num_chunks.sum()),), size)  # frames of each chunk that are the clip's
    real[last_chunk] = (frames - 1) % size + 1
    ends = real  # where the convolutions take a chunk to end
    if config.downsample_hidden_size is not None:  # this stem lets the padding up to the longest clip show
        longest = torch.tensor([*(clip.longest_frames or clip.features.shape[1] for clip in clips), null_frames])
        ends = torch.repeat_interleave(longest.clamp(min=frames).clamp(max=size), num_chunks)
    rows = -(-real // 2**config.num_halvings)
    valid = torch.arange(config.chunk_rows) < rows[:, None]
    chunks = [
        F.pad(part, (0, -part.shape[1] % size)).reshape(part.shape[0], -1, size).transpose(0, 1) for part in features
    ]  # each [num_chunks, num_mel_bins, size]
    clip_rows = (num_chunks - 1) * config.chunk_rows + rows[last_chunk]
    windows = _windows(clip_rows, config.window_rows)
    return AudioBatch(
        features=torch.cat(chunks),
        chunk_frames=ends,
        valid_index=valid.flatten().nonzero().squeeze(1),
        segments=Segments.from_lengths(windows.tolist()),
        token_index=torch.cat([*(clip.token_index for clip in clips), torch.zeros(0, dtype=torch.int64)]),
        pool_index=_pool_index(clip_rows, config.pool) if config.pool > 1 else None,
    )


def _pool_index(clip_rows: Tensor, pool: int) -> Tensor:
    """Rows that are averaged, int64 [B, pool]: neighbours within a clip, what is left over at its end falls away."""
    starts, counts = clip_rows.cumsum(0) - clip_rows, clip_rows // pool
    firsts = torch.repeat_interleave(starts - pool * (counts.cumsum(0) - counts), counts)
    return (firsts + pool * torch.arange(firsts.shape[0]))[:, None] + torch.arange(pool)


def _check_sound(number: int, clip: AudioClip, config: AudioTowerConfig) -> None:
    num_bins, num_frames = clip.features.shape
    assert num_bins == config.num_mel_bins, (number, num_bins)
    assert num_frames >= config.least_frames, (number, num_frames)
    assert len(clip.token_index) == config.num_tokens(num_frames), (number, num_frames, len(clip.token_index))


def _windows(clip_rows: Tensor, window_rows: int) -> Tensor:
    """Lengths of the attention windows, int64 [S]: full ones, and what is left over at each clip's end."""
    counts = -(-clip_rows // window_rows)
    lengths = torch.full((int(counts.sum()),), window_rows)
    lengths[counts.cumsum(0) - 1] = (clip_rows - 1) % window_rows + 1
    return lengths
