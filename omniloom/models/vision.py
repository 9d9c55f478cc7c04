"""The vision tower: patches to rows of the decoder's width.

The tower is a tensor function of a `VisionBatch`, which brings along everything that depends on grids. Images and
videos are the same thing here: frames of patches.
"""

from __future__ import annotations

from torch import Tensor, nn

from omniloom.dims import VisionTowerConfig
from omniloom.models.layers import ACTIVATIONS, MLP, Attention, FusedAttention, GatedMLP, LayerCall, Linear, RMSNorm
from omniloom.ops.linear_map import layer_key
from omniloom.ops.rotary import Rotary, axial_rotary
from omniloom.types import Kernel, Segments, VisionBatch

NORM_EPS = 1e-6


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

    def forward(self, hidden: Tensor, rotary: Rotary, segments: Segments, draw_key: Tensor | None = None) -> Tensor:
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

    def forward(self, hidden: Tensor, draw_key: Tensor | None = None) -> Tensor:
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
        self.call = LayerCall()
        self.deepstack = nn.ModuleList([PatchMerger(config, norm_merged=True) for _ in config.deepstack_visual_indexes])
        self.merger = PatchMerger(config, norm_merged=False)

    def forward(self, batch: VisionBatch, draw_key: int | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows [P / merge^2, out_hidden_size], and as many per deepstack level."""
        own_key = layer_key(draw_key)
        patches = batch.patches
        if batch.pixel_rules is not None:
            divisor, mean, std = batch.pixel_rules
            patches = patches.float().div_(divisor).sub_(mean).div_(std)
        hidden = self.patch_embed(patches.to(self.patch_embed.weight.dtype), own_key)  # [P, C]
        if self.pos_embed is not None:
            positions = self.pos_embed(batch.interpolation_index) * batch.interpolation_weights[:, :, None]  # [P, 4, C]
            hidden = hidden + positions.sum(dim=1).to(hidden.dtype)
        head_dim = self.config.hidden_size // self.config.num_heads
        rotary = axial_rotary(batch.rotary_index, head_dim=head_dim, theta=self.config.rope_theta)
        windows = batch.segments if batch.window_segments is None else batch.window_segments
        levels: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            seen = windows if self.config.sees_windows(index) else batch.segments
            hidden = self.call(index, layer, hidden, rotary, seen, layer_key(draw_key, index))
            if index in self.config.deepstack_visual_indexes:
                levels.append(self.deepstack[len(levels)](hidden, own_key))
        return self.merger(hidden, own_key), tuple(levels)
