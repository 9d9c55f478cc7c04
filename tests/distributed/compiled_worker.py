"""One rank of the job that compiles the blocks of models in their layouts.

Started by `test_compiled_layouts.py`; gloo, CPU. What compiled blocks give is compared with what they gave before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from omniloom.checkpoint.adapters import fill
from omniloom.config import load_config
from omniloom.ops.linear_map import keyed_seed
from omniloom.parallel.apply import compile_blocks
from omniloom.parallel.degrees import Degrees, resolve_degrees
from omniloom.parallel.device import HostCopies
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.fsdp import match_modules
from omniloom.parallel.mesh import Layout, Ranks, build_layout, close_distributed, init_distributed
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.recompute import OffloadingCall
from omniloom.parallel.step import Objective, evaluate, run_packs
from omniloom.run.opening import Workshop, all_parameters, build_model, load_weights, open_workshop
from omniloom.types import PackedBatch
from tests.device.steps import make_pack, unlike_contents

PACK_TOKENS, NUM_PACKS = 384, 20
OBJECTIVE = Objective(coefficients={"text": 1.0, "router": 0.1}, weight_sums={"text": 1.0, "router": 2.0})
FLOAT32_BOUND, BF16_BOUND = 1e-4, 4e-3  # the latter a rounding


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    ranks: int = 2
    parallel: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None
    backend: str = "aot_eager"
    dtype: Literal["bf16", "float32"] = "float32"
    evaluates: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    graphs: Mapping[str, int]  # by root
    breaks: Mapping[str, int]
    errors: Mapping[str, float]  # of gradients, or of what an evaluation sums up, relative
    bounds: Mapping[str, float]  # of these


class CompiledRun:
    """A model in its layout, and its packs."""

    def __init__(self, case: Case, model_dir: Path, ranks: Ranks, layouts: dict[Degrees, Layout]) -> None:
        self.case, self.workshop = case, _open(case, model_dir)
        config, self.plan = self.workshop.config, self.workshop.spec.sharding(self.workshop.family)
        degrees = resolve_degrees(config.parallel, ranks.world_size, packs_per_step=4)
        if degrees not in layouts:  # groups have threads of their own
            layouts[degrees] = build_layout(degrees, ranks)
        self.layout = layouts[degrees]
        self.model, _ = build_model(self.workshop, self.layout)
        load_weights(self.workshop, self.model, all_parameters(self.workshop, self.model, self.layout))
        for name, parameter in self.model.named_parameters():
            if name.endswith("lora_b"):  # zeros at first, by which lora_a has no gradient
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                fill(parameter.detach(), 0.05 * values)
        if case.memory.get("offload_activations"):
            self._offload()
        self.pipeline = None
        if degrees.pipeline > 1:
            dtype = self.workshop.compute_dtype
            self.pipeline = Pipeline(self.model, self.layout, self.plan, config.parallel, dtype)
        self.pool = EncoderPool(self.layout, self.plan, config.parallel.encoder_pool)
        packs = [make_pack(self.workshop.family, PACK_TOKENS, content) for content in unlike_contents(NUM_PACKS)]
        packs = [replace(pack, draw_key=keyed_seed(number)) for number, pack in enumerate(packs)]
        first = self.layout.data_rank
        self.packs = packs[first:] + packs[:first]  # at any time those of the ranks are unlike, too

    def _offload(self) -> None:
        """What a run on the CPU leaves out."""
        for name in match_modules(self.model, self.plan.layer_calls):
            call: Any = self.model.get_submodule(name)
            copies = HostCopies(self.layout.device)
            self.model.set_submodule(name, OffloadingCall(call, copies, least_bytes=0))

    def results(self, *packs: PackedBatch) -> dict[str, Tensor]:
        """Gradients, or what an evaluation sums up. Collective."""
        if self.case.evaluates:
            self.model.eval()
            terms = [evaluate(self.model, pack, self.layout, self.pool, self.pipeline) for pack in packs]
            return {f"{name} {number}": total for number, each in enumerate(terms) for name, total in each.sums.items()}
        self.model.zero_grad()
        planned = self.pool.plan(packs) if self.pipeline else [self.pool.plan([pack])[0] for pack in packs]
        run_packs(self.model, planned, self.layout, OBJECTIVE, self.pool, self.pipeline)
        trained = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {
            name: (each.full_tensor() if isinstance(each, DTensor) else each).float() for name, each in trained.items()
        }


def _open(case: Case, model_dir: Path) -> Workshop:
    return open_workshop(
        load_config(
            {
                "model": {"path": str(model_dir), "dtype": case.dtype, "quantize": case.quantize},
                "data": {"pack_tokens": PACK_TOKENS},
                "parallel": dict(case.parallel),
                "memory": dict(case.memory),
                "policy": dict(case.policy),
            }
        )
    )


def run_case(case: Case, model_dir: Path, ranks: Ranks, layouts: dict[Degrees, Layout]) -> list[Outcome]:
    """Of all ranks."""
    torch._dynamo.reset()
    counters.clear()
    run = CompiledRun(case, model_dir, ranks, layouts)
    expected = run.results(*run.packs[:2])  # of which one has media
    bounds = dict.fromkeys(expected, FLOAT32_BOUND)
    if case.dtype == "bf16":  # at most what the dtype itself makes of them
        exact = CompiledRun(replace(case, dtype="float32"), model_dir, ranks, layouts).results(*run.packs[:2])
        bounds = {name: max(BF16_BOUND, error) for name, error in relative_errors(expected, exact).items()}
    backends = {root: CompileCounterWithBackend(case.backend) for root in run.plan.roots}
    for root, backend in backends.items():
        compile_blocks(run.model, [block for block in run.plan.blocks if block.startswith(f"{root}.")], backend)
    errors = relative_errors(run.results(*run.packs[:2]), expected)
    for first in range(0, NUM_PACKS, 2):
        run.results(*run.packs[first : first + 2])
    graphs = {root: backend.frame_count for root, backend in backends.items()}
    breaks = dict(counters["graph_break"])
    return run.layout.exchange(Outcome(graphs=graphs, breaks=breaks, errors=errors, bounds=bounds))


def relative_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    norm = torch.stack([each.norm() for each in expected.values()]).norm() if expected else 0.0
    errors = {}
    for name, wanted in expected.items():  # of a key bias, whose gradient is what rounding leaves, against the weights'
        scale = max(expected.get(name.replace("k_proj.bias", "k_proj.weight"), wanted).norm(), 1e-6 * norm)
        errors[name] = ((found[name] - wanted).norm() / scale).item()
    return errors


def run_job(rank: int, world_size: int, port: int, cases: dict[str, Case], models: dict[str, str], result: str) -> None:
    """Body of one process."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    ranks, layouts = init_distributed(timeout_seconds=300), {}
    outcomes = {name: run_case(case, Path(models[case.family]), ranks, layouts) for name, case in cases.items()}
    if rank == 0:
        torch.save(outcomes, result)
    close_distributed()
