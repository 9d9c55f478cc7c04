"""Stacked gated feed-forwards (SwiGLU), one for each group of rows.

Of what lies between their products only what went into the activation is kept for backward; the rest is made again. On
accelerators the products are grouped GEMMs over all groups. On CPU `routed_experts` takes one group after another from
the tokens themselves, so that nothing between them and the result leaves the cache: passes over all copies of all
tokens cost as much as the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.ops.grouped_gemm import grouped_linear, grouped_linear_reference, grouped_outer


class Copies(NamedTuple):
    """Which copies of tokens the sorted rows are: `slot` and `row` of `sort_by_group`, and a weight for each copy."""

    slot: Tensor  # int64 [P]
    row: Tensor  # int64 [T x K]
    weights: Tensor  # [T, K]


def gated_experts(rows: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    """down[e] (silu(gate[e] x) * up[e] x) for each row x of each group e.

    Args:
        rows: [N, C], sorted by group.
        gate_up: [E, 2 I, C], gate's rows before up's.
        down: [E, C, I].
        offsets: int32 [E], where each group ends in `rows`; empty groups repeat the bound before them.

    Returns: [N, C]. Rows past the last bound are uninitialised memory, in the gradient of `rows` too.
    Source: Shazeer 2020 (arXiv 2002.05202).
    """
    return _GatedExperts.apply(rows, gate_up, down, offsets)


def routed_experts(tokens: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, copies: Copies) -> Tensor:
    """Weighted sum over a token's copies of what `gated_experts` makes of them: tokens [T, C] -> [T, C].

    Weights and offsets as in `gated_experts`, the groups being those of the sorted copies.
    """
    return _RoutedExperts.apply(tokens.device.type == "cpu", tokens, gate_up, down, offsets, *copies)


def routed_experts_reference(tokens: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, copies: Copies) -> Tensor:
    """What `routed_experts` computes, each step for all copies before the next."""
    sorted_rows = tokens[copies.slot // copies.weights.shape[1]]
    gate, up = grouped_linear_reference(sorted_rows, gate_up, offsets).chunk(2, dim=-1)
    rows = grouped_linear_reference(F.silu(gate) * up, down, offsets)
    return (rows[copies.row].unflatten(0, copies.weights.shape) * copies.weights[:, :, None]).sum(dim=1)


class _GatedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
        out, wide = _products(rows, gate_up, down, offsets)
        ctx.save_for_backward(rows, wide, gate_up, down, offsets)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(grad, *ctx.saved_tensors, None, ctx.needs_input_grad)[:3], None


class _RoutedExperts(torch.autograd.Function):
    """`by_group` takes one group after another, which only the CPU can."""

    @staticmethod
    def forward(
        ctx: Any,
        by_group: bool,
        tokens: Tensor,
        gate_up: Tensor,
        down: Tensor,
        offsets: Tensor,
        slot: Tensor,
        row: Tensor,
        weights: Tensor,
    ) -> Tensor:
        if by_group:
            out, wide = _cpu_routed_experts(tokens, gate_up, down, offsets, slot, row, weights)
        else:
            rows, wide = _products(tokens.index_select(0, slot // weights.shape[1]), gate_up, down, offsets)
            # a bag is a token: an embedding's kernel happens to be the fused weighted gather
            out = F.embedding_bag(row.view_as(weights), rows, mode="sum", per_sample_weights=weights)
        ctx.save_for_backward(tokens, wide, gate_up, down, offsets, slot, row, weights)
        ctx.by_group = by_group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: a recomputing backward has each for one use
        tokens, wide, gate_up, down, offsets, slot, row, weights = saved
        wanted = list(ctx.needs_input_grad[1:4])
        if ctx.by_group:
            *grads, weights_grad = _cpu_routed_experts_backward(grad.contiguous(), *saved, wanted)
            kept = (value if want else None for value, want in zip(grads, wanted, strict=True))
            return None, *kept, None, None, None, weights_grad
        token = slot // weights.shape[1]
        weight = weights.new_zeros(slot.shape[0], 1).scatter_(0, row[:, None], weights.view(-1, 1))
        rows, out_grad = tokens.index_select(0, token), grad.index_select(0, token)
        rows_grad, *grads, weights_grad = _gradients(out_grad, rows, wide, gate_up, down, offsets, weight, wanted)
        tokens_grad = None if rows_grad is None else F.embedding_bag(row.view_as(weights), rows_grad, mode="sum")
        assert weights_grad is not None
        return None, tokens_grad, *grads, None, None, None, weights_grad[row].view_as(weights)


# ---------------------------------------------------------------------------------------- all groups in one call


def _products(rows: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """What the groups make of their rows [N, C], and what went into the activation [N, 2 I]."""
    wide = grouped_linear(rows, gate_up, offsets)
    gate, up = wide.chunk(2, dim=-1)
    return grouped_linear(F.silu(gate).mul_(up), down, offsets), wide


def _gradients(
    grad: Tensor,
    rows: Tensor,
    wide: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rows, gate_up, down and of `weight` [N], by which each row of the result is multiplied if given."""
    gate, up = wide.chunk(2, dim=-1)
    active, inner_grad = F.silu(gate), grouped_linear(grad, down.mT, offsets)  # [N, I]
    inner = active * up
    weight_grad = None
    if weight is not None:
        # <grad, down inner> = <down^T grad, inner>: the weight's gradient needs no result of the expert
        weight_grad = torch.linalg.vecdot(inner_grad, inner)
        inner, inner_grad = inner.mul_(weight), inner_grad.mul_(weight)
    down_grad = grouped_outer(grad, inner, offsets) if wanted[2] else None
    wide_grad = torch.empty_like(wide)
    gate_grad, up_grad = wide_grad.chunk(2, dim=-1)
    torch.mul(inner_grad, active, out=up_grad)
    torch.ops.aten.silu_backward.grad_input(inner_grad.mul_(up), gate, grad_input=gate_grad)
    gate_up_grad = grouped_outer(wide_grad, rows, offsets) if wanted[1] else None
    rows_grad = grouped_linear(wide_grad, gate_up.mT, offsets) if wanted[0] else None
    return rows_grad, gate_up_grad, down_grad, weight_grad


