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

from omniloom.ops.linear_map import NUM_PARTS, Dropout, LinearMap, maps_of
from omniloom.ops.norm import normalise, normalise_backward

Dropouts = tuple[Dropout | None, ...]
BLOCK_ELEMENTS = 2**20  # of the wide intermediate on CPU: 4 MiB of float32


def gated_mlp(
    x: Tensor, gate: LinearMap, up: LinearMap, down: LinearMap, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """down(silu(gate(y)) * up(y)) with y = x, or y = rms_norm(x, norm, eps) if `norm` [C] is given.

    x [N, C], gate and up to [N, I], down to [N, O] -> [N, O]. Source: Shazeer 2020 (arXiv 2002.05202).
    """
    # the gradient of a scale asks for what was scaled; and blocks on a CPU are in the cache here
    if x.device.type != "cpu" and down.scale is None:
        return gated_mlp_apart(x, gate, up, down, norm, eps)
    (out,) = _GatedMLP.apply(*_inputs(True, x, gate, up, down, norm, eps))
    return out


def gated_mlp_apart(
    x: Tensor, gate: LinearMap, up: LinearMap, down: LinearMap, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """As `gated_mlp`, without a scale and of rows that are one block, the last product apart."""
    place, gated, upped = _GatedMLP.apply(*_inputs(False, x, gate, up, down, norm, eps))
    return _Result.apply(place, gated, upped, down)


def _inputs(
    whole: bool, x: Tensor, gate: LinearMap, up: LinearMap, down: LinearMap, norm: Tensor | None, eps: float
) -> tuple[Any, ...]:
    settings = eps, whole, (gate.dropout, up.dropout, down.dropout)
    return settings, x, norm, *gate.parts, *up.parts, *down.parts


def gated_mlp_reference(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What `gated_mlp` computes, each step for all rows before the next."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class _GatedMLP(torch.autograd.Function):
    """`parts` are those of gate, up and down.

    Returns what `gated_mlp` does; or, not `whole`, a place for its gradient, without memory, and what went into the
    activation: `_Result` is apart since a recomputing backward needs nothing of it, and stops between the two.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[float, bool, Dropouts], x: Tensor, norm: Tensor | None, *parts: Tensor | None
    ) -> tuple[Tensor, ...]:
        eps, whole, dropouts = ctx.settings = settings
        gate, up, down = (each.dense(x.dtype) for each in maps_of(parts, dropouts))
        shape = x.shape[0], down.weight.shape[0]
        out = x.new_empty(shape) if whole else x.new_zeros(()).expand(shape)
        kept: list[Tensor] = []  # block by block: what one large tensor would take, the allocator cannot reuse
        for block in _blocks(x, gate.weight):
            rows = x[block] if norm is None else normalise(x[block], norm, eps)[0]
            gated, upped = gate(rows, start=block.start), up(rows, start=block.start)  # [n, I]
            if whole:
                down(F.silu(gated).mul_(upped), start=block.start, out=out[block])
            kept += (gated, upped)
        ctx.save_for_backward(x, norm, None if down.scale is None else out, *parts, *kept)
        if whole:
            return (out,)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # zeros as large as these otherwise
        return out, *kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        eps, _, dropouts = ctx.settings
        saved = ctx.saved_tensors  # asked for once: a recomputing backward has each for one use
        x, norm, out, *parts = saved[: 3 + 3 * NUM_PARTS]
        kept = saved[3 + len(parts) :]
        gate, up, down = (each.dense(x.dtype) for each in maps_of(parts, dropouts))
        of_gate, of_up, of_down = (ctx.needs_input_grad[3 + n * NUM_PARTS :][:NUM_PARTS] for n in range(3))
        x_grad = torch.empty_like(x)
        # blocks add up in at least float32, since in bfloat16 the sum over many would lose the small ones
        wide = torch.promote_types(x.dtype, torch.float32) if len(kept) > 2 else x.dtype
        sums: list[Tensor | None] = [None] * (1 + len(parts))  # of norm and parts
        for number, block in enumerate(_blocks(x, gate.weight)):
            rows, scale = (x[block], None) if norm is None else normalise(x[block], norm, eps)
            gated, upped = kept[2 * number : 2 * number + 2]
            active, start = F.silu(gated), block.start
            inner = active * upped if any(of_down) else active
            result = None if out is None else out[block]
            inner_grad, down_grads = down.backward(grad[block], inner, result, of_down, start=start)
            up_grad = active.mul_(inner_grad)
            gate_grad = torch.ops.aten.silu_backward(inner_grad.mul_(upped), gated)
            rows_grad, gate_grads = gate.backward(gate_grad, rows, gated, of_gate, start=start, out=x_grad[block])
            rows_grad, up_grads = up.backward(up_grad, rows, upped, of_up, start=start, out=rows_grad, adds=True)
            norm_grad = None
            if norm is not None and scale is not None:
                rows_grad, norm_grad = normalise_backward(rows_grad, x[block], norm, scale)
                if len(kept) > 2:
                    x_grad[block] = rows_grad
                else:  # all rows at once
                    x_grad = rows_grad
            parts_grads = (norm_grad, *gate_grads, *up_grads, *down_grads)
            sums = [_add(total, part, wide) for total, part in zip(sums, parts_grads, strict=True)]
        return None, x_grad, *(None if total is None else total.to(x.dtype) for total in sums)


class _Result(torch.autograd.Function):
    """What the feed-forward returns. Its gradient goes where `place` came from."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, gated: Tensor, upped: Tensor, down: LinearMap) -> Tensor:
        return down.dense(gated.dtype)(F.silu(gated).mul_(upped))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


def _add(total: Tensor | None, part: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return total if part is None else part.to(dtype) if total is None else total.add_(part)


def _blocks(x: Tensor, gate: Tensor) -> list[slice]:
    """Rows that go through all products together; at least one block, which may be empty."""
    # a compiled graph fuses what blocks keep in the cache, and would be made anew for every number of rows
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.shape[0]:
        return [slice(0, None)]
    size = max(1, BLOCK_ELEMENTS // gate.shape[0])
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]
