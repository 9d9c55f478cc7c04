"""Real steps of real models on the fake device: what is opened, which batch is given, what is called in which order.

The one file here that knows the parts of the package. A model of any published size is opened as a run opens it, from
a checkpoint that has headers and no bytes; then a step is made of the calls that the trainer makes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from omniloom.config import load_config
from omniloom.data.collate import collate
from omniloom.families.registry import find_spec
from omniloom.models.fusion import OmniModel
from omniloom.ops import attention
from omniloom.parallel.apply import compile_blocks
from omniloom.parallel.degrees import Degrees, resolve_degrees
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.mesh import build_layout
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.staging import stage
from omniloom.parallel.step import Objective, evaluate, run_packs
from omniloom.processors.tower_batches import audio_batch, vision_batch
from omniloom.run.opening import Workshop, build_model, build_optimizer, open_workshop
from omniloom.run.optimizer_step import OptimizerStep
from omniloom.tools.tiny import FAMILIES, make_tiny
from omniloom.types import IGNORE_LABEL, AudioClip, Example, PackedBatch, StepPlan, VisionClip
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
    quantize: str | None = None
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
    live: Mapping[str, int]  # bytes by part at their most, of all packs that were at work
    rows: Mapping[str, int]  # that each tower made in a call
    stage: int  # of the pipeline


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
        "model": {"path": str(directory), "dtype": "bf16", "quantize": case.quantize},
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


def unlike_contents(count: int) -> list[Content]:
    """Of unlike packs: of other numbers of samples, sizes of pictures, lengths of sounds and of answers."""
    sides = (4, 8, 6, 12)
    return [
        Content(
            num_samples=1 + number % 3,
            grid=(1 + number % 2, sides[number % 4], sides[number // 4 % 4]),
            pictures=number % 2 if number else 0,
            mel_frames=(0, 60, 130)[number % 3],
            answer=0.1 + 0.04 * number,
        )
        for number in range(count)
    ]


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
    backend: Callable[[Record], Callable[..., Any]] | None = None,
) -> tuple[Record, Outcome]:
    """One optimizer step as rank `case.rank` takes it, and an evaluation where the case asks for one.

    With `backend` blocks are compiled, by what it makes of the record.
    """
    config, family = workshop.config, workshop.family
    batch = make_pack(family, case.pack_tokens, content or Content())
    degrees = resolve_degrees(config.parallel, case.world_size, packs_per_step=config.train.packs_per_step)
    with one_of(case.world_size, case.rank, device) as ranks, _imagined_members(degrees):
        local_tokens = case.pack_tokens // degrees.sharers
        live = LiveBytes(on_op)
        record = Record(device=device, rows=local_tokens * family.text.num_experts_per_tok, on_op=live)
        layout = build_layout(degrees, ranks)
        pool = EncoderPool(layout, workshop.spec.sharding(family), config.parallel.encoder_pool)
        with record:
            record.phase = "opening"
            model, policies = build_model(workshop, layout)
            if backend is not None:
                compile_blocks(model, workshop.spec.sharding(family).blocks, backend(record))
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
            live.watch(model)
            on_pack = partial(live.begin, record)
            pipeline = None
            if degrees.pipeline > 1:
                plan = workshop.spec.sharding(family)
                pipeline = Pipeline(model, layout, plan, config.parallel, workshop.compute_dtype)
            # the towers are called for all packs of a pipeline at once
            routed = pool.plan([batch] * case.num_packs) if pipeline else pool.plan([batch]) * case.num_packs
            staged = [stage(pack, device, workshop.compute_dtype) for pack in routed]
            _check_same(staged[0], routed[0])
            terms = run_packs(model, staged, layout, objective, pool, pipeline, on_pack=on_pack)
            record.phase = "optimizer"
            gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
            end: Any = OptimizerStep(
                layout=layout,
                settings=config.train,
                optimizer=optimizer,
                total_rows=1,
                peak_rate=1.0,
                pipeline=pipeline,
                watchdog=SimpleNamespace(enter=lambda *_: None),
            )
            end.take(StepPlan(step=0, packs=(), rows_planned=0), terms, objective, wants_stop=False)
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
        live=live.most,
        rows=live.rows,
        stage=layout.pipeline_rank,
    )


class LiveBytes:
    """What parts of a step made on the device and is still there, whoever holds it; FSDP's buffers left out.

    `most` are bytes by part: of `layers` (of the decoder, with their inputs) after any of them, of `towers` after the
    last, of `loss` after any operation. What a part returns is left out until the next pack is begun.
    """

    def __init__(self, on_op: Callable[..., None] | None) -> None:
        """`on_op` hears of each operation too."""
        self.on_op = on_op
        self.most: dict[str, int] = {"layers": 0, "towers": 0, "loss": 0}
        self.rows: dict[str, int] = {}  # that each tower made
        self._part: str | None = None
        self._made: dict[str, dict[int, StorageWeakRef]] = {part: {} for part in self.most}
        self._returned: set[int] = set()

    def watch(self, model: OmniModel) -> None:
        """Before the model's parts are copied for stages, which share them."""
        model.text.call = WatchedCall(model.text.call, self)
        parts = {"vision": model.vision, "audio": model.audio, "loss": model.text.loss_head}
        for name, part in parts.items():
            if part is not None:
                part.register_forward_pre_hook(partial(self._enter_part, name), prepend=True)
                part.register_forward_hook(partial(self._leave_part, name))

    def _enter_part(self, name: str, module: nn.Module, inputs: Any) -> None:
        self._part = "loss" if name == "loss" else "towers"
        if name == "vision" and any(parameter.requires_grad for parameter in module.parameters()):
            self._add("towers", inputs[0].patches)  # where they are pixels, the tower makes what it keeps of them

    def _leave_part(self, name: str, module: nn.Module, inputs: Any, out: Any) -> None:
        if name != "loss":
            rows = [out] if isinstance(out, Tensor) else [out[0], *out[1]]
            self.rows[name] = rows[0].shape[0]
            if name == "audio":  # whole chunks, valid or not
                chunks, _, frames = inputs[0].features.shape
                self.rows[name] = chunks * module.config.num_tokens(frames)
            self.leave("towers", rows)
        self._part = None

    def enter(self, part: str, given: Tensor) -> None:
        self._part = part
        self._add(part, given)

    def leave(self, part: str, returned: Sequence[Tensor]) -> None:
        """What was `returned` may be kept all the same, by what takes it."""
        self._returned |= {tensor.untyped_storage()._cdata for tensor in returned}
        own = {tensor.untyped_storage()._cdata for tensor in returned} if part == "layers" else self._returned
        self.most[part] = max(self.most[part], self._sum(part, own))
        self._part = None

    def begin(self, record: Record, pack: int) -> None:
        """A pack's forward or backward."""
        record.pack = pack
        self.most["layers"] = max(self.most["layers"], self._sum("layers", set()))

    def __call__(self, record: Record, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if self.on_op is not None:
            self.on_op(record, func, args, kwargs, out)
        part = self._part
        if part is None or func.is_view or _asked_by_fsdp():
            return
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            if tensor.device == record.device and tensor.untyped_storage()._cdata not in known:
                self._add(part, tensor)
        if part == "loss":
            self.most[part] = max(self.most[part], self._sum(part, set()))

    def _add(self, part: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._made[part][storage._cdata] = StorageWeakRef(storage)

    def _sum(self, part: str, left_out: set[int]) -> int:
        made = {key: ref for key, ref in self._made[part].items() if not ref.expired()}
        self._made[part] = made
        return sum(
            torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes()
            for key, ref in made.items()
            if key not in left_out
        )


class WatchedCall(nn.Module):
    """Around a call of the decoder's layers."""

    def __init__(self, call: nn.Module, live: LiveBytes) -> None:
        super().__init__()
        self.call, self.live = call, live

    def forward(self, index: int, layer: nn.Module, *inputs: Any) -> Any:
        self.live.enter("layers", inputs[0])
        out = self.call(index, layer, *inputs)
        self.live.leave("layers", out[:1])
        return out


def _asked_by_fsdp() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if "_fully_shard" in frame.f_code.co_filename:
            return True
        if frame.f_code.co_name in ("run_packs", "_call_impl"):
            break
        frame = frame.f_back
    return False


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
    """The other ranks say what this one says, of stages of their own, and what is sent has arrived; flash attention is
    at hand."""
    gather, send, resolve = dist.all_gather_object, dist.isend, attention.resolve_kernel

    def all_gather_object(gathered: list[Any], value: Any, group: Any = None) -> None:
        if isinstance(value, dict):  # what is known of stages, by their number
            value = {stage: known for stage in range(degrees.num_stages) for known in list(value.values())[:1]}
        gathered[:] = [value] * len(gathered)

    dist.all_gather_object, dist.isend = all_gather_object, lambda *_, **__: None
    attention.resolve_kernel = lambda kernel, _, dtype: resolve(kernel, "cuda", dtype)
    try:
        yield
    finally:
        dist.all_gather_object, dist.isend, attention.resolve_kernel = gather, send, resolve
