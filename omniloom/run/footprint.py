"""What a run takes of each device's memory, known before any device is at hand.

Weights, gradients and optimizer states are counted exactly, from the shapes of a model on meta and the rules of its
layout. What layers keep for backward is counted by running one layer of each kind, and the towers, on meta under
autograd's hooks: whatever a layer is made of, the count is of the real thing. The rest is estimated: what is gathered,
reduced and computed with at the fullest moment.

A pack is taken to hold four samples of one length, half of it media, of the kind that takes the most (pictures or
sound), half with a loss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from omniloom.config import Config, MemoryConfig
from omniloom.dims import AudioTowerConfig, VisionTowerConfig
from omniloom.models.decoder import Decoder
from omniloom.ops.cross_entropy import choose_chunk_tokens
from omniloom.ops.nf4 import BLOCK, BLOCK_BYTES
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.fsdp import is_named
from omniloom.parallel.optimizer import state_bytes
from omniloom.parallel.pipeline import layer_owners
from omniloom.parallel.recompute import Recompute, recompute_layers
from omniloom.parallel.shares import local_shape, stages_of
from omniloom.parallel.staging import list_tensors, map_tensors
from omniloom.processors.tower_batches import audio_batch, vision_batch
from omniloom.run.opening import Workshop, apply_policy
from omniloom.sharding import ShardingPlan
from omniloom.training.optimizer import is_orthogonal
from omniloom.types import AudioBatch, AudioClip, Segments, VisionBatch, VisionClip

COUNTED_TOKENS = 2048  # of a layer on meta: what is kept grows in proportion
COUNTED_DTYPE = torch.bfloat16  # the only one whose grouped products run on meta
MOVING_LAYERS = 2  # whose activations are on the device while they are copied to the host
COUNTED_SIDE = 64  # patches of a picture's side
COUNTED_FRAMES = 1600  # of mel features: sixteen seconds
NUM_SAMPLES = 4  # of a pack
REDUCED_BYTES = 4  # of an element of a gradient on its way: float32


@dataclass(frozen=True, kw_only=True, eq=False)  # known by identity, which costs a cache nothing
class Weight:
    """A parameter, or the same one of several layers."""

    name: str  # of the first
    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool
    orthogonal: bool  # stepped by Muon
    layers: tuple[int, ...]  # which have one each; empty for what is in none

    def numbers(self, elements: float) -> float:
        """How many numbers so many of its elements hold, of which packed weights have more."""
        return elements * BLOCK / BLOCK_BYTES if self.dtype == torch.uint8 else elements


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that autograd keeps of one layer for a token, weights and what all layers share left out."""

    outside: float  # of tensor-parallel regions
    inside: float
    inputs: float  # of regions: rows that are gathered, where tensor ranks divide them
    shared: float  # of these, what is kept outside as well, and so once where nothing is divided
    row: float  # of the layer's input

    def bytes_of(self, tokens: float, tensor: int) -> float:
        """Of so many tokens for all tensor ranks together, on one of them."""
        if tensor == 1:
            return tokens * (self.outside + self.inside + self.inputs - self.shared)
        return tokens * (self.outside / tensor + self.inside / tensor + self.inputs)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one device at the fullest moment, that of the fullest rank."""

    parameters: float
    gradients: float
    states: float
    activations: float  # what layers keep for backward, towers included
    working: float  # what is gathered, reduced and computed with

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.states + self.activations + self.working


class ModelSizes:
    """A workshop's model as numbers, for any number of layouts."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop, self.config = workshop, workshop.config
        self.plan: ShardingPlan = workshop.spec.sharding(workshop.family)
        with torch.device("meta"):
            self.model = workshop.build()
        policies = apply_policy(workshop, self.model)
        muon, groups = self.config.train.optimizer == "muon", dict[tuple[Any, ...], list[tuple[str, int | None]]]()
        for name, parameter in self.model.named_parameters():
            layer = layer_of(name, self.plan)
            key = (
                name if layer is None else name.replace(f".{layer}.", ".*.", 1),
                *(tuple(parameter.shape), parameter.dtype, parameter.requires_grad),
                muon and is_orthogonal(name, parameter.ndim, policies[name]),
            )
            groups.setdefault(key, []).append((name, layer))
        self.weights = tuple(
            Weight(
                name=members[0][0],
                shape=shape,
                dtype=dtype,
                trains=trains,
                orthogonal=orthogonal,
                layers=tuple(layer for _, layer in members if layer is not None),
            )
            for (_, shape, dtype, trains, orthogonal), members in groups.items()
        )
        self.local = lru_cache(maxsize=None)(self._local)
        self._owners = lru_cache(maxsize=None)(partial(layer_owners, self.plan))
        self._fixed = lru_cache(maxsize=None)(self._sum_fixed)
        self._working = lru_cache(maxsize=None)(partial(_working_bytes, self))
        self.tower_keeps = lru_cache(maxsize=None)(self._tower_keeps)

    def num_parameters(self, *, trains: bool = False) -> int:
        """Of the whole model, or what of it trains."""
        chosen = (weight for weight in self.weights if weight.trains or not trains)
        return sum(max(len(weight.layers), 1) * round(weight.numbers(math.prod(weight.shape))) for weight in chosen)

    @cached_property
    def kept(self) -> list[Kept]:
        """Of each layer of the decoder."""
        text, found = self.model.text, dict[object, Kept]()
        counted = []
        for layer in text.layers.values():
            layer.to(COUNTED_DTYPE)
            kind = tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())
            if kind not in found:
                per_token = count_layer(text, layer, self.plan)
                row = float(self.plan.hidden_size * self.workshop.compute_dtype.itemsize)
                found[kind] = Kept(row=row, **{where: self.wider * size for where, size in per_token.items()})
            counted.append(found[kind])
        return counted

    def kinds(self, layers: Iterable[int], memory: MemoryConfig) -> Counter[tuple[int, bool]]:
        """How many of these layers are of one kind: the first such layer, and whether it is recomputed."""
        how = self.recompute("text", memory)
        return Counter(
            (self.alike[layer], how != "none" and not (isinstance(how, int) and layer % how)) for layer in layers
        )

    @cached_property
    def alike(self) -> list[int]:
        """Of each layer of the decoder, the first that keeps and costs the same."""
        first = dict[object, int]()
        each = enumerate(zip(self.kept, self.plan.layer_costs, self.plan.routed_layers, strict=True))
        return [first.setdefault(kind, layer) for layer, kind in each]

    def _tower_keeps(self, name: str, how: Recompute, offloads: bool) -> float:
        """Bytes that autograd keeps of a tower that trains for a token of its media, on the device."""
        vision, audio = self.workshop.family.vision, self.workshop.family.audio
        kept = _keeps_of_tower(self, name, how)
        if name == "vision":
            depth, rows, width, heads = vision.depth, self.plan.patches_per_row, vision.hidden_size, vision.num_heads
        else:
            depth, rows, width, heads = audio.encoder_layers, audio.pool, audio.d_model, audio.encoder_attention_heads
        rows *= depth
        of_rows = rows * width * COUNTED_DTYPE.itemsize
        if offloads:  # the layers' inputs too
            stays = _keeps_of_tower(self, name, "full") - of_rows
            kept = stays + (kept - stays) * min(MOVING_LAYERS / depth, 1.0)
        if how == "selective":  # keeps what attention returns, on the device and out of autograd's sight
            kept += of_rows + 4.0 * rows * heads
        return self.wider * kept

    @property
    def wider(self) -> float:
        """How much wider than what was counted the dtype of compute is."""
        return self.workshop.compute_dtype.itemsize / COUNTED_DTYPE.itemsize

    @cached_property
    def trained_towers(self) -> tuple[str, ...]:
        trained = {weight.name.split(".")[0] for weight in self.weights if weight.trains}
        return tuple(name for name in ("vision", "audio") if name in trained)

    # ------------------------------------------------------------------------------------ by layout

    def _local(self, weight: Weight, degrees: Degrees, stage: int) -> tuple[tuple[int, ...], int]:
        """What the fullest rank of a stage holds of a weight in one layer, and in how many layers."""
        first = stage * degrees.shard * degrees.sharers
        count = max(len(weight.layers), 1)
        if weight.layers and weight.name.startswith(f"{self.plan.roots[-1]}."):
            count = sum(self.owners(degrees)[layer] == stage for layer in weight.layers)
        elif stage not in stages_of(weight.name, self.plan, self.owners(degrees)):
            count = 0
        return local_shape(weight.name, weight.shape, self.plan, degrees, first), count

    def footprint(self, degrees: Degrees, memory: MemoryConfig | None = None) -> Footprint:
        """Of the fullest rank under these degrees; `memory` in place of the config's."""
        memory = self.config.memory if memory is None else memory
        stages = [self._of_stage(degrees, memory, stage) for stage in range(degrees.pipeline)]
        return max(stages, key=lambda stage: stage.total)

    def owners(self, degrees: Degrees) -> tuple[int, ...]:
        """The pipeline rank of each layer of the decoder."""
        return self._owners(replace(degrees, replicate=1, shard=1, context=1, ring=1, tensor=1, expert=1))

    def _sum_fixed(self, degrees: Degrees, stage: int) -> tuple[float, float, float, float]:
        """Bytes of weights, gradients and states on the fullest rank of a stage, and of the largest weight's states."""
        parameters = gradients = states = largest_states = 0.0
        train = self.config.train
        for weight in self.weights:
            shape, count = self.local(weight, degrees, stage)
            num_bytes = count * math.prod(shape) * weight.dtype.itemsize
            parameters += num_bytes
            if weight.trains and count:
                gradients += num_bytes
                of_one = state_bytes(shape, weight.dtype, train.optimizer_states, orthogonal=weight.orthogonal)
                states += count * of_one
                largest_states = max(largest_states, of_one)
        return parameters, gradients, states, largest_states

    def _of_stage(self, degrees: Degrees, memory: MemoryConfig, stage: int) -> Footprint:
        parameters, gradients, states, largest_states = self._fixed(degrees, stage)
        working = (
            self._working(degrees, stage) + self.loss_bytes(degrees, memory, stage) + _media_bytes(self, degrees, stage)
        )
        if self.config.parallel.cpu_offload:
            parameters = gradients = states = 0.0
        elif memory.offload_optimizer:
            states = 2 * largest_states
        kept, of_layer = self._activations(degrees, memory, stage)
        return Footprint(
            parameters=parameters, gradients=gradients, states=states, activations=kept, working=working + of_layer
        )

    def _activations(self, degrees: Degrees, memory: MemoryConfig, stage: int) -> tuple[float, float]:
        """What waits for backward on a rank of a stage, and what one layer works with."""
        media = self.config.data.pack_tokens / 2 / (degrees.sharers * degrees.pipeline) * self.at_once(degrees)
        of_towers = [self.tower_bytes(name, media, degrees, memory) for name in self.trained_towers]
        here = [layer for layer, owner in enumerate(self.owners(degrees)) if owner == stage]
        tokens = self.config.data.pack_tokens / degrees.context
        of_layer = max(self.layer_bytes(layer, tokens, degrees) for layer in here)
        return self.layers_keep(degrees, memory, stage) + max(of_towers, default=0.0), of_layer

    def at_once(self, degrees: Degrees) -> int:
        """Packs whose media are encoded in one call."""
        return packs_of_rank(self.config, degrees) if degrees.pipeline > 1 else 1

    def layers_keep(self, degrees: Degrees, memory: MemoryConfig, stage: int) -> float:
        """What waits for backward of the decoder's layers on a rank of a stage, of all packs that are under way."""
        tokens = self.config.data.pack_tokens / degrees.context
        here = [layer for layer, owner in enumerate(self.owners(degrees)) if owner == stage]
        kept = moving = 0.0
        for (layer, again), count in self.kinds(here, memory).items():
            whole = None if again else self.layer_bytes(layer, tokens, degrees)
            stays, moves = self._waiting(layer, tokens, degrees, memory, whole)
            kept += count * (stays if memory.offload_activations else stays + moves)
            moving = max(moving, min(MOVING_LAYERS, len(here)) * moves)
        if stage < degrees.pipeline - 1:  # the rows that were handed on
            kept += degrees.stages_per_rank * tokens / degrees.tensor * self.kept[0].row
        kept *= min(packs_of_rank(self.config, degrees), packs_in_flight(degrees, stage))
        return kept + moving * memory.offload_activations

    def tower_bytes(self, name: str, rows: float, degrees: Degrees, memory: MemoryConfig) -> float:
        """What waits for backward of a tower that makes so many rows in a call, 0 where it does not train."""
        if name not in self.trained_towers:
            return 0.0
        how = self.recompute(name, memory, degrees.pipeline)
        return rows * self.tower_keeps(name, how, memory.offload_activations)

    def layer_bytes(self, layer: int, tokens: float, degrees: Degrees) -> float:
        """What autograd keeps of a layer that is not recomputed."""
        kept = self.kept[layer].bytes_of(tokens, degrees.tensor)
        if degrees.context > 1:
            kept += tokens / degrees.tensor * self._exchanged(layer, degrees)
        if degrees.expert > 1 and self.plan.routed_layers[layer]:
            # rows as they arrive, in place of the tokens that copies are taken from
            copies = self.workshop.family.text.num_experts_per_tok - 1
            kept += tokens / degrees.tensor * copies * self.kept[layer].row
        return kept

    def _exchanged(self, layer: int, degrees: Degrees) -> float:
        """Bytes of a token that attention keeps besides where its tokens are divided: what came of it before its heads
        went home, queries before their norm, keys and values that are repeated for heads that do not divide."""
        text = self.workshop.family.text
        if layer in text.delta_layers:
            return 0.0
        keys = max(text.num_key_value_heads // degrees.tensor, 1)
        repeats = math.lcm(keys, degrees.ulysses) // keys - 1
        heads = (
            text.num_attention_heads * ((degrees.ulysses > 1) + text.qk_norm) + 2 * repeats * text.num_key_value_heads
        )
        return float(heads * text.head_dim * self.workshop.compute_dtype.itemsize)

    def _waiting(
        self, layer: int, tokens: float, degrees: Degrees, memory: MemoryConfig, whole: float | None
    ) -> tuple[float, float]:
        """What waits of a layer for its backward, `whole` or what is not recomputed: on the device alone, and what may
        wait on the host."""
        if whole is not None:
            return 0.0, whole
        text, own_tokens, routed = self.workshop.family.text, tokens / degrees.tensor, self.plan.routed_layers[layer]
        saved = 0.0  # per token
        if self.recompute("text", memory) == "selective":
            element = self.workshop.compute_dtype.itemsize
            saved = text.num_attention_heads * (text.head_dim * element + 4)
            if routed:
                arrived = text.hidden_size * (degrees.expert > 1)
                saved += text.num_experts_per_tok * element * (2 * text.moe_intermediate_size + arrived)
        moved = self.kept[layer].row + (8.0 * text.num_experts_per_tok if routed else 0.0)
        return own_tokens * saved, own_tokens * moved

    def recompute(self, root: str, memory: MemoryConfig, pipeline: int = 1) -> Recompute:
        rule = self.config.policy.get(root)
        own = None if rule is None else rule.recompute
        usual: Recompute = memory.recompute if root == "text" or pipeline == 1 else "full"
        return usual if own is None else "full" if own else "none"

    def loss_bytes(self, degrees: Degrees, memory: MemoryConfig, stage: int) -> float:
        """Logits of a chunk, the rows that have a loss, and the head's gradient in float32."""
        if stage < degrees.pipeline - 1:
            return 0.0
        text, element = self.workshop.family.text, self.workshop.compute_dtype.itemsize
        vocab = math.ceil(text.vocab_size / degrees.tensor)
        own, answer = self.config.data.pack_tokens / degrees.sharers, self.config.data.pack_tokens / NUM_SAMPLES / 2
        rows = degrees.tensor * max(own / 2, min(own, answer))  # of a rank whose tokens lie in an answer, of each alike
        chunk = memory.loss_chunk_tokens
        chunk = choose_chunk_tokens(vocab, "cuda") if chunk == "auto" else chunk
        of_head = [weight for weight in self.weights if weight.name.startswith("text.loss_head.head.")] or [
            weight for weight in self.weights if weight.name.startswith("text.embed.")
        ]
        trains = any(weight.trains for weight in of_head)
        return (
            min(chunk, rows) * vocab * (4.0 + element)
            + 2 * rows * text.hidden_size * element
            + trains * vocab * text.hidden_size * 4.0
        )


def _working_bytes(sizes: ModelSizes, degrees: Degrees, stage: int) -> float:
    """Gathered weights of the blocks at work and on their way, and the gradients that are being reduced."""
    element, ahead = sizes.workshop.compute_dtype.itemsize, 1 + sizes.config.parallel.prefetch
    blocks, trained = dict[str, float](), dict[str, float]()
    inner, total = degrees.shard * degrees.sharers, 0.0
    for weight in sizes.weights:
        shape, count = sizes.local(weight, degrees, stage)
        if not count:
            continue
        root = weight.name.split(".")[0]
        routed = is_named(weight.name.rpartition(".")[0], sizes.plan.experts)
        shards = inner // (degrees.expert if routed else degrees.tensor)
        if root != sizes.plan.roots[-1]:
            shards = inner * degrees.pipeline
        size = weight.numbers(min(math.prod(shape) * shards, math.prod(weight.shape)))
        block = ".".join(weight.name.split(".")[: 3 if weight.layers else 2])
        blocks[block] = blocks.get(block, 0.0) + size * element
        trained[block] = trained.get(block, 0.0) + weight.trains * size * (element + REDUCED_BYTES)
        total += count * size * element
    gathered = ahead * max(blocks.values()) if sizes.config.parallel.reshard_after_forward is not False else total
    return gathered + max(trained.values())


def _media_bytes(sizes: ModelSizes, degrees: Degrees, stage: int) -> float:
    """Pixels of what is encoded here, rows of media on their way to the tokens here, and their gradients."""
    vision, rows = sizes.workshop.family.vision, sizes.config.data.pack_tokens / 2 / degrees.sharers
    if sizes.model.vision is None:
        return 0.0
    readers = [0, *sizes.owners(degrees)][: 1 + len(vision.deepstack_visual_indexes)]
    of_row = readers.count(stage) * (2 if sizes.trained_towers else 1) * sizes.kept[0].row
    if degrees.sharers * degrees.pipeline > 1:  # as they leave the tower, and as they arrive
        of_row += len(readers) / degrees.pipeline * sizes.kept[0].row
    return sizes.at_once(degrees) * rows * (of_row + sizes.plan.patches_per_row * vision.patch_dim / degrees.pipeline)


# ---------------------------------------------------------------------------------------- counting


def _keeps_of_tower(sizes: ModelSizes, name: str, how: Recompute) -> float:
    tower: Any = getattr(sizes.model, name)
    usual = tower.call
    recompute_layers(tower, how, routes=False)
    if name == "vision":
        kept = count_vision(tower, sizes.workshop.family.vision, sizes.plan.patches_per_row)
    else:
        kept = count_audio(tower, sizes.workshop.family.audio)
    tower.call = usual
    return kept


def count_layer(text: Decoder, layer: nn.Module, plan: ShardingPlan) -> dict[str, float]:
    """As `count_kept`, of a layer of the decoder, for a token, in COUNTED_DTYPE."""
    once, twice = (_count_rows(text, layer, plan, times * COUNTED_TOKENS) for times in (1, 2))
    # not of tokens, and left out: what is made of the weights, as of adapters on experts
    return {where: (num_bytes - once[where]) / COUNTED_TOKENS for where, num_bytes in twice.items()}


def _count_rows(text: Decoder, layer: Any, plan: ShardingPlan, tokens: int) -> dict[str, float]:
    with torch.device("meta"):
        hidden = torch.empty(tokens, plan.hidden_size, dtype=COUNTED_DTYPE, requires_grad=True)
        rotary = text.rotary(torch.empty(3, tokens, dtype=torch.int64))
        bounds, padding = torch.empty(2, dtype=torch.int32), torch.empty(tokens, dtype=torch.bool)
    segments = Segments(cu_seqlens=bounds, bounds=(0, tokens), max_length=tokens)
    prefix = plan.blocks[-1].replace("*", "0")
    regions = [] if plan.tensor is None else [
        module for name, module in layer.named_modules(prefix=prefix)
        if is_named(name, [pattern.replace("*", "0", 1) for pattern in plan.tensor.regions])
    ]  # fmt: skip
    return count_kept(layer, regions, lambda: layer(hidden, rotary, segments, padding, None, *layer.ahead()),
                      apart=[*list_tensors(rotary), bounds, padding])  # fmt: skip


def count_vision(tower: nn.Module, dims: VisionTowerConfig, patches_per_row: int) -> float:
    """Bytes that autograd keeps of a tower for one of its rows, in COUNTED_DTYPE."""
    side, rows = COUNTED_SIDE, COUNTED_SIDE**2 // patches_per_row
    patches = torch.empty(side**2, dims.patch_dim)
    picture = VisionClip(patches=patches, grid_thw=(1, side, side), token_index=torch.arange(rows))
    return _count_tower(tower, vision_batch([picture], dims)) / rows


def count_audio(tower: nn.Module, dims: AudioTowerConfig) -> float:
    """As `count_vision`, of sound."""
    rows = dims.num_tokens(COUNTED_FRAMES)
    features = torch.empty(dims.num_mel_bins, COUNTED_FRAMES)
    return _count_tower(tower, audio_batch([AudioClip(features=features, token_index=torch.arange(rows))], dims)) / rows


def _count_tower(tower: nn.Module, batch: VisionBatch | AudioBatch) -> float:
    on_meta = map_tensors(batch, lambda tensor: tensor.to("meta"))
    tower.to(COUNTED_DTYPE)
    return sum(count_kept(tower, (), partial(tower, on_meta), apart=list_tensors(on_meta)).values())


def count_kept(
    module: nn.Module, regions: Iterable[nn.Module], call: Callable[[], object], *, apart: Iterable[Tensor]
) -> dict[str, float]:
    """Bytes of unique storages that autograd keeps of a call, weights of `module` and `apart` left out.

    By where they are first kept: `outside` of regions, `inside`, among their `inputs`; `shared` are inputs that are
    kept outside too.
    """
    left_out = {StorageWeakRef(tensor.untyped_storage()) for tensor in (*module.parameters(), *apart)}
    found: dict[str, dict[StorageWeakRef, float]] = {"outside": {}, "inside": {}, "inputs": {}}
    within, entered, alive = [False], set[StorageWeakRef](), list[object]()

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        within[0] = True
        entered.add(StorageWeakRef(inputs[0].untyped_storage()))

    def leave(*_: object) -> None:
        within[0] = False

    def keep(tensor: Tensor) -> Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        alive.append(tensor)  # so that no storage's place is given to another
        if storage not in left_out:
            where = "outside" if not within[0] else "inputs" if storage in entered else "inside"
            found[where][storage] = float(tensor.untyped_storage().nbytes())
        return tensor

    hooks = [hook for region in regions
             for hook in (region.register_forward_pre_hook(enter), region.register_forward_hook(leave))]  # fmt: skip
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive.append(call())
    finally:
        for hook in hooks:
            hook.remove()
    shared = sum(size for storage, size in found["inputs"].items() if storage in found["outside"])
    return {"shared": shared, **{where: sum(sizes.values()) for where, sizes in found.items()}}


def layer_of(name: str, plan: ShardingPlan) -> int | None:
    """The layer of tower or decoder that a parameter is in."""
    parts = name.split(".")
    return int(parts[2]) if is_named(".".join(parts[:3]), plan.blocks) else None


def packs_of_rank(config: Config, degrees: Degrees) -> int:
    """Packs of a step on each data rank."""
    return -(-config.train.packs_per_step // (degrees.replicate * degrees.shard))


def packs_in_flight(degrees: Degrees, stage: int) -> float:
    """Packs whose activations a rank of a stage keeps at once, as if it kept all its layers of each.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.
    """
    ahead = degrees.pipeline - stage
    if degrees.stages_per_rank == 1:
        return ahead
    return ((degrees.stages_per_rank - 1) * degrees.pipeline + 2 * (ahead - 1) + 1) / degrees.stages_per_rank
