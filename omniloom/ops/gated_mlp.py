"""The gated feed-forward (SwiGLU) of dense models.

Of what lies between its three products only what went into the activation is kept for backward; the rest is made again,
the norm before them too.
On CPU some rows at a time go through all products, so that what is between them stays in the cache: as wide as
feed-forwards are, passes over all rows, and fresh memory for each, cost as much as the products themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.ops.norm import normalise, normalise_backward

BLOCK_ELEMENTS = 2**20  # of the wide intermediate on CPU: 4 MiB of float32


def gated_mlp(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """down (silu(gate y) * up y) with y = x, or y = rms_norm(x, norm, eps) if `norm` [C] is given.

    x [N, C], gate and up [I, C], down [C, I] -> [N, C]. Source: Shazeer 2020 (arXiv 2002.05202).
    """
    return _GatedMLP.apply(eps, x, norm, gate, up, down)


def gated_mlp_reference(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What `gated_mlp` computes, each step for all rows before the next."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, x: Tensor, norm: Tensor | None, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], down.shape[0])
        kept: list[Tensor] = []  # block by block: what one large tensor would take, the allocator cannot reuse
        for block in _blocks(x, gate):
            rows = x[block] if norm is None else normalise(x[block], norm, eps)[0]
            gated, upped = rows @ gate.T, rows @ up.T  # [n, I]
            torch.mm(F.silu(gated).mul_(upped), down.T, out=out[block])
            kept += (gated, upped)
        ctx.save_for_backward(x, norm, gate, up, down, *kept)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, gate, up, down, *kept = ctx.saved_tensors
        _, x_wanted, *wanted = ctx.needs_input_grad
        x_grad = torch.empty_like(x) if x_wanted or wanted[0] else None
        # blocks add up in at least float32, since in bfloat16 the sum over many would lose the small ones
        wide = torch.promote_types(gate.dtype, torch.float32) if len(kept) > 2 else gate.dtype
        sums: list[Tensor | None] = [None] * 4  # of norm, gate, up and down
        for number, block in enumerate(_blocks(x, gate)):
            rows, scale = (x[block], None) if norm is None else normalise(x[block], norm, ctx.eps)
            gated, upped = kept[2 * number : 2 * number + 2]
            active, inner_grad = F.silu(gated), grad[block] @ down  # [n, I]
            if wanted[3]:
                sums[3] = _add(sums[3], grad[block].T @ (active * upped), wide)
            up_grad = active.mul_(inner_grad)
            gate_grad = torch.ops.aten.silu_backward(inner_grad.mul_(upped), gated)
            for place, wide_grad in ((1, gate_grad), (2, up_grad)):
                if wanted[place]:
                    sums[place] = _add(sums[place], wide_grad.T @ rows, wide)
            if x_grad is None:
                continue
            torch.mm(gate_grad, gate, out=x_grad[block])
            x_grad[block].addmm_(up_grad, up)
            if norm is not None:
                x_grad[block], norm_grad = normalise_backward(x_grad[block], x[block], norm, scale)
                sums[0] = _add(sums[0], norm_grad, wide)
        return None, x_grad, *(None if total is None else total.to(gate.dtype) for total in sums)


def _add(total: Tensor | None, part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.to(dtype) if total is None else total.add_(part)


def _blocks(x: Tensor, gate: Tensor) -> list[slice]:
    """Rows that go through all products together; at least one block, which may be empty."""
    if x.device.type != "cpu" or not x.shape[0]:
        return [slice(None)]
    size = max(1, BLOCK_ELEMENTS // gate.shape[0])
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]
