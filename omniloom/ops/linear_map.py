"""Linear maps as data: a weight, and what an adapter adds to it.

Modules hand maps to the operations that keep little for backward (a gated feed-forward, experts, an adapted linear),
which call what is here outside of autograd. So an adapter needs no way of its own through them, and neither do weights
that are shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.ops.grouped_gemm import grouped_linear, grouped_outer

NUM_PARTS = 5  # of a `LinearMap` may train


class Dropout(NamedTuple):
    """Sets entries to zero with probability `rate`, the same ones for the same salt and key."""

    rate: float
    salt: int  # of the weight
    key: Tensor  # int64 [], on the host: a graph compiled for one key then holds for all


class LinearMap(NamedTuple):
    """x -> scale (weight x + up low dropout(x)) + bias; what is None is left out.

    Stacked maps have [E, ...] in front and neither scale nor bias; rows of group e end at offsets[e].
    """

    weight: Tensor  # [O, C]
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

    def of_group(self, group: int) -> LinearMap:
        return LinearMap.of_parts([None if part is None else part[group] for part in self.parts], self.dropout)

    def __call__(
        self, rows: Tensor, offsets: Tensor | None = None, *, start: int = 0, out: Tensor | None = None
    ) -> Tensor:
        """rows [N, C], of which the first is row `start` of all -> [N, O]. Outside of autograd."""
        out = multiply(rows, self.weight, offsets, out, bias=self.bias if self.scale is None else None)
        if self.low is not None and self.up is not None:
            narrow = multiply(dropped(rows, self.dropout, start), self.low, offsets)
            out = multiply(narrow, self.up, offsets, out, adds=True)
        if self.scale is not None:
            out.mul_(self.scale)
            if self.bias is not None:
                out.add_(self.bias)
        return out

    def row_gradient(
        self,
        grad: Tensor,
        offsets: Tensor | None = None,
        *,
        start: int = 0,
        out: Tensor | None = None,
        adds: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of rows from that of what they became, and that of what lies between low and up.

        grad [N, O] -> [N, C], [N, R]; the scale is passed over. The first is written to, or added into `out`.
        """
        out = multiply(grad, self.weight.mT, offsets, out, adds=adds)
        if self.low is None or self.up is None:
            return out, None
        narrow = multiply(grad, self.up.mT, offsets)
        if self.dropout is None:
            return multiply(narrow, self.low.mT, offsets, out, adds=True), narrow
        return out.add_(dropped(multiply(narrow, self.low.mT, offsets), self.dropout, start)), narrow

    def weight_gradients(
        self,
        grad: Tensor,
        narrow_grad: Tensor | None,
        rows: Tensor,
        wanted: Sequence[bool],
        offsets: Tensor | None = None,
        *,
        start: int = 0,
    ) -> list[Tensor | None]:
        """Gradients of weight, low and up, those `wanted`; `narrow_grad` is the second result of `row_gradient`."""
        grads = [outer(grad, rows, offsets) if wanted[0] else None, None, None]
        if self.low is not None and narrow_grad is not None:
            rows = dropped(rows, self.dropout, start)
            grads[1] = outer(narrow_grad, rows, offsets) if wanted[1] else None
            grads[2] = outer(grad, multiply(rows, self.low, offsets), offsets) if wanted[2] else None
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
        of_weights = self.weight_gradients(grad, narrow_grad, rows, (wanted[0], *wanted[2:4]), start=start)
        return rows_grad, [of_weights[0], bias_grad if wanted[1] else None, *of_weights[1:], scale_grad]


def adapted_linear(x: Tensor, linear: LinearMap) -> Tensor:
    """What the map makes of x: [N, C] -> [N, O]. Keeps x alone for backward."""
    return _Linear.apply(linear.dropout, x, *linear.parts)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dropout: Dropout | None, x: Tensor, weight: Tensor, *parts: Tensor | None) -> Tensor:
        linear = LinearMap.of_parts((weight, *parts), dropout)
        out = linear(x)
        ctx.save_for_backward(x, None if linear.scale is None else out, *linear.parts)
        ctx.dropout = dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, result, *parts = ctx.saved_tensors
        rows_grad, grads = LinearMap.of_parts(parts, ctx.dropout).backward(grad, x, result, ctx.needs_input_grad[2:])
        return None, rows_grad, *grads


# ---------------------------------------------------------------------------------------- products


def multiply(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    adds: bool = False,
) -> Tensor:
    """rows [N, C] times weight [O, C], or of each group [E, O, C], transposed -> [N, O].

    Without offsets written to `out`; or added into it, with offsets too.
    """
    if offsets is not None:
        product = grouped_linear(rows, weight, offsets)
        # into fresh memory: selective recompute keeps what grouped GEMM returned, as it was
        return out + product if adds and out is not None else product
    if adds and out is not None:
        return out.addmm_(rows, weight.mT)
    if out is None:
        return F.linear(rows, weight, bias)
    return torch.mm(rows, weight.mT, out=out) if bias is None else torch.addmm(bias, rows, weight.mT, out=out)


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
