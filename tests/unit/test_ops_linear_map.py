"""Adapted maps, alone and within gated feed-forwards and experts, against products written out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omniloom.ops import gated_mlp as gated_mlp_module
from omniloom.ops.gated_experts import Copies, gated_experts, grouped_experts
from omniloom.ops.gated_mlp import gated_mlp, gated_mlp_apart
from omniloom.ops.grouped_gemm import sort_by_group
from omniloom.ops.linear_map import Dropout, LinearMap, dropped, layer_key, linears

KEY = torch.tensor(7)


def make_map(
    num_out: int, num_in: int, *, groups: int | None = None, has: str = "low", rate: float = 0.0, salt: int = 1
) -> LinearMap:
    """Float64, all parts wanting gradients; `has` names those beside the weight."""
    generator = torch.Generator().manual_seed(num_out)
    shapes = {"weight": (num_out, num_in), "low": (2, num_in), "up": (num_out, 2)}
    shapes |= {"bias": (num_out,), "scale": (num_out,)}
    own = {"weight", *has.split(), *(("up",) if "low" in has else ())}
    dtype = torch.float64 if groups is None else torch.float32  # grouped GEMM has no float64
    parts = {
        part: torch.randn((*(() if groups is None else (groups,)), *shape), generator=generator, dtype=dtype)
        for part, shape in shapes.items()
        if part in own
    }
    leaves = {part: value.requires_grad_() for part, value in parts.items()}
    return LinearMap(**leaves, dropout=Dropout(rate, salt, KEY) if rate else None)


def written_out(rows: Tensor, linear: LinearMap, start: int = 0) -> Tensor:
    out = rows @ linear.weight.T
    if linear.low is not None:
        out = out + dropped(rows, linear.dropout, start) @ linear.low.T @ linear.up.T
    if linear.scale is not None:
        out = out * linear.scale
    return out if linear.bias is None else out + linear.bias


def check(got: Tensor, wanted: Tensor, leaves: list[Tensor], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(got.shape, dtype=got.dtype)
    grads = [torch.autograd.grad(out, leaves, upstream) for out in (got, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def trained(*maps: LinearMap) -> list[Tensor]:
    return [part for each in maps for part in each.parts if part is not None]


@pytest.mark.parametrize(
    ("has", "rate"), [("low", 0.0), ("low bias", 0.4), ("low scale", 0.4), ("low bias scale", 0.0)]
)
def test_linears_are_their_products_one_after_another(has: str, rate: float) -> None:
    maps, x = [make_map(5, 4, has=has, rate=rate), make_map(3, 4, has="bias")], torch.randn(6, 4, dtype=torch.float64)
    x.requires_grad_()
    got, wanted = (torch.cat(rows, dim=1) for rows in (linears(x, *maps), [written_out(x, each) for each in maps]))
    check(got, wanted, [x, *trained(*maps)])


@pytest.mark.parametrize(("has", "rate"), [("bias", 0.0), ("low", 0.5), ("low bias scale", 0.0)])
def test_a_gated_feed_forward_takes_adapted_maps(has: str, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_mlp_module, "BLOCK_ELEMENTS", 4 * 9)  # blocks of four rows, the last one short
    gate, up, down = (make_map(*shape, has=has, rate=rate) for shape in ((9, 5), (9, 5), (5, 9)))
    up, x = up._replace(weight=(0.5 * up.weight).detach().requires_grad_()), torch.randn(11, 5, dtype=torch.float64)

    def wanted(rows: Tensor, start: int) -> Tensor:
        inner = F.silu(written_out(rows, gate, start)) * written_out(rows, up, start)
        return written_out(inner, down, start)

    of_blocks = [wanted(x[start : start + 4], start) for start in (0, 4, 8)]
    check(gated_mlp(x, gate, up, down), torch.cat(of_blocks), trained(gate, up, down))
    if "scale" not in has:
        check(gated_mlp_apart(x[:4], gate, up, down), wanted(x[:4], 0), trained(gate, up, down))


@pytest.mark.parametrize("by_group", [True, False])
@pytest.mark.parametrize(("has", "rate"), [(("low", "low"), 0.5), (("", "low"), 0.0), (("low", ""), 0.0)])
def test_experts_take_adapted_maps(has: tuple[str, str], rate: float, by_group: bool) -> None:
    gate_up, down = (
        make_map(*shape, groups=3, has=own, rate=rate, salt=len(own))
        for shape, own in zip(((6, 4), (4, 3)), has, strict=True)
    )
    tokens, weights = (torch.randn(shape).requires_grad_() for shape in ((5, 4), (5, 2)))
    slot, row, counts = sort_by_group(torch.tensor([0, 1, 0, 1, 1, 1, 0, 1, 0, 1]), 3)  # none for the last
    offsets, copies = counts.cumsum(0).to(torch.int32), Copies(slot, row.view_as(weights), weights)
    if not by_group and rate:
        pytest.skip("other rows are dropped where all groups are drawn for at once")
    parts = []
    for group, (low, high) in enumerate(pairwise([0, *offsets.tolist()])):
        own_gate_up, own_down = gate_up.of_group(group), down.of_group(group)
        gate, up = written_out(tokens[slot[low:high] // 2], own_gate_up, low).chunk(2, dim=-1)
        parts.append(written_out(F.silu(gate) * up, own_down, low))
    wanted = (torch.cat(parts)[row].unflatten(0, (5, 2)) * weights[:, :, None]).sum(dim=1)
    got = (gated_experts if by_group else grouped_experts)(tokens, gate_up, down, offsets, copies)
    check(got, wanted, [tokens, weights, *trained(gate_up, down)], tolerance=1e-4)


def test_frozen_parts_get_no_gradient() -> None:
    linear, x = make_map(5, 4, has="low bias scale"), torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    for part in ("weight", "bias", "scale"):
        getattr(linear, part).requires_grad_(False)
    linears(x, linear)[0].sum().backward()
    assert [part is not None and part.grad is not None for part in linear.parts] == [False, False, True, True, False]


def test_what_is_dropped_follows_from_key_salt_and_row() -> None:
    ones = torch.ones(64)
    first = dropped(ones, Dropout(0.5, 1, KEY))
    assert torch.equal(dropped(ones, Dropout(0.5, 1, KEY)), first)
    for other in (Dropout(0.5, 2, KEY), Dropout(0.5, 1, KEY + 1)):
        assert not torch.equal(dropped(ones, other), first)
    assert not torch.equal(dropped(ones, Dropout(0.5, 1, KEY), 1), first)
    assert 16 < first.sum() < 48
    keys = [layer_key(3), layer_key(3, 0), layer_key(3, 1), layer_key(4, 0)]
    assert len({int(key) for key in keys}) == 4
    assert layer_key(None, 0) is None
