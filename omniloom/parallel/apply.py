"""Installs a layout into a model: replaces parameter-free submodules, sets up recompute, shards parameters.

The only place that knows in which order these go. Everything it needs to know of a family is in its `ShardingPlan`;
no module class is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import gcd
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from omniloom.config import MemoryConfig, ParallelConfig
from omniloom.ops.torch_operators import compile_module
from omniloom.parallel.context import GatherRows, UlyssesCore, UlyssesRecurrence, check_heads
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.device import HostCopies
from omniloom.parallel.expert import ExpertDispatch, LocalWeights, SumOverGroup
from omniloom.parallel.fsdp import match_modules, shard_parameters
from omniloom.parallel.mesh import Layout
from omniloom.parallel.pipeline import cut_decoder, layer_owners, split_layers
from omniloom.parallel.recompute import OffloadingCall, recompute_layers
from omniloom.parallel.ring import RingCore
from omniloom.parallel.tensor import check_tensor, divide_tensors
from omniloom.sharding import ShardingPlan


def check_plan(plan: ShardingPlan, degrees: Degrees) -> None:
    """Raises: ValueError listing every degree that this model cannot be divided by, with the ones it can."""
    faults = check_tensor(plan, degrees.tensor) if degrees.tensor > 1 else []
    if plan.num_talker_heads:
        faults += [
            f"parallel.{name}: {getattr(degrees, name)}, but a talker is not divided so yet; set it to 1"
            for name in ("tensor", "pipeline")
            if getattr(degrees, name) > 1
        ]
    if degrees.context > 1 and not faults:
        for heads in {plan.num_attention_heads, plan.num_recurrent_heads, plan.num_talker_heads} - {0}:
            try:
                check_heads(heads // degrees.tensor, 1, degrees.ulysses)  # those of keys and values are repeated
            except ValueError as error:
                faults.append(str(error))
        if plan.recurrences and degrees.context > degrees.ulysses:
            faults.append(
                "parallel.context.ring: layers with a recurrence hand a state from token to token, which no ring "
                "passes on; set it to 1, and divide the heads by parallel.context.ulysses"
            )
    if degrees.expert > 1 and not plan.num_experts:
        faults.append(f"parallel.expert: {degrees.expert}, but this model has no experts; set it to 1")
    # those of a talker, where one is built, are divided over the same ranks
    elif (common := gcd(plan.num_experts, plan.num_talker_experts)) % degrees.expert:
        allowed = [d for d in range(1, common + 1) if common % d == 0]
        found = " and ".join(str(count) for count in (plan.num_experts, plan.num_talker_experts) if count)
        faults.append(
            f"parallel.expert: {found} experts do not divide over {degrees.expert} ranks; choose from {allowed}"
        )
    if degrees.pipeline > 1:
        try:
            split_layers(plan, degrees)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))


def apply_parallelism(
    model: nn.Module,
    layout: Layout,
    plan: ShardingPlan,
    *,
    parallel: ParallelConfig,
    memory: MemoryConfig,
    compute_dtype: torch.dtype,
    recompute: Mapping[str, bool] | None = None,
) -> None:
    """Make `model` run in `layout`, in place. Collective over all ranks.

    The model may be on meta (afterwards `materialize` gives it memory) or hold values, equal on all ranks. Freeze
    parameters before this call. `recompute` overrides `memory.recompute` for a root (policy table).
    Raises: ValueError for degrees that do not divide.
    """
    check_plan(plan, layout.degrees)
    if layout.ring_group is not None and layout.device.type == "npu":
        raise ValueError(
            "parallel.context.ring: no attention kernel of NPUs gives what a ring joins; use ulysses alone"
        )
    if layout.degrees.pipeline > 1:
        text: Any = model.get_submodule(plan.roots[-1])
        cut_decoder(text, layer_owners(plan, layout.degrees), layout)
    _divide_tokens(model, layout, plan)
    if layout.tensor is not None:
        divide_tensors(model, layout.tensor, plan)
    if layout.expert is not None:
        _divide_experts(model, layout.expert.get_group(), plan)
    _keep_less(model, layout, plan, memory, recompute or {})
    if memory.compile is True:
        compile_blocks(model, plan.blocks)
    shard_parameters(model, layout, plan, parallel, compute_dtype)


def _divide_tokens(model: nn.Module, layout: Layout, plan: ShardingPlan) -> None:
    """Attention and recurrences over rows of several ranks, and router counts summed over them."""
    for name in match_modules(model, plan.attention_cores):
        core: Any = model.get_submodule(name)
        if layout.ring_group is not None:
            core = RingCore(core.kernel, layout.ring_group)
        if layout.ulysses_group is not None:
            core = UlyssesCore(core, layout.ulysses_group)
        model.set_submodule(name, core)
    if layout.ulysses_group is not None:
        for name in match_modules(model, plan.recurrences):
            model.set_submodule(name, UlyssesRecurrence(model.get_submodule(name), layout.ulysses_group))
    if layout.sharers_group is not None:
        for name in match_modules(model, plan.router_counts):
            model.set_submodule(name, SumOverGroup(layout.sharers_group))
        for name in match_modules(model, plan.row_gathers):
            model.set_submodule(name, GatherRows(layout.sharers_group))


def _divide_experts(model: nn.Module, group: ProcessGroup, plan: ShardingPlan) -> None:
    for name in match_modules(model, plan.dispatches):
        local: Any = model.get_submodule(name)
        model.set_submodule(name, ExpertDispatch(local.num_experts, group))
    for name in match_modules(model, plan.expert_products):
        model.set_submodule(name, LocalWeights(model.get_submodule(name)))


def _keep_less(
    model: nn.Module, layout: Layout, plan: ShardingPlan, memory: MemoryConfig, recompute: Mapping[str, bool]
) -> None:
    """Layers that compute again in backward, or keep what they need for it on the host."""
    decoder = plan.roots[-1]
    copies: HostCopies | None = None
    for name in match_modules(model, plan.layer_calls):
        root = name.split(".")[0]
        # under a pipeline a tower is called once for all packs of a step
        usual = memory.recompute if root == decoder or layout.degrees.pipeline == 1 else "full"
        how = {None: usual, True: "full", False: "none"}[recompute.get(root)]
        recompute_layers(
            model.get_submodule(name.rpartition(".")[0]),
            how,
            routes=any(e.startswith(f"{root}.") for e in plan.experts),
        )
        if memory.offload_activations and layout.device.type != "cpu":
            copies = copies or HostCopies(layout.device)
            model.set_submodule(name, OffloadingCall(model.get_submodule(name), copies))


def compile_blocks(model: nn.Module, blocks: Sequence[str], backend: str | Callable[..., Any] = "inductor") -> None:
    """Have each block that these patterns name compiled when it is next called."""
    for name in match_modules(model, blocks):
        compile_module(model.get_submodule(name), backend)


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give a meta model memory, of this rank's shards only; values are undefined until they are loaded."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    model.to_empty(device=device)
    for first, *others in names.values():  # tied weights came out as tensors of their own
        for name in others:
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, model.get_parameter(first))
