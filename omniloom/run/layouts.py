"""Which layouts a model can be trained in on so many devices, ranked by the step time that is estimated for them.

`parallel.layout: auto` takes the first; `omniloom plan --gpus` shows them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from omniloom.config import ContextConfig, MemoryConfig
from omniloom.parallel.apply import check_plan
from omniloom.parallel.degrees import Degrees, resolve_degrees
from omniloom.run.footprint import Footprint, ModelSizes
from omniloom.run.opening import Workshop
from omniloom.run.step_time import Clock, Machine, StepTime

FREE_SHARE = 0.06  # of a device's memory, for its libraries, the network's buffers and gaps between tensors
MOST = {"context": 64, "pipeline": 16}  # ranks of an axis that are tried; tensor stays within a machine
RECOMPUTES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, and what recomputation goes with it."""

    degrees: Degrees
    memory: MemoryConfig
    footprint: Footprint
    time: StepTime

    def fits(self, memory_bytes: float) -> bool:
        return self.footprint.total <= (1 - FREE_SHARE) * memory_bytes

    def describe(self) -> str:
        return f"{self.footprint.total / 2**30:.3g} GiB a device, {self.time.seconds:.3g} s a step by estimate"

    def settings(self) -> dict[str, str]:
        """The keys that come to it, with their values."""
        degrees, memory = self.degrees, self.memory
        axes = ("replicate", "shard", "context", "tensor", "pipeline", "expert")
        found = {f"parallel.{axis}": str(getattr(degrees, axis)) for axis in axes if getattr(degrees, axis) > 1}
        if degrees.ring > 1:
            del found["parallel.context"]
            found |= {f"parallel.context.{way}": str(getattr(degrees, way)) for way in ("ulysses", "ring")}
        found["memory.recompute"] = str(memory.recompute)
        for key in ("offload_activations", "offload_optimizer"):
            if getattr(memory, key):
                found[f"memory.{key}"] = "true"
        return found


def choose_degrees(
    workshop: Workshop, world_size: int, *, memory_bytes: float, machine: Machine
) -> tuple[Degrees, list[str]]:
    """How `parallel` divides a run over so many ranks, and why, where the choice is ours.

    Raises: ValueError where ranks, packs or model do not divide.
    """
    config, plan = workshop.config, workshop.spec.sharding(workshop.family)
    if config.parallel.layout == "given" or world_size == 1:
        degrees = resolve_degrees(config.parallel, world_size, packs_per_step=config.train.packs_per_step)
        check_plan(plan, degrees)
        return degrees, []
    found = rank_layouts(ModelSizes(workshop), world_size, memory_bytes, machine, vary_memory=False)
    if not found:
        raise ValueError(
            f"parallel.layout: auto finds no layout of {world_size} ranks that model and packs divide by; raise "
            f"train.packs_per_step ({config.train.packs_per_step}), or start another number of ranks"
        )
    best = found[0]
    lines = [f"layout {best.degrees.describe()}: {best.describe()}, of {len(found)} layouts"]
    if not best.fits(memory_bytes):
        lines.append(f"       warning: {memory_bytes / 2**30:.3g} GiB are estimated not to be enough for any of them")
    elif len(found) > 1:
        lines.append(f"       next {found[1].degrees.describe()}: {found[1].describe()}")
    return best.degrees, lines


def layouts_of(sizes: ModelSizes, gpus: int, machine: Machine) -> Iterator[Degrees]:
    """Every layout of so many devices that model and packs can be divided by, small degrees first."""
    plan, config = sizes.plan, sizes.config
    powers = [2**n for n in range(gpus.bit_length())] + [gpus]
    most_stages = 1 if plan.num_talker_heads else len(plan.layer_costs)  # a talker is not cut
    axes = {
        "tensor": [n for n in powers if n <= machine.devices],
        "context": [n for n in powers if n <= MOST["context"]],
        "pipeline": [n for n in powers if n <= min(MOST["pipeline"], most_stages)],
        "expert": [n for n in powers if n <= max(plan.num_experts, 1)],
        "replicate": sorted({1, max(gpus // machine.devices, 1)}),
    }
    seen = set()
    for tensor, context, pipeline, expert, replicate in itertools.product(*axes.values()):
        ulysses = math.gcd(context, plan.num_attention_heads // tensor)  # as far as heads divide, a ring beyond
        ring = context // ulysses
        chunks = math.lcm(tensor * context, 2 * ring if ring > 1 else 1)
        if gpus % (tensor * context * pipeline * replicate) or config.data.pack_tokens % chunks:
            continue
        parallel = replace(config.parallel, shard="auto", tensor=tensor, pipeline=pipeline,
                           expert=expert, replicate=replicate, pipeline_layers=None,
                           context=ContextConfig(ulysses=ulysses, ring=ring))  # fmt: skip
        try:
            degrees = resolve_degrees(parallel, gpus, packs_per_step=config.train.packs_per_step)
            check_plan(plan, replace(degrees, pipeline=1))  # any number of stages up to that of layers will do
        except ValueError:
            continue
        if degrees not in seen:
            seen.add(degrees)
            yield degrees


def rank_layouts(
    sizes: ModelSizes, gpus: int, memory_bytes: float, machine: Machine, *, vary_memory: bool
) -> list[Candidate]:
    """Candidates, those that fit first, the fastest before slower ones; else the smallest before larger ones.

    With `vary_memory` each layout comes with the fastest recomputation and offloading by which it fits.
    """
    candidates = list_candidates(sizes, gpus, Clock(sizes, machine), vary_memory=vary_memory)
    best = dict[Degrees, Candidate]()
    for candidate in candidates:
        known = best.setdefault(candidate.degrees, candidate)
        if order_of(candidate, memory_bytes) < order_of(known, memory_bytes):
            best[candidate.degrees] = candidate
    return sorted(best.values(), key=lambda candidate: order_of(candidate, memory_bytes))


def list_candidates(sizes: ModelSizes, gpus: int, clock: Clock, *, vary_memory: bool) -> Iterator[Candidate]:
    """Every layout with the config's recomputation, or with each there is, whether it fits or not."""
    for degrees in layouts_of(sizes, gpus, clock.machine):
        for memory in _memories(sizes.config.memory) if vary_memory else [sizes.config.memory]:
            yield Candidate(
                degrees=degrees,
                memory=memory,
                footprint=sizes.footprint(degrees, memory),
                time=clock.step(degrees, memory),
            )


def _memories(memory: MemoryConfig) -> list[MemoryConfig]:
    plain = [replace(memory, recompute=how, offload_activations=False, offload_optimizer=False) for how in RECOMPUTES]
    return [*plain, replace(plain[-1], offload_activations=True),
            replace(plain[-1], offload_activations=True, offload_optimizer=True)]  # fmt: skip


def order_of(candidate: Candidate, memory_bytes: float) -> tuple[bool, float, int]:
    """What candidates are sorted by: those that fit first, by time; else by size; of equal ones that of fewer axes."""
    fits, degrees = candidate.fits(memory_bytes), candidate.degrees
    axes = sum(size > 1 for size in (degrees.context, degrees.tensor, degrees.pipeline, degrees.expert))
    figure = float(f"{candidate.time.seconds:.3g}") if fits else candidate.footprint.total
    return not fits, figure, axes
