"""Real steps of real models on the fake device: what is opened, which batch is given, what is called in which order.

The one file here that knows the parts of the package. A model of any published size is opened as a run opens it, from
a checkpoint that has headers and no bytes; then a step is made of the calls that the trainer makes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from omniloom.config import load_config
from omniloom.data.collate import collate
from omniloom.families.registry import find_spec
from omniloom.models.fusion import OmniModel
from omniloom.ops import attention
from omniloom.parallel.degrees import Degrees, resolve_degrees
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.gradients import clip_gradients
from omniloom.parallel.mesh import build_layout
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.staging import list_tensors, stage
from omniloom.parallel.step import Objective, evaluate, run_packs
from omniloom.processors.tower_batches import audio_batch, vision_batch
from omniloom.run.opening import Workshop, build_model, build_optimizer, open_workshop
from omniloom.tools.tiny import FAMILIES, make_tiny
from omniloom.types import IGNORE_LABEL, AudioClip, Example, PackedBatch, VisionClip
from tests.device.fake_device import Record, one_of
from tests.parity.published_configs import PUBLISHED


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to make: model, rank, layout and settings. Layer counts of None are those published."""

    model: str  # a published size, or a family, whose tiny checkpoint is taken as it is
    layers: Mapping[str, int | None] = field(default_factory=lambda: {"text": 2, "vision": 2, "audio": 2})
    world_size: int = 1
    rank: int = 0
    parallel: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    pack_tokens: int = 8192
    num_packs: int = 1
    evaluates: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step left behind."""

    gradients: frozenset[torch.dtype]
    states: frozenset[torch.dtype]
    devices: frozenset[str]
    num_trained: int
    kept: float  # bytes that autograd keeps of a pack in the layers of the decoder, where nothing is recomputed


# ---------------------------------------------------------------------------------------- opening


def open_case(case: Case, directory: Path) -> Workshop:
    """The model of a case, opened as a run opens it. `directory` is written."""
    if case.model in FAMILIES:
        make_tiny(case.model, directory)
    else:
        published = PUBLISHED[case.model].config
        spec = find_spec(published)
        layers = {name: count for name, count in case.layers.items() if name in spec.modalities or name == "vision"}
        write_headers(directory, spec.reduce_config(published, **layers))
    tree = {
        "model": {"path": str(directory), "dtype": "bf16"},
        "data": {"pack_tokens": case.pack_tokens},
        "train": {"packs_per_step": case.world_size * case.num_packs, **case.train},
        "parallel": dict(case.parallel),
        "memory": dict(case.memory),
        "policy": dict(case.policy),
    }
    return open_workshop(load_config(tree))


def write_headers(directory: Path, config_json: Mapping[str, Any]) -> None:
    """A checkpoint directory that looks whole: the names and shapes are there, the bytes are a hole in the file."""
    spec = find_spec(config_json)
    family = spec.read_config(config_json)
    with torch.device("meta"):
        model = spec.build(family, modalities=spec.modalities)
    key_map, header, end = spec.key_map(family), {}, 0
    for ours, tensor in model.state_dict().items():
        names, shape = key_map.published_names(ours), tuple(tensor.shape)
        if "*" in names[0]:  # stacked: a tensor for each row, or several that lie one after another in it
            names = tuple(name.replace("*", str(row)) for row in range(shape[0]) for name in names)
            shape = (shape[1] * shape[0] // len(names), *shape[2:])
        for name in names:
            if name not in header:  # a tied head is the embedding
                start, end = end, end + 2 * prod(shape)
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json), encoding="utf-8")
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


# ---------------------------------------------------------------------------------------- a pack


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a pack is made of: samples of one length, their media first and their answer last."""

    num_samples: int = 4
    grid: tuple[int, int, int] = (1, 24, 24)  # of each picture
    pictures: int = 1  # of each sample
    mel_frames: int = 200  # of each sample's sound; 0: none
    answer: float = 0.5  # share of each sample that has a loss


def make_pack(family: Any, pack_tokens: int, content: Content) -> PackedBatch:
    """A pack as a worker would load it, on the host; its values mean nothing."""
    length = (pack_tokens - 64) // content.num_samples  # some padding at the end
    examples = [_example(family, number, length, content) for number in range(content.num_samples)]
    hears = getattr(family, "audio", None) is not None
    return collate(
        examples,
        pack_tokens=pack_tokens,
        weight_scales=[1.0] * len(examples),
        collate_vision=lambda clips: vision_batch(clips, family.vision),
        collate_audio=(lambda clips: audio_batch(clips, family.audio)) if hears else None,
    )


def _example(family: Any, number: int, length: int, content: Content) -> Example:
    place, vision, audio = 8, [], []
    for _ in range(content.pictures):
        patches, rows = prod(content.grid), prod(content.grid) // family.vision.spatial_merge_size**2
        index = torch.arange(place, place + rows)
        vision.append(
            VisionClip(patches=torch.ones(patches, family.vision.patch_dim), grid_thw=content.grid, token_index=index)
        )
        place += rows + 8
    if content.mel_frames and getattr(family, "audio", None) is not None:
        rows = family.audio.num_tokens(content.mel_frames)
        features = torch.zeros(family.audio.num_mel_bins, content.mel_frames)
        audio.append(AudioClip(features=features, token_index=torch.arange(place, place + rows)))
        place += rows + 8
    assert place <= length, f"media of {place} tokens in a sample of {length}"
    trained = torch.arange(length) >= length - int(length * content.answer)
    return Example(
        id=str(number),
        input_ids=torch.ones(length, dtype=torch.int64),
        labels=torch.where(trained, 1, IGNORE_LABEL),
        loss_weights=trained.float(),
        position_ids=torch.arange(length).expand(3, -1).contiguous(),
        vision=tuple(vision),
        audio=tuple(audio),
    )


