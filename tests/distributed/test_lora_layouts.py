"""Adapters in every layout so far: it changes neither the loss nor any adapter's gradient nor what is merged."""

from __future__ import annotations

import pytest
import torch
from lora_worker import Case, Outcome, run_job
from rank_jobs import run_ranks

from omniloom.config import ContextConfig, LoraConfig, ParallelConfig
from omniloom.tools.tiny import make_tiny

LORA = LoraConfig(rank=4, alpha=6)
DORA = LoraConfig(rank=3, alpha=6, dora=True)
CASES = {
    "fsdp2": Case(lora=LORA, parallel=ParallelConfig()),
    "head_fsdp2": Case(lora=LORA, head=True, parallel=ParallelConfig()),
    "head_context2": Case(lora=LORA, head=True, parallel=ParallelConfig(context=2)),
    "expert2": Case(lora=LORA, parallel=ParallelConfig(expert=2)),
    "expert2_of_a_rank_that_needs_filling": Case(lora=LoraConfig(rank=3), parallel=ParallelConfig(expert=2)),
    "context2": Case(lora=LORA, parallel=ParallelConfig(context=2)),
    "replicate2": Case(lora=LORA, parallel=ParallelConfig(replicate=2)),
    "recompute_expert2": Case(lora=LORA, recompute=True, parallel=ParallelConfig(expert=2)),
    "tensor2": Case(lora=LORA, parallel=ParallelConfig(tensor=2)),
    "head_tensor2": Case(lora=LORA, head=True, parallel=ParallelConfig(tensor=2)),
    "recompute_tensor2_expert2": Case(lora=LORA, recompute=True, parallel=ParallelConfig(tensor=2, expert=2)),
    "dora_fsdp2": Case(lora=DORA, experts=False, parallel=ParallelConfig()),
    "nf4_fsdp2": Case(lora=LORA, quantize="nf4", parallel=ParallelConfig()),
    "nf4_recompute_expert2": Case(lora=LORA, quantize="nf4", recompute=True, parallel=ParallelConfig(expert=2)),
    "nf4_tensor2": Case(lora=LORA, quantize="nf4", parallel=ParallelConfig(tensor=2)),
    "nf4_context2": Case(lora=LORA, quantize="nf4", parallel=ParallelConfig(context=2)),
    "nf4_ring2": Case(lora=LORA, quantize="nf4", parallel=ParallelConfig(context=ContextConfig(ring=2))),
    "nf4_pipeline2": Case(lora=LORA, quantize="nf4", parallel=ParallelConfig(pipeline=2)),
    "dora_pipeline2": Case(lora=DORA, experts=False, parallel=ParallelConfig(pipeline=2)),
    "dora_context2": Case(lora=DORA, experts=False, parallel=ParallelConfig(context=2)),
    "dora_tensor2": Case(lora=DORA, experts=False, parallel=ParallelConfig(tensor=2)),
}

FULL = (  # of others' kinds
    *("head_context2", "replicate2", "recompute_expert2", "tensor2", "context2", "dora_context2"),
    *("nf4_context2", "nf4_ring2", "dora_pipeline2"),
)
NAMES = [pytest.param(name, marks=pytest.mark.full if name in FULL else ()) for name in CASES]

DROPPING = {
    "fsdp2": CASES["fsdp2"],
    "head_tensor2": CASES["head_tensor2"],
    "bf16_fsdp2": Case(lora=LORA, dtype="bf16", parallel=ParallelConfig()),  # frozen weights in bf16, adapters float32
    "bf16_head_fsdp2": Case(lora=LORA, head=True, dtype="bf16", parallel=ParallelConfig()),
    "bf16_nf4_fsdp2": Case(lora=LORA, quantize="nf4", dtype="bf16", parallel=ParallelConfig()),
    "bf16_expert2": Case(lora=LoraConfig(rank=4, dtype="bf16"), dtype="bf16", parallel=ParallelConfig(expert=2)),
}
# so that rows of experts are whole blocks of `model.quantize`, and two tensor ranks can divide those of the output
WIDER = {"moe_intermediate_size": 64, "num_attention_heads": 8}

Results = tuple[dict[str, Outcome], dict[str, list[float]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Results:
    wanted = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    cases = {name: case for name, case in CASES.items() if name in wanted}
    folder = tmp_path_factory.mktemp("lora_layouts")
    make_tiny(
        "qwen3_omni",
        folder / "model",
        overrides={f"thinker_config.text_config.{name}": size for name, size in WIDER.items()},
    )
    run_ranks(run_job, 2, cases, DROPPING, str(folder / "model"), str(folder / "results.pt"))
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", NAMES)
def test_layout_does_not_change_what_adapters_learn(results: Results, name: str) -> None:
    outcome = results[0][name]
    assert outcome.loss_error < 1e-5  # DESIGN: float32 sums in another order
    assert not outcome.frozen_with_gradient
    worst = max((error, parameter) for parameter, error in outcome.gradient_errors.items())
    assert worst[0] < 1e-4, worst
    assert any("lora_b" in parameter for parameter in outcome.gradient_errors)


@pytest.mark.parametrize("name", NAMES)
def test_layout_does_not_change_what_is_merged(results: Results, name: str) -> None:
    assert results[0][name].merged_error < 1e-6


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_repeats_by_its_key(results: Results, name: str) -> None:
    first, again, other = results[1][name]
    assert first == again
    assert other != first
