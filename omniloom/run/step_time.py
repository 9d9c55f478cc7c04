"""How long a step takes under a layout, estimated from FLOPs, bytes and the speed of links, for ranking layouts.

A roofline: products, attention and passes over memory each at a stated share of what the machine can do, collectives of
FSDP beside the computing, those of token, tensor and expert parallelism between it. The shares are those of
`benchmarks/op_stream.py`, against whose counts the whole is tested; no accelerator has confirmed them yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from omniloom.config import MemoryConfig
from omniloom.families.cost import audio_flops, layer_flops, vision_flops
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.fsdp import is_named
from omniloom.run.footprint import COUNTED_FRAMES, NUM_SAMPLES, ModelSizes, packs_of_rank

PICTURE = (1, 64, 64)  # patches of a picture of the pack that is assumed


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices and what joins them: an H200 in machines of eight, each device with a network card of its own."""

    devices: int = 8  # of a machine
    peak: float = 989e12  # FLOP/s of dense products in bfloat16. Source: NVIDIA's data sheet
    bandwidth: float = 3.6e12  # bytes/s of memory, three quarters of what is published
    link: float = 3.6e11  # bytes/s out of a device to others of its machine, four fifths of what is published
    network: float = 4.0e10  # bytes/s out of a device to other machines: four fifths of 400 Gb/s
    host: float = 5.0e10  # bytes/s to and from the host's memory, each way
    product: float = 0.70  # share of the peak
    grouped: float = 0.50
    attention: float = 0.36
    attention_backward: float = 0.30
    tower: float = 0.42
    tower_backward: float = 0.36
    # bytes moved by passes over memory for each byte that a layer keeps for backward: dense, routed
    passes: tuple[float, float] = (3.7, 9.5)
    passes_backward: tuple[float, float] = (8.8, 18.0)
    loss_bytes: float = 46.0  # moved for each logit
    optimizer_bytes: float = 44.0  # moved for each element that a rank steps


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, and what a rank sends meanwhile, bytes by axis."""

    seconds: float
    tokens: int  # of the step, on all ranks
    world: int
    model_flops: float  # recompute not counted
    sent: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens / self.seconds / self.world

    def utilisation(self, machine: Machine) -> float:
        return self.model_flops / self.seconds / self.world / machine.peak


class Clock:
    """A model's step times on one kind of machine."""

    def __init__(self, sizes: ModelSizes, machine: Machine) -> None:
        self.sizes, self.machine, self.config = sizes, machine, sizes.config
        self._fsdp = lru_cache(maxsize=None)(self._sum_fsdp)

    @cached_property
    def layers(self) -> list[tuple[float, float, float]]:
        """FLOPs of each layer's forward for a pack: products, products of experts, attention's of pairs of tokens."""
        text, length = self.sizes.workshop.family.text, max(self.config.data.pack_tokens // NUM_SAMPLES, 1)
        found = []
        for layer, routed in enumerate(self.sizes.plan.routed_layers):
            once, twice = (layer_flops(text, layer, times * length) for times in (1, 2))
            pairs = (twice - 2 * once) / 2  # what grows with the square
            experts = 6.0 * length * text.hidden_size * text.moe_intermediate_size * text.num_experts_per_tok * routed
            found.append((NUM_SAMPLES * (once - pairs - experts), NUM_SAMPLES * experts, NUM_SAMPLES * pairs))
        return found

    @cached_property
    def trains(self) -> tuple[bool, bool]:
        """Whether the decoder's own weights and towers do."""
        adapters = self.sizes.workshop.adapter_names
        names = [weight.name for weight in self.sizes.weights if weight.trains]
        own = [name for name in names if name.startswith("text.") and name not in adapters]
        return bool(own), bool(self.sizes.trained_towers)

    def step(self, degrees: Degrees, memory: MemoryConfig) -> StepTime:
        """Under these degrees and this recomputation."""
        config, owners = self.config, self.sizes.owners(degrees)
        packs, sent = packs_of_rank(config, degrees), dict[str, float]()
        slowest = max(range(degrees.pipeline), key=lambda stage: (owners.count(stage), stage))
        rounds = packs + (degrees.pipeline - 1) / degrees.stages_per_rank
        seconds = rounds * self._pack(degrees, memory, slowest, sent)
        sent = {axis: packs * num_bytes for axis, num_bytes in sent.items() if num_bytes}
        seconds += self._once(degrees, memory, slowest, sent)
        decoder = sum(map(sum, self.layers)) + self._loss(degrees)[1]
        flops = decoder * (3 if self.trains[0] else 2) + self._towers(degrees)[1]
        return StepTime(
            seconds=seconds,
            tokens=config.data.pack_tokens * config.train.packs_per_step,
            world=degrees.world,
            model_flops=flops * config.train.packs_per_step,
            sent=sent,
        )

    def _pack(self, degrees: Degrees, memory: MemoryConfig, stage: int, sent: dict[str, float]) -> float:
        """Seconds of one pack on a rank of a stage; `sent` gets the bytes that it sends meanwhile."""
        sizes, forward, backward, exposed = self.sizes, 0.0, 0.0, 0.0
        here = [layer for layer, owner in enumerate(sizes.owners(degrees)) if owner == stage]
        for (layer, again), count in sizes.kinds(here, memory).items():
            ahead, back = self._layer(layer, degrees, memory, again)
            forward, backward = forward + count * ahead, backward + count * back
            for axis, (num_bytes, seconds) in self._exchanges(layer, degrees).items():
                times = count * (2 + again * self._repeated(axis, memory))
                sent[axis] = sent.get(axis, 0.0) + times * num_bytes
                exposed += times * seconds
        gather, reduce, sent["fsdp"] = self._fsdp(degrees, stage)
        seconds = max(forward, gather) + max(backward, gather + reduce) + exposed + self._towers(degrees)[0]
        head = self._loss(degrees)[0]
        if degrees.pipeline == 1:
            return seconds + head
        sent["pipeline"] = 2.0 * self.config.data.pack_tokens / degrees.sharers * sizes.kept[0].row
        seconds += sent["pipeline"] / self._speed(degrees.pipeline, degrees.shard * degrees.sharers)
        return max(seconds, head)  # the last stage, which has the head, has fewer layers for it

    # ------------------------------------------------------------------------------------ computing

    def _layer(self, layer: int, degrees: Degrees, memory: MemoryConfig, again: bool) -> tuple[float, float]:
        """Seconds of a layer's forward and backward on one rank, for one pack."""
        machine, routed = self.machine, self.sizes.plan.routed_layers[layer]
        products, experts, pairs = (flops / degrees.sharers / machine.peak for flops in self.layers[layer])
        tokens = self.config.data.pack_tokens / degrees.context
        kept = self.sizes.layer_bytes(layer, tokens, degrees) / machine.bandwidth
        own, selective = self.trains[0], self.sizes.recompute("text", memory) == "selective"
        linear = products / machine.product + experts / machine.grouped
        costly = experts / machine.grouped + pairs / machine.attention
        forward = linear + pairs / machine.attention + machine.passes[routed] * kept
        backward = linear * (2 if own else 1) + 2.5 * pairs / machine.attention_backward
        backward += machine.passes_backward[routed] * kept
        if again:
            spared = costly if selective else 0.0
            if not (selective and routed):  # the last product of the feed-forward, which nothing asks for
                spared += self._last_product(routed, experts, degrees)
            backward += forward - spared
        if memory.offload_activations:
            moved = tokens / degrees.tensor * self.sizes.kept[layer].row if again else kept * machine.bandwidth
            forward, backward = (max(each, moved / machine.host) for each in (forward, backward))
        return forward, backward

    def _last_product(self, routed: bool, experts: float, degrees: Degrees) -> float:
        """Seconds of a feed-forward's last product on one rank; `experts` are the FLOPs of all three."""
        if routed:
            return experts / 3 / self.machine.grouped
        text = self.sizes.workshop.family.text
        flops = 2.0 * self.config.data.pack_tokens * text.hidden_size * text.intermediate_size / degrees.sharers
        return flops / self.machine.peak / self.machine.product

    def _loss(self, degrees: Degrees) -> tuple[float, float]:
        """Seconds on a rank, and FLOPs of one direction of the whole."""
        text, machine = self.sizes.workshop.family.text, self.machine
        logits = self.config.data.pack_tokens / 2 * text.vocab_size
        trains = any(weight.trains and weight.name.startswith("text.loss_head.head") for weight in self.sizes.weights)
        flops = 2.0 * logits * text.hidden_size
        seconds = (3 if trains else 2) * flops / machine.peak / machine.product
        return (seconds + machine.loss_bytes * logits / machine.bandwidth) / degrees.sharers, flops

    def _towers(self, degrees: Degrees) -> tuple[float, float]:
        """Of the tower that takes longest for half a pack of its media: seconds on a rank, whose group shares it, and
        FLOPs of the whole, both directions where it trains."""
        family, machine, found = self.sizes.workshop.family, self.machine, [(0.0, 0.0)]
        of_media: dict[str, tuple[float, float]] = {}  # FLOPs and tokens of one picture or sound
        if self.sizes.model.vision is not None:
            of_media["vision"] = (
                vision_flops(family.vision, PICTURE),
                math.prod(PICTURE) / self.sizes.plan.patches_per_row,
            )
        if self.sizes.model.audio is not None:
            of_media["audio"] = audio_flops(family.audio, COUNTED_FRAMES), family.audio.num_tokens(COUNTED_FRAMES)
        for name, (of_one, rows) in of_media.items():
            flops, trains = of_one * self.config.data.pack_tokens / 2 / rows, name in self.sizes.trained_towers
            seconds = flops / machine.peak * (1 / machine.tower + trains * 2 / machine.tower_backward)
            found.append((seconds / (degrees.sharers * degrees.pipeline), flops * (3 if trains else 1)))
        return max(found)

    # ------------------------------------------------------------------------------------ sending

    def _repeated(self, axis: str, memory: MemoryConfig) -> float:
        """The share of a forward's exchanges that a recomputing backward makes again: rows on their way home are not
        asked for, and selective recompute keeps those that arrived."""
        if axis != "expert":
            return 1.0
        return 0.0 if self.sizes.recompute("text", memory) == "selective" else 0.5

    def _exchanges(self, layer: int, degrees: Degrees) -> dict[str, tuple[float, float]]:
        """Bytes that a rank sends for one direction of a layer, and seconds, by axis."""
        text, sizes = self.sizes.workshop.family.text, self.sizes
        element, rows = sizes.workshop.compute_dtype.itemsize, self.config.data.pack_tokens / degrees.sharers
        found = {}
        if (c := degrees.context) > 1:
            heads = 2 * text.num_attention_heads + 2 * math.lcm(text.num_key_value_heads, degrees.ulysses)
            passed = 2 * text.num_key_value_heads * (degrees.ring - 1)  # keys and values go once around
            swapped = heads * (degrees.ulysses - 1) / degrees.ulysses
            num_bytes = rows * (swapped + passed) * text.head_dim * element
            found["context"] = num_bytes, num_bytes / self._speed(c, degrees.tensor)
        if (t := degrees.tensor) > 1:
            regions = 1 if sizes.plan.routed_layers[layer] else 2  # experts are not divided
            num_bytes = 2 * regions * rows * (t - 1) * sizes.kept[layer].row
            found["tensor"] = num_bytes, num_bytes / self._speed(t, 1)
        if (e := degrees.expert) > 1 and sizes.plan.routed_layers[layer]:
            num_bytes = 2 * rows * text.num_experts_per_tok * sizes.kept[layer].row * (e - 1) / e
            found["expert"] = num_bytes, num_bytes / self._speed(e, 1)
        return found

    def _speed(self, ranks: int, stride: int) -> float:
        """Bytes/s out of a rank of a group whose members lie `stride` apart, all of them to all."""
        machine = self.machine
        near = max(1, min(ranks, machine.devices // stride))
        far = ranks - near
        return (ranks - 1) / max((near - 1) / machine.link, far / machine.network) if far else machine.link

    def _sum_fsdp(self, degrees: Degrees, stage: int) -> tuple[float, float, float]:
        """Seconds of gathering a stage's weights once and of reducing its gradients, and bytes sent for a pack."""
        sizes, inner = self.sizes, degrees.shard * degrees.sharers
        element, seconds, num_bytes = sizes.workshop.compute_dtype.itemsize, [0.0, 0.0], 0.0
        for weight in sizes.weights:
            shape, count = sizes.local(weight, degrees, stage)
            if not count:
                continue
            routed = is_named(weight.name.rpartition(".")[0], sizes.plan.experts)
            decoder = weight.name.startswith(f"{sizes.plan.roots[-1]}.")
            stride = degrees.expert if routed else degrees.tensor if decoder else 1
            shards = inner // stride if decoder else inner * degrees.pipeline
            if shards == 1:
                continue
            size = count * math.prod(shape) * (shards - 1)
            speed = self._ring_speed(shards, stride)
            gathers = 2 if decoder or self.trains[1] else 1
            seconds[0] += size * element / speed * gathers / 2
            seconds[1] += size * 4 / speed * weight.trains
            num_bytes += size * (gathers * element + 4 * weight.trains)
        return seconds[0], seconds[1], num_bytes

    def _ring_speed(self, ranks: int, stride: int) -> float:
        """Bytes/s into a rank of a group that gathers: its members on one machine share what comes from others."""
        machine = self.machine
        near = max(1, min(ranks, machine.devices // stride))
        return machine.link if near >= ranks else min(machine.link, near * machine.network)

    def _once(self, degrees: Degrees, memory: MemoryConfig, stage: int, sent: dict[str, float]) -> float:
        """What a step does once: sums over replicas, and the optimizer."""
        elements = 0
        for weight in self.sizes.weights:
            shape, count = self.sizes.local(weight, degrees, stage)
            elements += weight.trains * count * math.prod(shape)
        seconds = self.machine.optimizer_bytes * elements / self.machine.bandwidth
        if memory.offload_optimizer:
            seconds += 8 * elements / self.machine.host  # two moments come while others go
        if (r := degrees.replicate) > 1:
            sent["replicate"] = 2.0 * 4 * elements * (r - 1) / r
            seconds += sent["replicate"] / self._ring_speed(r, degrees.world // r)
        return seconds
