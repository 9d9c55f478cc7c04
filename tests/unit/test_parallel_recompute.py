"""Recompute changes neither gradients nor names, and takes over the choices of the first pass."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.models.layers import LayerCall
from omniloom.ops.gated_experts import Copies, grouped_experts
from omniloom.ops.linear_map import LinearMap
from omniloom.parallel import collectives  # noqa: F401  defines two of the operations
from omniloom.parallel.device import HostCopies
from omniloom.parallel.recompute import COSTLY, ROUTING, OffloadingCall, RecomputingCall, recompute_layers
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
    kernels = (torch.ops.omniloom.cpu_attention, torch.ops.omniloom.eager_attention, torch.ops.omniloom.grouped_mm)
    own = (torch.ops.omniloom.cpu_routed_experts, torch.ops.omniloom.all_to_all_rows)
    for kernel in (*kernels, *own):
        assert any(part in str(kernel.default) for part in COSTLY)
    assert not any(part in str(torch.ops.omniloom.all_to_all_rows_back.default) for part in COSTLY)


class Experts:
    """A decoder of two layers with experts, and the gradients of a pass through them."""

    def __init__(self) -> None:
        config_json = builders.random_config(random.Random(0), num_layers=2, dense=False)
        self.model = SPEC.build(SPEC.read_config(config_json))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        batch = builders.pack([], config_json, num_tokens=32)
        is_padding = torch.zeros(32, dtype=torch.bool)
        self.batch = dataclasses.replace(batch, is_padding=is_padding, loss_scales={"router": 0.5})
        self.hidden = torch.randn(32, self.model.text.embed.embedding_dim, generator=generator)

    def gradients(self) -> list[Tensor]:
        text = self.model.text
        text.zero_grad()
        rows = self.hidden.clone().requires_grad_()
        out, _, _ = text.run_layers(rows, self.batch, TowerRows(vision=None, deepstack=(), audio=None))
        out.square().sum().backward()
        return [rows.grad, *(p.grad for p in text.layers.parameters())]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at inputs'
@pytest.mark.parametrize(("how", "compiled"), [("full", False), ("full", True), ("selective", False), (2, True)])
def test_layers_with_experts_recompute_compiled_and_not(how: str | int, compiled: bool) -> None:
    experts = Experts()
    expected, backend = experts.gradients(), CompileCounterWithBackend("aot_eager")
    recompute_layers(experts.model.text, how, routes=True)
    if compiled:
        for layer in experts.model.text.layers.values():
            layer.compile(backend=backend)
    for found, wanted in zip(experts.gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert (backend.frame_count > 0) == compiled


class Queue:
    """A stream: what it was told to wait for, and events that count what it was given."""

    def __init__(self) -> None:
        self.events, self.waited = 0, 0

    def record_event(self) -> int:
        self.events += 1
        return self.events

    def wait_event(self, event: int) -> None:
        self.waited = max(self.waited, event)

    def wait_stream(self, other: Queue) -> None: ...


def test_device_memory_is_let_go_once_computing_has_waited_for_its_copy() -> None:
    """Not by the allocator, which learns from the host what is free: that is layers ahead of the device."""
    computing, copies = Queue(), HostCopies(torch.device("cpu"))
    copies._queue = Queue()
    copies._module = SimpleNamespace(current_stream=lambda: computing, stream=lambda queue: nullcontext())
    tensor, host = torch.ones(3), torch.zeros(3)
    copies.put(tensor, host)
    alive = ref(tensor)
    del tensor
    copies.turn()
    assert alive() is not None
    assert computing.waited == 0, "the copy has a layer's time"
    copies.turn()
    assert alive() is None
    assert computing.waited == 1
    unused, used = copies.fetch(host), copies.fetch(host)
    assert torch.equal(copies.wait(used), torch.ones(3))
    gone, kept = ref(used[0]), ref(unused[0])
    del used, unused
    assert gone() is None, "computing has waited for it"
    assert kept() is not None
    copies.settle()
    assert kept() is None
    assert computing.waited == copies._queue.events - 1


class RecordedCopies(HostCopies):
    """What went to the host and back, in order, and what is still there."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.put_away: list[Tensor] = []
        self.events: list[tuple[str, int]] = []

    def put(self, tensor: Tensor, host: Tensor) -> None:
        super().put(tensor, host)
        self.put_away.append(tensor)
        host.number = len(self.put_away) - 1
        self.events.append(("put", host.number))

    def fetch(self, host: Tensor) -> tuple[Tensor, int]:
        self.events.append(("fetch", host.number))
        return super().fetch(host)[0], host.number

    def wait(self, fetched: tuple[Tensor, int]) -> Tensor:
        self.events.append(("wait", fetched[1]))
        return fetched[0]


