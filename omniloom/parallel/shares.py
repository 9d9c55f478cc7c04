"""What a rank holds of each parameter, from names, shapes and degrees alone: no group, no mesh, no memory.

The rules by which `apply_parallelism` divides a model, for who plans for ranks that are not there.
"""

from __future__ import annotations

from collections.abc import Sequence

from omniloom.parallel.degrees import Degrees
from omniloom.parallel.fsdp import choose_dim, is_named
from omniloom.parallel.tensor import divided_linears
from omniloom.sharding import ShardingPlan


def local_shape(
    name: str, shape: Sequence[int], plan: ShardingPlan, degrees: Degrees, rank: int = 0
) -> tuple[int, ...]:
    """The shape of what `rank` holds of a parameter, if its stage has it (`stages_of`).

    Of ranks that divide a dim the first have the most, as `torch.chunk` divides.
    """
    inner, local = degrees.shard * degrees.sharers, list(shape)
    owner, _, key = name.rpartition(".")
    is_experts = is_named(owner, plan.experts)
    if name.split(".")[0] != plan.roots[-1] and not (is_experts and degrees.expert * degrees.tensor > 1):
        whole = degrees.pipeline * inner
        return _shard(local, shape, [1] * len(shape), whole, rank % whole)
    place, cuts = rank % inner, [1] * len(shape)
    if is_experts:
        cuts[0] = degrees.expert
        local[0] = _part(shape[0], degrees.expert, place % degrees.expert)
        return _shard(local, shape, cuts, inner // degrees.expert, place // degrees.expert)
    if degrees.tensor > 1:
        dims = [keys[key] for patterns, keys in divided_linears(plan, degrees.tensor) if is_named(owner, patterns)
                and key in keys]  # fmt: skip
        for dim in dims:
            cuts[dim] = degrees.tensor
            local[dim] = _part(shape[dim], degrees.tensor, place % degrees.tensor)
    return _shard(local, shape, cuts, inner // degrees.tensor, place // degrees.tensor)


def stages_of(name: str, plan: ShardingPlan, owners: Sequence[int]) -> set[int]:
    """The pipeline ranks that hold a parameter, of which two hold an embedding that is the head, and all the towers.

    `owners` are those of the decoder's layers, `pipeline.layer_owners`.
    """
    parts, last = name.split("."), owners[-1]
    if parts[0] != plan.roots[-1]:
        return set(owners)
    if is_named(".".join(parts[:3]), plan.blocks):
        return {owners[int(parts[2])]}
    first = plan.groups[0][0]
    if not name.startswith(f"{first}."):
        return {last}
    return {0, last} if len(plan.groups[0]) > 1 else {0}


def _shard(local: list[int], shape: Sequence[int], cuts: Sequence[int], ranks: int, place: int) -> tuple[int, ...]:
    dim = choose_dim(shape, cuts, ranks)
    return (*local[:dim], _part(local[dim], ranks, place), *local[dim + 1 :])


def _part(size: int, ranks: int, place: int) -> int:
    step = -(-size // ranks)
    return max(0, min(step, size - place * step))
