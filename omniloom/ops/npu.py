"""Ascend NPUs: torch_npu's fused operators, in the forms in which operations here ask for them.

The one file that says which tensors go to them and how each is called. Signatures and limits are those of torch_npu's
published documentation (the op-plugin repository, docs/context); no NPU has run any of it: docs/ascend.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

MOST_SEGMENTS = 1024  # of one call of attention over segments
MASK_SIZE = 2048  # of the one mask that stands for every causal one
CAUSAL_FROM_THE_END = 3  # sparse_mode: the last query of a segment sees its last key


def takes(x: Tensor) -> bool:
    """Whether operations on this tensor are the NPU's."""
    return x.device.type == "npu"


def library() -> Any:
    """torch_npu, which PyTorch loads by itself where it is installed."""
    import torch_npu

    return torch_npu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `ops.norm.normalise`."""
    out, scale = library().npu_rms_norm(x, weight, epsilon=eps)
    return out, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.norm.normalise_backward`."""
    x_grad, weight_grad = library().npu_rms_norm_backward(grad, x, weight, scale)
    return x_grad, weight_grad.to(weight.dtype)  # it comes in float32


def turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `ops.rotary.turn`, in float32: the operator takes angles in the dtype of heads alone."""
    wide_cos, wide_sin = (torch.cat((half, half), dim=-1)[None, :, None] for half in (cos, sin))  # [1, T, 1, D]
    return library().npu_rotary_mul(heads.float()[None], wide_cos, wide_sin)[0].to(heads.dtype)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """As `ops.grouped_gemm.grouped_linear`, without rows past the last bound."""
    return _grouped_matmul(rows, weight.transpose(1, 2), offsets, group_type=0)


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """As `ops.grouped_gemm.grouped_outer`."""
    return _grouped_matmul(left.T, right, offsets, group_type=2)  # a view: the operator knows it by its strides


def _grouped_matmul(left: Tensor, right: Tensor, offsets: Tensor, group_type: int) -> Tensor:
    """One tensor each, groups along rows (0) or along what products add up over (2), ends of groups on the device."""
    (out,) = library().npu_grouped_matmul(
        [left], [right], group_list=offsets.to(torch.int64), split_item=3, group_type=group_type, group_list_type=0
    )
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attention within segments: q [T, H, D], k and v [T, Hkv, D], bounds on the host as `types.Segments` has them.

    Returns: out [T, H, D]; the largest score and the sum of exponentials, float32 [T, H, 8], for backward.
    """
    parts = [
        library().npu_fusion_attention(
            q[rows], k[rows], v[rows], q.shape[1], "TND", scale=q.shape[-1] ** -0.5, **_bounded(q, ends, causal)
        )[:3]
        for rows, ends in _calls(bounds)
    ]
    out, largest, sums = (_joined(pieces) for pieces in zip(*parts, strict=True))
    return out, largest, sums


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    largest: Tensor,
    sums: Tensor,
    bounds: Sequence[int],
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of `attention`'s output."""
    parts = [
        library().npu_fusion_attention_grad(
            *(x[rows] for x in (q, k, v, grad)),
            q.shape[1],
            "TND",
            softmax_max=largest[rows],
            softmax_sum=sums[rows],
            attention_in=out[rows],
            scale_value=q.shape[-1] ** -0.5,
            **_bounded(q, ends, causal),
        )[:3]
        for rows, ends in _calls(bounds)
    ]
    q_grad, k_grad, v_grad = (_joined(pieces) for pieces in zip(*parts, strict=True))
    return q_grad, k_grad, v_grad


def _bounded(q: Tensor, ends: list[int], causal: bool) -> dict[str, Any]:
    """What both directions are told of segments and mask."""
    told: dict[str, Any] = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    if causal:
        mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=q.device).triu_(1)
        told |= {"atten_mask": mask, "sparse_mode": CAUSAL_FROM_THE_END}
    return told


def _calls(bounds: Sequence[int]) -> Iterator[tuple[slice, list[int]]]:
    """Rows that one call takes, and where segments end in them."""
    places = [*range(0, len(bounds) - 1, MOST_SEGMENTS), len(bounds) - 1]
    for first, last in pairwise(places):
        yield slice(bounds[first], bounds[last]), [end - bounds[first] for end in bounds[first + 1 : last + 1]]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
