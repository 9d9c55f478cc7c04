"""Stacked gated feed-forwards (SwiGLU), one for each group of rows.

On accelerators two grouped GEMMs with the activation between them. On CPU `routed_experts` takes one group after
another from the tokens themselves, so that nothing between them and the result leaves the cache: passes over all
copies of all tokens cost as much as the products.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omniloom.ops.grouped_gemm import combine_copies, gather_copies, grouped_linear, grouped_linear_reference


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
    gate, up = grouped_linear(rows, gate_up, offsets).chunk(2, dim=-1)
    return grouped_linear(F.silu(gate) * up, down, offsets)


def routed_experts(tokens: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, copies: Copies) -> Tensor:
    """Weighted sum over a token's copies of what `gated_experts` makes of them: tokens [T, C] -> [T, C].

    Weights and offsets as in `gated_experts`, the groups being those of the sorted copies.
    """
    if tokens.device.type == "cpu":
        return _cpu_routed_experts(tokens, gate_up, down, offsets, *copies)[0]
    rows = gather_copies(tokens, copies.slot, copies.row, copies.weights.shape[1])
    return combine_copies(gated_experts(rows, gate_up, down, offsets), copies.weights, copies.slot, copies.row)


def routed_experts_reference(tokens: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, copies: Copies) -> Tensor:
    """What `routed_experts` computes, each step for all copies before the next."""
    sorted_rows = tokens[copies.slot // copies.weights.shape[1]]
    gate, up = grouped_linear_reference(sorted_rows, gate_up, offsets).chunk(2, dim=-1)
    rows = grouped_linear_reference(F.silu(gate) * up, down, offsets)
    return (rows[copies.row].unflatten(0, copies.weights.shape) * copies.weights[:, :, None]).sum(dim=1)


# ---------------------------------------------------------------------------------------- on CPU


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


def _save_for_backward(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, gate_up, down, *others = inputs
    ctx.save_for_backward(tokens, output[1], gate_up, down, *others)
    ctx.set_materialize_grads(False)  # the second output has no gradient, and zeros in its shape cost a pass


def _differentiate(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    wanted = list(ctx.needs_input_grad[:3])
    *grads, weights_grad = _cpu_routed_experts_backward(grad.contiguous(), *ctx.saved_tensors, wanted)
    return *(value if want else None for value, want in zip(grads, wanted, strict=True)), None, None, None, weights_grad


_cpu_routed_experts.register_fake(_fake)
_cpu_routed_experts_backward.register_fake(_fake_backward)
_cpu_routed_experts.register_autograd(_differentiate, setup_context=_save_for_backward)
