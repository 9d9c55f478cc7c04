"""Stacked gated feed-forwards (SwiGLU), one for each group of rows.

Of what lies between their products only what went into the activation is kept for backward; the rest is made again. On
accelerators the products are grouped GEMMs over all groups. On CPU `routed_experts` takes one group after another from
the tokens themselves, so that nothing between them and the result leaves the cache: passes over all copies of all
tokens cost as much as the products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.ops.grouped_gemm import grouped_linear_reference, sum_bags
from omniloom.ops.linear_map import NUM_PARTS, Dropout, LinearMap, maps_of

Dropouts = tuple[Dropout | None, ...]


class Copies(NamedTuple):
    """Which copies of tokens the sorted rows are, as `sort_by_group` says, and a weight for each copy."""

    slot: Tensor  # int64 [P]
    row: Tensor  # int64 [T, K]
    weights: Tensor  # [T, K]


def gated_experts(tokens: Tensor, gate_up: LinearMap, down: LinearMap, offsets: Tensor, copies: Copies) -> Tensor:
    """The sum over a token's copies of weight x down[e](silu(gate[e](x)) * up[e](x)), e being the copy's group.

    Args:
        tokens: [T, C], in any order.
        gate_up: stacked, to [P, 2 I], gate's before up's.
        down: stacked, from [P, I] to [P, C].
        offsets: int32 [E], where each group ends in the sorted rows; empty groups repeat the bound before them.

    Returns: [T, C].
    Source: Shazeer 2020 (arXiv 2002.05202).
    """
    if tokens.device.type != "cpu":
        return grouped_experts(tokens, gate_up, down, offsets, copies)
    return _CPUExperts.apply(*_inputs(tokens, gate_up, down, offsets, copies))


def grouped_experts(tokens: Tensor, gate_up: LinearMap, down: LinearMap, offsets: Tensor, copies: Copies) -> Tensor:
    """As `gated_experts`, all groups in one call each."""
    place, wide = _GatedExperts.apply(*_inputs(tokens, gate_up, down, offsets, copies))
    return _Result.apply(place, wide, down, offsets, *copies[1:])


def _inputs(tokens: Tensor, gate_up: LinearMap, down: LinearMap, offsets: Tensor, copies: Copies) -> tuple[Any, ...]:
    return (gate_up.dropout, down.dropout), tokens, offsets, *copies, *gate_up.parts, *down.parts


def routed_experts_reference(tokens: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, copies: Copies) -> Tensor:
    """What `gated_experts` computes, each step for all copies before the next."""
    sorted_rows = tokens[copies.slot // copies.weights.shape[1]]
    gate, up = grouped_linear_reference(sorted_rows, gate_up, offsets).chunk(2, dim=-1)
    rows = grouped_linear_reference(F.silu(gate) * up, down, offsets)
    return (rows[copies.row] * copies.weights[:, :, None]).sum(dim=1)


# ---------------------------------------------------------------------------------------- all groups in one call


class _GatedExperts(torch.autograd.Function):
    """`parts` are those of gate_up and down.

    Returns what went into the activation, and a place for the gradient of the result, without memory: `_Result` is
    apart since a recomputing backward needs all of the former and nothing of the latter, and stops between the two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        dropouts: Dropouts,
        tokens: Tensor,
        offsets: Tensor,
        slot: Tensor,
        row: Tensor,
        weights: Tensor,
        *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        gate_up, _ = maps_of(parts, dropouts)
        rows = tokens.index_select(0, slot // weights.shape[1])
        terms, narrow = gate_up.dense(rows.dtype).of_groups(rows, offsets, named=True)
        wide = _sum(terms)  # [N, 2 I]
        ctx.save_for_backward(tokens, offsets, slot, row, weights, wide, narrow, *parts)
        ctx.dropouts = dropouts
        ctx.mark_non_differentiable(wide)
        ctx.set_materialize_grads(False)  # zeros as large as `wide` otherwise
        return tokens.new_zeros(()).expand_as(tokens), wide

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: a recomputing backward has each for one use
        tokens, offsets, slot, row, weights, wide, narrow, *parts = saved
        maps = maps_of(parts, ctx.dropouts)
        wanted = [ctx.needs_input_grad[start:][:NUM_PARTS] for start in (6, 6 + NUM_PARTS)]
        token = slot // weights.shape[1]
        weight = _weight_of_rows(slot, row, weights)
        rows, rows_out_grad = (each.index_select(0, token) for each in (tokens, grad))
        terms, down_narrow_grad = maps[1].dense(rows.dtype).row_gradient_of_groups(rows_out_grad, offsets)
        wide_grad, inner, weight_grad = _through_activation(_sum(terms), wide, weight)
        terms, narrow_grad = maps[0].dense(rows.dtype).row_gradient_of_groups(wide_grad, offsets)
        of_down = (rows_out_grad, down_narrow_grad, inner)
        grads = maps[0].weight_gradients(wide_grad, narrow_grad, rows, wanted[0], offsets, narrow=narrow)
        grads += maps[1].weight_gradients(*of_down, wanted[1], offsets, row_weight=weight)
        return None, _sum_copies(terms, row), None, None, None, weight_grad[row], *grads


class _Result(torch.autograd.Function):
    """What the experts return. Its gradient goes where `place` came from."""

    @staticmethod
    def forward(
        ctx: Any,
        place: Tensor,
        wide: Tensor,
        down: LinearMap,
        offsets: Tensor,
        row: Tensor,
        weights: Tensor,
    ) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        terms, _ = down.dense(wide.dtype).of_groups(F.silu(gate).mul_(up), offsets)
        return _sum_copies(terms, row, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None, None


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """Into fresh memory: selective recompute keeps what grouped GEMM returned, as it was."""
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _sum_copies(terms: Sequence[Tensor], row: Tensor, weights: Tensor | None = None) -> Tensor:
    """Rows `row` [T, K] of what `terms` [P, C] add up to, times their `weights` if given, summed: [T, C]."""
    if row.shape[1] == 1:  # as many bags as rows: the sum first is fewer passes
        terms = [_sum(terms)]
    bags = (sum_bags(term, row, weights) for term in terms)
    total = next(bags)
    for bag in bags:
        total += bag
    return total


def _weight_of_rows(slot: Tensor, row: Tensor, weights: Tensor) -> Tensor:
    """The weight of each sorted row, 0 for filling: [P, 1]."""
    return weights.new_zeros(slot.shape[0], 1).scatter_(0, row.view(-1, 1), weights.reshape(-1, 1))


def _through_activation(inner_grad: Tensor, wide: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `wide` [P, 2 I] and of `weight` [P, 1], and what went into the second product [P, I].

    `inner_grad` [P, I] is the gradient of the last before `weight`, by which each row's result is multiplied; it is
    overwritten.
    """
    gate, up = wide.chunk(2, dim=-1)
    active = F.silu(gate)  # [P, I]
    inner = active * up
    # <grad, down inner> = <down^T grad, inner>: the weight's gradient needs no result of the expert
    weight_grad = torch.linalg.vecdot(inner_grad, inner)
    inner_grad = inner_grad.mul_(weight)
    if torch.compiler.is_compiling():  # fuses what is written, and takes no `out` with gaps
        wide_grad = torch.cat([torch.ops.aten.silu_backward(inner_grad * up, gate), inner_grad * active], dim=-1)
        return wide_grad, inner, weight_grad
    wide_grad = torch.empty_like(wide)
    gate_grad, up_grad = wide_grad.chunk(2, dim=-1)
    torch.mul(inner_grad, active, out=up_grad)
    torch.ops.aten.silu_backward.grad_input(inner_grad.mul_(up), gate, grad_input=gate_grad)
    return wide_grad, inner, weight_grad


# ---------------------------------------------------------------------------------------- group by group, on CPU


class _CPUExperts(torch.autograd.Function):
    """As `_GatedExperts` and `_Result`."""

    @staticmethod
    def forward(
        ctx: Any,
        dropouts: Dropouts,
        tokens: Tensor,
        offsets: Tensor,
        slot: Tensor,
        row: Tensor,
        weights: Tensor,
        *parts: Tensor | None,
    ) -> Tensor:
        settings = _plain(dropouts)
        out, wide = _cpu_routed_experts(tokens, offsets, slot, row, weights, parts, *settings)
        ctx.save_for_backward(tokens, offsets, slot, row, weights, wide, *parts)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted, saved = list(ctx.needs_input_grad[6:]), ctx.saved_tensors
        results = _cpu_routed_experts_backward(grad.contiguous(), *saved[:6], saved[6:], wanted, *ctx.settings)
        tokens_grad, weights_grad, *grads = results
        kept = (each if want else None for each, want in zip(grads, wanted, strict=True))
        return None, tokens_grad, None, None, None, weights_grad, *kept


@torch.library.custom_op("omniloom::cpu_routed_experts", mutates_args=())
def _cpu_routed_experts(
    tokens: Tensor,
    offsets: Tensor,
    slot: Tensor,
    row: Tensor,
    weights: Tensor,
    parts: Sequence[Tensor | None],
    rates: Sequence[float],
    salts: Sequence[int],
    key: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns the sums [T, C], and of every copy what went into its activation [P, 2 I]."""
    maps = maps_of(parts, _dropouts(rates, salts, key))
    wide = tokens.new_empty(slot.shape[0], maps[0].weight.shape[1])
    rows = tokens.new_empty(slot.shape[0], tokens.shape[1])
    token = slot // weights.shape[1]
    for group, block in _groups(offsets):
        gate_up, down = (each.of_group(group).dense(tokens.dtype) for each in maps)
        gate_up(tokens.index_select(0, token[block]), start=block.start, out=wide[block])
        gate, up = wide[block].chunk(2, dim=-1)
        down(F.silu(gate).mul_(up), start=block.start, out=rows[block])
    return sum_bags(rows, row, weights), wide


@torch.library.custom_op("omniloom::cpu_routed_experts_backward", mutates_args=())
def _cpu_routed_experts_backward(
    grad: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    slot: Tensor,
    row: Tensor,
    weights: Tensor,
    wide: Tensor,
    parts: Sequence[Tensor | None],
    wanted: Sequence[bool],
    rates: Sequence[float],
    salts: Sequence[int],
    key: Tensor | None,
) -> list[Tensor]:
    """Gradients of tokens, weights and parts; of the last, nothing [0] where not `wanted`."""
    maps = maps_of(parts, _dropouts(rates, salts, key))
    copies_grad, weights_grad = tokens.new_empty(slot.shape[0], tokens.shape[1]), weights.new_zeros(slot.shape[0])
    grads = _like_wanted(torch.zeros_like, tokens, parts, wanted)  # zeros: an expert may have no rows
    token = slot // weights.shape[1]
    weight = _weight_of_rows(slot, row, weights)
    of_maps = (wanted[:NUM_PARTS], wanted[NUM_PARTS:])
    for group, block in _groups(offsets):
        rows, out_grad = tokens.index_select(0, token[block]), grad.index_select(0, token[block])  # [n, C]
        start, (gate_up, down) = block.start, (each.of_group(group).dense(tokens.dtype) for each in maps)
        inner_grad, down_narrow_grad = down.row_gradient(out_grad, start=start)
        wide_grad, inner, weights_grad[block] = _through_activation(inner_grad, wide[block], weight[block])
        _, narrow_grad = gate_up.row_gradient(wide_grad, start=start, out=copies_grad[block])
        of_down = (out_grad, down_narrow_grad, inner)
        of_group = gate_up.weight_gradients(wide_grad, narrow_grad, rows, of_maps[0], start=start)
        of_group += down.weight_gradients(*of_down, of_maps[1], start=start, row_weight=weight[block])
        for whole, part in zip(grads, of_group, strict=True):
            if part is not None:
                whole[group] = part
    return [sum_bags(copies_grad, row), weights_grad[row], *grads]


def _plain(dropouts: Dropouts) -> tuple[list[float], list[int], Tensor | None]:
    """What an operation can be given: rates, of which 0 is none, salts and the key."""
    keys = [each.key for each in dropouts if each is not None]
    rates = [0.0 if each is None else each.rate for each in dropouts]
    return rates, [0 if each is None else each.salt for each in dropouts], keys[0] if keys else None


def _dropouts(rates: Sequence[float], salts: Sequence[int], key: Tensor | None) -> Dropouts:
    pairs = zip(rates, salts, strict=True)
    return tuple(Dropout(rate, salt, key) if rate and key is not None else None for rate, salt in pairs)


def _like_wanted(
    make: Callable[..., Tensor], tokens: Tensor, parts: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor]:
    pairs = zip(parts, wanted, strict=True)
    return [
        tokens.new_empty(0) if part is None or not want else make(part, memory_format=torch.contiguous_format)
        for part, want in pairs
    ]


def _groups(offsets: Tensor) -> list[tuple[int, slice]]:
    """The groups that have rows, with their rows. Reads the bounds on the host, hence CPU only."""
    bounds = [0, *offsets.tolist()]
    return [(group, slice(low, high)) for group, (low, high) in enumerate(pairwise(bounds)) if high > low]


def _fake(
    tokens: Tensor, offsets: Tensor, slot: Tensor, row: Tensor, weights: Tensor, parts: Sequence[Any], *_others: object
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    return out, tokens.new_empty(slot.shape[0], parts[0].shape[1])


def _fake_backward(_grad: Tensor, tokens: Tensor, *others: Any) -> list[Tensor]:
    _, _, _, weights, _, parts, wanted, *_ = others
    return [torch.empty_like(tokens), torch.empty_like(weights), *_like_wanted(torch.empty_like, tokens, parts, wanted)]


_cpu_routed_experts.register_fake(_fake)
_cpu_routed_experts_backward.register_fake(_fake_backward)
