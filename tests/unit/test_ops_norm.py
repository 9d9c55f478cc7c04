"""The RMS norm against its definition and against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omniloom.ops import norm
from omniloom.ops.norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("block_elements", [norm.BLOCK_ELEMENTS, 32])  # 32: blocks of few rows, the last one short
@pytest.mark.parametrize("shape", [(5, 16), (3, 4, 8), (0, 8)])
def test_output_and_gradients_equal_the_reference(shape, block_elements, monkeypatch):
    monkeypatch.setattr(norm, "BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    weight = torch.randn(shape[-1], generator=generator, requires_grad=True)
    got, wanted = rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, F.rms_norm(x, weight.shape, weight, 1e-6), rtol=1e-6, atol=1e-6)
    upstream = torch.randn(shape, generator=generator)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight), upstream), torch.autograd.grad(wanted, (x, weight), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_low_precision_is_rounded_once():
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(9, 16, generator=generator).bfloat16(), torch.randn(16, generator=generator).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.float(), weight.float(), 1e-6).bfloat16())
