"""One rank of the job that trains a talker in several layouts and compares each with a plain model.

Started by `test_speech_layouts.py`; four ranks, gloo, CPU. Every rank computes the reference.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from omniloom.config import Config, DataConfig, MemoryConfig, ModelConfig, ParallelConfig, PolicyRule
from omniloom.data.loader import Loader
from omniloom.data.planner import plan_all
from omniloom.data.sources import open_sources
from omniloom.parallel.degrees import resolve_degrees
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.mesh import Ranks, build_layout, close_distributed, init_distributed
from omniloom.parallel.step import Objective, evaluate, run_packs
from omniloom.run.opening import Workshop, build_model, load_weights, open_workshop
from omniloom.run.rows import open_rows
from omniloom.types import CODE0, CODES, TEXT, PackedBatch, PackPlan

PACK_TOKENS, NUM_PACKS = 128, 4
LOSSES = (TEXT, CODE0, CODES)


@dataclass(frozen=True, kw_only=True)
class Case:
    parallel: ParallelConfig
    family: str = "qwen3_omni"
    alone: bool = False  # nothing but the talker trains
    recompute: bool = False

    def config(self, model: Path, rows: Path) -> Config:
        trained = ("talker",) if self.alone else ("talker", "text", "lm_head")
        return Config(
            model=ModelConfig(path=str(model), dtype="float32"),
            data=DataConfig(train=(str(rows),), pack_tokens=PACK_TOKENS),
            policy={name: PolicyRule(freeze=False) for name in trained},
            parallel=self.parallel,
            memory=MemoryConfig(recompute="full" if self.recompute else "none"),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    loss_errors: dict[str, float]
    gradient_errors: dict[str, float]
    right: dict[str, float]  # weights of likeliest codes in evaluation, less the reference's


def make_packs(workshop: Workshop) -> list[PackedBatch]:
    """All packs, the last ones empty."""
    source = open_sources(workshop.config.data.train, workshop.config.data)
    with closing(Loader(open_rows(workshop, source, cache=False), workers=0)) as loader:
        plans, bad = plan_all(
            num_rows=len(source), pack_tokens=PACK_TOKENS, measure=loader.measure, locate=source.locate
        )
        assert not bad, bad
        assert len(plans) <= NUM_PACKS, len(plans)
        empty = [PackPlan(index=index, samples=()) for index in range(len(plans), NUM_PACKS)]
        return [loaded.batch for loaded in loader.load_in_order([*plans, *empty])]


def weight_sums(packs: list[PackedBatch]) -> dict[str, float]:
    found = {name: float(sum(pack.targets[name].weights.sum() for pack in packs)) for name in packs[0].targets}
    return {TEXT: float(sum(pack.loss_weights.sum() for pack in packs)), **found, "router": float(len(packs))}


def run_case(case: Case, model_dir: Path, rows: Path, ranks: Ranks) -> Outcome:
    workshop = open_workshop(case.config(model_dir, rows))
    packs = make_packs(workshop)
    names = [name for name in (LOSSES[1:] if case.alone else LOSSES) if name in (TEXT, *packs[0].targets)]
    sums_of = weight_sums(packs)
    objective = Objective(
        coefficients={TEXT: 1.0, CODE0: 1.0, CODES: 0.3},
        weight_sums={name: total for name, total in sums_of.items() if name in (*names, "router")},
    )
    reference = workshop.build()
    load_weights(workshop, reference)
    wanted = dict.fromkeys(names, 0.0)
    for pack in packs:
        terms = reference(pack)
        objective.of_pack(
            type(terms)(sums={n: terms.sums[n] for n in names}, expert_counts=terms.expert_counts)
        ).backward()
        wanted = {name: wanted[name] + terms.sums[name].item() for name in names}
    reference.eval()
    right = dict[str, float]()
    with torch.no_grad():
        for pack in packs:
            for name, value in reference(pack).sums.items():
                right[name] = right.get(name, 0.0) + value.item()

    layout = build_layout(resolve_degrees(case.parallel, ranks.world_size, packs_per_step=NUM_PACKS), ranks)
    model, policies = build_model(workshop, layout)
    load_weights(workshop, model)
    pool = EncoderPool(layout, workshop.spec.sharding(workshop.family), case.parallel.encoder_pool)
    mine = packs[layout.data_rank :: layout.data_world]
    terms = run_packs(model, pool.plan(mine), layout, objective, pool)
    totals = {name: float(layout.sum_over_ranks(terms.sums[name])) for name in names}
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters() if policies[name].trainable}
    errors = compare(dict(model.named_parameters()), gradients)
    model.eval()
    evaluated = [evaluate(model, pack, layout, pool).sums for pack in mine]
    found = {name: float(layout.sum_over_ranks(sum(sums[name] for sums in evaluated))) for name in right if "." in name}
    return Outcome(
        loss_errors={name: abs(totals[name] - wanted[name]) / abs(wanted[name]) for name in names},
        gradient_errors=errors,
        right={name: found[name] - right[name] for name in found},
    )


def compare(parameters: dict[str, Tensor], wanted: dict[str, Tensor | None]) -> dict[str, float]:
    """Of each gradient the error over its norm, or over what vanishes in the whole."""
    norm = torch.stack([gradient.norm() for gradient in wanted.values() if gradient is not None]).norm()
    errors = {}
    for name, gradient in wanted.items():
        found = parameters[name].grad
        assert found is not None, f"{name} has no gradient"
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        gradient = torch.zeros_like(whole) if gradient is None else gradient
        errors[name] = float((whole - gradient).norm() / max(gradient.norm(), 1e-6 * norm))
    return errors


def run_job(rank: int, world_size: int, port: int, cases: dict[str, Case], folder: str) -> None:
    """Body of one process."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    ranks = init_distributed(timeout_seconds=120)
    place = Path(folder)
    outcomes = {
        name: run_case(case, place / case.family, place / f"{case.family}.json", ranks) for name, case in cases.items()
    }
    if rank == 0:
        torch.save(outcomes, place / "results.pt")
    close_distributed()
