"""The vision tower: patches to rows of the decoder's width, and the geometry that a batch of clips brings along.

The tower is a tensor function of a `VisionBatch`; everything that depends on grids is computed by `vision_batch`, on
the CPU, where batches are collated. Images and videos are the same thing here: frames of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniloom.models.layers import ACTIVATIONS, MLP, Attention, FusedAttention, GatedMLP, Linear, RMSNorm
from omniloom.ops.attention import Kernel
from omniloom.ops.rotary import Rotary, axial_rotary
from omniloom.types import Segments, VisionBatch, VisionClip

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """Dims of a vision tower, named as in Hugging Face configs."""

    depth: int
    hidden_size: int
    hidden_act: str
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int  # a square; 0: no learned positions
    deepstack_visual_indexes: tuple[int, ...]
    rope_theta: float
    norm: Literal["layer", "rms"] = "layer"
    gated_mlp: bool = False
    fused_qkv: bool = True  # one projection for q, k and v
    patch_bias: bool = True
    window_size: int = 0  # side in pixels of the windows that patches see; 0: all layers see whole frames
    fullatt_block_indexes: tuple[int, ...] = ()  # under windows, layers that see whole frames nevertheless

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_squares(self) -> int:
        """Side of a window in merged patches; 0 without windows."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    def sees_windows(self, layer: int) -> bool:
        return self.window_size > 0 and layer not in self.fullatt_block_indexes


def _norm(config: VisionTowerConfig, size: int) -> nn.Module:
    return nn.LayerNorm(size, eps=NORM_EPS) if config.norm == "layer" else RMSNorm(size, NORM_EPS)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionTowerConfig, kernel: Kernel) -> None:
        super().__init__()
        size, num_heads = config.hidden_size, config.num_heads
        self.norm1 = _norm(config, size)
        self.attention: nn.Module
        if config.fused_qkv:
            self.attention = FusedAttention(hidden_size=size, num_heads=num_heads, kernel=kernel)
        else:
            self.attention = Attention(
                hidden_size=size,
                num_heads=num_heads,
                num_key_value_heads=num_heads,
                head_dim=size // num_heads,
                biases=(True, True, True, True),
                qk_norm_eps=None,
                causal=False,
                kernel=kernel,
            )
        self.norm2 = _norm(config, size)
        self.mlp: nn.Module
        if config.gated_mlp:
            self.mlp = GatedMLP(
                hidden_size=size, intermediate_size=config.intermediate_size, activation=config.hidden_act, bias=True
            )
        else:
            self.mlp = MLP(hidden_size=size, intermediate_size=config.intermediate_size, activation=config.hidden_act)

    def forward(self, hidden: Tensor, rotary: Rotary, segments: Segments, draw_key: int | None = None) -> Tensor:
        """hidden [P, C] -> [P, C]."""
        hidden = hidden + self.attention(self.norm1(hidden), rotary, segments, draw_key)
        return hidden + self.mlp(self.norm2(hidden), draw_key)


class PatchMerger(nn.Module):
    """Squares of patches, neighbours in the packed order, become one row of the decoder's width.

    The norm is over single patches, or over the whole square if `norm_merged`.
    """

    def __init__(self, config: VisionTowerConfig, *, norm_merged: bool) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.norm_merged = norm_merged
        self.norm = _norm(config, self.merged_size if norm_merged else config.hidden_size)
        self.fc1 = Linear(self.merged_size, self.merged_size)
        self.act = ACTIVATIONS["gelu"]
        self.fc2 = Linear(self.merged_size, config.out_hidden_size)

    def forward(self, hidden: Tensor, draw_key: int | None = None) -> Tensor:
        """hidden [P, C] -> [P / merge^2, out_hidden_size]."""
        if self.norm_merged:
            hidden = self.norm(hidden.view(-1, self.merged_size))
        else:
            hidden = self.norm(hidden).view(-1, self.merged_size)
        return self.fc2(self.act(self.fc1(hidden, draw_key)), draw_key)


