"""Sharding of parameters by FSDP2, from a family's plan. Gradients are summed, never averaged.

Owns which modules form one all-gather, over which mesh, in which dtype, and how far ahead the next one is fetched.
Knows modules by the names in the plan only. Runs before parameters have memory (meta) or after.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard

from omniloom.config import ParallelConfig
from omniloom.parallel.mesh import Layout
from omniloom.sharding import ShardingPlan


def match_modules(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the modules that match, in the model's order. `*` stands for one dot-separated part."""
    wanted = tuple(patterns)
    return [name for name, _ in model.named_modules() if is_named(name, wanted)]


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name matches one of the patterns."""
    parts = name.split(".")
    wanted = (pattern.split(".") for pattern in patterns)
    return any(len(parts) == len(each) and all(map(fnmatch.fnmatchcase, parts, each)) for each in wanted)


def shard_parameters(
    model: nn.Module, layout: Layout, plan: ShardingPlan, parallel: ParallelConfig, compute_dtype: torch.dtype
) -> None:
    """Shard every parameter of `model` in place; afterwards all are DTensors. Collective over all ranks.

    Parameters are gathered in `compute_dtype`, gradients reduced in float32. Experts go to `layout.expert` and
    `layout.expert_fsdp`, towers to `layout.tower_fsdp`, everything else to `layout.fsdp`. Experts are gathered with
    their block: a hook within it would break a compiled one. Roots that the model was built without are passed over,
    and a decoder that is only a rank's stages, each of which is a root (`shard_root`).
    """
    # nothing to gather, cast or offload: parameters stay plain, which saves a twentieth of a step of small models
    if layout.world_size == 1 and compute_dtype == torch.float32 and not parallel.cpu_offload:
        return
    modules = dict(model.named_modules())
    experts = _experts_apart(model, layout, plan)
    wrap = partial(_wrap, layout=layout, parallel=parallel, compute_dtype=compute_dtype, experts=experts)
    decoder = plan.roots[-1]
    for name in match_modules(model, plan.wide):
        wrap([modules[name]], layout.fsdp, compute_dtype=torch.float32)
    meshes = {**dict.fromkeys(plan.roots, layout.tower_fsdp), decoder: layout.fsdp}
    wrapped: dict[str, list[FSDPModule]] = {root: [] for root in plan.roots}
    for name in match_modules(model, plan.blocks):
        root = name.split(".")[0]
        wrapped[root].append(wrap([modules[name]], meshes[root]))
    for patterns in plan.groups:
        if names := match_modules(model, patterns):
            # what forward uses last, backward uses first: the head stays gathered between the two
            of_group = replace(parallel, reshard_after_forward=False) if patterns is plan.groups[-1] else parallel
            wrap([modules[name] for name in names], meshes[names[0].split(".")[0]], parallel=of_group)
    for root, blocks in wrapped.items():
        if root in modules and (layout.degrees.pipeline == 1 or root != decoder):
            shard_root(modules[root], blocks, meshes[root], layout, parallel, compute_dtype)
    loose = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not loose, f"no root of the sharding plan {plan.roots} holds {', '.join(loose[:5])}"


def shard_root(
    root: nn.Module,
    blocks: list[FSDPModule],
    mesh: DeviceMesh,
    layout: Layout,
    parallel: ParallelConfig,
    compute_dtype: torch.dtype,
) -> None:
    """Make a module that is called as a whole the root of its sharded `blocks`, and let each prefetch the next."""
    _wrap([root], mesh, layout=layout, parallel=parallel, compute_dtype=compute_dtype)
    _set_prefetch(blocks, parallel.prefetch)


def _experts_apart(model: nn.Module, layout: Layout, plan: ShardingPlan) -> frozenset[nn.Parameter]:
    """The parameters of experts, divided, where they are sharded over another mesh than what is around them."""
    if layout.expert is None and layout.tensor is None:
        return frozenset()
    modules = [model.get_submodule(name) for name in match_modules(model, plan.experts)]
    if layout.expert is not None:
        for experts in modules:
            _divide_experts(experts, layout.expert)
    return frozenset(parameter for experts in modules for parameter in experts.parameters())


def _divide_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each expert-parallel rank `E / expert` consecutive experts of every stacked parameter."""
    for key, parameter in list(experts.named_parameters(recurse=False)):
        experts.register_parameter(key, divide_parameter(parameter, mesh, Shard(0)))


