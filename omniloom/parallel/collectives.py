"""Differentiable collectives on plain tensors. Every function names its group, order and shapes. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def exchange_rows(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first `send[0]` rows to rank 0 of `group`, the next to rank 1, ...; no gradient passes.

    `rows` [sum(send), ...] local; returns [sum(receive), ...], the rows from rank 0 first. Collective over `group`.
    """
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row r of the result is what rank r of `group` holds for us. `counts` int64 [ranks, n], row r meant for rank r."""
    if group.size() == 1:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


_Collective = Callable[[Tensor, dist.ProcessGroup], Tensor]


class _OutAndBack(torch.autograd.Function):
    """A collective whose gradient takes another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, out: _Collective, back: _Collective) -> Tensor:
        ctx.group, ctx.back = group, back
        return out(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(gradient, ctx.group), None, None, None


def _scatter_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, H, D] of my tokens -> [t * n, H / n, D] of all tokens, my heads."""
    n = group.size()
    t, heads, dim = x.shape
    send = x.view(t, n, heads // n, dim).transpose(0, 1).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.view(n * t, heads // n, dim)


def _gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t * n, h, D] of all tokens, my heads -> [t, h * n, D] of my tokens, all heads."""
    n = group.size()
    tokens, heads, dim = x.shape
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received.view(n, tokens // n, heads, dim).transpose(0, 1).reshape(tokens // n, n * heads, dim)


def scatter_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, H, D] (a slice of the tokens, every head) -> [t * n, H / n, D] (every token, a slice of the heads).

    Ranks of `group` hold consecutive slices of tokens in rank order. Differentiable. Collective over `group`.
    Source: DeepSpeed Ulysses, arXiv 2309.14509.
    """
    return _OutAndBack.apply(x, group, _scatter_heads, _gather_heads)


def gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t * n, h, D] (every token, a slice of the heads) -> [t, h * n, D]; the inverse of `scatter_heads`."""
    return _OutAndBack.apply(x, group, _gather_heads, _scatter_heads)


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, ...] of each rank of `group` -> [n * t, ...] of all in rank order. Collective: one all-gather.

    The gradient that reaches a row is the sum of what all ranks have for it: one reduce-scatter.
    """
    return _OutAndBack.apply(rows, group, _all_gather, _reduce_scatter)


def sum_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n * t, ...], each rank's share of a sum -> [t, ...], the sums of this rank's rows.

    The way of `gather_rows`'s gradient, and back. Collective: one reduce-scatter.
    """
    return _OutAndBack.apply(rows, group, _reduce_scatter, _all_gather)


def _all_gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = rows.new_empty((group.size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_single(gathered, rows.contiguous(), group=group)
    return gathered


def _reduce_scatter(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    summed = rows.new_empty((rows.shape[0] // group.size(), *rows.shape[1:]))
    dist.reduce_scatter_single(summed, rows.contiguous(), group=group)
    return summed


def swap_rows_for_columns(x: Tensor, group: dist.ProcessGroup, num_columns: int) -> Tensor:
    """[n * t, v] of all rows, this rank's columns -> [t, num_columns] of its rows, all columns; no gradient passes.

    Columns are divided as `torch.chunk` does, so that the last ranks may have fewer. Collective: one all-to-all.
    """
    widest = -(-num_columns // group.size())
    send = F.pad(x.detach(), (0, widest - x.shape[1])).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1)[:, :num_columns]


# ---------------------------------------------------------------------------------------- as operations of torch
#
# What a recomputing backward must not do again is found by its name as an operation; and as one, a compiled layer
# takes it as a whole. Operations know groups by name.


@torch.library.custom_op("omniloom::exchange_sizes", mutates_args=())
def _exchange_sizes(counts: Tensor, group_name: str) -> tuple[Tensor, Tensor]:
    here = exchange_counts(counts, group_of(group_name)).clone()
    return here, torch.stack([counts.sum(dim=1), here.sum(dim=1)]).cpu()


@torch.library.custom_op("omniloom::sum_over_group", mutates_args=())
def _sum_over_group(counts: Tensor, group_name: str) -> Tensor:
    total = counts.clone()
    dist.all_reduce(total, group=group_of(group_name))
    return total


@_exchange_sizes.register_fake
def _(counts: Tensor, group_name: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(counts), torch.empty(2, counts.shape[0], dtype=counts.dtype)


@_sum_over_group.register_fake
def _(counts: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(counts)


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of this name. Torch has no public way back from a name that its own operations are given."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def send_rows(rows: Tensor, sizes: Tensor, num_rows: int, group_name: str) -> Tensor:
    """As `all_to_all_rows`, outside autograd."""
    send, receive = sizes.tolist()
    assert (sum(send), sum(receive)) == (rows.shape[0], num_rows), f"splits {send}, {receive} of {rows.shape[0]} rows"
    return exchange_rows(rows, send, receive, group_of(group_name))


def return_rows(rows: Tensor, sizes: Tensor, num_rows: int, group_name: str) -> Tensor:
    """The way back of `send_rows`: an operation of its own, since a recomputing backward asks for the way out alone."""
    return send_rows(rows, sizes.flip(0), num_rows, group_name)


_SENDING = tuple(
    torch.library.custom_op(f"omniloom::all_to_all_{name}", send, mutates_args=())
    for name, send in (("rows", send_rows), ("rows_back", return_rows))
)
for _operation in _SENDING:
    _operation.register_fake(lambda rows, _, num_rows, __: rows.new_empty(num_rows, *rows.shape[1:]))


def _send(returns: bool, *inputs: Any) -> Any:
    operations = torch.ops.omniloom
    return operations.all_to_all_rows_back(*inputs) if returns else operations.all_to_all_rows(*inputs)


class _AllToAllRows(torch.autograd.Function):  # the way back is cheaper here than as the operation's own
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Tensor, num_rows: int, returns: bool, group_name: str) -> Tensor:
        ctx.num_rows, ctx.returns, ctx.group_name = rows.shape[0], returns, group_name
        ctx.sizes = sizes  # not saved: a recomputing backward need not come as far as the way back
        return _send(returns, rows, sizes, num_rows, group_name)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _send(not ctx.returns, gradient, ctx.sizes, ctx.num_rows, ctx.group_name), None, None, None, None


def all_to_all_rows(
    rows: Tensor, sizes: Tensor, num_rows: int, group: dist.ProcessGroup, *, returns: bool = False
) -> Tensor:
    """Rows out by `sizes[0]` and in by `sizes[1]`, or the way back; the gradient takes the other one.

    rows local, those for rank 0 of `group` first -> [num_rows, ...], those from rank 0 first; sizes int64 [2, n] on the
    host, as `exchange_sizes` gives them. Collective over `group`: one all-to-all.
    """
    if group.size() == 1:
        return rows
    return _AllToAllRows.apply(rows, sizes, num_rows, returns, group.group_name)


def exchange_sizes(counts: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, int]:
    """Tell the ranks of `group` how many rows they will get: the one wait of the host in a layer with experts.

    counts int64 [n, E / n], row r for rank r -> the same from each rank; on the host, int64 [2, n], rows to send to
    each and rows to receive from each; and how many these are in all. Collective over `group`: one all-to-all.
    """
    here, sizes = torch.ops.omniloom.exchange_sizes(counts, group.group_name)
    (num_rows,) = sizes[1].sum(0, keepdim=True).tolist()
    return here, sizes, num_rows


def sum_over_group(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add up over `group`; no gradient passes. Collective: one all-reduce."""
    return torch.ops.omniloom.sum_over_group(counts, group.group_name)
