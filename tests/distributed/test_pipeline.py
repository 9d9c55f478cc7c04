"""Stages do not change the answer: 1F1B and interleaved, with every other axis, against one model on one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layout_worker import LOSS_BOUND, Case, Outcome, run_job
from rank_jobs import run_ranks
from test_layouts import WORLD
from tiny_omni import Dims, random_dims

from omniloom.config import ContextConfig, MemoryConfig, ParallelConfig

DEEP = Dims(num_layers=5, vision_depth=3, deepstack=(0, 2))  # levels for the first two layers
INTERLEAVED = {"pipeline_schedule": "interleaved", "stages_per_rank": 2}
FULL = MemoryConfig(recompute="full")
TRAINED = ("trained_pipeline2_fsdp2",)  # of two layers: deeper ones drift apart under any layout, FSDP alone included


def make_cases() -> dict[str, tuple[Case, ParallelConfig, MemoryConfig]]:
    plain = MemoryConfig()
    # of other seeds, gradients change by more than the bounds where weights do in their last bit
    deep = Case(dims=DEEP, num_packs=8, shares_decoding=True, seed=3)
    adapted = Case(dims=DEEP, num_packs=8, adapted=True, seed=7)
    below = ("vision.", "audio.", "text.embed", "text.layers.0.", "text.layers.1.")
    frozen = Case(dims=DEEP, num_packs=8, frozen=below)
    towers_alone = Case(dims=DEEP, num_packs=8, frozen=("text.",), shares_decoding=True)
    tied = Case(dims=Dims(tie=True, num_layers=3), num_packs=8, seed=2)
    hybrid = Case(dims=Dims(hybrid=True, num_layers=5), num_packs=8, seed=7, shares_decoding=True)
    cases = {
        # a level of deepstack rows belongs to each of two stages
        "pipeline4": (deep, ParallelConfig(pipeline=4, pipeline_layers=(1, 2, 1, 1)), plain),
        "pipeline2_fsdp2": (deep, ParallelConfig(pipeline=2), plain),
        "interleaved2_fsdp2": (deep, ParallelConfig(pipeline=2, **INTERLEAVED), plain),
        "interleaved2_hsdp": (deep, ParallelConfig(pipeline=2, replicate=2, **INTERLEAVED), plain),
        "pipeline2_context2": (deep, ParallelConfig(pipeline=2, context=2), plain),
        "pipeline2_expert2": (deep, ParallelConfig(pipeline=2, expert=2), plain),
        "pipeline2_context2_expert2": (deep, ParallelConfig(pipeline=2, context=2, expert=2), plain),
        "pipeline2_tensor2": (deep, ParallelConfig(pipeline=2, tensor=2), plain),
        "pipeline2_ring2": (deep, ParallelConfig(pipeline=2, context=ContextConfig(ring=2)), plain),
        "tied_pipeline2_tensor2": (tied, ParallelConfig(pipeline=2, tensor=2), plain),
        "trained_pipeline2_fsdp2": (Case(), ParallelConfig(pipeline=2), plain),
        "pool_of_all": (deep, ParallelConfig(pipeline=2, encoder_pool="data"), plain),
        "tied_hsdp": (tied, ParallelConfig(pipeline=2, replicate=2), plain),
        "dropping_out_and_recomputing": (adapted, ParallelConfig(pipeline=4), FULL),
        "dropping_out_interleaved": (adapted, ParallelConfig(pipeline=2, **INTERLEAVED), FULL),
        "a_frozen_stage": (frozen, ParallelConfig(pipeline=2, pipeline_layers=(2, 3)), plain),
        "towers_alone": (towers_alone, ParallelConfig(pipeline=4), plain),
        "hybrid_pipeline2_fsdp2": (hybrid, ParallelConfig(pipeline=2), plain),
        "hybrid_interleaved2_context2": (hybrid, ParallelConfig(pipeline=2, context=2, **INTERLEAVED), plain),
        "hybrid_pipeline2_expert2": (hybrid, ParallelConfig(pipeline=2, expert=2), plain),
        "hybrid_adapted_pipeline2_tensor2": (
            replace(hybrid, dims=replace(hybrid.dims, num_layers=3), adapted=True, dropout=0.0),
            ParallelConfig(pipeline=2, tensor=2),
            plain,
        ),
        "offload_interleaved2_tensor2": (
            deep,
            ParallelConfig(pipeline=2, tensor=2, **INTERLEAVED),
            MemoryConfig(offload_activations=True),
        ),
    }
    axes = {"pipeline2": {"pipeline": 2}, "context": {"pipeline": 2, "context": 2}}
    axes |= {"expert": {"pipeline": 2, "expert": 2}, "hsdp": {"pipeline": 2, "replicate": 2}}
    for seed, (name, own) in enumerate(axes.items(), start=30):
        dims = random_dims(seed)
        while dims.num_layers < 2:
            seed += 100
            dims = random_dims(seed)
        cases[f"random_{name}"] = (Case(dims=dims, num_packs=8, seed=seed), ParallelConfig(**own), plain)
    return cases


SAMPLED = {
    *("pipeline4", "interleaved2_fsdp2", "pipeline2_context2_expert2", "tied_hsdp", "a_frozen_stage"),
    *("pipeline2_tensor2", "dropping_out_and_recomputing", "towers_alone", "hybrid_pipeline2_expert2"),
}
NAMES = [pytest.param(name, marks=() if name in SAMPLED else pytest.mark.full) for name in make_cases()]

Results = tuple[dict[str, Outcome], dict[str, tuple[list[float], list[float]]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Results:
    """Of the cases whose tests were selected."""
    wanted = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    cases = {name: case for name, case in make_cases().items() if name in wanted}
    result = tmp_path_factory.mktemp("stages") / "results.pt"
    run_ranks(run_job, WORLD, cases, str(result), TRAINED)
    return torch.load(Path(result), weights_only=False)


@pytest.mark.parametrize("name", NAMES)
def test_stages_do_not_change_loss_norm_or_any_gradient(results: Results, name: str, record_property) -> None:
    results[0][name].check(record_property)


@pytest.mark.full  # `test_training_ranks.py` draws as many losses of a whole run
@pytest.mark.parametrize("name", TRAINED)
def test_stages_do_not_change_the_first_twenty_losses(results: Results, name: str) -> None:
    found, expected = results[1][name]
    assert len(expected) == 20
    assert expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=LOSS_BOUND)
