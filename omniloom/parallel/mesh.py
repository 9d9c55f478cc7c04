"""Who the ranks are: joining the job, the named axes, and the groups that cut across them.

`world = replicate x pipeline x shard x context x tensor`, tensor innermost. Data parallelism is `replicate x shard`;
FSDP shards the decoder over `shard x context` of its stage, whole experts over `shard x context x tensor`, towers over
`pipeline x shard x context x tensor`. `expert` multiplies nothing: it regroups the ranks of whole experts as
`expert_shard x expert`, expert innermost. Knows no model.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from omniloom.parallel.degrees import Degrees
from omniloom.parallel.device import backend_of, choose_device
from omniloom.types import RunError

Channel = Literal["main", "planning", "agreement", "checkpoint"]
CHANNELS: tuple[Channel, ...] = ("main", "planning", "agreement", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process in the job. `store` is the job's own, for what must work while collectives hang."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    store: dist.Store  # type: ignore[name-defined]
    timeout: timedelta = timedelta(minutes=30)  # of collectives; groups made later do not inherit it
    local_world_size: int = 1  # ranks of this machine


def init_distributed(*, timeout_seconds: float = 1800.0, device: torch.device | None = None) -> Ranks:
    """Join the job that torchrun describes in the environment, or form one of a single process.

    Collectives that wait longer than `timeout_seconds` end the process. `device` overrides the choice.
    """
    timeout = timedelta(seconds=timeout_seconds)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(local_rank) if device is None else device
    if "RANK" in os.environ:
        store, rank, world_size = _meet(timeout)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    # Bound to no device: NCCL would then send all messages of a group of stages one after another, those that are asked
    # for ahead before those that they wait for; and of other backends meshes would be split, which they cannot.
    dist.init_process_group(
        backend_of(device),
        store=dist.PrefixStore("groups", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=device,
        store=store,
        timeout=timeout,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def least_over_ranks(values: Sequence[int], ranks: Ranks) -> list[int]:
    """The least of each value on any rank, so that all decide alike. Collective over all ranks."""
    least = torch.tensor(values, dtype=torch.int64, device=ranks.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return [int(value) for value in least.tolist()]


def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:  # type: ignore[name-defined]
    """The job's store, this rank and the number of ranks. Raises: RunError where they do not come together."""
    try:
        return next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(
            f"rank {os.environ['RANK']} did not meet all {os.environ['WORLD_SIZE']} ranks at {where} within "
            f"{timeout.total_seconds():g} s; start the same command on every machine, and see that they reach that "
            f"address and nothing else listens there ({str(error).splitlines()[0]})"
        ) from error


def close_distributed() -> None:
    """Leave the job. Collective in effect: call it on every rank or on none."""
    dist.destroy_process_group()
    gc.collect()  # groups that meshes hold in cycles: threads of theirs that outlive the interpreter abort the process


def says_rank_is_gone(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank ended or was silent too long. gloo tells it by words alone."""
    words = ("gloo/transport/", "Application timeout caused pair closure")
    return isinstance(error, dist.DistError) or any(part in str(error) for part in words)


@dataclass(frozen=True, kw_only=True)
class Seat:
    """What a rank works on: the packs of its data rank, and of each the tokens of one of `sharers` ranks."""

    data_rank: int
    sharer_rank: int
    sharers: int
    pipeline_rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The axes of a run and this rank's place in each. Made by `build_layout`.

    The decoder's parameters are divided over `tensor` and sharded over `fsdp`, towers over `tower_fsdp`. Stacked
    experts are divided over `expert` and sharded over `expert_fsdp`. Meshes of FSDP are 2-D with `replicate` in front
    where that is larger than one. `upward` and `downward` are the ranks of all stages, for messages to a higher and to
    a lower rank of theirs. What an axis of one rank would need is None: process groups cost threads and memory.
    """

    degrees: Degrees
    ranks: Ranks
    fsdp: DeviceMesh
    tower_fsdp: DeviceMesh
    tensor: DeviceMesh | None
    expert_fsdp: DeviceMesh
    expert: DeviceMesh | None
    ulysses_group: dist.ProcessGroup | None
    ring_group: dist.ProcessGroup | None
    sharers_group: dist.ProcessGroup | None  # ranks that share a pack's tokens, context x tensor, in the tokens' order
    upward: dist.ProcessGroup | None
    downward: dist.ProcessGroup | None
    channels: dict[Channel, dist.ProcessGroup]  # host tensors, all ranks, one per thread of control

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes logs and shared files."""
        return self.ranks.rank == 0

    @property
    def data_world(self) -> int:
        """Number of model-parallel groups, each of which works on packs of its own."""
        return self.degrees.replicate * self.degrees.shard

    def seat(self, rank: int) -> Seat:
        """The place of any rank."""
        degrees = self.degrees
        rest, sharer_rank = divmod(rank, degrees.sharers)
        rest, shard_rank = divmod(rest, degrees.shard)
        replica, pipeline_rank = divmod(rest, degrees.pipeline)
        return Seat(
            data_rank=replica * degrees.shard + shard_rank,
            sharer_rank=sharer_rank,
            sharers=degrees.sharers,
            pipeline_rank=pipeline_rank,
        )

    @property
    def data_rank(self) -> int:
        return self.seat(self.rank).data_rank

    @property
    def context_rank(self) -> int:
        return self.sharer_rank // self.degrees.tensor

    @property
    def sharer_rank(self) -> int:
        """This rank's place among those that share its packs: it holds the tokens of this place."""
        return self.rank % self.degrees.sharers

    @property
    def pipeline_rank(self) -> int:
        return self.seat(self.rank).pipeline_rank

    @property
    def group_size(self) -> int:
        """Number of ranks that work on the same packs."""
        return self.world_size // self.data_world

    @property
    def group_rank(self) -> int:
        """This rank among those that work on the same packs."""
        return self.pipeline_rank * self.degrees.sharers + self.sharer_rank

    def exchange(self, value: Any, channel: Channel = "main") -> list[Any]:
        """All-gather one picklable object per rank on the host; item i is rank i's. Collective over all ranks.

        Each channel is a group of its own, so that background threads cannot mix up their messages.
        """
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.channels[channel])
        return gathered

    def barrier(self, channel: Channel = "main") -> None:
        """Wait on the host until every rank is here."""
        dist.barrier(group=self.channels[channel])

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """All-reduce a small tensor in place over all ranks, on its own device."""
        dist.all_reduce(value)
        return value


