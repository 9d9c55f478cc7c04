"""A loss of an inner layer, whose gradient rides on the rows that pass through.

So a layer in the middle of a pipeline needs no way of its own to the loss: its gradient starts where that of its rows
arrives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attach_loss(hidden: Tensor, loss: Tensor) -> Tensor:
    """`hidden` as it is; its backward also adds the gradient of `loss`, a float32 scalar, as if that were summed up."""
    return _Attach.apply(hidden, loss)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, *ctx.saved_tensors