# ---------------------------------------------------------------------------------------- group by group, on CPU


@torch.library.custom_op("omniloom::cpu_routed_experts", mutates_args=())
def _cpu_routed_experts(
    tokens: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, slot: Tensor, row: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the sums [T, C], and of every copy what went into its activation [P, 2 I]."""
    wide = tokens.new_empty(slot.shape[0], gate_up.shape[1])
    rows = tokens.new_empty(slot.shape[0], tokens.shape[1])
    token = slot // weights.shape[1]
    for group, block in _groups(offsets):
        torch.mm(tokens.index_select(0, token[block]), gate_up[group].T, out=wide[block])
        gate, up = wide[block].chunk(2, dim=-1)
        torch.mm(F.silu(gate).mul_(up), down[group].T, out=rows[block])
    # a bag is a token: an embedding's kernel happens to be the fused weighted gather
    return F.embedding_bag(row.view_as(weights), rows, mode="sum", per_sample_weights=weights), wide


@torch.library.custom_op("omniloom::cpu_routed_experts_backward", mutates_args=())
def _cpu_routed_experts_backward(
    grad: Tensor,
    tokens: Tensor,
    wide: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    slot: Tensor,
    row: Tensor,
    weights: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, gate_up, down and weights; of the first three, nothing [0] where not `wanted`."""
    copies_grad = torch.empty(slot.shape[0], tokens.shape[1], dtype=tokens.dtype) if wanted[0] else tokens.new_empty(0)
    # zeros: an expert may have no rows
    gate_up_grad, down_grad = (
        torch.zeros_like(weight, memory_format=torch.contiguous_format) if want else weight.new_empty(0)
        for weight, want in zip((gate_up, down), wanted[1:], strict=True)
    )
    token, weights_grad = slot // weights.shape[1], weights.new_zeros(slot.shape[0])
    weight = weights.new_zeros(slot.shape[0], 1).scatter_(0, row[:, None], weights.view(-1, 1))  # 0 for filling
    for group, block in _groups(offsets):
        rows, out_grad = tokens.index_select(0, token[block]), grad.index_select(0, token[block])  # [n, C]
        gate, up = wide[block].chunk(2, dim=-1)
        active, inner_grad = F.silu(gate), out_grad @ down[group]  # [n, I]
        inner = active * up
        # <grad, down inner> = <down^T grad, inner>: the weight's gradient needs no result of the expert
        torch.linalg.vecdot(inner_grad, inner, out=weights_grad[block])
        if wanted[2]:
            torch.mm(out_grad.T, inner.mul_(weight[block]), out=down_grad[group])
        inner_grad *= weight[block]
        wide_grad = torch.empty_like(wide[block])
        gate_grad, up_grad = wide_grad.chunk(2, dim=-1)
        torch.mul(inner_grad, active, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(inner_grad.mul_(up), gate, grad_input=gate_grad)
        if wanted[1]:
            torch.mm(wide_grad.T, rows, out=gate_up_grad[group])
        if wanted[0]:
            torch.mm(wide_grad, gate_up[group], out=copies_grad[block])
    tokens_grad = F.embedding_bag(row.view_as(weights), copies_grad, mode="sum") if wanted[0] else copies_grad
    return tokens_grad, gate_up_grad, down_grad, weights_grad[row].view_as(weights)


def _groups(offsets: Tensor) -> list[tuple[int, slice]]:
    """The groups that have rows, with their rows. Reads the bounds on the host, hence CPU only."""
    bounds = [0, *offsets.tolist()]
    return [(group, slice(low, high)) for group, (low, high) in enumerate(pairwise(bounds)) if high > low]


def _fake(
    tokens: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, slot: Tensor, row: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    return out, tokens.new_empty(slot.shape[0], gate_up.shape[1])


def _fake_backward(_grad: Tensor, tokens: Tensor, _wide: Tensor, gate_up: Tensor, down: Tensor, *others):
    *_, weights, wanted = others
    first, second, third = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if want else x.new_empty(0)
        for x, want in zip((tokens, gate_up, down), wanted, strict=True)
    )
    return first, second, third, torch.empty_like(weights)


_cpu_routed_experts.register_fake(_fake)
_cpu_routed_experts_backward.register_fake(_fake_backward)