@pytest.mark.parametrize("how", ["none", "selective", "full", 2])
def test_what_layers_keep_goes_to_the_host_and_back_and_gradients_stay_the_same(how: str | int) -> None:
    experts = Experts()
    text, copies = experts.model.text, RecordedCopies()
    recompute_layers(text, how, routes=True)
    expected = experts.gradients()
    text.call = OffloadingCall(text.call, copies, least_bytes=0)
    for found, wanted in zip(experts.gradients(), expected, strict=True):
        assert torch.equal(found, wanted)
    counts = Counter(event for event, _ in copies.events)
    assert counts["put"] == counts["fetch"] == counts["wait"] > 0
    inputs = [tensor for tensor in copies.put_away if tensor.shape == experts.hidden.shape]
    assert inputs
    if how == "full":
        assert len(copies.put_away) == len(text.layers), "of a recomputed layer its input alone"


def test_weights_and_what_all_layers_share_stay_on_the_device() -> None:
    experts, copies = Experts(), RecordedCopies()
    text = experts.model.text
    text.call = OffloadingCall(text.call, copies, least_bytes=0)
    gathered = {p.untyped_storage().data_ptr() for p in text.parameters()}
    experts.gradients()
    assert not gathered & {tensor.untyped_storage().data_ptr() for tensor in copies.put_away}
    angles = (experts.hidden.shape[0], text.layers["0"].attention.head_dim // 2)
    assert angles not in {tuple(tensor.shape) for tensor in copies.put_away}


def test_what_a_layer_needs_is_on_its_way_while_the_one_after_it_is_at_work() -> None:
    model, copies = Stack(), RecordedCopies()
    model.call = OffloadingCall(model.call, copies, least_bytes=0)
    for _ in range(2):  # nothing of one pass is left to the next
        copies.events.clear()
        model(torch.randn(5, 6)).square().sum().backward()
        own = sum(event == "put" for event, _ in copies.events) // len(model.layers)
        first_wait = next(place for place, (event, _) in enumerate(copies.events) if event == "wait")
        fetched = sum(event == "fetch" for event, _ in copies.events[:first_wait])
        assert fetched == 2 * own, "the last layer's and the one's before it"
        waits = [number for event, number in copies.events if event == "wait"]
        before_last = copies.events.index(("wait", waits[-1]))
        assert all(event != "fetch" for event, _ in copies.events[before_last:])


def test_small_tensors_stay_and_so_does_all_without_gradients() -> None:
    model, copies = Stack(), RecordedCopies()
    model.call = OffloadingCall(model.call, copies)
    model(torch.randn(5, 6)).sum().backward()
    model.call = OffloadingCall(model.call, copies, least_bytes=0)
    with torch.no_grad():
        model(torch.randn(5, 6))
    assert not copies.put_away


def test_adapted_experts_leave_what_selective_recompute_saved_as_it_is() -> None:
    """torch refuses what was changed in place since; of accelerators, whose products are grouped."""
    gate_up = LinearMap(torch.randn(2, 8, 4), low=torch.randn(2, 3, 4), up=torch.randn(2, 8, 3).requires_grad_())
    down, root = LinearMap(torch.randn(2, 4, 4), low=torch.randn(2, 3, 4), up=torch.randn(2, 4, 3)), torch.nn.Module()
    recompute_layers(root, "selective", routes=True)
    rows, offsets = torch.randn(6, 4).requires_grad_(), torch.tensor([2, 6], dtype=torch.int32)
    copies = Copies(torch.arange(6), torch.arange(6)[:, None], torch.ones(6, 1))
    experts = torch.nn.Module()
    experts.forward = lambda rows: grouped_experts(rows, gate_up, down, offsets, copies)
    for run in (experts, lambda rows: root.call(0, experts, rows)):
        rows.grad = gate_up.up.grad = None
        run(rows).square().sum().backward()
        found = (rows.grad, gate_up.up.grad)
    torch.testing.assert_close(found, torch.autograd.grad(experts(rows).square().sum(), (rows, gate_up.up)))
