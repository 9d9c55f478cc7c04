"""Blocks with divided experts, compiled: one graph without a break, whatever the number of rows that arrive."""

from __future__ import annotations

import pytest
import torch
from compiled_worker import Case, Outcome, run_job
from rank_jobs import run_ranks

from omniloom.tools.tiny import make_tiny

FAMILIES = ("qwen3_omni", "qwen3_vl_moe", "qwen3_5_moe")
CASES = {
    f"{family}-{recompute}": Case(family=family, recompute=recompute)
    for family in FAMILIES
    for recompute in ("none", "full")
}
CASES["lora"] = Case(family="qwen3_omni", recompute="full", lora=True)
CASES["inductor"] = Case(family="qwen3_vl_moe", backend="inductor")
CASES["bf16"] = Case(family="qwen3_omni", dtype="bf16")
SAMPLE = "qwen3_omni-full"
NAMES = [pytest.param(name, marks=() if name == SAMPLE else pytest.mark.full) for name in CASES]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Outcome]:
    wanted = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    folder = tmp_path_factory.mktemp("compiled")
    cases = {name: case for name, case in CASES.items() if name in wanted}
    models = {family: str(make_tiny(family, folder / family)) for family in {case.family for case in cases.values()}}
    run_ranks(run_job, 2, cases, models, str(folder / "results.pt"))
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", NAMES)
def test_divided_experts_are_compiled_without_a_break(outcomes: dict[str, Outcome], name: str) -> None:
    outcome, case = outcomes[name], CASES[name]
    assert not outcome.breaks
    worst = max((error, parameter) for parameter, error in outcome.errors.items())
    assert worst[0] < (1e-4 if case.dtype == "float32" else 4e-3), worst  # a rounding of bfloat16
    # a delta rule beside attention; a first layer below which nothing trains, which has no gradient to hand on
    kinds = {"text": 1 + (case.family == "qwen3_5_moe") + case.lora}
    assert all(0 < graphs <= 2 * kinds.get(root, 1) for root, graphs in outcome.graphs.items()), outcome.graphs
