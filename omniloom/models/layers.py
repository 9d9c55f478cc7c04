"""Layers that several components share: norm, attention, feed-forward.

Plain algebra on packed rows. Head counts and widths come from the weights' shapes, so a layer works on a shard of its
parameters as on all of them. Ranks, devices and segment bounds are somebody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniloom.ops.attention import HeadNorms, segment_attention
from omniloom.ops.gated_mlp import gated_mlp
from omniloom.ops.linear_map import LinearMap, linears
from omniloom.ops.norm import rms_norm
from omniloom.ops.rotary import Rotary, apply_rotary
from omniloom.types import Kernel, Segments

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
)


class RMSNorm(nn.Module):
    """x / rms(x) x factor over the last dim, in float32. Source: Zhang and Sennrich 2019 (arXiv 1910.07467).

    The factor is the weight, or 1 + the weight if `zero_centred`: then weight decay draws it to 1.
    """

    def __init__(self, size: int, eps: float, *, zero_centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if zero_centred else torch.ones(size))
        self.eps = eps
        self.zero_centred = zero_centred

    @property
    def factor(self) -> Tensor:
        """[size]; float32 if zero-centred, since bfloat16 would round 1 + weight."""
        return 1.0 + self.weight.float() if self.zero_centred else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.factor, self.eps)


class Linear(nn.Linear):
    """A linear in whose place an adapted one may stand, which draws at random by `draw_key`."""

    def forward(self, input: Tensor, draw_key: Tensor | None = None) -> Tensor:
        return super().forward(input)

    def as_map(self, draw_key: Tensor | None) -> LinearMap:
        """For operations that take several linears at once."""
        return LinearMap(self.weight, self.bias)


class LayerCall(nn.Module):
    """Calls a layer. Without parameters, so that a call that recomputes can take its place."""

    def forward(self, index: int, layer: Callable[..., Any], *inputs: object) -> Any:
        return layer(*inputs)


class AttentionCore(nn.Module):
    """Attention proper, without parameters, so that context parallelism can put its exchange around it."""

    def __init__(self, *, causal: bool, kernel: Kernel) -> None:
        super().__init__()
        self.causal = causal
        self.kernel: Kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, norms: HeadNorms | None = None) -> Tensor:
        """q [T, H, D], k and v [T, Hkv, D] -> [T, H, D]; `norms` are applied to q and k first."""
        return segment_attention(q, k, v, segments, causal=self.causal, kernel=self.kernel, norms=norms)


class Attention(nn.Module):
    """Grouped-query attention with separate projections; optional biases, q/k norm, rotary positions, output gate.

    Half of what `q_proj` makes of a head is then the gate, whose sigmoid the head's output is multiplied by.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        biases: tuple[bool, bool, bool, bool],
        qk_norm_eps: float | None,
        causal: bool,
        kernel: Kernel,
        zero_centred_norms: bool = False,
        output_gate: bool = False,
    ) -> None:
        """`biases` are those of q, k, v and output; `qk_norm_eps` None leaves the norms out."""
        super().__init__()
        self.head_dim = head_dim
        self.output_gate = output_gate
        self.q_proj = Linear(hidden_size, (1 + output_gate) * num_heads * head_dim, bias=biases[0])
        self.k_proj = Linear(hidden_size, num_key_value_heads * head_dim, bias=biases[1])
        self.v_proj = Linear(hidden_size, num_key_value_heads * head_dim, bias=biases[2])
        norm = partial(RMSNorm, head_dim, zero_centred=zero_centred_norms)
        self.q_norm = None if qk_norm_eps is None else norm(qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else norm(qk_norm_eps)
        self.core = AttentionCore(causal=causal, kernel=kernel)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=biases[3])

    def forward(
        self, hidden: Tensor, rotary: Rotary | None, segments: Segments, draw_key: Tensor | None = None
    ) -> Tensor:
        """hidden [T, C] -> [T, C]."""
        heads = (-1, self.head_dim)
        maps = (projection.as_map(draw_key) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rows.unflatten(-1, heads) for rows in linears(hidden, *maps))  # [T, H, D], twice [T, Hkv, D]
        q, *gate = q.unflatten(1, (-1, 2)).unbind(2) if self.output_gate else (q,)  # backward of unbind is a copy
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            assert rotary is not None, "heads that are normed are turned too"
            norms = HeadNorms(self.q_norm.factor, self.k_norm.factor, (self.q_norm.eps, self.k_norm.eps), rotary)
        elif rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        out = self.core(q, k, v, segments, norms)  # [T, H, D]
        if gate:
            out = out * gate[0].sigmoid()
        return self.o_proj(out.flatten(1), draw_key)


class FusedAttention(nn.Module):
    """Multi-head attention with one projection for q, k and v, each of all heads in turn; vision towers have it."""

    def __init__(self, *, hidden_size: int, num_heads: int, kernel: Kernel) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.core = AttentionCore(causal=False, kernel=kernel)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, rotary: Rotary, segments: Segments, draw_key: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(hidden, draw_key).unflatten(-1, (3, -1, self.head_dim)).unbind(1)  # each [P, H, D]
        out = self.core(apply_rotary(q, rotary), apply_rotary(k, rotary), v, segments)
        return self.proj(out.flatten(1), draw_key)


class GatedProduct(nn.Module):
    """A gated feed-forward as a module without parameters, so that weights may be shards."""

    def forward(
        self,
        hidden: Tensor,
        gate: LinearMap,
        up: LinearMap,
        down: LinearMap,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """As `ops.gated_mlp`: hidden [T, C], its norm's weight [C] -> [T, C]."""
        return gated_mlp(hidden, gate, up, down, norm, eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) x up(x)). Source: Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, *, hidden_size: int, intermediate_size: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        if activation != "silu":
            raise ValueError(f"hidden_act {activation!r} of a gated feed-forward is not supported; expected silu")
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.product = GatedProduct()

    def forward(self, hidden: Tensor, draw_key: Tensor | None = None, norm: RMSNorm | None = None) -> Tensor:
        """hidden [T, C] -> [T, C]; `norm` is applied to it first."""
        maps = (projection.as_map(draw_key) for projection in (self.gate_proj, self.up_proj, self.down_proj))
        return self.product(hidden, *maps, *(() if norm is None else (norm.factor, norm.eps)))


class MLP(nn.Module):
    """fc2(act(fc1(x))) with biases; the towers' feed-forward, and what makes rows of one width those of another."""

    def __init__(
        self, *, hidden_size: int, intermediate_size: int, activation: str, out_size: int | None = None
    ) -> None:
        """`out_size`: None for `hidden_size`."""
        super().__init__()
        self.fc1 = Linear(hidden_size, intermediate_size)
        self.act = ACTIVATIONS[activation]
        self.fc2 = Linear(intermediate_size, out_size or hidden_size)

    def forward(self, hidden: Tensor, draw_key: Tensor | None = None) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden, draw_key)), draw_key)
