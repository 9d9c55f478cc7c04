"""Gated delta rule layers: what mixes the tokens of a segment where there is no attention.

Plain algebra on packed rows, as `layers.py`: head counts come from the weights' shapes, segment bounds are handed in.
Source: Yang et al. 2024 (arXiv 2412.06464), and transformers' modeling_qwen3_5.py for what surrounds the rule.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniloom.models.layers import Linear, RMSNorm
from omniloom.ops.delta_rule import causal_convolution, gated_delta_rule, open_fla
from omniloom.ops.linear_map import linears
from omniloom.ops.rotary import Rotary
from omniloom.types import RuleKernel, Segments


class DecayGate(nn.Module):
    """How much of its state each head keeps at a token. A module of its own, so that its parameters stay float32.

    What takes part of it in a layer is handed to the layer's call (`GatedDeltaRule.ahead`).
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(num_heads))
        self.dt_bias = nn.Parameter(torch.ones(num_heads))

    def forward(self) -> Tensor:
        """Rates and biases, float32 [2, H]: the log of what is kept at x [T, H] is rate * softplus(x + bias)."""
        return torch.stack((-self.A_log.float().exp(), self.dt_bias.float()))


class ShortConvolution(nn.Module):
    """The weights of a convolution over a token and those before it, each channel by itself; the core computes it."""

    def __init__(self, num_channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_channels, width))


class DeltaRuleCore(nn.Module):
    """What looks at other tokens, without parameters, so that context parallelism can put its exchange around it."""

    def __init__(self, *, key_head_dim: int, value_head_dim: int, kernel: RuleKernel) -> None:
        super().__init__()
        self.key_head_dim, self.value_head_dim = key_head_dim, value_head_dim
        self.kernel: RuleKernel = kernel
        if kernel == "fla":
            open_fla()  # now, and not in the first step

    def widths(self, num_channels: int, num_value_heads: int) -> tuple[int, int, int]:
        """How many of the channels are those of q, k and v, in this order."""
        values = num_value_heads * self.value_head_dim
        keys = (num_channels - values) // 2
        return keys, keys, values

    def forward(self, qkv: Tensor, weight: Tensor, decay: Tensor, beta: Tensor, segments: Segments) -> Tensor:
        """qkv [T, channels of q, k and v], convolution's weight [channels, K], decay, beta [T, Hv] -> [T, Hv, Dv]."""
        widths = self.widths(qkv.shape[1], beta.shape[1])
        q, k, v = causal_convolution(qkv, weight, segments).split(widths, dim=1)
        q, k = (x.unflatten(1, (-1, self.key_head_dim)) for x in (q, k))
        v = v.unflatten(1, (-1, self.value_head_dim))
        return gated_delta_rule(q, k, v, decay, beta, segments, kernel=self.kernel)


class GatedDeltaRule(nn.Module):
    """Takes the place of attention in a decoder layer."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_key_heads: int,
        num_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        convolution_width: int,
        norm_eps: float,
        kernel: RuleKernel,
    ) -> None:
        super().__init__()
        values = num_value_heads * value_head_dim
        channels = 2 * num_key_heads * key_head_dim + values
        self.in_proj_qkv = Linear(hidden_size, channels, bias=False)
        self.in_proj_z = Linear(hidden_size, values, bias=False)
        self.in_proj_b = Linear(hidden_size, num_value_heads, bias=False)
        self.in_proj_a = Linear(hidden_size, num_value_heads, bias=False)
        self.conv1d = ShortConvolution(channels, convolution_width)
        self.decay = DecayGate(num_value_heads)
        self.recurrence = DeltaRuleCore(key_head_dim=key_head_dim, value_head_dim=value_head_dim, kernel=kernel)
        self.norm = RMSNorm(value_head_dim, norm_eps)
        self.out_proj = Linear(values, hidden_size, bias=False)

    def ahead(self) -> tuple[Tensor, ...]:
        """What a layer hands to `forward` behind the other inputs."""
        return (self.decay(),)

    def forward(
        self, hidden: Tensor, rotary: Rotary, segments: Segments, draw_key: Tensor | None, gate: Tensor
    ) -> Tensor:
        """hidden [T, C] -> [T, C]; positions are in the order of tokens alone."""
        projections = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        qkv, z, b, a = linears(hidden, *(projection.as_map(draw_key) for projection in projections))
        rate, bias = gate.unbind()
        decay = rate * F.softplus(a.float() + bias)  # float32 [T, Hv]
        out = self.recurrence(qkv, self.conv1d.weight, decay, b.sigmoid(), segments)  # [T, Hv, Dv]
        out, passed = self.norm(out), F.silu(z.float()).view(out.shape)
        return self.out_proj((out * passed).to(out.dtype).flatten(1), draw_key)
