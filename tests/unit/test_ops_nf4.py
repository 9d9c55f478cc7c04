"""4-bit weights: bitsandbytes' codes and scales, and operations that compute as with the numbers these stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from omniloom.ops.gated_experts import Copies, gated_experts, grouped_experts
from omniloom.ops.gated_mlp import gated_mlp
from omniloom.ops.grouped_gemm import sort_by_group
from omniloom.ops.linear_map import LinearMap, linears
from omniloom.ops.nf4 import BLOCK, BLOCK_BYTES, is_packed, pack, packed_shape, shape_of, unpack


def made_up(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def test_codes_are_the_nearest_of_their_block_and_scales_its_largest() -> None:
    weight = made_up(3, 5, 2 * BLOCK)
    packed = pack(weight.bfloat16())
    assert is_packed(packed)
    assert tuple(packed.shape) == packed_shape((3, 5, 2 * BLOCK)) == (3, 5, 2 * BLOCK_BYTES)
    assert shape_of(packed) == (3, 5, 2 * BLOCK)
    found = unpack(packed, torch.float32).unflatten(-1, (-1, BLOCK))
    blocks = weight.bfloat16().float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(found.abs().amax(-1, keepdim=True), largest, rtol=0, atol=0)
    numbers = (found / largest).unique()
    choices = largest[..., None] * numbers  # [3, 5, 2, 1, up to 16]
    nearest = (choices - blocks[..., None]).abs().amin(-1)
    torch.testing.assert_close((found - blocks).abs(), nearest, rtol=0, atol=1e-6)
    assert torch.equal(pack(unpack(packed, torch.float32)), packed)


def test_a_block_of_zeros_and_a_cut_between_blocks_stay_what_they_are() -> None:
    weight = made_up(4, 3 * BLOCK)
    weight[1, BLOCK : 2 * BLOCK] = 0
    packed = pack(weight)
    assert torch.equal(unpack(packed, torch.float32)[1, BLOCK : 2 * BLOCK], torch.zeros(BLOCK))
    assert torch.equal(pack(weight[1:3, BLOCK:]), packed[1:3, BLOCK_BYTES:])


def test_unpacking_some_rows_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(made_up(7, BLOCK))
    whole = unpack(packed, torch.bfloat16)
    monkeypatch.setattr("omniloom.ops.nf4.ROWS_ELEMENTS", 2 * BLOCK)
    assert torch.equal(unpack(packed, torch.bfloat16), whole)


def test_packing_is_that_of_bitsandbytes() -> None:
    weight = ((torch.arange(24 * 192) * 7919 % 1009) - 504).float().view(24, 192) / 504 * torch.arange(1, 25)[:, None]
    ours = pack(weight).unflatten(-1, (-1, BLOCK_BYTES))
    parts = (ours[..., : BLOCK // 2], ours[..., BLOCK // 2 :])
    found = [hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest()[:16] for part in parts]
    # of what quantize_4bit(weight, blocksize=64, quant_type="nf4") of bitsandbytes 0.50.2 gives on a CPU: codes, absmax
    assert found == ["1a08b5f50a2a520e", "60fb4f01be6dfc00"]


def test_packing_is_that_of_the_bitsandbytes_that_is_installed() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = made_up(24, 3 * BLOCK)
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    ours = pack(weight).unflatten(-1, (-1, BLOCK_BYTES))
    assert torch.equal(ours[..., : BLOCK // 2].flatten(), codes.flatten())
    assert torch.equal(ours[..., BLOCK // 2 :].contiguous().view(torch.float32).flatten(), state.absmax)
    assert torch.equal(unpack(pack(weight), torch.float32), functional.dequantize_4bit(codes, state))


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), leaves))


def adapted(weight: Tensor) -> LinearMap:
    groups = weight.shape[:-2]
    low, up = made_up(*groups, 2, weight.shape[-1]), made_up(*groups, weight.shape[-2], 2)
    return LinearMap(weight, low=(0.1 * low).requires_grad_(), up=(0.1 * up).requires_grad_())


def packed_and_dense(compute, maps: list[LinearMap], rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Result and gradients of rows and factors, each of packed weights and of the numbers that these stand for."""
    packed = [each._replace(weight=pack(each.weight)) for each in maps]
    dense = [each._replace(weight=unpack(each.weight, torch.float32)) for each in packed]
    found = []
    for own in (packed, dense):
        leaves = [rows.clone().requires_grad_(), *(part for each in own for part in (each.low, each.up))]
        out = compute(leaves[0], *own)
        found.append([out, *gradients(out, leaves)])
    return list(zip(*found, strict=True))


def test_operations_compute_with_the_numbers_that_codes_stand_for() -> None:
    rows = made_up(9, BLOCK)
    narrow, wide = adapted(made_up(BLOCK, BLOCK)), adapted(made_up(2 * BLOCK, BLOCK))
    of_linears = packed_and_dense(lambda x, *maps: torch.cat(linears(x, *maps), dim=1), [narrow, wide], rows)
    assert all(torch.equal(*pair) for pair in of_linears)
    back = adapted(made_up(BLOCK, 2 * BLOCK))
    of_mlp = packed_and_dense(gated_mlp, [wide, adapted(made_up(2 * BLOCK, BLOCK)), back], rows)
    assert all(torch.equal(*pair) for pair in of_mlp)


@pytest.mark.parametrize("compute", [gated_experts, grouped_experts])
def test_experts_compute_with_the_numbers_that_codes_stand_for(compute: Callable[..., Tensor]) -> None:
    experts = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    slot, row, counts = sort_by_group(experts.flatten(), 3)
    copies, rows = Copies(slot, row.view_as(experts), made_up(4, 2)), made_up(4, BLOCK)
    maps = [adapted(made_up(3, 2 * BLOCK, BLOCK)), adapted(made_up(3, BLOCK, BLOCK))]
    offsets = counts.cumsum(0).to(torch.int32)
    pairs = packed_and_dense(lambda x, *own: compute(x, *own, offsets, copies), maps, rows)
    assert all(torch.equal(*pair) for pair in pairs)