def build_layout(degrees: Degrees, ranks: Ranks) -> Layout:
    """Make the meshes and groups. Collective over all ranks."""
    if degrees.world != ranks.world_size:
        raise ValueError(f"layout {degrees.describe()} needs {degrees.world} ranks, {ranks.world_size} were started")
    inner = degrees.shard * degrees.context * degrees.tensor
    grid = _make_mesh(degrees, ranks, inner // degrees.tensor, tensor=degrees.tensor)
    fsdp = tower_fsdp = expert_fsdp = _without(grid, "pipeline", "tensor")
    tensor = expert = None
    if degrees.tensor > 1:
        tensor = grid["tensor"]
        tower_fsdp = expert_fsdp = _without(_make_mesh(degrees, ranks, inner), "pipeline")
    if degrees.expert > 1:
        regrouped = _make_mesh(degrees, ranks, inner // degrees.expert, expert=degrees.expert)
        expert, expert_fsdp = regrouped["expert"], _without(regrouped, "pipeline", "expert")
    upward = downward = None
    if degrees.pipeline > 1:
        tower_fsdp = _make_mesh(replace(degrees, pipeline=1), ranks, degrees.pipeline * inner)
        upward = grid["pipeline"].get_group()
        downward = _make_groups(ranks, degrees.pipeline * inner, inner)
    sharers, ulysses, ring = _make_token_groups(degrees, ranks)
    return Layout(
        degrees=degrees,
        ranks=ranks,
        fsdp=fsdp,
        tower_fsdp=tower_fsdp,
        tensor=tensor,
        expert_fsdp=expert_fsdp,
        expert=expert,
        ulysses_group=ulysses,
        ring_group=ring,
        sharers_group=sharers,
        upward=upward,
        downward=downward,
        channels={name: _make_channel(name, ranks) for name in CHANNELS},
    )


def _make_channel(name: Channel, ranks: Ranks) -> dist.ProcessGroup:
    """A group of all ranks for tensors of the host; the job's own where that does."""
    does = ranks.world_size == 1 or (name == "main" and ranks.device.type == "cpu")
    group = dist.group.WORLD if does else dist.new_group(backend="gloo", timeout=ranks.timeout)
    return cast(dist.ProcessGroup, group)


def _make_token_groups(degrees: Degrees, ranks: Ranks) -> tuple[dist.ProcessGroup | None, ...]:
    """Ranks that share a pack's tokens, and of them those that swap tokens for heads, and those that pass keys on."""
    sharers = ulysses = ring = None
    if degrees.sharers > 1:
        sharers = dist.new_subgroups(degrees.sharers, timeout=ranks.timeout)[0]
    of_ulysses = degrees.ulysses * degrees.tensor  # neighbours, of which all tensor ranks meet one after another
    if degrees.ulysses > 1:
        ulysses = sharers if degrees.sharers == degrees.ulysses else _make_groups(ranks, of_ulysses, degrees.tensor)
    if degrees.ring > 1:
        ring = sharers if degrees.sharers == degrees.ring else _make_groups(ranks, degrees.sharers, of_ulysses)
    return sharers, ulysses, ring


def _make_mesh(degrees: Degrees, ranks: Ranks, fsdp: int, **divided: int) -> DeviceMesh:
    """All ranks as replicate x pipeline x fsdp x divided, axes of one rank left out but for `fsdp`."""
    sizes = {"replicate": degrees.replicate, "pipeline": degrees.pipeline, "fsdp": fsdp, **divided}
    kept = {name: size for name, size in sizes.items() if size > 1 or name == "fsdp"}
    mesh = init_device_mesh(ranks.device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))
    for name in kept:
        mesh.get_group(name).set_timeout(ranks.timeout)
    return mesh


def _without(mesh: DeviceMesh, *axes: str) -> DeviceMesh:
    names = tuple(name for name in mesh.mesh_dim_names or () if name not in axes)
    return mesh if len(names) == mesh.ndim else mesh[names]


def _make_groups(ranks: Ranks, size: int, step: int) -> dist.ProcessGroup:
    """Every `step`-th rank of each `size` neighbours, and this rank's group: those that hold the same part of something
    that the `step` ranks in between divide."""
    members = [
        list(range(first + place, first + size, step))
        for first in range(0, ranks.world_size, size)
        for place in range(step)
    ]
    return dist.new_subgroups_by_enumeration(members, timeout=ranks.timeout)[0]
