"""The NPU's operators against a stand-in for torch_npu: called as documented, they give what is given elsewhere.

The stand-in has the signatures and limits of torch_npu's documentation (Ascend/op-plugin, docs/context, npu_*.md, read
2026-11-28) and computes in plain PyTorch. What the chip does with such calls, it cannot tell.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from omniloom.ops import attention, grouped_gemm, norm, npu, rotary
from omniloom.ops.attention import HeadNorms, segment_attention, segment_attention_reference
from omniloom.ops.rotary import Rotary
from omniloom.parallel.device import widest_float
from omniloom.types import Segments

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FAR = 2147483647


class TorchNPU:
    """`torch_npu`, as far as it is called here."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def npu_rms_norm(self, self_: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
        self.calls.append("npu_rms_norm")
        assert self_.dtype in FLOATS
        assert gamma.shape == self_.shape[-1:]
        scale = torch.rsqrt(self_.float().square().mean(-1, keepdim=True) + epsilon)
        return (self_.float() * scale * gamma.float()).to(self_.dtype), scale

    def npu_rms_norm_backward(self, dy: Tensor, self_: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append("npu_rms_norm_backward")
        assert rstd.dtype == torch.float32
        assert rstd.shape == (*self_.shape[:-1], 1)
        with torch.enable_grad():
            x, weight = self_.detach().float().requires_grad_(), gamma.detach().float().requires_grad_()
            out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _epsilon(x.detach(), rstd)) * weight
            dx, dgamma = torch.autograd.grad(out, (x, weight), dy.float())
        return dx.to(self_.dtype), dgamma

    def npu_rotary_mul(self, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
        self.calls.append("npu_rotary_mul")
        assert input.dtype == r1.dtype == r2.dtype
        assert input.ndim == r1.ndim == r2.ndim == 4
        _, length, heads, width = input.shape
        assert r1.shape == r2.shape == (1, length, 1, width), "1S1D for BSND"
        assert width < 896
        assert width % 2 == 0
        assert heads < 1000
        assert r1.abs().max() <= 1
        assert rotary_mode == "half"
        low, high = input.chunk(2, dim=-1)
        return r1 * input + r2 * torch.cat((-high, low), dim=-1)

    def npu_grouped_matmul(
        self,
        x: list[Tensor],
        weight: list[Tensor],
        *,
        bias: list[Tensor] | None = None,
        scale: list[Tensor] | None = None,
        offset: list[Tensor] | None = None,
        antiquant_scale: list[Tensor] | None = None,
        antiquant_offset: list[Tensor] | None = None,
        per_token_scale: list[Tensor] | None = None,
        group_list: Tensor | None = None,
        activation_input: list[Tensor] | None = None,
        activation_quant_scale: list[Tensor] | None = None,
        activation_quant_offset: list[Tensor] | None = None,
        split_item: int = 0,
        group_type: int | None = None,
        group_list_type: int = 0,
        act_type: int = 0,
        output_dtype: torch.dtype | None = None,
        tuning_config: list[int] | None = None,
    ) -> list[Tensor]:
        self.calls.append("npu_grouped_matmul")
        (left,), (right,) = x, weight
        assert isinstance(group_list, Tensor)
        assert group_list.dtype == torch.int64
        assert group_list.ndim == 1
        assert split_item in (2, 3), "one tensor comes out"
        assert group_list_type == 0
        assert (group_list.diff() >= 0).all()
        assert left.dtype == right.dtype
        assert left.dtype in FLOATS
        assert max(left.shape[-1], right.shape[-1]) < 65536
        ends = [0, *group_list.tolist()]
        if group_type == 0:
            assert left.is_contiguous(), "x is not taken transposed"
            assert right.ndim == 3
            assert len(right) == len(group_list) <= 1024
            assert ends[-1] == left.shape[0]
            return [torch.cat([left[a:b] @ right[e] for e, (a, b) in enumerate(pairwise(ends))])]
        assert group_type == 2
        assert not left.is_contiguous(), "the transposition shows in strides"
        return [torch.stack([left[:, a:b] @ right[a:b] for a, b in pairwise(ends)])]

    def npu_fusion_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_num: int,
        input_layout: str,
        pse: Tensor | None = None,
        padding_mask: Tensor | None = None,
        atten_mask: Tensor | None = None,
        scale: float = 1.0,
        keep_prob: float = 1.0,
        pre_tockens: int = FAR,
        next_tockens: int = FAR,
        inner_precise: int = 0,
        prefix: list[int] | None = None,
        actual_seq_qlen: list[int] | None = None,
        actual_seq_kvlen: list[int] | None = None,
        sparse_mode: int = 0,
        gen_mask_parallel: bool = True,
        sync: bool = False,
        softmax_layout: str = "",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
        self.calls.append("npu_fusion_attention")
        self._check_attention(query, key, value, head_num, input_layout, atten_mask, actual_seq_qlen, sparse_mode)
        assert actual_seq_qlen == actual_seq_kvlen
        out, largest, sums = torch.empty_like(query), [], []
        for rows, probabilities, own in _segments(query, key, actual_seq_qlen or [], atten_mask is not None, scale):
            largest.append(own[0])
            sums.append(own[1])
            out[rows] = torch.einsum("hqk,khd->qhd", probabilities, _repeat(value[rows], head_num)).to(out.dtype)
        kept = (torch.cat(part)[..., None].expand(-1, -1, 8).contiguous() for part in (largest, sums))
        return out, *kept, torch.empty(0), 0, 0, 0

    def npu_fusion_attention_grad(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dy: Tensor,
        head_num: int,
        input_layout: str,
        *,
        pse: Tensor | None = None,
        padding_mask: Tensor | None = None,
        atten_mask: Tensor | None = None,
        softmax_max: Tensor | None = None,
        softmax_sum: Tensor | None = None,
        softmax_in: Tensor | None = None,
        attention_in: Tensor | None = None,
        scale_value: float = 1.0,
        keep_prob: float = 1.0,
        pre_tockens: int = FAR,
        next_tockens: int = FAR,
        inner_precise: int = 0,
        seed: int = 0,
        offset: int = 0,
        numels: int = 0,
        prefix: list[int] | None = None,
        actual_seq_qlen: list[int] | None = None,
        actual_seq_kvlen: list[int] | None = None,
        sparse_mode: int = 0,
        gen_mask_parallel: bool = True,
        sync: bool = False,
        softmax_layout: str = "",
        sink: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        self.calls.append("npu_fusion_attention_grad")
        self._check_attention(query, key, value, head_num, input_layout, atten_mask, actual_seq_qlen, sparse_mode)
        assert softmax_max is not None
        assert softmax_sum is not None
        assert attention_in is not None
        assert dy.shape == attention_in.shape == query.shape
        again = self.npu_fusion_attention(
            *(query, key, value, head_num, input_layout),
            atten_mask=atten_mask,
            scale=scale_value,
            actual_seq_qlen=actual_seq_qlen,
            actual_seq_kvlen=actual_seq_kvlen,
            sparse_mode=sparse_mode,
        )
        for kept, made in ((softmax_max, again[1]), (softmax_sum, again[2]), (attention_in, again[0])):
            torch.testing.assert_close(kept, made, rtol=1e-2, atol=1e-2)
        ends = torch.tensor([0, *(actual_seq_qlen or [])], dtype=torch.int32)
        with torch.enable_grad():
            inputs = [x.detach().float().requires_grad_() for x in (query, key, value)]
            segments = Segments(cu_seqlens=ends, bounds=tuple(ends.tolist()), max_length=len(query))
            out = segment_attention_reference(*inputs, segments, causal=atten_mask is not None)
            grads = torch.autograd.grad(out, inputs, dy.float())
        return *(grad.to(query.dtype) for grad in grads), torch.empty(0), torch.empty(0)

    def _check_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_num: int,
        layout: str,
        mask: Tensor | None,
        ends: list[int] | None,
        sparse_mode: int,
    ) -> None:
        assert layout == "TND"
        assert query.dtype == key.dtype == value.dtype
        assert query.dtype in FLOATS
        assert head_num == query.shape[1] <= 256
        assert head_num % key.shape[1] == 0
        assert query.shape[2] == key.shape[2] <= 768
        assert isinstance(ends, list)
        assert 1 <= len(ends) <= 1024
        assert all(isinstance(end, int) for end in ends)
        assert ends == sorted(ends)
        assert ends[-1] == len(query) == len(key) == len(value)
        if mask is None:
            assert sparse_mode == 0
        else:
            assert sparse_mode == 3
            assert mask.dtype == torch.bool
            assert torch.equal(mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))


