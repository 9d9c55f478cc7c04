"""One rank of the job that compiles the blocks of models whose experts are divided.

Started by `test_compiled_experts.py`; two ranks, gloo, CPU. Gradients are compared with those of the same model before
it is compiled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from omniloom.config import load_config
from omniloom.models.fusion import OmniModel
from omniloom.ops.linear_map import keyed_seed
from omniloom.parallel.apply import compile_blocks
from omniloom.parallel.degrees import resolve_degrees
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.mesh import Layout, Ranks, build_layout, close_distributed, init_distributed
from omniloom.parallel.recompute import Recompute
from omniloom.parallel.step import Objective, run_packs
from omniloom.run.opening import build_model, load_weights, open_workshop
from omniloom.types import PackedBatch
from tests.device.steps import make_pack, unlike_contents

PACK_TOKENS, NUM_PACKS = 384, 20
OBJECTIVE = Objective(coefficients={"text": 1.0, "router": 0.1}, weight_sums={"text": 1.0, "router": 2.0})


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    recompute: Recompute = "none"
    lora: bool = False
    backend: str = "aot_eager"
    dtype: Literal["bf16", "float32"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    graphs: Mapping[str, int]  # by root
    breaks: Mapping[str, int]
    errors: Mapping[str, float]  # of gradients, relative


def run_case(case: Case, model_dir: Path, ranks: Ranks) -> Outcome:
    torch._dynamo.reset()
    counters.clear()
    tree = {
        "model": {"path": str(model_dir), "dtype": case.dtype},
        "data": {"pack_tokens": PACK_TOKENS},
        "parallel": {"expert": 2},
        "memory": {"recompute": case.recompute},
        "policy": {"text": {"lora": {"rank": 4, "dropout": 0.3}}, "lm_head": {"freeze": True}} if case.lora else {},
    }
    workshop = open_workshop(load_config(tree))
    config, plan = workshop.config, workshop.spec.sharding(workshop.family)
    layout = build_layout(resolve_degrees(config.parallel, ranks.world_size, packs_per_step=2), ranks)
    model, _ = build_model(workshop, layout)
    load_weights(workshop, model)
    pool = EncoderPool(layout, plan, config.parallel.encoder_pool)
    packs = [make_pack(workshop.family, PACK_TOKENS, content) for content in unlike_contents(NUM_PACKS)]
    packs = [replace(pack, draw_key=keyed_seed(number)) for number, pack in enumerate(packs)]
    packs = packs[ranks.rank :] + packs[: ranks.rank]  # at any time those of the ranks are unlike, too
    expected = gradients(model, packs[0], layout, pool)
    backends = {root: CompileCounterWithBackend(case.backend) for root in plan.roots}
    for root, backend in backends.items():
        compile_blocks(model, [block for block in plan.blocks if block.startswith(f"{root}.")], backend)
    found = gradients(model, packs[0], layout, pool)
    norm = torch.stack([each.norm() for each in expected.values()]).norm()
    errors = {}
    for name, wanted in expected.items():  # of a key bias, whose gradient is what rounding leaves, against the weights'
        scale = max(expected[name.replace("k_proj.bias", "k_proj.weight")].norm(), 1e-6 * norm)
        errors[name] = ((found[name] - wanted).norm() / scale).item()
    for pack in packs:
        gradients(model, pack, layout, pool)
    return Outcome(
        graphs={root: backend.frame_count for root, backend in backends.items()},
        breaks=dict(counters["graph_break"]),
        errors=errors,
    )


def gradients(model: OmniModel, pack: PackedBatch, layout: Layout, pool: EncoderPool) -> dict[str, Tensor]:
    model.zero_grad()
    run_packs(model, pool.plan([pack]), layout, OBJECTIVE, pool)
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in trained.items()}


def run_job(rank: int, world_size: int, port: int, cases: dict[str, Case], models: dict[str, str], result: str) -> None:
    """Body of one process."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    ranks = init_distributed(timeout_seconds=300)
    outcomes = {name: run_case(case, Path(models[case.family]), ranks) for name, case in cases.items()}
    if rank == 0:
        torch.save(outcomes, result)
    close_distributed()
