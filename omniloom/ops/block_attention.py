"""Attention in blocks: of some query rows to some keys, with what is needed to join the softmaxes of several blocks.

Ring attention is made of it. A block is a square of causal segments, each with itself, or a rectangle in which every
query sees every key. Kernels are those of `attention`, but for NPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniloom.ops import torch_operators
from omniloom.types import Kernel


def attend(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None, longest: int = 0
) -> tuple[Tensor, Tensor]:
    """One block: q [N, H, D], k and v [M, Hkv, D] -> output [N, H, D], log of the softmax's denominator float32 [N, H].

    `bounds` int32 [S + 1] are those of causal segments of at most `longest` rows, N = M; None is a rectangle.
    """
    if kernel == "eager":
        return torch.ops.omniloom.eager_attention(q, k, v, _or_whole(bounds, q, k), bounds is not None)
    if kernel == "sdpa" and bounds is not None:
        return torch.ops.omniloom.cpu_attention(q, k, v, bounds, True)
    if kernel == "sdpa":
        heads = [_head_first(x) for x in (q, k, v)]
        out, log_sums = torch_operators.cpu_attention(*heads, 0.0, False)
        return out[0].transpose(0, 1).to(q.dtype), log_sums[0].transpose(0, 1)
    of_blocks = _flash_bounds(q, k, bounds, longest)
    out, log_sums = torch.ops.omniloom.flash_attention(q, k, v, *of_blocks, bounds is not None)
    return out, log_sums.T


def attend_backward(
    kernel: Kernel,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    bounds: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's part of the gradients of q, k and v. `grad`, `out` and `log_sums` are those of all blocks joined."""
    inputs = (grad.contiguous(), q, k, v, out)
    if kernel == "eager":
        return torch.ops.omniloom.eager_attention_backward(
            *inputs, log_sums, _or_whole(bounds, q, k), bounds is not None
        )
    if kernel == "sdpa" and bounds is not None:
        return torch.ops.omniloom.cpu_attention_backward(*inputs, log_sums, bounds, True)
    by_head = log_sums.T.contiguous()
    if kernel == "sdpa":
        parts = torch_operators.cpu_attention_backward(*map(_head_first, inputs), by_head[None], 0.0, False)
        q_grad, k_grad, v_grad = (part[0].transpose(0, 1) for part in parts)
        return q_grad, k_grad, v_grad
    of_blocks = _flash_bounds(q, k, bounds, longest)
    return torch.ops.omniloom.flash_attention_backward(*inputs, by_head, *of_blocks, bounds is not None)


def join(out: Tensor, log_sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
    """Add a block's output to `out` float32 [N, H, D], as if all keys had been in one softmax; in place.

    Source: Milakov and Gimelshein 2018, arXiv 1805.02867.
    """
    joined = torch.logaddexp(log_sums, part_sums)
    out.mul_((log_sums - joined).exp()[..., None]).add_(part * (part_sums - joined).exp()[..., None])
    log_sums.copy_(joined)


def _head_first(x: Tensor) -> Tensor:
    return x.float().transpose(0, 1)[None]


def _or_whole(bounds: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    return _whole(max(len(q), len(k)), q.device) if bounds is None else bounds


def _whole(num_rows: int, device: torch.device) -> Tensor:
    """int32 [2], made on the device: a copy to it would have to be waited for."""
    return num_rows * torch.arange(2, dtype=torch.int32, device=device)


def _flash_bounds(q: Tensor, k: Tensor, bounds: Tensor | None, longest: int) -> tuple[Tensor, Tensor, int, int]:
    if bounds is not None:
        return bounds, bounds, longest, longest
    return _whole(len(q), q.device), _whole(len(k), k.device), len(q), len(k)
