"""Weights as 4-bit codes: NF4, in blocks of 64 numbers of a row with a float32 scale each.

A packed tensor is uint8. In place of each block of a row it has 36 bytes: 32 of codes, two in each with the first in
the upper half, and 4 of the block's scale. So a row stays a row, a cut between blocks is a cut between bytes, and what
shards, gathers and counts tensors needs to know nothing of it: 4.5 bits a number.

Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3 and appendix E; numbers and rounding as bitsandbytes has
them, without its second quantisation, that of the scales.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # numbers that share a scale
CODE_BYTES, BLOCK_BYTES = BLOCK // 2, BLOCK // 2 + 4
NUMBERS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # that a code stands for, times the scale
ROWS_ELEMENTS = 2**24  # numbers unpacked at a time, since indexes and products on the way take 10 bytes for each


def is_packed(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the bytes of a weight [..., C], C a multiple of `BLOCK`."""
    assert shape[-1] % BLOCK == 0, shape
    return (*shape[:-1], shape[-1] // BLOCK * BLOCK_BYTES)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Of the numbers of a tensor, packed or not."""
    shape = tuple(tensor.shape)
    return (*shape[:-1], shape[-1] // BLOCK_BYTES * BLOCK) if is_packed(tensor) else shape


def pack(weight: Tensor) -> Tensor:
    """Each number as the nearest code of its block: floating [..., C] -> uint8 [..., C / 64 x 36]."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(dim=-1, keepdim=True)
    numbers = _numbers(weight.device)
    shares = blocks * (1.0 / scales.clamp(min=1e-38))  # a block of zeros stays one
    codes = torch.bucketize(shares, (numbers[1:] + numbers[:-1]) / 2).to(torch.uint8)
    pairs = (codes[..., ::2] << 4) | codes[..., 1::2]
    return torch.cat((pairs, scales.view(torch.uint8)), dim=-1).flatten(-2)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a packed tensor: uint8 [..., C / 64 x 36] -> `dtype` [..., C]; what is not packed as it is."""
    if not is_packed(packed):
        return packed
    numbers = _numbers(packed.device)
    of_byte = torch.stack((numbers.repeat_interleave(16), numbers.repeat(16)), dim=1)  # [256, 2]
    out = torch.empty(shape_of(packed), dtype=dtype, device=packed.device)
    at_a_time = max(1, ROWS_ELEMENTS // out.shape[-1])
    for rows, into in zip(packed.flatten(0, -2).split(at_a_time), out.flatten(0, -2).split(at_a_time), strict=True):
        blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
        scales = blocks[..., CODE_BYTES:].contiguous().view(torch.float32)
        shares = F.embedding(blocks[..., :CODE_BYTES].int(), of_byte).flatten(-2)  # [n, blocks, 64]
        into.copy_((shares * scales).flatten(-2))
    return out


def _numbers(device: torch.device) -> Tensor:
    numbers = torch.tensor(NUMBERS)
    if device.type not in ("cpu", "meta") and not torch.compiler.is_compiling():  # to which it is a constant
        numbers = numbers.pin_memory()  # the host would wait for a copy from elsewhere
    return numbers.to(device, non_blocking=True)
