"""Operations with branches that no CPU takes: in bfloat16 on the device, against plain PyTorch in float32 here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from omniloom.ops import cross_entropy, delta_rule, gated_mlp, norm, rotary
from omniloom.ops.linear_map import Dropout, LinearMap, dropped
from omniloom.ops.nf4 import pack, unpack
from omniloom.parallel.optimizer import column_noise, newton_schulz, round_to_bf16
from omniloom.parallel.staging import map_tensors
from omniloom.types import Segments

TOLERANCE = 0.02  # of the norm: 8 bits of mantissa
ANGLES = torch.arange(70.0)[:, None] * torch.logspace(0, -3, 8)
TURN = rotary.Rotary(cos=ANGLES.cos(), sin=ANGLES.sin())
SEGMENTS = Segments.from_lengths([30, 1, 39])
LABELS, WEIGHTS = torch.arange(70) * 14 % 1000, torch.linspace(0, 1, 70)


def head_loss(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return cross_entropy.linear_cross_entropy(hidden, LinearMap(head), labels, weights, chunk_tokens=16)


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return gated_mlp.gated_mlp(x, LinearMap(gate), LinearMap(up), LinearMap(down))


# an operation, what it computes, shapes of its tensors, and what follows them
OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...], tuple[Any, ...]]]
OPERATIONS = {
    "rotary": (rotary.apply_rotary, rotary.apply_rotary_reference, ((70, 4, 16),), (TURN,)),
    "part of rotary": (rotary.apply_rotary, rotary.apply_rotary_reference, ((70, 4, 24),), (TURN,)),
    "norm": (norm.rms_norm, norm.rms_norm_reference, ((70, 64), (64,)), (1e-6,)),
    "norm of heads": (norm.rms_norm, norm.rms_norm_reference, ((70, 4, 16), (16,)), (1e-6,)),
    "loss": (head_loss, cross_entropy.linear_cross_entropy_reference, ((70, 64), (1000, 64)), (LABELS, WEIGHTS)),
    "feed-forward": (feed_forward, gated_mlp.gated_mlp_reference, ((70, 64), (96, 64), (96, 64), (48, 96)), ()),
    "convolution": (
        delta_rule.causal_convolution,
        delta_rule.causal_convolution_reference,
        ((70, 24), (24, 4)),
        (SEGMENTS,),
    ),
}


def check(device: torch.device, operation: Any, reference: Any, inputs: list[Tensor], others: tuple[Any, ...]) -> None:
    """Results and gradients."""
    exact = [x.bfloat16().float().requires_grad_() for x in inputs]
    leaves = [x.detach().to(device, torch.bfloat16).requires_grad_() for x in exact]
    found, wanted = operation(*leaves, *map_tensors(others, lambda x: x.to(device))), reference(*exact, *others)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(found, leaves, upstream.to(found))
    pairs = zip((found, *grads), (wanted, *torch.autograd.grad(wanted, exact, upstream)), strict=True)
    for number, (one, other) in enumerate(pairs):
        assert (one.cpu().float() - other).norm() <= TOLERANCE * other.norm(), number


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_an_operation_gives_is_what_it_says(device: torch.device, name: str) -> None:
    operation, reference, shapes, others = OPERATIONS[name]
    generator = torch.Generator().manual_seed(0)
    check(device, operation, reference, [torch.randn(shape, generator=generator) for shape in shapes], others)


def test_the_delta_rule_is_the_recurrence(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(70, heads, 16, generator=generator) for heads in (2, 2, 4))
    decay, beta = -torch.rand(70, 4, generator=generator), torch.rand(70, 4, generator=generator)
    check(
        device, delta_rule.gated_delta_rule, delta_rule.gated_delta_rule_reference, [q, k, v, decay, beta], (SEGMENTS,)
    )


def test_numbers_that_all_devices_make_alike_are_alike(device: torch.device) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    codes = pack(weight)
    assert torch.equal(unpack(codes.to(device), torch.bfloat16).cpu(), unpack(codes, torch.bfloat16))
    here, there = (column_noise(weight, 2**31 + 7, each) for each in (device, torch.device("cpu")))
    assert torch.equal(here.cpu(), there)
    assert torch.equal(round_to_bf16(weight.to(device), here).cpu(), round_to_bf16(weight, there))
    drop = partial(dropped, weight.to(device), Dropout(0.25, 3, torch.tensor(9)))
    assert torch.equal(drop(), drop())
    assert (drop() == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_matrices_become_nearly_orthogonal(device: torch.device) -> None:
    matrices = torch.randn(2, 96, 32, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    values = torch.linalg.svdvals(newton_schulz(matrices).float())
    assert 0.6 < values.min().item() < values.max().item() < 1.3
