"""Optimizers that are computed here, against torch's own; and what their states lose in fewer bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omniloom.config import TrainConfig
from omniloom.parallel.device import HostCopies
from omniloom.parallel.optimizer import (
    ShardedOptimizer,
    column_noise,
    decode,
    encode,
    make_optimizer,
    newton_schulz,
    round_to_bf16,
)
from omniloom.training.optimizer import parameter_groups
from omniloom.training.policy import ParameterPolicy

POLICY = ParameterPolicy(component="text", trainable=True, learning_rate=0.01, weight_decay=0.1)
CPU = torch.device("cpu")


def weights(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"text.layers.0.a": (12, 20), "text.layers.0.b": (3, 8, 5), "text.embed": (9, 16), "text.norm": (7,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def gradients(step: int) -> dict[str, Tensor]:
    return {name: weight.detach() * 0.01 for name, weight in weights(100 + step).items()}


def take_steps(optimizer: torch.optim.Optimizer, own: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for name, gradient in gradients(step).items():
            own[name].grad = gradient if name in own else None
        optimizer.step()


def make(own: dict[str, nn.Parameter], **options: Any) -> ShardedOptimizer:
    muon = options.pop("muon", False)
    groups = parameter_groups(own.items(), dict.fromkeys(own, POLICY), muon=muon)
    settings: dict[str, Any] = {"states": "float32", "copies": None, "compute_dtype": torch.float32} | options
    return ShardedOptimizer(groups, betas=(0.9, 0.95), epsilon=1e-8, **settings)


@pytest.mark.parametrize("copies", [None, HostCopies(CPU)])
def test_adamw_with_states_as_wide_as_the_weights_is_torchs(copies: HostCopies | None) -> None:
    own, theirs = weights(), weights()
    take_steps(make(own, copies=copies), own, 0, 5)
    groups = parameter_groups(theirs.items(), dict.fromkeys(theirs, POLICY))
    take_steps(torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True), theirs, 0, 5)
    for name, weight in own.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-7)


def test_muon_is_torchs_and_leaves_the_rest_to_adamw() -> None:
    own, theirs = weights(), weights()
    take_steps(make(own, muon=True, compute_dtype=torch.bfloat16), own, 0, 4)
    muon = torch.optim.Muon(
        [theirs["text.layers.0.a"]], lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    take_steps(muon, theirs, 0, 4)
    rest = {name: theirs[name] for name in ("text.embed", "text.norm")}
    groups = parameter_groups(rest.items(), dict.fromkeys(rest, POLICY))
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(4):
        for name in rest:
            rest[name].grad = gradients(step)[name]
        adamw.step()
    for name in ("text.layers.0.a", *rest):
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-2, atol=1e-4)  # products in bfloat16


def test_each_of_stacked_matrices_is_made_orthogonal_by_itself() -> None:
    stacked = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    whole = newton_schulz(stacked)
    for matrix, one in zip(whole, stacked, strict=True):
        torch.testing.assert_close(matrix, newton_schulz(one[None])[0], rtol=1e-4, atol=1e-5)
        values = torch.linalg.svdvals(matrix)
        assert values.min() > 0.5
        assert values.max() < 1.3  # the coefficients do not aim at 1 itself


def test_rounding_loses_nothing_on_average() -> None:
    value = torch.rand(64, 1, generator=torch.Generator().manual_seed(0)).exp().expand(-1, 4096).contiguous()
    noise = torch.rand(4096, generator=torch.Generator().manual_seed(1))
    for rounded, step in (
        (round_to_bf16(value, noise).float(), 2**-7),
        (decode(*encode(value, noise, torch.uint8, value.amax(dim=1, keepdim=True) * 7)), 2 ** (1 / 8) - 1),
        (decode(*encode(-value, noise, torch.int8, value.amax(dim=1, keepdim=True) * 7)).neg(), 2 ** (1 / 8) - 1),
    ):
        assert ((rounded - value).abs() <= step * value * 1.001).all()
        bias = (rounded.mean(dim=1) / value[:, 0] - 1).abs()
        assert bias.max() < 4 * step / math.sqrt(12 * 4096) * 2


def test_a_divisors_square_is_never_rounded_to_zero_and_zero_stays() -> None:
    row = torch.tensor([[1.0, 1e-20, 0.0]])
    low = decode(*encode(row, torch.zeros(3) + 0.999, torch.uint8, row.amax(dim=1, keepdim=True)))
    assert low[0, 0] == pytest.approx(1.0)
    assert low[0, 1] > 0
    assert low[0, 2] == 0


def test_noise_differs_by_column_weight_and_step_and_fills_its_range() -> None:
    weight = torch.zeros(2, 5000)
    one, other = column_noise(weight, 1, CPU), column_noise(weight, 2, CPU)
    assert one.min() >= 0
    assert one.max() < 1
    assert abs(one.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1]) < 0.05


@pytest.mark.parametrize(("states", "slack"), [("bf16", 1.02), ("8bit", 1.15)])
@pytest.mark.parametrize("muon", [False, True])
def test_states_of_fewer_bits_reach_what_float32_reaches(states: str, slack: float, muon: bool) -> None:
    """A regression with noise, which each reaches to the same loss; beta2 so near 1 that rounding to nearest stalls."""
    truth = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))

    def final_loss(states: str) -> float:
        weight = nn.Parameter(torch.zeros(16, 24))
        groups = parameter_groups([("text.layers.0.a", weight)], {"text.layers.0.a": POLICY}, muon=muon)
        settings: dict[str, Any] = {"states": states, "copies": None, "compute_dtype": torch.float32}
        optimizer = ShardedOptimizer(groups, betas=(0.9, 0.999), epsilon=1e-8, **settings)
        generator, losses = torch.Generator().manual_seed(1), []
        for step in range(400):
            x = torch.randn(32, 24, generator=generator)
            loss = (x @ (weight - truth).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
            optimizer.param_groups[0]["weight_decay"] = 0.0
            optimizer.step()
            losses.append(loss.item())
        return sum(losses[-20:]) / 20

    assert final_loss(states) < slack * final_loss("float32") + 1e-3


def test_states_are_as_large_as_they_are_said_to_be() -> None:
    for states, count in (("float32", 8), ("bf16", 4), ("8bit", 2)):
        own = {"text.layers.0.a": nn.Parameter(torch.ones(64, 2048))}
        optimizer = make(own, states=states)
        own["text.layers.0.a"].grad = torch.ones(64, 2048)
        optimizer.step()
        (state,) = optimizer.state.values()
        held = sum(value.nbytes for value in state.values()) / own["text.layers.0.a"].numel()
        assert count <= held < count * 1.01 + 0.01


def test_the_usual_optimizer_is_torchs_fused_one() -> None:
    own = weights()
    groups = parameter_groups(own.items(), dict.fromkeys(own, POLICY))
    options: dict[str, Any] = {"device": CPU, "compute_dtype": torch.float32}
    assert isinstance(make_optimizer(groups, TrainConfig(), offload=True, **options), torch.optim.AdamW)
    other = make_optimizer(groups, TrainConfig(optimizer_states="8bit"), offload=False, **options)
    assert isinstance(other, ShardedOptimizer)
