"""RMS norm: PyTorch's fused kernel where there is one, else one of few steps.

On CPU autograd takes PyTorch's own apart into a dozen passes over the rows. Here both directions take some rows at a
time through all their steps, so that what is between the steps stays in the cache, and no copies are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.ops import npu, torch_operators


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x squared + eps) x weight over the last dim, in float32; x [..., C], weight [C] -> [..., C].

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` computes, its gradient left to autograd."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


BLOCK_ELEMENTS = 2**17  # of the rows that go through all steps together: half a MiB of each float32 intermediate


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *normalise_backward(grad, *ctx.saved_tensors), None


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `rms_norm` returns, and 1 / root mean square of each row, float32 [..., 1]; outside autograd."""
    if npu.takes(x):
        return npu.rms_norm(x, weight, eps)
    if x.device.type != "cpu":
        # what torch.nn.functional.rms_norm calls; only here does it give the scale. It takes one dtype
        out, scale = torch_operators.rms_norm(x.to(weight.dtype), weight.shape, weight, eps)
        return out.to(x.dtype), scale
    rows = x.flatten(0, -2)
    out, scale = torch.empty_like(rows), rows.new_empty(rows.shape[0], 1, dtype=torch.float32)
    wide_weight = weight.float()
    for block in _blocks(rows):
        wide = rows[block].float()
        # faster by far than the mean of the squares
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        scale[block] = root
        out[block] = (wide * root).mul_(wide_weight)
    return out.view(x.shape), scale.view(*x.shape[:-1], 1)


def normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight from that of what `normalise` returned; `scale` is its second result."""
    if npu.takes(x):
        return npu.rms_norm_backward(grad, x, weight, scale)
    if x.device.type != "cpu":
        grad, rows = grad.to(weight.dtype), x.to(weight.dtype)
        of_rows, of_weight = torch_operators.rms_norm_backward(grad, rows, weight.shape, scale, weight, [True, True])
        return of_rows.to(x.dtype), of_weight
    rows, upstream, wide_weight = x.flatten(0, -2), grad.flatten(0, -2), weight.float()
    scale = scale.view(-1, 1)
    rows_grad, weight_grad = torch.empty_like(rows), torch.zeros_like(wide_weight)
    for block in _blocks(rows):
        normed, wide = rows[block].float() * scale[block], upstream[block].float()
        product = normed * wide
        weight_grad += product.sum(dim=0)
        along = (product @ wide_weight).div_(-x.shape[-1])  # the part that would only change the length of x
        wide = wide * wide_weight
        rows_grad[block] = wide.addcmul_(normed, along[:, None]).mul_(scale[block])
    return rows_grad.view(x.shape), weight_grad.to(weight.dtype)


def _blocks(rows: Tensor) -> list[slice]:
    if torch.compiler.is_compiling():  # fuses the steps, and would count blocks anew for every number of rows
        return [slice(None)]
    size = max(1, BLOCK_ELEMENTS // rows.shape[1])
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]
