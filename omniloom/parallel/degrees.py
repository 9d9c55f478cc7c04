"""Sizes of the axes along which ranks are divided, and the rules between them that need neither a model nor torch.

A command line is checked by them before any rank is started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from omniloom.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Size of each axis, all numbers. `expert` divides `shard * context * tensor`."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    ring: int = 1  # of the context ranks, those that pass keys on; the others swap tokens for heads
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    stages_per_rank: int = 1
    pipeline_layers: tuple[int, ...] = ()  # of each stage, where the config says so

    @property
    def num_stages(self) -> int:
        return self.pipeline * self.stages_per_rank

    @property
    def ulysses(self) -> int:
        return self.context // self.ring

    @property
    def sharers(self) -> int:
        """Ranks that share the tokens of a pack."""
        return self.context * self.tensor

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.context * self.tensor * self.pipeline

    def describe(self) -> str:
        """The axes that are larger than one, for logs and messages."""
        of_context = ("context",) if self.ring == 1 else ("ulysses", "ring")
        axes = ("replicate", "shard", *of_context, "tensor", "pipeline", "expert")
        sizes = [(name, getattr(self, name)) for name in axes]
        return " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one rank"


def resolve_degrees(config: ParallelConfig, world_size: int, *, packs_per_step: int) -> Degrees:
    """Fill `shard: auto` and check every rule that needs no model.

    Raises: ValueError with one line per broken rule, each with the values that would do.
    """
    given = {"replicate": config.replicate, "context": config.ulysses * config.ring}
    given |= {"tensor": config.tensor, "pipeline": config.pipeline}
    degrees = Degrees(
        shard=max(world_size // math.prod(given.values()), 1) if config.shard == "auto" else config.shard,
        ring=config.ring,
        expert=config.expert,
        stages_per_rank=config.stages_per_rank if config.pipeline_schedule == "interleaved" else 1,
        pipeline_layers=config.pipeline_layers or (),
        **given,
    )
    said = {**given, "shard": config.shard}
    wrong = [] if degrees.world == world_size else [_wrong_product(said, degrees, world_size)]
    if faults := [*wrong, *_check_sharing(config, degrees), *_check_packs(packs_per_step, degrees)]:
        raise ValueError("\n".join(faults))
    return degrees


def _wrong_product(said: Mapping[str, int | str], degrees: Degrees, world_size: int) -> str:
    """What to say of degrees that make another number of ranks than were started."""
    product = " x ".join(f"{name} {size}" for name, size in said.items())
    rest = degrees.world // degrees.shard
    fix = f"set parallel.shard to {world_size // rest} or auto, or start {degrees.world} ranks"
    if world_size % rest:
        allowed = _divisors(world_size)
        fix = f"their product must divide {world_size}: use degrees from {allowed}, or start {degrees.world} ranks"
    return f"parallel: {product} makes {degrees.world} ranks, but {world_size} were started; {fix}"


def _check_sharing(config: ParallelConfig, degrees: Degrees) -> list[str]:
    """Faults of what divides the ranks that share parameters."""
    faults, inner, expert = [], degrees.shard * degrees.sharers, degrees.expert
    if inner % expert:
        faults.append(
            f"parallel.expert: {expert} does not divide shard x context x tensor = {inner}; choose from "
            f"{_divisors(inner)}"
        )
    group, sharers, expert_shards = config.reshard_after_forward, inner // degrees.tensor, inner // expert
    groups = [d for d in _divisors(sharers) if d > 1 and (expert_shards == 1 or expert_shards % d == 0)]  # 1: whole
    if not isinstance(group, bool) and group not in groups:
        of_experts = f", and the {expert_shards} that share experts" if expert > 1 else ""
        faults.append(
            f"parallel.reshard_after_forward: groups of {group} ranks do not divide the {sharers} that share parameters"
            f"{of_experts}; choose {', '.join(['true', 'false', *map(str, groups)])}"
        )
    if degrees.pipeline_layers and degrees.pipeline == 1:
        faults.append("parallel.pipeline_layers divide the layers over stages, but parallel.pipeline is 1; set both")
    return faults


def _check_packs(packs_per_step: int, degrees: Degrees) -> list[str]:
    """What keeps data-parallel ranks or a pipeline from being filled: too few packs, or interleaved no equal rounds."""
    num_ranks, data = degrees.pipeline, degrees.replicate * degrees.shard
    if data > packs_per_step:
        return [
            f"train.packs_per_step: {packs_per_step} packs cannot feed {data} data-parallel ranks "
            f"(replicate {degrees.replicate} x shard {degrees.shard}); raise it to at least {data}, or give ranks to "
            f"parallel.context or parallel.tensor"
        ]

    def fits(packs: int) -> bool:
        return packs >= num_ranks and (degrees.stages_per_rank == 1 or packs % (packs // num_ranks) == 0)

    packs = -(-packs_per_step // data)
    if num_ranks == 1 or fits(packs):
        return []
    more = [count * data for count in range(packs + 1, packs + 2 * num_ranks + 2) if fits(count)]
    return [
        f"train.packs_per_step: {packs_per_step} packs are {packs} for each of {data} data-parallel ranks, which a "
        f"pipeline of {num_ranks} ranks cannot take: it needs at least {num_ranks}, and equal rounds of them under "
        f"parallel.pipeline_schedule=interleaved; set it to {' or '.join(map(str, more[:2]))}"
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
