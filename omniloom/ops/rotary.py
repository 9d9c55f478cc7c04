"""Rotary position embedding: angle tables in float32 and their application to packed heads.

Knows positions and frequencies only; who lays out positions (text, patches, three axes) decides which table to ask for.
Tables are made on the device at every forward from int64 positions: a table kept in bfloat16, or positions kept in it,
would collapse 16,384 positions to about a thousand values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniloom.ops import npu

SectionOrder = Literal["interleaved", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Angles of a packed sequence. A dataclass, not a tuple, so that FSDP's input casting leaves it in float32."""

    cos: Tensor  # float32 [T, R / 2], of heads whose first R dims are turned
    sin: Tensor  # float32 [T, R / 2]


def inverse_frequencies(num_frequencies: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-i/n) for i in 0..n-1, float32 [num_frequencies].

    Source: Su et al. 2021 (arXiv 2104.09864), section 3.2.2.
    """
    exponents = torch.arange(num_frequencies, dtype=torch.float32, device=device) / num_frequencies
    return 1.0 / (theta**exponents)


def multimodal_rotary(
    position_ids: Tensor, *, head_dim: int, theta: float, sections: tuple[int, int, int], order: SectionOrder
) -> Rotary:
    """Angles of text heads whose frequencies are shared out over time, height and width.

    Args:
        position_ids: int64 [3, T].
        sections: frequencies per axis, summing to head_dim / 2.
        order: `interleaved` deals frequencies in turn t, h, w, t, h, w, ...; what h and w leave over is time's.
            `blocks` gives the first sections[0] to time, the next to height, the last to width.

    Source: Qwen3-VL (interleaved) and Qwen2-VL (blocks) modelling code in transformers.
    """
    num_frequencies = head_dim // 2
    frequencies = inverse_frequencies(num_frequencies, theta, position_ids.device)
    time, height, width = (position_ids.float()[:, :, None] * frequencies).unbind(0)  # each [T, D / 2]
    angles = time.clone()
    if order == "interleaved":
        angles[:, 1 : 3 * sections[1] : 3] = height[:, 1 : 3 * sections[1] : 3]
        angles[:, 2 : 3 * sections[2] : 3] = width[:, 2 : 3 * sections[2] : 3]
    else:
        first, second = sections[0], sections[0] + sections[1]
        angles[:, first:second] = height[:, first:second]
        angles[:, second:] = width[:, second:]
    return Rotary(cos=angles.cos(), sin=angles.sin())


def axial_rotary(rotary_index: Tensor, *, head_dim: int, theta: float) -> Rotary:
    """Angles of patches: half of the frequencies turn with the row, half with the column.

    Args: rotary_index: int64 [P, 2], row and column of each patch.
    """
    frequencies = inverse_frequencies(head_dim // 4, theta, rotary_index.device)
    angles = (rotary_index.float()[:, :, None] * frequencies).flatten(1)  # [P, D / 2]
    return Rotary(cos=angles.cos(), sin=angles.sin())


def apply_rotary(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn `heads` [T, H, D] by the angles of their rows, in float32; returns the dtype it was given.

    Dims i and i + R/2 form a pair (the Hugging Face convention, not neighbours), R being twice the number of angles;
    what of D lies beyond stays as it is.
    """
    return _Turn.apply(heads, rotary.cos, rotary.sin)


class _Turn(torch.autograd.Function):
    """Its gradient is turned back by the same angles; autograd would take three times as many steps."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `apply_rotary` returns, outside autograd; with -sin it turns back."""
    if (turned := 2 * cos.shape[-1]) < heads.shape[-1]:
        return torch.cat((turn(heads[..., :turned], cos, sin), heads[..., turned:]), dim=-1)
    if npu.takes(heads):
        return npu.turn(heads, cos, sin)
    # angles make every product float32; accelerators convert within each kernel, the CPU only by a copy
    first, second = (heads.float() if heads.device.type == "cpu" else heads).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, D / 2]
    if torch.compiler.is_compiling():  # fuses the passes, and takes no `out` with gaps
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
    out = torch.empty_like(heads, memory_format=torch.contiguous_format)
    low, high = out.chunk(2, dim=-1)
    torch.addcmul(first * cos, second, sin, value=-1, out=low)
    torch.addcmul(second * cos, first, sin, out=high)
    return out


def apply_rotary_reference(heads: Tensor, rotary: Rotary) -> Tensor:
    """What `apply_rotary` computes, as complex numbers: each pair is multiplied by exp(i angle)."""
    half = rotary.cos.shape[-1]
    pairs = torch.complex(heads[..., :half].double(), heads[..., half : 2 * half].double())
    turned = pairs * torch.complex(rotary.cos.double(), rotary.sin.double())[:, None]
    return torch.cat((turned.real, turned.imag, heads[..., 2 * half :]), dim=-1).to(heads.dtype)
