"""Recompute changes neither gradients nor names, and takes over the choices of the first pass."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.models.layers import LayerCall
from omniloom.parallel import collectives  # noqa: F401  defines two of the operations
from omniloom.parallel.recompute import COSTLY, ROUTING, RecomputingCall, activations_on_host, recompute_layers
from omniloom.types import TowerRows
from tests.parity import builders


class Layer(nn.Module):
    """Chooses otherwise each time it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.num_passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_passes += 1
        scores = self.linear(x)
        chosen = scores.detach().roll(self.num_passes, dims=1).topk(1).indices
        return x + scores.tanh() * scores.gather(1, chosen)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])
        self.call = LayerCall()

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            layer.num_passes = 0
            x = self.call(index, layer, x)
        return x


def run(how: str | int, *, routes: bool = True) -> tuple[Stack, list[Tensor]]:
    torch.manual_seed(0)
    model = Stack()
    x = torch.randn(5, 6)
    recompute_layers(model, how, routes=routes)
    for _ in range(2):  # results of one pass must not reach the next
        model(x).square().sum().backward()
    return model, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("how", ["full", 2, 3])
def test_gradients_are_those_of_the_first_pass(how: str | int) -> None:
    _, expected = run("none")
    model, found = run(how)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert isinstance(model.call, RecomputingCall)


def test_a_choice_that_is_made_anew_would_change_them() -> None:
    """That the test above can fail."""
    _, expected = run("none")
    _, found = run("full", routes=False)
    assert not all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True))


def test_every_nth_layer_is_computed_twice() -> None:
    model, _ = run(2)
    assert [layer.num_passes for layer in model.layers] == [2, 1, 2]


def test_names_stay_as_they_were() -> None:
    model, _ = run("full")
    assert "layers.0.linear.weight" in dict(model.named_parameters())


def test_what_is_saved_of_routing_exists_as_an_operation() -> None:
    """An upgrade of torch that names one otherwise would recompute in silence."""
    seen = [str(torch.ops.aten.topk.default)]
    seen += [str(getattr(torch.ops.omniloom, name).default) for name in ("exchange_sizes", "sum_over_group")]
    assert tuple(seen) == ROUTING
    kernels = (torch.ops.omniloom.cpu_attention, torch.ops.omniloom.eager_attention, torch.ops.aten._grouped_mm)
    for kernel in (*kernels, torch.ops.omniloom.cpu_routed_experts):
        assert any(part in str(kernel.default) for part in COSTLY)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at inputs'
@pytest.mark.parametrize(("how", "compiled"), [("full", False), ("full", True), ("selective", False), (2, True)])
def test_layers_with_experts_recompute_compiled_and_not(how: str | int, compiled: bool) -> None:
    config_json = builders.random_config(random.Random(0), num_layers=2, dense=False)
    model = SPEC.build(SPEC.read_config(config_json))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    batch = builders.pack([], config_json, num_tokens=32)
    hidden = torch.randn(32, model.text.embed.embedding_dim, generator=generator)
    is_padding = torch.zeros(32, dtype=torch.bool)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        rows = hidden.clone().requires_grad_()
        batch_of_words = dataclasses.replace(batch, is_padding=is_padding, loss_scales={"router": 0.5})
        out, _, _ = model.text.run_layers(rows, batch_of_words, TowerRows(vision=None, deepstack=(), audio=None))
        out.square().sum().backward()
        return [rows.grad, *(p.grad for p in model.text.layers.parameters())]

    expected, backend = gradients(), CompileCounterWithBackend("aot_eager")
    recompute_layers(model.text, how, routes=True)
    if compiled:
        for layer in model.text.layers.values():
            layer.compile(backend=backend)
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert (backend.frame_count > 0) == compiled


def test_activations_on_host_leaves_gradients_alone() -> None:
    _, expected = run("none")
    with activations_on_host(True):
        _, found = run("none")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
