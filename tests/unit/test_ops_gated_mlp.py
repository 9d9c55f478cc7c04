"""The fused feed-forward of dense models against its steps one after another."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from omniloom.ops import gated_mlp as module
from omniloom.ops.gated_mlp import gated_mlp, gated_mlp_apart, gated_mlp_reference
from omniloom.ops.linear_map import LinearMap
from omniloom.ops.norm import rms_norm


def make(num_rows: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    shapes = (num_rows, 5), (9, 5), (9, 5), (5, 9)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *norm: object) -> torch.Tensor:
    return gated_mlp(x, LinearMap(gate), LinearMap(up), LinearMap(down), *norm)


@pytest.mark.parametrize("num_rows", [0, 1, 4, 11])
def test_results_and_gradients_equal_the_steps_one_after_another(num_rows, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 4 * 9)  # blocks of four rows, the last one short
    tensors = make(num_rows)
    got, wanted = gated(*tensors), gated_mlp_reference(*tensors)
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn(got.shape, dtype=got.dtype)
    grads = [torch.autograd.grad(out, tensors, upstream) for out in (got, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def apart(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *norm: object) -> torch.Tensor:
    """What accelerators do."""
    return gated_mlp_apart(x, LinearMap(gate), LinearMap(up), LinearMap(down), *norm)


@pytest.mark.parametrize("frozen", [None, 0, 1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [0, 1, 11])
def test_the_last_product_apart_gives_the_same(num_rows, frozen):
    tensors = [*make(num_rows), torch.linspace(0.5, 1.5, 5, dtype=torch.float64).requires_grad_()]
    if frozen is not None:
        tensors[frozen].requires_grad_(False)
    got, wanted = (compute(*tensors, 1e-6) for compute in (apart, gated))
    torch.testing.assert_close(got, wanted)
    leaves, upstream = [tensor for tensor in tensors if tensor.requires_grad], torch.randn(got.shape, dtype=got.dtype)
    grads = [torch.autograd.grad(out, leaves, upstream) for out in (got, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_recomputing_backward_stops_before_the_last_product(monkeypatch):
    """A third of the arithmetic, which nothing in backward asks for."""
    calls, tensors, forward = [], make(8), LinearMap.__call__
    monkeypatch.setattr(LinearMap, "__call__", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    out = checkpoint(apart, *tensors, use_reentrant=False)
    assert len(calls) == 3
    out.sum().backward()
    assert len(calls) == 5


@pytest.mark.parametrize("again", [False, True])
def test_the_last_product_apart_is_one_compiled_graph(again):
    tensors = make(8)
    compute = (lambda *given: checkpoint(apart, *given, use_reentrant=False)) if again else apart
    results = [run(*tensors) for run in (torch.compile(compute, backend="aot_eager", fullgraph=True), apart)]
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in results]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_what_is_frozen_gets_no_gradient_and_the_others_the_same(frozen):
    tensors = make(6)
    wanted = torch.autograd.grad(gated_mlp_reference(*tensors).square().sum(), tensors)
    tensors[frozen].requires_grad_(False)
    gated(*tensors).square().sum().backward()
    for number, (tensor, grad) in enumerate(zip(tensors, wanted, strict=True)):
        assert tensor.grad is None if number == frozen else torch.allclose(tensor.grad, grad)


@pytest.mark.parametrize("frozen", [None, 0, 4])
def test_a_norm_within_gives_what_one_before_gives(frozen, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 4 * 9)
    tensors = [*make(11, torch.float32), torch.linspace(0.5, 1.5, 5).requires_grad_()]
    if frozen is not None:
        tensors[frozen].requires_grad_(False)
    x, *weights, norm = tensors
    got, wanted = gated(x, *weights, norm, 1e-6), gated_mlp_reference(rms_norm(x, norm, 1e-6), *weights)
    torch.testing.assert_close(got, wanted)
    leaves, upstream = [tensor for tensor in tensors if tensor.requires_grad], torch.randn(got.shape)
    grads = [torch.autograd.grad(out, leaves, upstream) for out in (got, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_bfloat16_is_as_close_as_its_rounding():
    tensors = make(64, torch.bfloat16)
    wanted = gated_mlp_reference(*(tensor.double() for tensor in tensors))
    assert (gated(*tensors).double() - wanted).norm() < 0.02 * wanted.norm()  # bfloat16 keeps 8 bits
