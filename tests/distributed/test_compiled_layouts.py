"""Blocks in their layouts, compiled: one graph without a break, which unlike packs share, whatever the ranks exchange.

Single ranks here are those that FSDP has wrapped, or that hold less by other means than recompute; plain ones are in
`tests/unit/test_compile.py`.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from compiled_worker import Case, Outcome, run_job
from rank_jobs import run_ranks

from omniloom.tools.tiny import make_tiny, tiny_config

FAMILIES = ("qwen3_omni", "qwen2_5_omni", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe")
ROUTED = ("qwen3_omni", "qwen3_vl_moe", "qwen3_5_moe")
EXPERT, TENSOR, CONTEXT, PIPELINE = {"expert": 2}, {"tensor": 2}, {"context": 2}, {"pipeline": 2}
RING = {"context": {"ring": 2}}


def adapters(family: str, *, dora: bool = False) -> dict[str, Any]:
    lora = {"lora": {"rank": 4, "dropout": 0.3, "dora": dora}}
    tied = tiny_config(family).get("tie_word_embeddings")
    return {"text": lora, "vision": lora, "text.embed" if tied else "lm_head": {"freeze": True}}


def make_cases() -> dict[str, Case]:
    cases = {f"{family}-bf16": Case(family=family, ranks=1, dtype="bf16") for family in FAMILIES}
    for family, recompute in product(ROUTED, ("none", "full")):
        cases[f"{family}-{recompute}"] = Case(family=family, parallel=EXPERT, memory={"recompute": recompute})
    for family in ROUTED:
        cases[f"{family}-evaluation"] = Case(family=family, parallel=EXPERT, evaluates=True)
        lora = {"memory": {"recompute": "full"}, "policy": adapters(family)}
        cases[f"{family}-lora"] = Case(family=family, parallel=EXPERT, **lora)
    for family in ("qwen3_omni", "qwen3_5_moe"):
        cases[f"{family}-expert_bf16"] = Case(family=family, parallel=EXPERT, dtype="bf16")
    return cases | lean_cases() | divided_cases()


def lean_cases() -> dict[str, Case]:
    """Ways to hold less on a lone rank."""
    cases, selective = {}, {"recompute": "selective"}
    offload: dict[str, Any] = {"offload_activations": True}
    for family in ("qwen3_vl", "qwen3_omni", "qwen3_5_moe"):
        one: dict[str, Any] = {"family": family, "ranks": 1}
        cases |= {
            f"{family}-selective": Case(**one, memory=selective),
            f"{family}-every_second": Case(**one, memory={"recompute": 2}),
            f"{family}-offload": Case(**one, memory=offload),
            f"{family}-nf4": Case(**one, quantize="nf4", policy=adapters(family), memory=selective | offload),
            f"{family}-evaluation_nf4": Case(**one, quantize="nf4", policy=adapters(family), evaluates=True),
            f"{family}-evaluation_selective": Case(**one, memory=selective | offload, evaluates=True),
        }
    dora: dict[str, Any] = {"family": "qwen3_vl", "ranks": 1, "policy": adapters("qwen3_vl", dora=True)}
    cases |= {"dora": Case(**dora, memory=selective), "evaluation_dora": Case(**dora, evaluates=True)}
    return cases


def divided_cases() -> dict[str, Case]:
    """A dense family, one with experts, divided too, and one with a delta rule, which no ring passes on."""
    cases = {}
    axes = {"tensor": TENSOR, "context": CONTEXT, "ring": RING}
    for name, parallel in axes.items():
        cases[f"qwen3_vl-{name}"] = Case(family="qwen3_vl", parallel=parallel, memory={"recompute": "full"})
        cases[f"qwen3_omni-{name}"] = Case(family="qwen3_omni", parallel=parallel | EXPERT)
        cases[f"qwen3_omni-evaluation_{name}"] = Case(family="qwen3_omni", parallel=parallel, evaluates=True)
        if name != "ring":
            cases[f"qwen3_5_moe-{name}"] = Case(family="qwen3_5_moe", parallel=parallel | EXPERT, dtype="bf16")
    for family in ("qwen3_omni", "qwen3_5_moe"):
        cases[f"{family}-pipeline"] = Case(family=family, parallel=PIPELINE)
    cases["qwen3_omni-evaluation_pipeline"] = Case(family="qwen3_omni", parallel=PIPELINE, evaluates=True)
    for name, parallel in {"expert": EXPERT, "pipeline": PIPELINE, **axes}.items():
        family = "qwen3_vl_moe" if name == "expert" else "qwen3_vl"
        cases[f"inductor-{name}"] = Case(family=family, parallel=parallel, backend="inductor")
    return cases


CASES = make_cases()
SAMPLE = "qwen3_omni-full"
NAMES = [pytest.param(name, marks=() if name == SAMPLE else pytest.mark.full) for name in CASES]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    wanted = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    folder, found = tmp_path_factory.mktemp("compiled"), {}
    models = {family: str(make_tiny(family, folder / family)) for family in {CASES[name].family for name in wanted}}
    for num_ranks in sorted({CASES[name].ranks for name in wanted}):
        cases = {name: CASES[name] for name in sorted(wanted) if CASES[name].ranks == num_ranks}
        run_ranks(run_job, num_ranks, cases, models, str(folder / "results.pt"))
        found |= torch.load(folder / "results.pt", weights_only=False)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_blocks_in_their_layouts_are_compiled_without_a_break(outcomes: dict[str, list[Outcome]], name: str) -> None:
    case = CASES[name]
    # a first layer below which nothing trains has no gradient to hand on; the text's rows are always as many
    limits = {"text": 1 + case.family.startswith("qwen3_5")}
    for outcome in outcomes[name]:
        assert not outcome.breaks
        worst = max((error / outcome.bounds[each], error, each) for each, error in outcome.errors.items())
        assert worst[0] < 1, worst
        found = outcome.graphs
        assert all(0 < found[root] <= limits.get(root, 2 + 2 * bool(case.policy)) for root in found), found
