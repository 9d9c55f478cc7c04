"""Tensor parallelism, always with sequence parallelism: the decoder's matrices over ranks that share its rows.

Between regions (attention, feed-forward, embedding, loss) each tensor rank holds rows of its own. Into a region all
rows are gathered, each rank computes with its parts of the matrices, and what comes out, a share of a sum, is summed up
and handed back to the owners of the rows. Source: Korthikanti et al. 2022 (arXiv 2205.05198).

One rule serves all gradients: each rank's backward is that of the sum of all ranks' losses to what it holds. So what
tensor ranks hold alike (norms, routers, some factors of adapters) has the sum of their gradients.

Knows modules by the names in a family's `TensorSharding`, and of linears the names of their parameters.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from omniloom.ops.cross_entropy import choose_chunk_tokens, linear_cross_entropy
from omniloom.ops.linear_map import LinearMap
from omniloom.ops.nf4 import BLOCK_BYTES, is_packed
from omniloom.parallel.collectives import gather_rows, sum_rows, swap_rows_for_columns
from omniloom.parallel.context import PrepareHeads, share_of_parts
from omniloom.parallel.expert import SumOverGroup
from omniloom.parallel.fsdp import divide_parameter, match_modules
from omniloom.sharding import ShardingPlan, TensorSharding
from omniloom.types import Segments

# by which dim parameters of a linear are divided; those that are not named are held whole
BY_OUTPUT = {"weight": 0, "bias": 0, "lora_b": 0, "magnitude": 0, "A_log": 0, "dt_bias": 0}
BY_INPUT = {"weight": 1, "lora_a": 1}


def check_tensor(plan: ShardingPlan, degree: int) -> list[str]:
    """What of a model does not divide over so many tensor ranks, each with the degrees that would do."""
    sharding = plan.tensor
    if sharding is None:
        return [f"parallel.tensor: {degree}, but this family's decoder is not divided; set it to 1"]
    faults = []
    if sharding.has_output_bias:
        faults.append(f"parallel.tensor: {degree}, but attention has a bias on its output; set it to 1")
    sizes = (("num_attention_heads", plan.num_attention_heads), *sharding.widths)
    allowed = [d for d in range(1, plan.num_attention_heads + 1) if all(size % d == 0 for _, size in sizes)]
    for name, size in sizes:
        if size % degree:
            faults.append(f"parallel.tensor: {name} {size} does not divide over {degree} ranks; choose from {allowed}")
    if sharding.vocab_size <= (degree - 1) * math.ceil(sharding.vocab_size / degree):
        faults.append(f"parallel.tensor: a vocabulary of {sharding.vocab_size} leaves nothing to the last of {degree}")
    return faults


def divide_tensors(model: nn.Module, mesh: DeviceMesh, plan: ShardingPlan) -> None:
    """Install tensor parallelism into the decoder, in place; its parameters become DTensors on `mesh`, one axis.

    Before parameters are sharded and after attention cores are wrapped.
    """
    sharding, group = plan.tensor, mesh.get_group()
    assert sharding is not None, "check_tensor was not asked"
    for name in match_modules(model, sharding.regions):
        _make_region(model.get_submodule(name), group)
    if plan.num_key_value_heads % mesh.size():
        for name in match_modules(model, plan.attention_cores):
            model.set_submodule(name, SelectHeads(model.get_submodule(name), group))
    _divide_vocabulary(model, sharding, group)
    _divide_parameters(model, mesh, plan, sharding)


def _make_region(region: nn.Module, group: dist.ProcessGroup) -> None:
    region.register_forward_pre_hook(lambda _, inputs: (gather_rows(inputs[0], group), *inputs[1:]))
    region.register_forward_hook(lambda _, inputs, rows: sum_rows(rows, group))


def _divide_vocabulary(model: nn.Module, sharding: TensorSharding, group: dist.ProcessGroup) -> None:
    size = sharding.vocab_size
    if match_modules(model, (sharding.embedding,)):
        model.set_submodule(
            sharding.embedding, VocabularyEmbedding(model.get_submodule(sharding.embedding), size, group)
        )
    if match_modules(model, (sharding.loss_head,)):
        chunk_tokens: Any = model.get_submodule(sharding.cross_entropy).chunk_tokens
        model.set_submodule(sharding.cross_entropy, VocabularyCrossEntropy(chunk_tokens, size, group))
        model.get_submodule(sharding.loss_head).register_forward_pre_hook(
            lambda _, inputs: (
                *(None if rows is None else gather_rows(rows, group) for rows in inputs[:3]),
                *inputs[3:],
            )
        )
        # called for logits only
        model.get_submodule(sharding.head).register_forward_hook(
            lambda _, inputs, logits: swap_rows_for_columns(logits, group, size)
        )


def divided_linears(plan: ShardingPlan, degree: int) -> list[tuple[tuple[str, ...], dict[str, int]]]:
    """Patterns of the linears that so many ranks divide, and by which dim what of their parameters."""
    sharding = plan.tensor
    assert sharding is not None, "check_tensor was not asked"
    key_values = () if plan.num_key_value_heads % degree else sharding.key_values
    by_output = (*sharding.outputs, *key_values, sharding.embedding, sharding.head)
    return [(by_output, BY_OUTPUT), (sharding.inputs, BY_INPUT)]


def _divide_parameters(model: nn.Module, mesh: DeviceMesh, plan: ShardingPlan, sharding: TensorSharding) -> None:
    linears = divided_linears(plan, mesh.size())
    dims = {name: keys for patterns, keys in linears for name in match_modules(model, patterns)}
    experts = match_modules(model, plan.experts)
    divided: dict[int, nn.Parameter] = {}  # a tied weight stays one
    for name, module in model.get_submodule(sharding.root).named_modules(prefix=sharding.root):
        own = dict(module.named_parameters(recurse=False))
        if not own or name in experts:
            continue
        if "magnitude" in own and dims.get(name) is BY_INPUT:
            module.whole_rows = SumOverGroup(mesh.get_group())  # of squares, for the norms of DoRA
        for key, parameter in own.items():
            if id(parameter) not in divided:
                dim = dims.get(name, {}).get(key)
                if dim == 1 and is_packed(parameter) and parameter.shape[1] // BLOCK_BYTES % mesh.size():
                    raise ValueError(
                        f"parallel.tensor: {name} has {parameter.shape[1] // BLOCK_BYTES} blocks in a row under "
                        f"model.quantize, which {mesh.size()} ranks do not divide; choose another degree"
                    )
                placement = Replicate() if dim is None else Shard(dim)
                divided[id(parameter)] = divide_parameter(parameter, mesh, placement)
            module.register_parameter(key, divided[id(parameter)])
        # as fully_shard changes the class of what it shards: names of parameters and modules stay as they are
        module.__class__ = _with_local_parameters(module.__class__)
    for pattern, widths in sharding.parted_outputs:
        for name in match_modules(model, (pattern,)):
            parted: Any = model.get_submodule(name)
            parted.parted_outputs = widths


class LocalParameters(nn.Module):
    """Put before a module's class: the module computes with this rank's parts of gathered parameters."""

    parted_outputs: tuple[int, ...] = ()  # of a module whose parameters are held whole: takes its share of each part

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        # of one axis, the tensor ranks': sharded parameters have another and are none of the module's business
        if not isinstance(value, DTensor) or value.device_mesh.ndim > 1:
            return value
        local = value.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in value.placements])
        if self.parted_outputs and name in BY_OUTPUT:
            mesh = value.device_mesh
            local = share_of_parts(local, self.parted_outputs, mesh.get_local_rank(), mesh.size())
        return local


@cache
def _with_local_parameters(of: type[nn.Module]) -> type[nn.Module]:
    """One for all layers, each of which would be compiled for itself otherwise."""
    return type(f"Local{of.__name__}", (LocalParameters, of), {})


class SelectHeads(nn.Module):
    """Wraps an attention core: of key-value heads that all ranks make, takes those that this one's query heads meet."""

    def __init__(self, core: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.core = core
        self.group = group

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, norms: PrepareHeads | None = None) -> Tensor:
        """q [T, H / n, D], k and v [T, Hkv, D] -> [T, H / n, D]."""
        num_heads, degree = q.shape[1], self.group.size()
        share = num_heads * degree // k.shape[1]  # query heads that meet one key-value head
        first, step = self.group.rank() * num_heads, math.gcd(share, num_heads)
        met = [head // share for head in range(first, first + num_heads, step)]
        k, v = (torch.stack([x[:, head] for head in met], dim=1) for x in (k, v))
        out: Tensor = self.core(q, k, v, segments, norms)
        return out


class VocabularyEmbedding(nn.Module):
    """An embedding of which each tensor rank holds a part of the vocabulary."""

    def __init__(self, embedding: nn.Module, vocab_size: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight: Tensor = embedding.get_parameter("weight")
        self.group = group
        self.first = group.rank() * math.ceil(vocab_size / group.size())

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [t] of this rank's rows -> [t, C]."""
        weight = self.weight  # this rank's part
        place = gather_rows(input_ids, self.group) - self.first
        elsewhere = (place < 0) | (place >= weight.shape[0])
        rows = F.embedding(place.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[:, None], 0.0)
        return sum_rows(rows, self.group)


class VocabularyCrossEntropy(nn.Module):
    """In place of the loss proper: each rank has all rows and the logits of its part of the vocabulary."""

    def __init__(self, chunk_tokens: int | None, vocab_size: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens
        self.part = math.ceil(vocab_size / group.size())
        self.group = group

    def forward(self, hidden: Tensor, head: LinearMap, labels: Tensor, weights: Tensor) -> Tensor:
        """As the loss proper, of all tensor ranks' rows and this rank's part of the head; gives an even share of it."""
        # as many chunks on every rank, whose parts may differ
        chunk = self.chunk_tokens or choose_chunk_tokens(self.part, hidden.device.type)
        labels = labels - self.group.rank() * self.part
        total = linear_cross_entropy(hidden, head, labels, weights, chunk_tokens=chunk, join_vocabulary=self._join)
        # ranks' shares add up to the total, and so do their gradients, each being that of the total to what is here
        return total + (total / self.group.size() - total).detach()

    def _join(self, normaliser: Tensor, label_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row [n, 1] over a part of the vocabulary -> over all of it. Collective: one all-gather."""
        both = gather_rows(torch.cat((normaliser, label_logits), dim=1)[None], self.group)  # [ranks, n, 2]
        return both[..., :1].logsumexp(dim=0), both[..., 1:].sum(dim=0)