def _epsilon(x: Tensor, rstd: Tensor) -> Tensor:
    return rstd**-2 - x.square().mean(-1, keepdim=True)


def _repeat(heads: Tensor, num_heads: int) -> Tensor:
    return heads.float().repeat_interleave(num_heads // heads.shape[1], dim=1)


def _segments(query: Tensor, key: Tensor, ends: list[int], causal: bool, scale: float) -> Any:
    """Rows of each segment, their probabilities [H, S, S], and the largest scores and sums [S, H]."""
    for first, last in zip([0, *ends], ends, strict=False):
        rows = slice(first, last)
        scores = torch.einsum("qhd,khd->hqk", query[rows].float(), _repeat(key[rows], query.shape[1])) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        sums = (scores - largest).exp().sum(-1, keepdim=True)
        yield rows, (scores - largest).exp() / sums, (largest[..., 0].T, sums[..., 0].T)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> TorchNPU:
    """Tensors count as the NPU's, and torch_npu is the stand-in."""
    library = TorchNPU()
    monkeypatch.setattr(npu, "takes", lambda _: True)
    monkeypatch.setattr(npu, "library", lambda: library)
    monkeypatch.setattr(attention, "resolve_kernel", lambda *_: "flash")
    return library


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def assert_same_gradients(found: Tensor, wanted: Tensor, inputs: list[Tensor], tolerance: float = 1e-4) -> None:
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(9)).to(found.dtype)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad(wanted, inputs, upstream)
    for one, other in zip(torch.autograd.grad(found, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_norms(library: TorchNPU, dtype: torch.dtype, tolerance: float) -> None:
    x, weight = random(6, 3, 16, dtype=dtype), random(16, seed=1, dtype=dtype)
    out, wanted = norm.rms_norm(x, weight, 1e-6), norm.rms_norm_reference(x, weight, 1e-6)
    assert_same_gradients(out, wanted, [x, weight], tolerance)
    assert library.calls == ["npu_rms_norm", "npu_rms_norm_backward"]


def test_heads_are_turned(library: TorchNPU) -> None:
    heads, angles = random(5, 3, 8), random(5, 4, seed=1).detach()
    turned = Rotary(cos=angles.cos(), sin=angles.sin())
    assert_same_gradients(rotary.apply_rotary(heads, turned), rotary.apply_rotary_reference(heads, turned), [heads])
    assert library.calls == ["npu_rotary_mul"] * 2


def test_products_of_groups(library: TorchNPU) -> None:
    rows, weight = random(10, 8), random(4, 12, 8, seed=1)
    offsets = torch.tensor([3, 3, 9, 10], dtype=torch.int32)
    out = grouped_gemm.grouped_linear(rows, weight, offsets)
    torch.testing.assert_close(out, grouped_gemm.grouped_linear_reference(rows, weight, offsets))
    left = random(10, 12, seed=2)
    outer = grouped_gemm.grouped_outer(left, rows, offsets)
    wanted = torch.autograd.grad(grouped_gemm.grouped_linear_reference(rows, weight, offsets), weight, left)[0]
    torch.testing.assert_close(outer, wanted, rtol=1e-4, atol=1e-5)
    assert library.calls == ["npu_grouped_matmul"] * 2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_attention_within_segments(library: TorchNPU, causal: bool, normed: bool) -> None:
    segments = Segments.from_lengths([3, 1, 7], num_bounds=8)
    q, k, v = random(11, 4, 8), random(11, 2, 8, seed=1), random(11, 2, 8, seed=2)
    inputs, norms, heads = [q, k, v], None, (q, k)
    if normed:
        weights, angles = (random(8, seed=3), random(8, seed=4)), random(11, 4, seed=5).detach()
        norms = HeadNorms(*weights, (1e-6, 1e-6), Rotary(cos=angles.cos(), sin=angles.sin()))
        inputs += weights
        normed_heads = (norm.rms_norm_reference(x, w, 1e-6) for x, w in zip((q, k), weights, strict=True))
        heads = tuple(rotary.apply_rotary_reference(x, norms.rotary) for x in normed_heads)
    out = segment_attention(q, k, v, segments, causal=causal, kernel="auto", norms=norms)
    assert_same_gradients(out, segment_attention_reference(*heads, v, segments, causal=causal), inputs)
    assert {"npu_fusion_attention", "npu_fusion_attention_grad"} <= set(library.calls)


def test_more_segments_than_a_call_takes_are_several_calls(library: TorchNPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "MOST_SEGMENTS", 2)
    segments = Segments.from_lengths([2, 3, 1, 4, 2])
    q, k, v = (random(12, 2, 8, seed=seed) for seed in range(3))
    out = segment_attention(q, k, v, segments, causal=True, kernel="auto")
    assert library.calls.count("npu_fusion_attention") == 3
    assert_same_gradients(out, segment_attention_reference(q, k, v, segments, causal=True), [q, k, v])


def test_an_npu_takes_its_kernel_in_every_dtype_and_sums_in_float32() -> None:
    assert attention.resolve_kernel("auto", "npu", torch.float32) == "flash"
    assert attention.resolve_kernel("auto", "npu", torch.bfloat16) == "flash"
    assert attention.resolve_kernel("auto", "cuda", torch.float32) == "eager"
    assert widest_float(torch.device("cpu")) == torch.float64


def test_tensors_of_others_go_their_own_way() -> None:
    assert not npu.takes(torch.ones(1))