class VisionTower(nn.Module):
    """Patch embedding, learned positions resampled to each grid if any, blocks over frames or windows, mergers."""

    def __init__(self, config: VisionTowerConfig, *, kernel: Kernel) -> None:
        super().__init__()
        self.config = config
        # a convolution whose stride is its kernel
        self.patch_embed = Linear(config.patch_dim, config.hidden_size, bias=config.patch_bias)
        self.pos_embed: nn.Embedding | None = None
        if config.num_position_embeddings:
            self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([VisionBlock(config, kernel) for _ in range(config.depth)])
        self.deepstack = nn.ModuleList([PatchMerger(config, norm_merged=True) for _ in config.deepstack_visual_indexes])
        self.merger = PatchMerger(config, norm_merged=False)

    def forward(self, batch: VisionBatch, draw_key: int | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows [P / merge^2, out_hidden_size], and as many per deepstack level."""
        hidden = self.patch_embed(batch.patches.to(self.patch_embed.weight.dtype), draw_key)  # [P, C]
        if self.pos_embed is not None:
            positions = self.pos_embed(batch.interpolation_index) * batch.interpolation_weights[:, :, None]  # [P, 4, C]
            hidden = hidden + positions.sum(dim=1).to(hidden.dtype)
        head_dim = self.config.hidden_size // self.config.num_heads
        rotary = axial_rotary(batch.rotary_index, head_dim=head_dim, theta=self.config.rope_theta)
        windows = batch.segments if batch.window_segments is None else batch.window_segments
        levels = []
        for index, layer in enumerate(self.layers):
            seen = windows if self.config.sees_windows(index) else batch.segments
            hidden = layer(hidden, rotary, seen, draw_key)
            if index in self.config.deepstack_visual_indexes:
                levels.append(self.deepstack[len(levels)](hidden, draw_key))
        return self.merger(hidden, draw_key), tuple(levels)


# ---------------------------------------------------------------------------------------- geometry, on the CPU


def vision_batch(clips: Sequence[VisionClip], config: VisionTowerConfig) -> VisionBatch:
    """All clips of a pack as one batch, a null segment of one merged patch last.

    `token_index` of the clips counts rows of the pack. Tensors are on the CPU.
    Raises: ValueError where a clip's patches, grid and tokens do not agree.
    """
    merge = config.spatial_merge_size
    for number, clip in enumerate(clips):
        _check_clip(number, clip, config)
    grids = torch.tensor([*(clip.grid_thw for clip in clips), (1, merge, merge)])
    row, column, heights, widths = _patch_coordinates(grids, merge)
    patches = torch.cat([*(clip.patches for clip in clips), torch.zeros(merge**2, config.patch_dim)])
    token_index = torch.cat([*(clip.token_index for clip in clips), torch.zeros(0, dtype=torch.int64)])
    frame_lengths = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
    window_segments = None
    if config.window_size:
        order, window_lengths = _window_order(row, column, frame_lengths, merge, config.window_squares)
        patches, row, column, heights, widths = (
            tensor.unflatten(0, (-1, merge**2))[order].flatten(0, 1)
            for tensor in (patches, row, column, heights, widths)
        )
        token_index = token_index[order[:-1]]  # the null segment, one square, is the last frame and stays last
        window_segments = _segments(window_lengths)
    index, weights = _interpolation(row, column, heights, widths, round(config.num_position_embeddings**0.5))
    return VisionBatch(
        patches=patches,
        segments=_segments(frame_lengths),
        rotary_index=torch.stack((row, column), dim=1),
        interpolation_index=index,
        interpolation_weights=weights,
        token_index=token_index,
        window_segments=window_segments,
    )


def _segments(lengths: Tensor) -> Segments:
    return Segments(cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), max_length=int(lengths.max()))


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
    return order, ordered.unique_consecutive(return_counts=True)[1] * merge**2


def _check_clip(number: int, clip: VisionClip, config: VisionTowerConfig) -> None:
    frames, height, width = clip.grid_thw
    num_patches = frames * height * width
    merge = config.spatial_merge_size
    if height % merge or width % merge:
        raise ValueError(f"clip {number}: grid_thw {clip.grid_thw} does not divide by spatial_merge_size {merge}")
    if tuple(clip.patches.shape) != (num_patches, config.patch_dim):
        raise ValueError(
            f"clip {number}: expected patches [{num_patches}, {config.patch_dim}] for grid_thw {clip.grid_thw}, "
            f"got {list(clip.patches.shape)}"
        )
    if clip.token_index.shape[0] != num_patches // merge**2:
        raise ValueError(
            f"clip {number}: grid_thw {clip.grid_thw} makes {num_patches // merge**2} rows, but "
            f"{clip.token_index.shape[0]} tokens wait for them"
        )


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
