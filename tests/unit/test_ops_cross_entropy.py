"""Chunked cross entropy of a head: against all logits at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.ops.cross_entropy import choose_chunk_tokens, linear_cross_entropy, linear_cross_entropy_reference
from omniloom.ops.linear_map import LinearMap


def inputs(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, 8, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(23, 8, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 23, (num_tokens,), generator=generator)
    weights = torch.rand(num_tokens, generator=generator) * 3
    return hidden, head, labels, weights


def of_maps(hidden, head, labels, weights, **others):
    return linear_cross_entropy(hidden, LinearMap(head), labels, weights, **others)


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(0, 20), chunk=st.sampled_from([1, 3, 8, 64, None]), seed=st.integers(0, 99))
def test_loss_and_gradients_equal_the_reference_whatever_the_chunk(num_tokens, chunk, seed):
    hidden, head, labels, weights = inputs(num_tokens, seed)
    loss = linear_cross_entropy(hidden, LinearMap(head), labels, weights, chunk_tokens=chunk)
    wanted = linear_cross_entropy_reference(hidden, head, labels, weights)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    # an upstream gradient other than 1, as dividing by the step's weight sum makes it
    for got, reference in zip(
        torch.autograd.grad(loss * 0.37, (hidden, head)),
        torch.autograd.grad(wanted * 0.37, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-6)


def test_an_adapter_of_the_head_adds_to_the_logits():
    hidden, head, labels, weights = inputs(20)
    generator = torch.Generator().manual_seed(1)
    low = tuple(torch.randn(size, generator=generator, requires_grad=True) for size in ((3, 8), (23, 3)))
    adapted = LinearMap(head.detach(), low=low[0], up=low[1])
    loss = linear_cross_entropy(hidden, adapted, labels, weights, chunk_tokens=8)
    wanted = linear_cross_entropy_reference(hidden, head.detach() + low[1] @ low[0], labels, weights)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss * 0.37, (hidden, *low)), torch.autograd.grad(wanted * 0.37, (hidden, *low))
    )


def test_no_tokens_give_zero_loss_and_zero_gradients():
    hidden, head, labels, weights = inputs(0)
    loss = linear_cross_entropy(hidden, LinearMap(head), labels, weights)
    loss.backward()
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    assert hidden.grad.shape == (0, 8)
    assert not head.grad.any()


def test_bfloat16_loss_is_as_good_as_its_logits():
    hidden, head, labels, weights = inputs(40, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, LinearMap(head), labels, weights, chunk_tokens=8)
    exact = linear_cross_entropy_reference(hidden.double(), head.double(), labels, weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.float(), rtol=5e-3, atol=0)  # logits carry 8 bits, errors average out
    got = torch.autograd.grad(loss, (hidden, head))
    wanted = torch.autograd.grad(exact, (hidden, head))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_leaves_the_other_right(frozen):
    arguments = inputs(9)
    arguments[frozen].requires_grad_(False)
    live = arguments[1 - frozen]
    got = torch.autograd.grad(of_maps(*arguments, chunk_tokens=4), live)
    wanted = torch.autograd.grad(linear_cross_entropy_reference(*arguments), live)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_without_gradients_only_the_loss_is_computed():
    arguments = inputs(9)
    with torch.no_grad():
        loss = of_maps(*arguments, chunk_tokens=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy_reference(*arguments).detach())


def test_very_large_logits_do_not_overflow():
    hidden, head, labels, weights = inputs(6)
    loss = linear_cross_entropy(hidden * 1e4, LinearMap(head), labels, weights)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, head)[0]).all()


def test_the_chunk_is_the_largest_power_of_two_within_the_budget():
    assert choose_chunk_tokens(2**20, "cpu") == 64
    assert choose_chunk_tokens(2**20 - 1000, "cpu") == 64
    assert choose_chunk_tokens(2**30, "cpu") == 1
    assert choose_chunk_tokens(2**20, "cuda") == 8 * choose_chunk_tokens(2**20, "cpu")


@pytest.mark.parametrize("bounds", [(0, 8, 16, 23), (0, 20, 21, 23)])
def test_parts_of_the_vocabulary_give_the_loss_and_gradients_of_the_whole(bounds):
    """As tensor ranks compute them, one after another: what they tell each other is known beforehand here."""
    hidden, head, labels, weights = inputs(11)
    labels[3], weights[3] = -100, 0.0  # a row that fills up
    logits = (hidden @ head.T).detach()
    whole = logits.logsumexp(dim=1, keepdim=True), logits.gather(1, labels.clamp(0)[:, None])
    seen = []

    def join(normaliser, label_logits):
        seen.append((normaliser, label_logits))
        rows = slice(4 * (len(seen) - 1), 4 * len(seen))
        return whole[0][rows], whole[1][rows]

    gradients, joined = [], []
    for low, high in pairwise(bounds):
        part = LinearMap(head[low:high])
        loss = linear_cross_entropy(hidden, part, labels - low, weights, chunk_tokens=4, join_vocabulary=join)
        gradients.append(torch.autograd.grad(loss, (hidden, head)))
        joined.append([torch.cat(pieces) for pieces in zip(*seen, strict=True)])
        seen.clear()
    wanted = linear_cross_entropy_reference(hidden, head, labels.clamp(0), weights)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.stack([each[0] for each in joined]).logsumexp(dim=0), whole[0])
    kept = weights > 0
    torch.testing.assert_close(sum(each[1] for each in joined)[kept], whole[1][kept])
    for parts, reference in zip(zip(*gradients, strict=True), torch.autograd.grad(wanted, (hidden, head)), strict=True):
        torch.testing.assert_close(sum(parts), reference, rtol=1e-4, atol=1e-6)
