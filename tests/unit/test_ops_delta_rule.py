"""The gated delta rule and its convolution: against the recurrence, and transformers sample by sample."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniloom.ops.delta_rule import (
    CHUNK,
    GROUP,
    causal_convolution,
    causal_convolution_reference,
    gated_delta_rule,
    gated_delta_rule_reference,
    open_fla,
)
from omniloom.types import Segments


def segments_of(lengths: list[int]) -> Segments:
    return Segments.from_lengths(lengths, num_bounds=len(lengths) + 3)


def random_inputs(
    num_tokens: int,
    *,
    key_heads: int = 1,
    group: int = 2,
    key_dim: int = 5,
    value_dim: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v, decay, beta; some tokens forget nearly all, some nothing."""
    generator, heads = torch.Generator().manual_seed(seed), key_heads * group
    q, k = (torch.randn(num_tokens, key_heads, key_dim, generator=generator) for _ in range(2))
    v = torch.randn(num_tokens, heads, value_dim, generator=generator)
    decay = -torch.rand(num_tokens, heads, generator=generator).pow(3).mul(8)
    beta = torch.rand(num_tokens, heads, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, decay, beta)]


def assert_same(inputs: list[Tensor], out: Tensor, wanted: Tensor, *, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Outputs, and gradients of all inputs."""
    torch.testing.assert_close(out, wanted, rtol=rtol, atol=atol)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found, expected = (torch.autograd.grad(x, inputs, upstream) for x in (out, wanted))
    for got, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=rtol, atol=atol * max(1.0, float(reference.abs().max())))


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 7, 30, CHUNK - 1, CHUNK, CHUNK + 1]), min_size=1, max_size=4).filter(
        any
    ),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_chunks_and_their_gradients_equal_the_recurrence(lengths, key_heads, group, dims, seed):
    inputs = random_inputs(
        sum(lengths), key_heads=key_heads, group=group, key_dim=dims[0], value_dim=dims[1], seed=seed
    )
    segments = segments_of(lengths)
    assert_same(inputs, gated_delta_rule(*inputs, segments), gated_delta_rule_reference(*inputs, segments))


def test_gradients_are_exact_in_float64_over_several_groups_of_chunks():
    lengths = [GROUP - 3, 2 * CHUNK, 1, 40]
    inputs, segments = random_inputs(sum(lengths), dtype=torch.float64), segments_of(lengths)
    out, wanted = gated_delta_rule(*inputs, segments), gated_delta_rule_reference(*inputs, segments)
    assert_same(inputs, out, wanted, rtol=1e-9, atol=1e-11)


def test_what_others_in_the_pack_contain_does_not_change_a_sample_by_a_bit():
    lengths = [70, 33, 90, 15]
    inputs, segments = random_inputs(sum(lengths)), segments_of(lengths)
    changed = [x.detach().clone() for x in inputs]
    for x in changed[:3]:
        x[:70], x[103:] = 9.0 * x[:70], 0.0
    changed[3][:70] = -50.0
    out, other = (gated_delta_rule(*each, segments)[70:103] for each in (inputs, changed))
    assert torch.equal(out, other)


def test_a_state_that_survives_a_bound_would_be_seen():
    inputs = random_inputs(100)
    apart, joined = (gated_delta_rule(*inputs, segments_of(lengths)) for lengths in ([60, 40], [100]))
    assert torch.equal(apart[:60], joined[:60])
    assert not torch.isclose(apart[60:], joined[60:], rtol=1e-2).all()


@pytest.mark.parametrize("lengths", [[130], [1, 64, 65, 30]])
def test_outputs_and_gradients_equal_transformers_sample_by_sample(lengths):
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    inputs = random_inputs(sum(lengths), key_heads=2, key_dim=8, value_dim=6)
    segments = segments_of(lengths)
    parts = []
    for low, high in pairwise(segments.bounds):
        q, k, v, decay, beta = (x[None, low:high] for x in inputs)
        parts.append(torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0][0])
    assert_same(inputs, gated_delta_rule(*inputs, segments), torch.cat(parts))


def test_low_precision_is_computed_in_float32_and_returned_as_it_came():
    inputs, segments = random_inputs(200), segments_of([120, 80])
    low = [x.detach().bfloat16().requires_grad_() for x in inputs[:3]] + inputs[3:]
    out = gated_delta_rule(*low, segments)
    wanted = gated_delta_rule(*(x.float() for x in low), segments)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wanted.bfloat16())
    grads = torch.autograd.grad(out.sum(), low)
    assert [grad.dtype for grad in grads] == [x.dtype for x in low]


def test_only_inputs_and_a_state_for_many_tokens_are_kept():
    inputs, kept = random_inputs(2 * GROUP, key_heads=1, group=1, key_dim=4, value_dim=4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_delta_rule(*inputs, segments_of([2 * GROUP]))
    extra = sum(x.numel() for x in kept if all(x is not each for each in inputs) and x.is_floating_point())
    assert extra == 2 * 4 * 4


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    channels=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_the_convolution_equals_that_of_each_segment_alone(lengths, channels, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(lengths), channels, generator=generator, requires_grad=True)
    weight, segments = torch.randn(channels, width, generator=generator, requires_grad=True), segments_of(lengths)
    out = causal_convolution(x, weight, segments)
    assert_same([x, weight], out, causal_convolution_reference(x, weight, Segments.from_lengths(lengths)))


def test_flash_linear_attention_is_asked_for_what_the_rule_is(monkeypatch):
    """Its kernels need an accelerator; its interface is transformers', whose function stands in, each sample alone."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    def rule(q, k, v, *, g, beta, cu_seqlens, use_qk_l2norm_in_kernel):
        assert cu_seqlens.dtype == torch.int64
        parts = [
            torch_chunk_gated_delta_rule(
                *(x[:, low:high] for x in (q, k, v)),
                g=g[:, low:high],
                beta=beta[:, low:high],
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )[0]
            for low, high in pairwise(cu_seqlens.tolist())
            if high > low
        ]
        return torch.cat(parts, dim=1), None

    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = rule
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    inputs, segments = random_inputs(90, key_heads=2), segments_of([50, 0, 40])
    assert_same(inputs, gated_delta_rule(*inputs, segments, kernel="fla"), gated_delta_rule(*inputs, segments))


def test_flash_linear_attention_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ValueError, match=r"model\.attention\.delta_rule: fla .* install it, or use chunked"):
        open_fla()


def test_compiled_code_sees_one_operation():
    inputs, segments = random_inputs(80), segments_of([50, 30])
    args = (*(x.detach() for x in inputs), segments.cu_seqlens)
    torch.library.opcheck(torch.ops.omniloom.linear_attention.default, args)
