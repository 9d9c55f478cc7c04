"""Segment attention: every kernel against one masked softmax."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import attention as registry

from omniloom.ops import attention
from omniloom.ops.attention import HeadNorms, resolve_kernel, segment_attention, segment_attention_reference
from omniloom.ops.rotary import Rotary
from omniloom.types import Segments

CPU_KERNELS = ("eager", "sdpa")


def segments_of(lengths: list[int]) -> Segments:
    return Segments.from_lengths(lengths, num_bounds=len(lengths) + 1)


def random_heads(num_tokens: int, num_heads: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(num_tokens, num_heads, head_dim, generator=generator, requires_grad=True)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any),
    key_value_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8, 10]),
    causal=st.booleans(),
    kernel=st.sampled_from(CPU_KERNELS),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_equal_the_reference(lengths, key_value_heads, group, head_dim, causal, kernel, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        random_heads(sum(lengths), heads, head_dim, generator)
        for heads in (key_value_heads * group, key_value_heads, key_value_heads)
    )
    segments = segments_of(lengths)
    out = segment_attention(q, k, v, segments, causal=causal, kernel=kernel)
    wanted = segment_attention_reference(q, k, v, segments, causal=causal)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(out.shape, generator=generator)
    for got, reference in zip(
        torch.autograd.grad(out, (q, k, v), upstream),
        torch.autograd.grad(wanted, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("frozen", [False, True])
def test_norms_within_equal_norms_before_and_keep_one_copy_of_keys_alone(kernel, frozen):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (random_heads(17, heads, 8, generator) for heads in (4, 2, 2))
    weights = [(1 + 0.1 * torch.randn(8, generator=generator)).requires_grad_(not frozen) for _ in range(2)]
    angles = torch.randn(17, 4, generator=generator)
    norms = HeadNorms(*weights, (1e-6, 1e-6), Rotary(cos=angles.cos(), sin=angles.sin()))
    segments, kept = segments_of([5, 8, 4]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = segment_attention(q, k, v, segments, causal=True, kernel=kernel, norms=norms)
    heads = {id(tensor): tensor for tensor in kept if tensor.shape in (q.shape, k.shape)}
    turned = [heads[place] for place in heads.keys() - {id(q), id(k), id(v), id(out)}]
    assert [tensor.shape for tensor in turned] == [k.shape]
    wanted = segment_attention(*norms(q, k), v, segments, causal=True, kernel=kernel)
    assert torch.equal(out, wanted)
    leaves = [q, k, v] if frozen else [q, k, v, *weights]
    upstream = torch.randn(out.shape, generator=generator)
    for got, reference in zip(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        assert torch.equal(got, reference)


def test_blocks_of_queries_in_the_eager_kernel_do_not_show(monkeypatch):
    monkeypatch.setattr(attention, "EAGER_QUERY_BLOCK", 3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (random_heads(17, heads, 4, generator) for heads in (4, 2, 2))
    segments = segments_of([5, 8, 4])
    out = segment_attention(q, k, v, segments, causal=True, kernel="eager")
    wanted = segment_attention_reference(q, k, v, segments, causal=True)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for got, reference in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(wanted.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_neighbouring_segments_do_not_see_each_other(kernel):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (random_heads(10, 2, 8, generator).detach() for _ in range(3))
    together = segment_attention(q, k, v, segments_of([4, 6]), causal=True, kernel=kernel)
    alone = segment_attention(q[4:], k[4:], v[4:], segments_of([6]), causal=True, kernel=kernel)
    assert torch.equal(together[4:], alone) or kernel == "eager"  # eager sums over more (masked) keys
    torch.testing.assert_close(together[4:], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_views_that_are_not_contiguous_are_read_right(kernel):
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(9, 3, 2, 8, generator=generator).unbind(1)
    segments = segments_of([3, 3, 3])
    got = segment_attention(q, k, v, segments, causal=False, kernel=kernel)
    torch.testing.assert_close(got, segment_attention_reference(q, k, v, segments, causal=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_bfloat16_keeps_its_dtype_and_float32_softmax(kernel):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (random_heads(12, 2, 8, generator).detach().bfloat16().requires_grad_() for _ in range(3))
    segments = segments_of([5, 7])
    out = segment_attention(q, k, v, segments, causal=True, kernel=kernel)
    wanted = segment_attention_reference(q.double(), k.double(), v.double(), segments, causal=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), wanted.double(), rtol=0.02, atol=0.02)  # 8 bits of mantissa
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 and torch.isfinite(x.grad).all() for x in (q, k, v))


def test_runs_of_equal_segments_become_one_call():
    bounds = torch.tensor([0, 4, 8, 12, 12, 15, 15, 18, 22])
    assert attention._equal_runs(bounds) == [(0, 3, 4), (12, 2, 3), (18, 1, 4)]


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (attention._cpu_attention, attention._cpu_attention_backward),
        (attention._eager_attention, attention._eager_attention_backward),
    ],
)
def test_both_ops_are_registered_so_that_compilers_may_rely_on_them(forward, backward):
    generator = torch.Generator().manual_seed(4)
    q, k, v = (random_heads(10, heads, 8, generator).detach() for heads in (4, 2, 2))
    others = segments_of([4, 6]).cu_seqlens, True
    torch.library.opcheck(forward, (q, k, v, *others))
    torch.library.opcheck(backward, (torch.ones_like(q), q, k, v, *forward(q, k, v, *others), *others))


@pytest.mark.parametrize(("lengths", "calls"), [([4] * 8, [3, 3, 2]), ([4, 5, 3, 4, 4], [5]), ([4, 4, 4], [3])])
def test_flash_attention_takes_many_segments_of_one_length_in_parts(monkeypatch, lengths, calls):
    """By a stand-in that computes as the eager kernel does: the room that its backward takes grows with segments."""
    found = []

    def forward(q, k, v, q_bounds, k_bounds, q_longest, k_longest, dropout, causal, debug, **window):
        assert (dropout, debug, q_longest, k_longest, q_bounds is k_bounds) == (0.0, False, *2 * [max(lengths)], True)
        assert window == {"window_size_left": -1, "window_size_right": 0}
        out, log_sums = attention._eager_attention(q, k, v, q_bounds, causal)
        return out, log_sums.T.contiguous(), None, None, None

    def backward(grad, q, k, v, out, log_sums, q_bounds, k_bounds, q_longest, k_longest, dropout, causal, *_, **__):
        found.append(len(q_bounds) - 1)
        assert torch.equal(q_bounds, k_bounds)
        assert (dropout, q_longest, k_longest, int(q_bounds[-1])) == (0.0, *2 * [max(lengths)], len(q))
        return attention._eager_attention_backward(grad, q, k, v, out, log_sums.T.contiguous(), q_bounds, causal)

    monkeypatch.setattr(attention.torch_operators, "flash_attention", forward)
    monkeypatch.setattr(attention.torch_operators, "flash_attention_backward", backward)
    monkeypatch.setattr(attention, "resolve_kernel", lambda *_: "flash")
    monkeypatch.setattr(attention, "MOST_SEGMENTS", 3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (random_heads(sum(lengths), heads, 8, generator) for heads in (4, 2, 2))
    segments = Segments.from_lengths(lengths)
    out = segment_attention(q, k, v, segments, causal=True, kernel="auto")
    wanted = segment_attention_reference(q, k, v, segments, causal=True)
    upstream = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    assert found == calls
    for one, other in zip(grads, torch.autograd.grad(wanted, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_flash_attention_3_takes_its_place_once_or_says_that_it_is_not_there():
    with pytest.raises(ValueError, match="flash_attn_interface"):
        attention.use_flash3()
    calls, removed = [], []
    handle = SimpleNamespace(remove=lambda: removed.append(1))
    known = registry._registry._FLASH_ATTENTION_IMPLS["FA3"]
    registry.register_flash_attention_impl("FA3", register_fn=lambda: calls.append(1) or handle)
    try:
        attention.use_flash3()
        attention.use_flash3()
        assert calls == [1]
    finally:
        registry.restore_flash_attention_impl()
        registry.register_flash_attention_impl("FA3", register_fn=known)
    assert removed == [1]


def test_kernels_are_chosen_by_name_and_never_fallen_back_from():
    assert resolve_kernel("auto", "cpu", torch.float32) == "sdpa"
    assert resolve_kernel("auto", "cuda", torch.bfloat16) == "flash"
    assert resolve_kernel("auto", "cuda", torch.float32) == "eager"
    assert resolve_kernel("auto", "xpu", torch.bfloat16) == "eager"
    for kernel, device, dtype in (
        ("flash", "cpu", torch.bfloat16),
        ("flash", "cuda", torch.float32),
        ("flash3", "npu", torch.bfloat16),
        ("sdpa", "cuda", torch.bfloat16),
    ):
        with pytest.raises(ValueError, match=f"'{kernel}' cannot run on {device}"):
            resolve_kernel(kernel, device, dtype)