def divide_parameter(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """This rank's part of a parameter, over the one axis of `mesh`, as `torch.chunk` divides it."""
    local = parameter.detach()
    if isinstance(placement, Shard):
        local = local.chunk(mesh.size(), dim=placement.dim)[mesh.get_local_rank()].contiguous()
    whole = DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _wrap(
    modules: list[nn.Module],
    mesh: DeviceMesh,
    *,
    layout: Layout,
    parallel: ParallelConfig,
    compute_dtype: torch.dtype,
    experts: frozenset[nn.Parameter] = frozenset(),
) -> FSDPModule:
    """One all-gather over `mesh` for all parameters of `modules` that no earlier call took, and one for `experts`."""
    has_experts = any(parameter in experts for module in modules for parameter in module.parameters())
    meshes = [mesh, *([layout.expert_fsdp] if has_experts else [])]
    # of one rank there are no groups, nor beside it; `resolve_degrees` has refused what divides no other mesh
    reshard = parallel.reshard_after_forward if min(map(_num_shards, meshes)) > 1 else True
    low = None if compute_dtype == torch.float32 else compute_dtype
    sharded = fully_shard(
        modules if len(modules) > 1 else modules[0],
        mesh=mesh,
        reshard_after_forward=reshard,
        shard_placement_fn=_Placements(_num_shards(mesh), experts, meshes[-1]),
        # inputs stay as they are: loss weights must not be rounded to bfloat16
        mp_policy=MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=layout.device.type != "cpu")
        if parallel.cpu_offload
        else OffloadPolicy(),
    )
    first = sharded[0] if isinstance(sharded, list) else sharded
    # of a lone rank they are not averaged anyway, and would be copied to be divided by 1
    if max(each.size() for each in meshes) > 1:
        first.set_gradient_divide_factor(1.0)
    first.set_force_sum_reduction_for_comms(True)
    return first


def _num_shards(mesh: DeviceMesh) -> int:
    return mesh.size(mesh.ndim - 1)


class _Placements:
    """How each parameter of a module is sharded: over the module's own mesh, or, one of `experts`, over `mesh`."""

    def __init__(self, num_shards: int, experts: frozenset[nn.Parameter], mesh: DeviceMesh) -> None:
        self.num_shards, self.experts, self.mesh = num_shards, experts, mesh

    @cached_property
    def on_mesh(self) -> Callable[[Shard], Any]:
        """Puts a placement onto `mesh`, which has one object for all parameters, as FSDP wants it."""
        # what `shard_placement_fn` may return has no public name, and PyTorch 2.11 lacks it
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult

        axes = HSDPMeshInfo(self.mesh, 1, 0) if self.mesh.ndim == 2 else FSDPMeshInfo(self.mesh, 0)
        return partial(ShardPlacementResult, mesh_info=axes)

    def __call__(self, parameter: nn.Parameter) -> Any:
        if parameter in self.experts:
            return self.on_mesh(_choose_placement(_num_shards(self.mesh), parameter))
        return _choose_placement(self.num_shards, parameter)


def _choose_placement(num_shards: int, parameter: nn.Parameter) -> Shard:
    def cuts(dim: int) -> int:
        if not isinstance(parameter, DTensor):
            return 1
        axes = enumerate(parameter.placements)
        return prod(parameter.device_mesh.size(axis) for axis, placement in axes if placement.is_shard(dim))

    return Shard(choose_dim(parameter.shape, [cuts(dim) for dim in range(parameter.ndim)], num_shards))


def choose_dim(shape: Sequence[int], cuts: Sequence[int], num_shards: int) -> int:
    """By which dim a parameter is sharded that other axes cut into so many parts along each of its dims.

    The first, or an inner one that divides: where ranks would be left with nothing, and where another axis divides the
    first, unless those are stacked experts that both axes divide evenly.
    """
    even = [dim for dim in range(1, len(shape)) if shape[dim] % (cuts[dim] * num_shards) == 0]
    is_uneven = shape[0] % (cuts[0] * num_shards) > 0
    is_cut_twice = cuts[0] > 1 and (is_uneven or len(shape) == 2)
    return even[0] if even and (is_cut_twice or (is_uneven and shape[0] < num_shards)) else 0


def _set_prefetch(blocks: list[FSDPModule], depth: int) -> None:
    """Gather the parameters of the next `depth` blocks while one computes, in both directions."""
    if depth == 0:
        return
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + depth])
        block.set_modules_to_backward_prefetch(blocks[max(index - depth, 0) : index][::-1])


def set_all_reduce(modules: Iterable[nn.Module], enabled: bool) -> None:
    """Under HSDP: whether the coming backward passes also sum over replicas, or leave that to a later one."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(enabled, recurse=False)
