"""Attention kernels that only a GPU has, against the reference on the same GPU."""

from __future__ import annotations

import pytest
import torch

from omniloom.ops.attention import segment_attention, segment_attention_reference
from omniloom.ops.block_attention import attend, attend_backward
from omniloom.parallel.staging import to_device
from omniloom.types import Segments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")  # kernels that no CPU has


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kernel", "dtype"), [("flash", torch.bfloat16), ("eager", torch.float32)])
@pytest.mark.parametrize(("heads", "key_value_heads", "head_dim"), [(8, 2, 128), (16, 16, 72), (20, 20, 64)])
def test_output_and_gradients_equal_the_reference(kernel, dtype, causal, heads, key_value_heads, head_dim):
    generator = torch.Generator("cuda").manual_seed(0)
    segments = to_device(Segments.from_lengths([1, 299, 1, 799], num_bounds=8), torch.device("cuda"))
    q, k, v = (
        torch.randn(1100, count, head_dim, device="cuda", generator=generator).to(dtype).requires_grad_()
        for count in (heads, key_value_heads, key_value_heads)
    )
    out = segment_attention(q, k, v, segments, causal=causal, kernel=kernel)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    wanted = segment_attention_reference(*exact, segments, causal=causal)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4  # 8 bits of mantissa; TF32 is off by default
    assert (out - wanted).norm() < tolerance * wanted.norm()
    upstream = torch.randn(out.shape, device="cuda", generator=generator)
    got = torch.autograd.grad(out, (q, k, v), upstream.to(dtype))
    for a, b in zip(got, torch.autograd.grad(wanted, exact, upstream), strict=True):
        assert (a.float() - b).norm() < tolerance * b.norm()


def test_a_block_of_ring_attention_is_a_rectangle():
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (100, 8, 64), (37, 2, 64), (37, 2, 64)
    exact = [torch.randn(s, device="cuda", generator=generator).bfloat16().float().requires_grad_() for s in shapes]
    q, k, v = (x.detach().bfloat16() for x in exact)
    scores = torch.einsum("qhd,khd->hqk", exact[0], exact[1].repeat_interleave(4, dim=1)) * 64**-0.5
    wanted = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), exact[2].repeat_interleave(4, dim=1))
    out, log_sums = attend("flash", q, k, v)
    assert (log_sums - scores.logsumexp(dim=-1).T).abs().max() < 0.02
    upstream = torch.randn(wanted.shape, device="cuda", generator=generator)
    found = attend_backward("flash", upstream.bfloat16(), q, k, v, out, log_sums)
    for one, other in zip((out, *found), (wanted, *torch.autograd.grad(wanted, exact, upstream)), strict=True):
        assert (one.float() - other).norm() < 0.02 * other.norm()


def test_many_segments_of_one_length_have_the_gradients_of_one_call(monkeypatch):
    segments = to_device(Segments.from_lengths([16] * 2500), torch.device("cuda"))
    q, k, v = (torch.randn(40000, heads, 64, device="cuda").bfloat16().requires_grad_() for heads in (4, 2, 2))
    grads = []
    for most in (1024, 4096):
        monkeypatch.setattr("omniloom.ops.attention.MOST_SEGMENTS", most)
        out = segment_attention(q, k, v, segments, causal=True, kernel="flash")
        grads.append(torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_attention_never_waits_for_the_device():
    segments = to_device(Segments.from_lengths([100, 156]), torch.device("cuda"))
    q = torch.randn(256, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    segment_attention(q, q, q, segments, causal=True, kernel="auto").sum().backward()  # first-use set-up may wait
    torch.cuda.set_sync_debug_mode("error")
    outs = []
    try:  # whatever waits raises
        for kernel in ("flash", "eager"):
            outs.append(segment_attention(q, q, q, segments, causal=True, kernel=kernel))
            outs[-1].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (outs[0] - outs[1]).norm() < 0.02 * outs[1].norm()
