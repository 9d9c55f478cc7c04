"""Rotary positions: against complex multiplication, and against what must hold of any rotation."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.ops.rotary import apply_rotary, apply_rotary_reference, axial_rotary, multimodal_rotary

SECTIONS = (2, 3, 3)


def table(position_ids: torch.Tensor, layout: str = "interleaved", theta: float = 10_000.0):
    return multimodal_rotary(position_ids, head_dim=16, theta=theta, sections=SECTIONS, order=layout)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), layout=st.sampled_from(["interleaved", "blocks"]))
def test_applying_equals_complex_multiplication(seed, layout):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 5000, (3, 7), generator=generator)
    heads = torch.randn(7, 2, 16, generator=generator)
    rotary = table(positions, layout)
    torch.testing.assert_close(apply_rotary(heads, rotary), apply_rotary_reference(heads, rotary), rtol=1e-5, atol=1e-6)


def test_the_gradient_equals_the_references():
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(7, 2, 16, generator=generator, requires_grad=True)
    rotary = table(torch.randint(0, 5000, (3, 7), generator=generator))
    upstream = torch.randn(heads.shape, generator=generator)
    got, wanted = (
        torch.autograd.grad(turn(heads, rotary), heads, upstream)[0] for turn in (apply_rotary, apply_rotary_reference)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_scores_depend_on_distances_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, generator=generator).double().unbind(0)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        turned = [
            apply_rotary_reference(x, table(torch.tensor([[position]] * 3)))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(109, 104), rtol=1e-4, atol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_interleaved_frequencies_are_dealt_in_turn_and_time_takes_the_rest():
    positions = torch.tensor([[1], [100], [10_000]])
    angles = torch.atan2(*(lambda r: (r.sin, r.cos))(table(positions, theta=1.0)))[0]  # all frequencies 1
    wanted = torch.tensor([1.0, 100.0, 10_000.0])[torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])]
    # slots 1, 4, 7 are height's; width's would be 2, 5, 8, and 8 lies past the end
    torch.testing.assert_close(angles, torch.atan2(wanted.sin(), wanted.cos()))


def test_blocks_give_each_axis_its_stretch_of_frequencies():
    positions = torch.tensor([[1], [2], [3]])
    angles = torch.atan2(*(lambda r: (r.sin, r.cos))(table(positions, "blocks", theta=1.0)))[0]
    torch.testing.assert_close(angles, torch.tensor([1.0, 1, 2, 2, 2, 3, 3, 3]))


def test_half_of_the_axial_frequencies_follow_the_row_and_half_the_column():
    rotary = axial_rotary(torch.tensor([[1, 2]]), head_dim=8, theta=1.0)
    torch.testing.assert_close(torch.atan2(rotary.sin, rotary.cos)[0], torch.tensor([1.0, 1, 2, 2]))


def test_far_positions_stay_apart():
    """In bfloat16 16,384 positions collapse to about a thousand values."""
    positions = torch.arange(16_384).expand(3, -1)
    rotary = table(positions)
    assert rotary.cos.dtype == torch.float32
    assert torch.stack((rotary.cos[:, 0], rotary.sin[:, 0]), dim=1).unique(dim=0).shape[0] == 16_384


def test_low_precision_heads_are_turned_in_float32():
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(4, 2, 16, generator=generator).bfloat16()
    rotary = table(torch.arange(4000, 4004).expand(3, -1))
    got = apply_rotary(heads, rotary)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rotary(heads.float(), rotary).bfloat16())
