"""One rank of the job that adapts a tiny model in several layouts and compares each with a plain model.

Started by `test_lora_layouts.py`; two ranks, gloo, CPU. Every rank computes the reference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tiny_omni import make_pack
from torch import Tensor
from torch.distributed.tensor import DTensor

from omniloom.checkpoint.adapters import fill
from omniloom.checkpoint.hf import gather_full
from omniloom.config import Config, LoraConfig, MemoryConfig, ModelConfig, ParallelConfig, PolicyRule
from omniloom.models.fusion import OmniModel
from omniloom.ops.linear_map import keyed_seed
from omniloom.ops.nf4 import unpack
from omniloom.parallel.degrees import resolve_degrees
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.mesh import Ranks, build_layout, close_distributed, init_distributed
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.step import Objective, run_packs
from omniloom.run.opening import Workshop, all_parameters, build_model, load_weights, open_workshop
from omniloom.training.lora import merging
from omniloom.types import PackedBatch

PACK_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    lora: LoraConfig
    experts: bool = True
    head: bool = False
    recompute: bool = False
    dtype: Literal["bf16", "float32"] = "float32"
    quantize: Literal["nf4"] | None = None
    parallel: ParallelConfig

    def config(self, model: Path) -> Config:
        policy = {
            "text": PolicyRule(lora=self.lora),
            "audio": PolicyRule(lora=self.lora),
            "vision": PolicyRule(freeze=True),
            "vision.merger": PolicyRule(freeze=False),
            "lm_head": PolicyRule(lora=self.lora) if self.head else PolicyRule(freeze=True),
        }
        if not self.experts:
            policy["text.experts"] = PolicyRule(freeze=True)
        return Config(
            model=ModelConfig(path=str(model), dtype=self.dtype, quantize=self.quantize),
            policy=policy,
            parallel=self.parallel,
            memory=MemoryConfig(recompute="full" if self.recompute else "none"),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    loss_error: float
    gradient_errors: dict[str, float]
    merged_error: float
    frozen_with_gradient: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Reference:
    loss: float
    gradients: dict[str, Tensor]
    merged: dict[str, Tensor]


def make_packs(workshop: Workshop) -> list[PackedBatch]:
    kinds: list[dict] = [{"images": ((1, 4, 4),), "audio_frames": (20, 7)}, {"audio_frames": (30,)}]
    return [
        make_pack(workshop.family, seed=i, pack_tokens=PACK_TOKENS, num_samples=2, **kind)
        for i, kind in enumerate(kinds)
    ]


def load(workshop: Workshop, model: OmniModel, parameters: Mapping[str, torch.nn.Parameter] | None = None) -> None:
    """The published weights; adapters away from where they start, so that both factors have gradients."""
    load_weights(workshop, model, parameters)
    held = dict(model.named_parameters())
    with torch.no_grad():
        for adapter in workshop.adapters:
            if (lora_b := held.get(adapter.lora_b)) is not None:  # else another stage's
                generator = torch.Generator().manual_seed(keyed_seed(adapter.lora_b))
                fill(lora_b, 0.1 * torch.randn(lora_b.shape, generator=generator))


def merged_weights(
    workshop: Workshop, parameters: Mapping[str, Tensor], pipeline: Pipeline | None = None
) -> dict[str, Tensor]:
    held = gather_full(parameters)
    if pipeline is not None:
        held = pipeline.gather_from(parameters, held)
    gather = merging(lambda name: unpack(held(name), torch.float32), workshop.adapters)
    return {adapter.base: gather(adapter.base) for adapter in workshop.adapters}


def run_reference(workshop: Workshop, objective: Objective) -> Reference:
    model = workshop.build()
    load(workshop, model)
    model.eval()
    policies = workshop.policies([name for name, _ in model.named_parameters()])
    loss = 0.0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(policies[name].trainable)
    for pack in make_packs(workshop):
        terms = model(pack)
        objective.of_pack(terms).backward()
        loss += terms.sums["text"].item()
    return Reference(
        loss=loss,
        gradients={name: p.grad for name, p in model.named_parameters() if p.requires_grad},
        merged=merged_weights(workshop, dict(model.named_parameters())),
    )


def run_case(case: Case, model_dir: Path, ranks: Ranks) -> Outcome:
    workshop = open_workshop(case.config(model_dir))
    weight_sum = sum(float(pack.loss_weights.double().sum()) for pack in make_packs(workshop))
    objective = Objective(coefficients={"text": 1.0}, weight_sums={"text": weight_sum, "router": 2.0})
    expected = run_reference(workshop, objective)
    layout = build_layout(resolve_degrees(case.parallel, ranks.world_size, packs_per_step=2), ranks)
    model, _ = build_model(workshop, layout)
    parameters = all_parameters(workshop, model, layout)
    here = {name: parameter for name, parameter in parameters.items() if not parameter.is_meta}
    load(workshop, model, parameters)
    model.eval()
    plan = workshop.spec.sharding(workshop.family)
    pool, pipeline = EncoderPool(layout, plan, case.parallel.encoder_pool), None
    if layout.degrees.pipeline > 1:
        pipeline = Pipeline(model, layout, plan, case.parallel, workshop.compute_dtype)
    packs = pool.plan(make_packs(workshop)[layout.data_rank :: layout.data_world])
    total = layout.sum_over_ranks(run_packs(model, packs, layout, objective, pool, pipeline).sums["text"])
    assert all(isinstance(parameter, DTensor) for parameter in here.values())
    norm = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    errors = {}
    for name, gradient in expected.gradients.items():
        if name in here:
            found = here[name].grad
            assert found is not None, f"{name} has no gradient"
            errors[name] = ((found.full_tensor() - gradient).norm() / max(gradient.norm(), 1e-6 * norm)).item()
    errors = {name: error for own in layout.exchange(errors) for name, error in own.items()}
    assert errors.keys() == expected.gradients.keys()
    merged = merged_weights(workshop, parameters, pipeline)
    return Outcome(
        loss_error=abs(total.item() - expected.loss) / abs(expected.loss),
        gradient_errors=errors,
        merged_error=max((merged[name] - value).abs().max().item() for name, value in expected.merged.items()),
        frozen_with_gradient=tuple(n for n, p in here.items() if n not in errors and p.grad is not None),
    )


def repeat_with_dropout(case: Case, model_dir: Path, ranks: Ranks) -> list[float]:
    """Losses of the same keys twice, and of another key; recomputing blocks and dropping out."""
    case = replace(case, lora=replace(case.lora, dropout=0.3), recompute=True)
    workshop = open_workshop(case.config(model_dir))
    layout = build_layout(resolve_degrees(case.parallel, ranks.world_size, packs_per_step=2), ranks)
    model, _ = build_model(workshop, layout)
    load(workshop, model)
    pool = EncoderPool(layout, workshop.spec.sharding(workshop.family), case.parallel.encoder_pool)
    packs = pool.plan(make_packs(workshop)[layout.data_rank :: layout.data_world])
    found = []
    for step in (1, 1, 2):
        objective = Objective(coefficients={"text": 1.0}, weight_sums={"text": 1.0, "router": 2.0})
        keyed = [replace(pack, draw_key=keyed_seed(step, number)) for number, pack in enumerate(packs)]
        found.append(layout.sum_over_ranks(run_packs(model, keyed, layout, objective, pool).sums["text"]).item())
    return found


def run_job(
    rank: int,
    world_size: int,
    port: int,
    cases: dict[str, Case],
    dropping: dict[str, Case],
    model_dir: str,
    result: str,
) -> None:
    """Body of one process."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    ranks = init_distributed(timeout_seconds=120)
    outcomes = {name: run_case(case, Path(model_dir), ranks) for name, case in cases.items()}
    dropped = {name: repeat_with_dropout(case, Path(model_dir), ranks) for name, case in dropping.items()}
    if rank == 0:
        torch.save((outcomes, dropped), Path(result))
    close_distributed()