# ---------------------------------------------------------------------------------------- a step


def run_case(
    case: Case,
    workshop: Workshop,
    device: torch.device,
    content: Content | None = None,
    on_op: Callable[..., None] | None = None,
) -> tuple[Record, Outcome]:
    """One optimizer step as rank `case.rank` takes it, and an evaluation where the case asks for one."""
    config, family = workshop.config, workshop.family
    batch = make_pack(family, case.pack_tokens, content or Content())
    degrees = resolve_degrees(config.parallel, case.world_size, packs_per_step=config.train.packs_per_step)
    with one_of(case.world_size, case.rank, device) as ranks, _imagined_members(degrees):
        local_tokens = case.pack_tokens // degrees.sharers
        record = Record(device=device, rows=local_tokens * family.text.num_experts_per_tok, on_op=on_op)
        layout = build_layout(degrees, ranks)
        pool = EncoderPool(layout, workshop.spec.sharding(family), config.parallel.encoder_pool)
        with record:
            record.phase = "opening"
            model, policies = build_model(workshop, layout)
            optimizer = build_optimizer(workshop, dict(model.named_parameters()), policies, device)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            optimizer.step()  # makes the states, once and for all steps
            optimizer.zero_grad()
            objective = Objective(
                coefficients=config.train.loss_coefficients,
                weight_sums={"text": 1.0, "router": float(case.num_packs)},
            )
            _follow(model, record)
            kept = KeptOfLayers(model.text.call)
            if not case.memory:
                model.text.call = kept
            on_pack = partial(setattr, record, "pack")
            pipeline = None
            if degrees.pipeline > 1:
                plan = workshop.spec.sharding(family)
                pipeline = Pipeline(model, layout, plan, config.parallel, workshop.compute_dtype)
            # the towers are called for all packs of a pipeline at once
            routed = pool.plan([batch] * case.num_packs) if pipeline else pool.plan([batch]) * case.num_packs
            staged = [stage(pack, device, workshop.compute_dtype) for pack in routed]
            _check_same(staged[0], routed[0])
            run_packs(model, staged, layout, objective, pool, pipeline, on_pack=on_pack)
            record.phase = "optimizer"
            repeated = () if pipeline is None else pipeline.counted_elsewhere
            clip_gradients(optimizer, config.train.clip_norm, device, repeated)
            gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
            optimizer.step()
            if case.evaluates:
                record.phase, record.pack = "evaluation", case.num_packs
                model.eval()
                evaluate(model, batch, layout, pool, pipeline)
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]  # no step counts
    return record, Outcome(
        gradients=frozenset(gradient.dtype for gradient in gradients if gradient is not None),
        states=frozenset(state.dtype for state in states),
        devices=frozenset(tensor.device.type for tensor in (*gradients, *states) if tensor is not None and tensor.ndim),
        num_trained=len(gradients),
        kept=kept.num_bytes / case.num_packs,
    )


class KeptOfLayers(nn.Module):
    """In place of a call of layers: adds up what autograd keeps of them, weights and what all are given left out."""

    def __init__(self, call: nn.Module) -> None:
        super().__init__()
        self.call, self.num_bytes = call, 0
        self._alive: list[Tensor] = []  # so that no storage's place is given to another

    def forward(self, index: int, layer: nn.Module, *inputs: object) -> Any:
        shared = {tensor.untyped_storage()._cdata for tensor in list_tensors(inputs[1:])}
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            self._alive.append(tensor)
            storage = tensor.untyped_storage()
            weights = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in layer.parameters())
            if storage._cdata not in shared and all(
                weight.untyped_storage()._cdata != storage._cdata for weight in weights
            ):
                found[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = self.call(index, layer, *inputs)
        self.num_bytes += sum(found.values())
        return out


def _check_same(staged: Any, wanted: Any) -> None:
    """Every tensor the same, but for the dtype of features."""
    if isinstance(wanted, Tensor):
        assert torch.equal(staged, wanted.to(staged.dtype))
    elif dataclasses.is_dataclass(wanted):
        for part in dataclasses.fields(wanted):
            _check_same(getattr(staged, part.name), getattr(wanted, part.name))


def _follow(model: OmniModel, record: Record) -> None:
    """Have the record say which part of the model is at work; what follows the decoder's forward is backward."""
    parts = (("towers", model.vision), ("towers", model.audio), ("decoder", model.text), ("loss", model.text.loss_head))
    for name, part in parts:
        if part is not None:
            part.register_forward_pre_hook(partial(_enter, record, f"{name} forward"), prepend=True)
    model.text.register_forward_hook(partial(_enter, record, "backward"))


def _enter(record: Record, phase: str, *_: Any) -> None:
    record.phase = phase


@contextlib.contextmanager
def _imagined_members(degrees: Degrees) -> Iterator[None]:
    """The other ranks say what this one says, of stages of their own; flash attention is at hand."""
    gather, resolve = dist.all_gather_object, attention.resolve_kernel

    def all_gather_object(gathered: list[Any], value: Any, group: Any = None) -> None:
        if isinstance(value, dict):  # what is known of stages, by their number
            value = {stage: known for stage in range(degrees.num_stages) for known in list(value.values())[:1]}
        gathered[:] = [value] * len(gathered)

    dist.all_gather_object = all_gather_object
    attention.resolve_kernel = lambda kernel, _, dtype: resolve(kernel, "cuda", dtype)
    try:
        yield
    finally:
        dist.all_gather_object, attention.resolve_kernel = gather, resolve
