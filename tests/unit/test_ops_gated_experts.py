"""The fused feed-forward of routed experts against its steps one after another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from omniloom.ops.gated_experts import (
    Copies,
    gated_experts,
    grouped_experts,
    routed_experts_reference,
)
from omniloom.ops.grouped_gemm import sort_by_group
from omniloom.ops.linear_map import LinearMap

NUM_EXPERTS, HIDDEN, INNER = 5, 7, 3


def make(
    num_tokens: int, num_copies: int, *, dtype: torch.dtype = torch.float64, multiple: int = 1, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor, Copies]:
    """tokens, gate_up, down and weights, all wanting gradients; offsets; copies. The last expert gets no token."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_tokens, HIDDEN), (NUM_EXPERTS, 2 * INNER, HIDDEN), (NUM_EXPERTS, HIDDEN, INNER)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in (*shapes, (num_tokens, num_copies))]
    chosen = torch.randint(NUM_EXPERTS - 1, (num_tokens * num_copies,), generator=generator)
    slot, row, counts = sort_by_group(chosen, NUM_EXPERTS, multiple)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    return leaves, counts.cumsum(0).to(torch.int32), Copies(slot, row.view(num_tokens, num_copies), leaves[3])


def routed(tokens: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, *others: object) -> torch.Tensor:
    return gated_experts(tokens, LinearMap(gate_up), LinearMap(down), *others)


def grouped(tokens: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, *others: object) -> torch.Tensor:
    return grouped_experts(tokens, LinearMap(gate_up), LinearMap(down), *others)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 4]), st.integers(0, 99))
def test_results_and_gradients_equal_the_steps_one_after_another(num_tokens, num_copies, multiple, seed):
    leaves, offsets, copies = make(num_tokens, num_copies, multiple=multiple, seed=seed)
    got, wanted = (f(*leaves[:3], offsets, copies) for f in (routed, routed_experts_reference))
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn(got.shape, dtype=got.dtype)
    grads = [torch.autograd.grad(out, leaves, upstream) for out in (got, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_all_groups_in_one_call_give_the_same(frozen):
    """What accelerators do; grouped GEMM has no float64."""
    leaves, offsets, copies = make(8, 2, dtype=torch.float32)
    wanted = routed_experts_reference(*leaves[:3], offsets, copies)
    upstream = torch.randn(wanted.shape)
    wanted_grads = torch.autograd.grad(wanted, leaves, upstream)
    if frozen is not None:
        leaves[frozen].requires_grad_(False)
    got = grouped(*leaves[:3], offsets, copies)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    got.backward(upstream)
    for number, (leaf, grad) in enumerate(zip(leaves, wanted_grads, strict=True)):
        assert leaf.grad is None if number == frozen else torch.allclose(leaf.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_what_is_frozen_gets_no_gradient_and_the_others_the_same(frozen):
    leaves, offsets, copies = make(6, 2)
    wanted = torch.autograd.grad(routed_experts_reference(*leaves[:3], offsets, copies).square().sum(), leaves)
    leaves[frozen].requires_grad_(False)
    routed(*leaves[:3], offsets, copies).square().sum().backward()
    for number, (leaf, grad) in enumerate(zip(leaves, wanted, strict=True)):
        assert leaf.grad is None if number == frozen else torch.allclose(leaf.grad, grad)


def test_bfloat16_is_as_close_as_its_rounding():
    leaves, offsets, copies = make(64, 2, dtype=torch.bfloat16, multiple=64)
    exact = [leaf.detach().double() for leaf in leaves]
    wanted = routed_experts_reference(*exact[:3], offsets, copies._replace(weights=exact[3]))
    got = routed(*leaves[:3], offsets, copies).double()
    assert (got - wanted).norm() < 0.02 * wanted.norm()  # bfloat16 keeps 8 bits


def test_a_recomputing_backward_stops_before_the_last_product(monkeypatch):
    """A third of the experts' arithmetic, which nothing in backward asks for."""
    leaves, offsets, copies = make(8, 2, dtype=torch.float32)
    calls = []
    forward = LinearMap.of_groups
    monkeypatch.setattr(LinearMap, "of_groups", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    out = checkpoint(grouped, *leaves[:3], offsets, copies, use_reentrant=False)
    assert len(calls) == 2
    out.sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("again", [False, True])
def test_all_groups_in_one_call_are_one_compiled_graph(again):
    leaves, offsets, copies = make(8, 2, dtype=torch.float32)

    def compute(tokens, gate_up, down, weights):
        return grouped(tokens, gate_up, down, offsets, copies._replace(weights=weights))

    whole = (lambda *given: checkpoint(compute, *given, use_reentrant=False)) if again else compute
    results = [run(*leaves) for run in (torch.compile(whole, backend="aot_eager", fullgraph=True), compute)]
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in results]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
