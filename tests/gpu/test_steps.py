"""Whole steps of every family on a GPU: nothing waits, what is copied is pinned, what is computed is computed right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omniloom.config import load_config
from omniloom.ops.gated_experts import Copies, gated_experts, routed_experts_reference
from omniloom.ops.grouped_gemm import sort_by_group
from omniloom.ops.linear_map import LinearMap
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.gradients import clip_gradients
from omniloom.parallel.mesh import Layout
from omniloom.parallel.staging import list_tensors, stage
from omniloom.parallel.step import Objective, run_packs
from omniloom.run.opening import Workshop, build_model, build_optimizer, load_weights, open_workshop
from omniloom.tools.tiny import FAMILIES, make_tiny
from tests.device.steps import Content, make_pack

SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "full recompute": ("memory.recompute=full",),
    "selective": ("memory.recompute=selective",),
    "8bit on the host": ("train.optimizer_states=8bit", "memory.offload_optimizer=true"),
    "activations on the host": ("memory.offload_activations=true",),
    "muon": ("train.optimizer=muon",),
    "lora": ("policy.text.lora.rank=4",),
    "lora on 4 bits": ("policy.text.lora.rank=4", "model.quantize=nf4"),
}


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def open_family(family: str, folder: Path, *words: str) -> Workshop:
    make_tiny(family, folder / "model")
    return open_workshop(load_config(None, [f"model.path={folder / 'model'}", "train.learning_rate=1e-3", *words]))


def make_step(workshop: Workshop, layout: Layout) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """A step, which returns its loss on the device, and the parameters that it changes."""
    torch.manual_seed(0)
    model, policies = build_model(workshop, layout)
    load_weights(workshop, model)
    optimizer = build_optimizer(workshop, dict(model.named_parameters()), policies, layout.device)
    pool = EncoderPool(layout, workshop.spec.sharding(workshop.family), "group")
    (routed,) = pool.plan([make_pack(workshop.family, 1024, Content(grid=(1, 8, 8)))])
    staged = stage(routed, layout.device, workshop.compute_dtype)
    objective = Objective(coefficients={"text": 1.0, "router": 0.01}, weight_sums={"text": 400.0, "router": 1.0})
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def step() -> Tensor:
        terms = run_packs(model, [staged], layout, objective, pool)
        clip_gradients(optimizer, 1.0, layout.device)
        optimizer.step()
        optimizer.zero_grad()
        return terms.sums["text"]

    return step, trained


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_step_waits_for_nothing(layout: Layout, tmp_path: Path, family: str, name: str) -> None:
    if name != "plain" and family not in ("qwen3_omni", "qwen2_5_vl"):
        pytest.skip("settings are tried on a dense family and on one with experts")
    if "4 bits" in name and torch.__version__ < "2.13":
        pytest.skip("FSDP of older PyTorch takes no integers")
    step, trained = make_step(open_family(family, tmp_path, *SETTINGS[name]), layout)
    before = {key: value.detach().clone() for key, value in trained.items()}
    first = step()  # libraries set themselves up, and may wait for that
    with waiting_is_an_error(layout.device):
        losses = [step() for _ in range(3)]
    assert losses[-1].item() < first.item()
    assert all(torch.isfinite(value).all() for value in trained.values())
    assert any(not torch.equal(before[key], value) for key, value in trained.items())


@pytest.mark.parametrize("name", ["full recompute", "selective", "activations on the host"])
def test_what_is_kept_elsewhere_changes_no_step(layout: Layout, tmp_path: Path, name: str) -> None:
    losses = {}
    for words in ((), SETTINGS[name]):
        step, _ = make_step(open_family("qwen3_omni", tmp_path / str(len(words)), *words), layout)
        losses[words] = [step().item() for _ in range(3)]
    assert losses[SETTINGS[name]] == pytest.approx(losses[()], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_batch_is_pinned(device: torch.device, tmp_path: Path, family: str) -> None:
    workshop = open_family(family, tmp_path)
    staged = stage(make_pack(workshop.family, 1024, Content(grid=(1, 8, 8))), device, workshop.compute_dtype)
    tensors = list_tensors(staged)
    assert len(tensors) > 10
    assert all(tensor.is_pinned() for tensor in tensors) == (device.type == "cuda")


@pytest.mark.parametrize("num_tokens", [0, 1, 300])
@pytest.mark.parametrize("num_used", [1, 3, 8])
def test_experts_without_tokens_and_no_tokens_at_all(device: torch.device, num_tokens: int, num_used: int) -> None:
    num_experts, hidden, inner, num_copies = 8, 64, 32, 2
    generator = torch.Generator().manual_seed(0)
    shapes = (num_tokens, hidden), (num_experts, 2 * inner, hidden), (num_experts, hidden, inner)
    tokens, gate_up, down, weights = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for shape in (*shapes, (num_tokens, num_copies))
    )
    chosen = torch.randint(num_used, (num_tokens * num_copies,), generator=generator).to(device)
    slot, row, counts = sort_by_group(chosen, num_experts)
    offsets, copies = counts.cumsum(0).to(torch.int32), Copies(slot, row.view_as(weights), weights)
    found = gated_experts(tokens, LinearMap(gate_up), LinearMap(down), offsets, copies)
    leaves = (tokens, gate_up, down, weights)
    wanted = routed_experts_reference(tokens, gate_up, down, offsets, copies)
    upstream = torch.randn(found.shape, generator=generator).to(found)
    pairs = zip(
        (found, *torch.autograd.grad(found, leaves, upstream)),
        (wanted, *torch.autograd.grad(wanted, leaves, upstream)),
        strict=True,
    )
    for one, other in pairs:
        assert (one.float() - other.float()).norm() <= 0.03 * other.float().norm()  # 8 bits of mantissa
        assert torch.isfinite(one).all()
