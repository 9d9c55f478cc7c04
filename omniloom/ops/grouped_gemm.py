"""Matrix products of stacked experts, and the permutation that brings their rows together.

Knows nothing of routing: it is handed rows sorted by group and where each group ends.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.ops import npu

ROW_BYTES = 16  # grouped GEMM takes rows that begin at multiples of this


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, *, named: bool = False) -> Tensor:
    """Row r of group e times `weight[e].T`, for all groups in one call and without a device sync.

    Args:
        rows: [N, C], sorted by group.
        weight: [E, O, C].
        offsets: int32 [E], where each group ends in `rows`; empty groups repeat the bound before them.
        named: as `omniloom::grouped_mm`, by whose name selective recompute takes over what backward will ask for.

    Returns: [N, O]. Rows past the last bound are uninitialised memory, in the gradient of `rows` too.

    Widths C and O that `fits_grouped_gemm` refuses are filled up with zeros, which copies rows and weights each time.
    """
    num_out, step = weight.shape[1], ROW_BYTES // rows.element_size()
    missing_in, missing_out = -weight.shape[2] % step, -num_out % step
    if missing_in or missing_out:
        rows, weight = F.pad(rows, (0, missing_in)), F.pad(weight, (0, missing_in, 0, missing_out))
    if npu.takes(rows):
        out = npu.grouped_linear(rows, weight, offsets)
    else:
        out = _multiply_groups(rows, weight.transpose(-2, -1), offsets, named)
    return out[:, :num_out] if missing_out else out


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Sum over the rows of each group of left's times right's: the gradient of a `grouped_linear` to its weights.

    left [N, O] and right [N, C], sorted by group; offsets as in `grouped_linear`. Returns: [E, O, C].
    """
    num_out, num_in, step = left.shape[1], right.shape[1], ROW_BYTES // left.element_size()
    if num_out % step or num_in % step:
        left, right = F.pad(left, (0, -num_out % step)), F.pad(right, (0, -num_in % step))
    if npu.takes(left):
        return npu.grouped_outer(left, right, offsets)[:, :num_out, :num_in]
    return _multiply_groups(left.T, right, offsets)[:, :num_out, :num_in]


def _multiply_groups(left: Tensor, right: Tensor, offsets: Tensor, named: bool = False) -> Tensor:
    """PyTorch's grouped product, which it traces for a compiler in bfloat16 alone, and of known numbers of rows."""
    if named or torch.compiler.is_compiling():
        return _named_grouped_mm(left, right, offsets)
    return F.grouped_mm(left, right, offs=offsets)


@torch.library.custom_op("omniloom::grouped_mm", mutates_args=())
def _named_grouped_mm(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(left, right, offs=offsets).contiguous()


@_named_grouped_mm.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(*(offsets.shape if right.ndim == 2 else ()), left.shape[0], right.shape[-1])


def fits_grouped_gemm(width: int, dtype: torch.dtype) -> bool:
    """Whether rows of so many elements go into grouped GEMM as they are."""
    return width * dtype.itemsize % ROW_BYTES == 0


def grouped_linear_reference(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """What `grouped_linear` computes, one group at a time; rows past the last bound are left out."""
    bounds = [0, *offsets.tolist()]
    groups = [rows[low:high] @ weight[e].T for e, (low, high) in enumerate(pairwise(bounds))]
    return torch.cat(groups)


def group_multiple(device_type: str, dtype: torch.dtype) -> int:
    """Rows to whose multiple each group is best filled up before `grouped_linear`.

    On CPU, oneDNN compiles a bfloat16 kernel for every number of rows it has not met, which costs as much as the
    product itself; of a few round numbers it keeps the kernels.
    """
    return 64 if device_type == "cpu" and dtype == torch.bfloat16 else 1


def sort_by_group(group: Tensor, num_groups: int, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The stable order that brings equal entries of `group` int64 [N] together, each group filled up to `multiple`.

    Returns: slot int64 [P], the entry that each sorted row is (entry 0 where it is filling); row int64 [N], the sorted
    row of each entry; counts int64 [E], filling included. P is N where `multiple` is 1, else large enough for any
    counts: rows past their sum are filling of no group.
    """
    order = group.argsort(stable=True)
    # not bincount, which waits for the device to learn the largest entry
    sizes = torch.zeros(num_groups, dtype=torch.int64, device=group.device)
    sizes.scatter_add_(0, group, torch.ones_like(group))
    counts = (sizes + multiple - 1) // multiple * multiple
    filling = (counts - sizes).cumsum(0) - (counts - sizes)  # before each group
    places = torch.arange(group.shape[0], device=group.device) + filling[group[order]]
    num_rows = group.shape[0] + num_groups * (multiple - 1)
    slot = torch.zeros(num_rows, dtype=torch.int64, device=group.device).scatter_(0, places, order)
    return slot, torch.empty_like(order).scatter_(0, order, places), counts


def gather_copies(rows: Tensor, slot: Tensor, row: Tensor) -> Tensor:
    """Row slot[i] // K of `rows` [T, C] for each i: every row is taken K times.

    `slot` int64 [T x K] and `row` int64 [T, K] are those of `sort_by_group` over [T x K] entries, without filling. Same
    as an index_select, but its backward sums copies in a fixed order instead of by atomic additions.
    Returns: [T x K, C].
    """
    return _GatherCopies.apply(rows, slot, row)


def sum_copies(rows: Tensor, slot: Tensor, row: Tensor) -> Tensor:
    """What became of the copies that `gather_copies` made, taken from where they are and summed: [T x K, C] -> [T, C].

    Saves nothing, so that a recomputing backward need not come this far.
    """
    return _SumCopies.apply(rows, slot, row)


class _GatherCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, slot: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return rows.index_select(0, slot // row.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (row,) = ctx.saved_tensors
        return sum_bags(grad, row), None, None


class _SumCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, slot: Tensor, row: Tensor) -> Tensor:
        ctx.slot, ctx.num_copies = slot, row.shape[1]
        return sum_bags(rows, row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.slot // ctx.num_copies), None, None


def sum_bags(rows: Tensor, row: Tensor, weights: Tensor | None = None) -> Tensor:
    """Rows `row` [T, K] of `rows` [P, C], times `weights` [T, K] if given, summed: [T, C]. Outside of autograd."""
    if row.shape[1] == 1 and weights is None:
        return rows.index_select(0, row[:, 0])
    # a bag is a token: an embedding's kernel happens to be the fused weighted gather
    return F.embedding_bag(row, rows, mode="sum", per_sample_weights=weights)
