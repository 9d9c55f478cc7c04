"""Grouped products and the row permutations around them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.ops.grouped_gemm import (
    gather_copies,
    grouped_linear,
    grouped_linear_reference,
    grouped_outer,
    sort_by_group,
    sum_copies,
)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 99),
    widths=st.sampled_from([(8, 12), (7, 12), (8, 5), (3, 1)]),  # the kernel wants multiples of 4
)
def test_products_and_gradients_equal_a_loop_over_groups(counts, seed, widths):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(counts), widths[0], generator=generator, requires_grad=True)
    weight = torch.randn(len(counts), widths[1], widths[0], generator=generator, requires_grad=True)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    got, wanted = grouped_linear(rows, weight, offsets), grouped_linear_reference(rows, weight, offsets)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(got.shape, generator=generator)
    for a, b in zip(
        torch.autograd.grad(got, (rows, weight), upstream),
        torch.autograd.grad(wanted, (rows, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_products_in_float32_are_traced_for_a_compiler():
    """PyTorch's own are in bfloat16 alone, which a compiled layer of divided experts would stumble over."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(7, 8, generator=generator), torch.randn(2, 4, 8, generator=generator)
    offsets = torch.tensor([3, 7], dtype=torch.int32)

    def both(rows, weight, offsets):
        out = grouped_linear(rows, weight, offsets)
        return out, grouped_outer(out, rows, offsets)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(rows, weight, offsets), both(rows, weight, offsets), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_rows_past_the_last_bound_leave_the_others_alone():
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(10, 8, generator=generator), torch.randn(2, 4, 8, generator=generator)
    offsets = torch.tensor([3, 7], dtype=torch.int32)
    wanted = grouped_linear_reference(rows, weight, offsets)
    torch.testing.assert_close(grouped_linear(rows, weight, offsets)[:7], wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(groups=st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_sorting_by_group_is_stable_and_its_inverse_undoes_it(groups):
    group = torch.tensor(groups)
    slot, row, counts = sort_by_group(group, 5)
    assert slot.tolist() == sorted(range(len(groups)), key=lambda entry: groups[entry])
    assert torch.equal(slot[row], torch.arange(len(groups)))
    assert counts.tolist() == [groups.count(number) for number in range(5)]


@settings(max_examples=40, deadline=None)
@given(groups=st.lists(st.integers(0, 4), min_size=1, max_size=30), multiple=st.sampled_from([2, 4, 16]))
def test_filling_groups_up_moves_no_entry_out_of_its_group(groups, multiple):
    group = torch.tensor(groups)
    slot, row, counts = sort_by_group(group, 5, multiple)
    assert torch.equal(slot[row], torch.arange(len(groups)))
    assert all(
        count % multiple == 0 and 0 <= count - groups.count(number) < multiple for number, count in enumerate(counts)
    )
    bounds = torch.tensor([0, *counts.cumsum(0).tolist()])
    assert bounds[-1] <= len(slot)
    assert torch.equal(torch.searchsorted(bounds, row, right=True) - 1, group)
    filling = torch.ones(len(slot), dtype=torch.bool).index_fill(0, row, False)
    assert not slot[filling].any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), num_copies=st.integers(1, 3))
def test_copies_through_groups_and_back_equal_products_token_by_token(seed, num_copies):
    """Outputs and all gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(7, 8, generator=generator, requires_grad=True)
    weights = torch.rand(7, num_copies, generator=generator, requires_grad=True)
    experts = torch.randn(3, 4, 8, generator=generator, requires_grad=True)
    group = torch.randint(0, 3, (7, num_copies), generator=generator)
    slot, row, counts = sort_by_group(group.flatten(), 3)
    row = row.view_as(group)
    rows = grouped_linear(gather_copies(hidden, slot, row), experts, counts.cumsum(0).to(torch.int32))
    got = sum_copies(rows * gather_copies(weights.view(-1, 1), slot, row.view(-1, 1)), slot, row)
    wanted = torch.einsum("tc,tkoc,tk->to", hidden, experts[group], weights)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(got.shape, generator=generator)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weights, experts), upstream),
        torch.autograd.grad(wanted, (hidden, weights, experts), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_copies", [1, 3])
def test_gathering_copies_equals_index_select_with_its_gradient(num_copies):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 4, generator=generator, requires_grad=True, dtype=torch.float64)
    order, inverse, _ = sort_by_group(torch.randint(0, 3, (5 * num_copies,), generator=generator), 3)
    wanted = rows.index_select(0, order // num_copies)
    got = gather_copies(rows, order, inverse.view(5, num_copies))
    assert torch.equal(got, wanted)
    upstream = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, rows, upstream), torch.autograd.grad(wanted, rows, upstream))


@pytest.mark.parametrize("num_copies", [1, 3])
def test_summing_copies_is_what_gathering_them_does_backwards(num_copies):
    generator = torch.Generator().manual_seed(2)
    slot, row, _ = sort_by_group(torch.randint(0, 4, (5 * num_copies,), generator=generator), 4)
    row = row.view(5, num_copies)
    rows = torch.randn(len(slot), 4, generator=generator, requires_grad=True)
    got, wanted = sum_copies(rows, slot, row), rows[row].sum(dim=1)
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn(got.shape, generator=generator)
    torch.testing.assert_close(torch.autograd.grad(got, rows, upstream), torch.autograd.grad(wanted, rows, upstream))
