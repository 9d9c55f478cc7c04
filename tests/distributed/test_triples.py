"""Products of three axes and more on eight ranks, as the guides train, against one model on one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_worker import Case, Outcome, run_job
from rank_jobs import run_ranks
from test_pipeline import DEEP, INTERLEAVED
from tiny_omni import Dims, random_dims

from omniloom.config import ContextConfig, MemoryConfig, ParallelConfig

WORLD = 8
pytestmark = pytest.mark.full

PRODUCTS: dict[str, dict[str, Any]] = {
    "tensor2_pipeline2_expert2": {"tensor": 2, "pipeline": 2, "expert": 2},
    "tensor2_pipeline2_expert4": {"tensor": 2, "pipeline": 2, "expert": 4},
    "tensor4_pipeline2_expert4": {"tensor": 4, "pipeline": 2, "expert": 4},
    "tensor2_interleaved2_expert4": {"tensor": 2, "pipeline": 2, "expert": 4, **INTERLEAVED},
    "context2_tensor2_pipeline2": {"context": 2, "tensor": 2, "pipeline": 2},
    "ring2_tensor2_pipeline2_expert4": {"context": ContextConfig(ring=2), "tensor": 2, "pipeline": 2, "expert": 4},
    "ulysses2_ring2_expert8": {"context": ContextConfig(ulysses=2, ring=2), "expert": 8},
    "hsdp_tensor2_pipeline2": {"replicate": 2, "tensor": 2, "pipeline": 2},
    "hsdp_tensor2_expert4": {"replicate": 2, "tensor": 2, "expert": 4},
}


def make_cases() -> dict[str, tuple[Case, ParallelConfig, MemoryConfig]]:
    plain, cases = MemoryConfig(), {}
    for seed, (name, axes) in enumerate(PRODUCTS.items(), start=60):
        parallel = ParallelConfig(**axes)
        eight = replace(DEEP, num_experts=8)
        cases[name] = (Case(dims=eight, num_packs=8, shares_decoding=True), parallel, plain)
        dims = random_dims(seed)
        while dims.num_experts % parallel.expert:
            seed += 100
            dims = random_dims(seed)
        dims = replace(dims, num_layers=max(dims.num_layers, parallel.pipeline * parallel.stages_per_rank))
        cases[f"random_{name}"] = (Case(dims=dims, num_packs=8, seed=seed), parallel, plain)
    tied = Case(dims=Dims(tie=True, num_layers=3), num_packs=8, seed=2)
    cases["tied_hsdp_tensor2_pipeline2"] = (tied, ParallelConfig(**PRODUCTS["hsdp_tensor2_pipeline2"]), plain)
    return cases


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """Of the cases whose tests were selected."""
    wanted = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    cases = {name: case for name, case in make_cases().items() if name in wanted}
    result = tmp_path_factory.mktemp("triples") / "results.pt"
    run_ranks(run_job, WORLD, cases, str(result), ())
    found: dict[str, Outcome] = torch.load(Path(result), weights_only=False)[0]
    return found


@pytest.mark.parametrize("name", make_cases())
def test_products_of_axes_do_not_change_loss_norm_or_any_gradient(
    outcomes: dict[str, Outcome], name: str, record_property
) -> None:
    outcomes[name].check(record_property)
