"""Linear maps as data: a weight, and what an adapter adds to it.

Modules hand maps to the operations that keep little for backward (a gated feed-forward, experts, an adapted linear),
which call what is here outside of autograd. So an adapter needs no way of its own through them, and neither do weights
that are shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.ops.grouped_gemm import grouped_linear, grouped_outer
from omniloom.ops.nf4 import is_packed, unpack

NUM_PARTS = 5  # of a `LinearMap` may train
NARROW_PRODUCTS = ("cpu", "npu", "mps")  # devices on which the product of 16-bit matrices is one too


class Dropout(NamedTuple):
    """Sets entries to zero with probability `rate`, the same ones for the same salt and key."""

    rate: float
    salt: int  # of the weight
    key: Tensor  # int64 [], on the host: a graph compiled for one key then holds for all


class LinearMap(NamedTuple):
    """x -> scale (weight x + up low dropout(x)) + bias; what is None is left out.

    Stacked maps have [E, ...] in front and neither scale nor bias; rows of group e end at offsets[e].
    """

    weight: Tensor  # [O, C], or a frozen one packed (`ops.nf4`), which `dense` takes apart
    bias: Tensor | None = None  # [O]
    low: Tensor | None = None  # [R, C]
    up: Tensor | None = None  # [O, R]
    scale: Tensor | None = None  # [O]
    dropout: Dropout | None = None

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """All tensors that may train."""
        return self.weight, self.bias, self.low, self.up, self.scale

    @staticmethod
    def of_parts(parts: Sequence[Any], dropout: Dropout | None) -> LinearMap:
        """The map of such `parts`, tensors or None."""
        weight, bias, low, up, scale = parts
        return LinearMap(weight, bias, low, up, scale, dropout)

    def dense(self, dtype: torch.dtype) -> LinearMap:
        """The same map, a packed weight as numbers: what is computed with, and not kept."""
        if not is_packed(self.weight):
            return self
        low, up = (None if part is None else part.to(dtype) for part in (self.low, self.up))
        return self._replace(weight=unpack(self.weight, dtype), low=low, up=up)

    def of_group(self, group: int) -> LinearMap:
        return LinearMap.of_parts([None if part is None else part[group] for part in self.parts], self.dropout)

    def __call__(self, rows: Tensor, *, start: int = 0, out: Tensor | None = None) -> Tensor:
        """rows [N, C], of which the first is row `start` of all -> [N, O]. Outside of autograd."""
        out = multiply(rows, self.weight, out, bias=self.bias if self.scale is None else None)
        if self.low is not None and self.up is not None:
            out = multiply(multiply(dropped(rows, self.dropout, start), self.low), self.up, out, adds=True)
        if self.scale is not None:
            out.mul_(self.scale)
            if self.bias is not None:
                out.add_(self.bias)
        return out

    def of_groups(self, rows: Tensor, offsets: Tensor, *, named: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """What adds up to the result [N, O] of rows [N, C] of all groups, and what lies between low and up [N, R].

        Terms apart, since grouped GEMM adds to nothing: whoever sums up rows anyway spares a pass over all of them.
        `named` as `grouped_linear` has it.
        """
        multiply = partial(grouped_linear, offsets=offsets, named=named)
        terms = [multiply(rows, self.weight)]
        if self.low is None or self.up is None:
            return terms, None
        narrow = multiply(dropped(rows, self.dropout), self.low)
        return [*terms, multiply(narrow, self.up)], narrow

    def row_gradient_of_groups(self, grad: Tensor, offsets: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """What adds up to the gradient of rows [N, C] from that of their result [N, O], and that of what lies between
        low and up."""
        terms = [grouped_linear(grad, self.weight.mT, offsets)]
        if self.low is None or self.up is None:
            return terms, None
        narrow = grouped_linear(grad, self.up.mT, offsets)
        return [*terms, dropped(grouped_linear(narrow, self.low.mT, offsets), self.dropout)], narrow

    def row_gradient(
        self, grad: Tensor, *, start: int = 0, out: Tensor | None = None, adds: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of rows from that of what they became, and that of what lies between low and up.

        grad [N, O] -> [N, C], [N, R]; the scale is passed over. The first is written to, or added into `out`.
        """
        out = multiply(grad, self.weight.mT, out, adds=adds)
        if self.low is None or self.up is None:
            return out, None
        narrow = multiply(grad, self.up.mT)
        if self.dropout is None:
            return multiply(narrow, self.low.mT, out, adds=True), narrow
        return out.add_(dropped(multiply(narrow, self.low.mT), self.dropout, start)), narrow

    def weight_gradients(
        self,
        grad: Tensor,
        narrow_grad: Tensor | None,
        rows: Tensor,
        wanted: Sequence[bool],
        offsets: Tensor | None = None,
        *,
        start: int = 0,
        narrow: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Gradients of weight, low and up in the places of their parts, those `wanted`.

        `narrow_grad` is the second result of `row_gradient`; `narrow` is what low made of the rows, if known; each row
        counts `row_weight` [N, 1] times, if given.
        """
        if row_weight is not None and wanted[0]:
            rows, row_weight = rows * row_weight, None
        grads: list[Tensor | None] = [None] * NUM_PARTS
        if wanted[0]:
            grads[0] = outer(grad, rows, offsets)
        if self.low is None or narrow_grad is None:
            return grads
        rows = dropped(rows, self.dropout, start)
        if wanted[2]:
            grads[2] = outer(narrow_grad if row_weight is None else narrow_grad * row_weight, rows, offsets)
        if wanted[3]:
            if narrow is None:
                narrow = multiply(rows, self.low) if offsets is None else grouped_linear(rows, self.low, offsets)
            grads[3] = outer(grad, narrow if row_weight is None else narrow * row_weight, offsets)
        return grads

    def backward(
        self,
        grad: Tensor,
        rows: Tensor,
        result: Tensor | None,
        wanted: Sequence[bool],
        *,
        start: int = 0,
        out: Tensor | None = None,
        adds: bool = False,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient of rows [N, C], written to or added into `out`, and those of `parts`, those `wanted`.

        `result` is what the map made of the rows, needed with a scale only.
        """
        bias_grad = grad.sum(dim=0) if self.bias is not None and (wanted[1] or self.scale is not None) else None
        scale_grad = None
        if self.scale is not None and result is not None:
            along = (grad * result).sum(dim=0)
            if bias_grad is not None and self.bias is not None:
                along -= bias_grad * self.bias
            scale_grad, grad = along / self.scale, grad * self.scale
        rows_grad, narrow_grad = self.row_gradient(grad, start=start, out=out, adds=adds)
        grads = self.weight_gradients(grad, narrow_grad, rows, wanted, start=start)
        grads[1], grads[4] = bias_grad if wanted[1] else None, scale_grad
        return rows_grad, grads


def linears(x: Tensor, *maps: LinearMap) -> tuple[Tensor, ...]:
    """What each map makes of x: [N, C] -> [N, O] each.

    Keeps x alone for backward, where the products add up its gradient.
    """
    parts = [part for linear in maps for part in linear.parts]
    results: tuple[Tensor, ...] = _Linears.apply(tuple(linear.dropout for linear in maps), x, *parts)
    return results


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dropouts: tuple[Dropout | None, ...], x: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
        maps = maps_of(parts, dropouts)
        results = tuple(linear.dense(x.dtype)(x) for linear in maps)
        scaled = (None if linear.scale is None else out for linear, out in zip(maps, results, strict=True))
        ctx.save_for_backward(x, *scaled, *parts)
        ctx.dropouts = dropouts
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        maps = maps_of(saved[len(grads) :], ctx.dropouts)
        x_grad, parts_grads = None, []
        for place, (linear, grad, result) in enumerate(zip(maps, grads, saved, strict=False)):
            wanted = ctx.needs_input_grad[2 + place * NUM_PARTS :][:NUM_PARTS]
            x_grad, of_parts = linear.dense(x.dtype).backward(grad, x, result, wanted, out=x_grad, adds=place > 0)
            parts_grads += of_parts
        return None, x_grad, *parts_grads


def maps_of(parts: Sequence[Any], dropouts: Sequence[Dropout | None]) -> list[LinearMap]:
    """The maps whose parts follow one another, one for each of `dropouts`."""
    return [LinearMap.of_parts(parts[n * NUM_PARTS :][:NUM_PARTS], dropout) for n, dropout in enumerate(dropouts)]


# ---------------------------------------------------------------------------------------- products


def multiply(
    rows: Tensor, weight: Tensor, out: Tensor | None = None, *, bias: Tensor | None = None, adds: bool = False
) -> Tensor:
    """rows [N, C] times weight [O, C] transposed -> [N, O], written to or added into `out`."""
    if adds and out is not None:
        return out.addmm_(rows, weight.mT)
    if out is None:
        return F.linear(rows, weight, bias)
    return torch.mm(rows, weight.mT, out=out) if bias is None else torch.addmm(bias, rows, weight.mT, out=out)


def multiply_wide(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [N, C] times right [C, O], in at least float32 and added into `out` [N, O] if given.

    Accelerators sum in float32 anyway and hand that out, where their library can, without a pass of its own.
    """
    if left.itemsize >= 4:
        return left @ right if out is None else out.addmm_(left, right)
    if left.device.type in NARROW_PRODUCTS:
        return (left @ right).float() if out is None else out.add_(left @ right)
    if out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(out, left, right, out_dtype=torch.float32, out=out)


def outer(left: Tensor, right: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Sum over rows, or those of each group, of left's times right's: [N, O], [N, C] -> [O, C] or [E, O, C]."""
    return left.T @ right if offsets is None else grouped_outer(left, right, offsets)


# ---------------------------------------------------------------------------------------- dropout


def keyed_seed(*key: object) -> int:
    """63 bits that depend on all parts of a key and are the same in every process."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def layer_key(draw_key: int | None, *layer: int) -> Tensor | None:
    """The key of a layer's draws, or with no index that of what lies outside of layers, from a pack's."""
    return None if draw_key is None else torch.tensor(keyed_seed(draw_key, *layer))


def dropped(rows: Tensor, dropout: Dropout | None, start: int = 0) -> Tensor:
    """`rows`, the first of which is row `start`, with what falls to the dropout at zero. Differentiable.

    Not scaled up: whoever drops folds 1 / (1 - rate) into a smaller factor.
    """
    return rows if dropout is None else _drop(rows, *dropout, start)


@torch.library.custom_op("omniloom::dropout", mutates_args=())
def _drop(rows: Tensor, rate: float, salt: int, key: Tensor, start: int) -> Tensor:
    generator = torch.Generator(rows.device).manual_seed(keyed_seed(salt, int(key), start))
    return torch.empty_like(rows).bernoulli_(1 - rate, generator=generator).mul_(rows)


_drop.register_fake(lambda rows, rate, salt, key, start: torch.empty_like(rows))


def _keep_settings(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[1:]


_drop.register_autograd(
    lambda ctx, grad: (_drop(grad, *ctx.settings), None, None, None, None), setup_context=_keep_settings
)
