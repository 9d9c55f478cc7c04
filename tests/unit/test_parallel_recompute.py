"""Recompute changes neither gradients nor names, and takes over the choices of the first pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from omniloom.parallel.recompute import Kept, activations_on_host, recompute_blocks


class Choose(nn.Module):
    """A choice that comes out otherwise each time it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def forward(self, scores: Tensor) -> Tensor:
        self.num_calls += 1
        return scores.argsort(dim=-1)[:, self.num_calls % scores.shape[1]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.choose = Choose()
        self.num_passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_passes += 1
        scores = self.linear(x)
        chosen = self.choose(scores.detach())
        return x + scores.tanh() * scores.gather(1, chosen[:, None])


def run(how: str | int, *, keep: bool = True) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block())
    x = torch.randn(5, 6)
    if keep:
        for block in model:
            block.choose = Kept(block.choose)
    recompute_blocks(list(model), how)
    for _ in range(2):  # results of one pass must not reach the next
        model(x).square().sum().backward()
    return model, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("how", ["full", 2, 3])
def test_gradients_are_those_of_the_first_pass(how: str | int) -> None:
    _, expected = run("none")
    model, found = run(how)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert [block.choose.inner.num_calls for block in model] == [2, 2, 2]


def test_a_choice_that_is_made_anew_would_change_them() -> None:
    """That the test above can fail."""
    _, expected = run("none", keep=False)
    _, found = run("full", keep=False)
    assert not all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True))


def test_every_nth_block_is_computed_twice() -> None:
    model, _ = run(2)
    assert [block.num_passes for block in model] == [4, 2, 4]


def test_names_stay_as_they_were() -> None:
    model, _ = run("full")
    assert "0.linear.weight" in dict(model.named_parameters())


def test_activations_on_host_leaves_gradients_alone() -> None:
    _, expected = run("none")
    with activations_on_host(True):
        _, found = run("none")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
