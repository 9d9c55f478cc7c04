"""PEFT adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Owns PEFT's names, layouts and settings. Tensors are written under names that PEFT finds in every class of transformers
that holds the model. What is adapted and with which rank comes in as `Adapter` records; where a weight of
ours lies in the published model comes from the key map's assemblies.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from omniloom.checkpoint.agreement import agree, on_first, rank
from omniloom.checkpoint.files import read_json, write_text
from omniloom.checkpoint.hf import local_region
from omniloom.checkpoint.tensor_files import DTYPES, HFCheckpoint, TensorEntry, read_header
from omniloom.config import LoraConfig
from omniloom.keymap import Assembly, Shape, Tied, canonical_name, listed
from omniloom.types import Adapter

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NOTE_NAME = "omniloom_adapter.json"  # which model it was trained on, by fingerprint
# PEFT takes linears of these names, in a model with experts, for parts of the stacked ones
EXPERT_LEAVES = ("gate", "gate_proj", "up_proj", "down_proj")
SETTINGS = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none", "fan_in_fan_out": False}
# settings of PEFT by which an adapter does something else than add a product
OTHER_FORMS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("use_bdlora", "use_qalora"),
)
# values of init_lora_weights with which PEFT takes something off the base's weights, whenever it loads the adapter
CHANGED_BASES = ("corda", "loftq", "lora_ga", "olora", "pissa")
BASE_WEIGHT = ".base_layer.weight"  # PEFT saves a head that is adapted, too
SAMPLED_TENSORS, SAMPLED_BYTES = 64, 4096


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the addition to one of our weights goes in transformers' model."""

    published: str  # name of the module
    parameter: str | None = None  # stacked experts: transformers' parameter of the module

    @property
    def name(self) -> str:
        """As transformers holds it in memory, less what its classes do not share: PEFT compares ends of names."""
        module = canonical_name(self.published)
        return module if self.parameter is None else f"{module}.{self.parameter}"

    @property
    def is_head(self) -> bool:
        """Of a thinker: it alone is called in memory as published."""
        return self.published.startswith("thinker.") and self.published.endswith(f".{canonical_name(self.published)}")

    def keys(self, *, has_experts: bool) -> tuple[str, ...]:
        """In an adapter's file: published names where PEFT maps them onto several classes, else those in memory.

        PEFT takes `thinker.` off, but undoes that where nothing else changes: the head goes under both. Onto the whole
        of an omni model it maps only where there are experts, for whose sake transformers has a mapping: others go
        under their names in its memory, too.
        """
        name = canonical_name(self.published)
        if not self.published.startswith("thinker."):
            return (name,)
        if self.is_head:
            return (self.published, name)
        return (self.published,) if has_experts else (self.published, f"thinker.{name}")


def adapter_targets(assemblies: Mapping[str, Assembly]) -> dict[str, Target]:
    """The places of all weights of ours that transformers holds as linears or as stacked experts, by our names.

    Matrices that are no linear's (embeddings, routers) are among them; kernels of convolutions are not.
    """
    targets = {}
    for name, assembly in assemblies.items():
        first = assembly.pieces[0]
        if len(assembly.shape) == 3 and ".experts." in first.published:
            module, _, _ = first.published.rpartition(".experts.")
            leaves = {piece.published.removesuffix(".weight").rpartition(".")[2] for piece in assembly.pieces}
            parameter = "gate_up_proj" if leaves == {"gate_proj", "up_proj"} else leaves.pop()
            targets[name] = Target(published=f"{module}.experts", parameter=parameter)
        elif len(assembly.shape) == 2 and first.reshape == "same":
            targets[name] = Target(published=first.published.removesuffix(".weight"))
    return targets


# ---------------------------------------------------------------------------------------- PEFT's tensors


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One tensor of the file, and what it is of one of our parameters."""

    key: str
    parameter: str
    layout: str = "same"  # experts_a and experts_b: PEFT's of stacked experts; else a piece's

    @property
    def is_added(self) -> bool:
        """Whether it belongs to an adapter, rather than being a weight that trained beside them."""
        return ".lora_" in self.key

    def to_peft(self, tensor: Tensor) -> Tensor:
        if self.layout == "experts_a":  # [E, r, in] -> [E r, in]
            return tensor.flatten(0, 1)
        if self.layout == "experts_b":  # [E, out, r] -> [out, r E]
            return tensor.permute(1, 2, 0).flatten(1)
        return tensor

    def from_peft(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """`shape` is that of our parameter."""
        if self.layout == "experts_b":
            return tensor.reshape(shape[1], shape[2], shape[0]).permute(2, 0, 1)
        return tensor.reshape(tuple(shape))

    def shape_in_file(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.to_peft(torch.empty(tuple(shape), device="meta")).shape)


def _parts(adapters: Collection[Adapter], targets: Mapping[str, Target]) -> list[_Part]:
    """All tensors of an adapter, by their keys in its file."""
    modules = Counter(targets[adapter.base].published for adapter in adapters)
    has_experts = any(target.parameter for target in targets.values())
    parts = []
    for adapter in adapters:
        target = targets[adapter.base]
        layouts = ("same", "same") if target.parameter is None else ("experts_a", "experts_b")
        # PEFT wraps the module once per parameter; the first in the module's order is the inner one
        inner = ".base_layer" if modules[target.published] > 1 and target.parameter == "gate_up_proj" else ""
        for stem in (f"{PREFIX}{key}{inner}" for key in target.keys(has_experts=has_experts)):
            parts.append(_Part(key=f"{stem}.lora_A.weight", parameter=adapter.lora_a, layout=layouts[0]))
            parts.append(_Part(key=f"{stem}.lora_B.weight", parameter=adapter.lora_b, layout=layouts[1]))
            if adapter.magnitude is not None:
                parts.append(_Part(key=f"{stem}.lora_magnitude_vector", parameter=adapter.magnitude))
    return parts


# ---------------------------------------------------------------------------------------- writing


def write_adapter(
    directory: str | Path,
    source: HFCheckpoint,
    config_json: Mapping[str, Any],
    assemblies: Mapping[str, Assembly],
    adapters: Collection[Adapter],
    gather: Callable[[str], Tensor],
    *,
    tied: Mapping[str, Tied],
    base_name: str,
    trained: Collection[str] = (),
    group: ProcessGroup | None = None,
) -> Path:
    """Write adapters, and weights of ours in `trained` that train beside them, as PEFT loads them. Returns the folder.

    Called by all ranks of `group` alike: `gather(name)` may be a collective and gives the full tensor on rank 0.
    `base_name` is what others call the published model: its directory, or the hub's id. Weights in `trained` are
    PEFT's `modules_to_save`, which fit the class in config.json's `architectures`; second names in `tied` (of `KeyMap`)
    have them, too, for else PEFT leaves the head of an embedding as published.
    Raises: ValueError on every rank if the directory holds something else or cannot be written.
    """
    directory = Path(directory)
    targets = adapter_targets(assemblies)
    first = rank(group) == 0
    agree(_refusal(directory) if first else None, group)
    whole = _whole_parts(assemblies, trained, tied)
    tensors: dict[str, Tensor] = {}
    for part in (*_parts(adapters, targets), *whole):
        full = gather(part.parameter)
        if first:
            key, values = (part.key, full) if part.is_added else _as_published(part, full, assemblies, source)
            tensors[key] = part.to_peft(values).clone(memory_format=torch.contiguous_format)

    def write() -> None:
        config = _peft_config(base_name, config_json, adapters, targets) | _saved_modules(whole, tied)
        _write(directory, config, tensors, fingerprint(source))

    on_first(write, f"write the adapter {directory}", group=group)
    return directory


def _as_published(
    part: _Part, full: Tensor, assemblies: Mapping[str, Assembly], source: HFCheckpoint
) -> tuple[str, Tensor]:
    """The key and the values, in the published dtype, of a weight that trained beside adapters."""
    piece = assemblies[part.parameter].pieces[0]
    root = "thinker." if piece.published.startswith("thinker.") else ""
    values = full.to(DTYPES[source.entries[piece.published].dtype])
    return f"{PREFIX}{root}{part.key}", values.reshape(piece.shape) if part.layout == "flatten" else values


def _refusal(directory: Path) -> str | None:
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CONFIG_NAME).is_file():
        return f"{directory} is not empty and no adapter; choose another directory or empty it"
    return f"{directory} is a file; write the adapter into a directory" if directory.is_file() else None


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], base: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{TENSORS_NAME}.partial"
    safetensors.torch.save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(directory / TENSORS_NAME)
    for name, content in ((NOTE_NAME, {"base": base}), (CONFIG_NAME, config)):
        write_text(directory / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _peft_config(
    base_name: str,
    config_json: Mapping[str, Any],
    adapters: Collection[Adapter],
    targets: Mapping[str, Target],
) -> dict[str, Any]:
    """The file's content. Where adapters differ, the most frequent rank and alpha are the default, others patterns."""
    names = {adapter.base: _name_in_config(targets[adapter.base], targets) for adapter in adapters}
    parameters = {names[a.base] for a in adapters if targets[a.base].parameter or names[a.base].endswith(".weight")}
    one_rule = len({adapter.rslora for adapter in adapters}) == 1
    ranks = {names[a.base]: a.rank for a in adapters}
    # without rslora for all, alpha is given so that alpha / rank is the scaling
    alphas = {names[a.base]: a.alpha if one_rule else a.scaling * a.rank for a in adapters}
    rank_default, alpha_default = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
    model_type = config_json.get("model_type", "").removesuffix("_thinker")  # of the same module
    return {
        **SETTINGS,
        "auto_mapping": {
            "base_model_class": (config_json.get("architectures") or [None])[0],
            "parent_library": f"transformers.models.{model_type}.modeling_{model_type}",
        },
        "base_model_name_or_path": base_name,
        "r": rank_default,
        "lora_alpha": alpha_default,
        # PEFT has no dropout on parameters and refuses to load an adapter that asks for it
        "lora_dropout": 0.0 if parameters else max(adapter.dropout for adapter in adapters),
        "use_rslora": one_rule and next(iter(adapters)).rslora,
        "use_dora": any(adapter.magnitude is not None for adapter in adapters),
        "target_modules": sorted(set(names.values()) - parameters),
        # the talker has a list of modules called lm_head
        "exclude_modules": r"talker\.code_predictor\.lm_head"
        if any(targets[adapter.base].is_head for adapter in adapters)
        else None,
        "target_parameters": sorted(parameters) or None,
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items() if rank != rank_default},
        "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items() if alpha != alpha_default},
    }


def _saved_modules(whole: Sequence[_Part], tied: Mapping[str, Tied]) -> dict[str, Any]:
    """What the file's content says of weights that trained beside adapters."""
    modules = sorted({part.key.rpartition(".")[0] for part in whole if part.key not in tied})
    return {"modules_to_save": modules or None} | (
        {"ensure_weight_tying": True} if any(part.key in tied for part in whole) else {}
    )


def _name_in_config(target: Target, targets: Mapping[str, Target]) -> str:
    """In a model with stacked experts, PEFT takes other linears with names of experts' for parameters."""
    has_experts = any(other.parameter for other in targets.values())
    is_taken = has_experts and target.parameter is None and target.name.rpartition(".")[2] in EXPERT_LEAVES
    return f"{target.name}.weight" if is_taken else target.name


def fingerprint(source: HFCheckpoint) -> str:
    """Of a model's headers and a sample of its values: equal for copies, different for models trained apart."""
    digest = hashlib.blake2b(digest_size=16)
    entries = sorted(source.entries.values(), key=lambda entry: entry.name)
    for entry in entries:
        digest.update(f"{entry.name} {entry.dtype} {entry.shape}\n".encode())
    for entry in entries[:: max(1, len(entries) // SAMPLED_TENSORS)]:
        with entry.file.open("rb") as stream:
            stream.seek(entry.start + max(0, entry.num_bytes - SAMPLED_BYTES) // 2)
            digest.update(stream.read(min(SAMPLED_BYTES, entry.num_bytes)))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter directory whose settings and headers have been read; tensors by the name that all spellings share."""

    directory: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    copies: dict[str, TensorEntry]  # of the base's weights, by their names
    base: str | None  # fingerprint of the model it was trained on, where we wrote it

    def without(self, assemblies: Collection[Assembly], others: tuple[str, ...] = ()) -> StoredAdapter:
        """Less what belongs to these weights, and to modules whose names begin with one of `others`."""
        targets = adapter_targets({assembly.ours: assembly for assembly in assemblies})
        modules = (*(f"{canonical_name(target.published)}." for target in targets.values()), *others)
        whole = set(map(name_in_memory, assemblies))
        kept = (name for name in self.entries if name not in whole and not name.startswith(modules))
        return replace(self, entries={name: self.entries[name] for name in kept})

    def tensor(self, name: str) -> Tensor:
        entry = self.copies[name] if name in self.copies else self.entries[name]
        with safetensors.safe_open(entry.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(entry.name)
        return tensor

    def size(self, target: str) -> tuple[int, float]:
        """Rank and alpha of the addition to a module of this name (`Target.name`)."""
        weight = f"{target}.weight"  # of a linear that PEFT takes for a parameter
        if any(f".{weight}".endswith(f".{name}") for name in self.config.get("target_parameters") or ()):
            target = weight
        return int(self._setting("rank_pattern", "r", target)), float(
            self._setting("alpha_pattern", "lora_alpha", target)
        )

    def scaling(self, target: str) -> float:
        """What PEFT multiplies the addition to a module of this name with."""
        rank, alpha = self.size(target)
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def follows(self, lora: LoraConfig) -> bool:
        """Whether a policy asks for what the adapter has where its patterns say nothing: then they hold, too."""
        settings = self.config["r"], self.config["lora_alpha"], bool(self.config.get("use_rslora"))
        return settings == (lora.rank, lora.alpha, lora.rslora)

    def _setting(self, patterns: str, default: str, target: str) -> Any:
        """Source: peft.utils.other.get_pattern_key, on names in memory with or without `thinker.`."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (target, f"thinker.{target}")):
                return value
        return self.config[default]

    @cached_property
    def needs(self) -> str:
        """The policy settings that fit it, for messages."""
        words = [f"rank: {self.config['r']}", f"alpha: {self.config['lora_alpha']}"]
        words += [f"{ours}: true" for theirs, ours in (("use_rslora", "rslora"), ("use_dora", "dora"))
                  if self.config.get(theirs)]  # fmt: skip
        modules = {name.split(".lora_")[0] for name in self.entries if ".lora_" in name}
        leaves = {"gate_up_proj" if name.endswith("base_layer") else name.rpartition(".")[2] for name in modules}
        patterns = " and ".join(name for name in ("rank_pattern", "alpha_pattern") if self.config.get(name))
        others = f" (other modules by its {patterns})" if patterns else ""
        return f"{', '.join(words)}{others} on {', '.join(sorted(leaves))}"


def open_adapter(directory: str | Path) -> StoredAdapter:
    """Read an adapter's settings and headers. Raises: ValueError for what is no LoRA adapter of PEFT."""
    directory = Path(directory)
    if not (directory / CONFIG_NAME).is_file():
        raise ValueError(f"model.adapter: {directory} has no {CONFIG_NAME}; expected a directory written by peft")
    config = read_json(directory / CONFIG_NAME)
    _check_settings(directory, config)
    entries, _ = read_header(directory / TENSORS_NAME)
    if single := next((name for name in entries if re.search(r"\.experts\.\d+\.", name)), None):
        raise ValueError(
            f"model.adapter: {directory} adapts single experts ({single.removeprefix(PREFIX)}), as transformers 4 held "
            "them; load it onto the model by peft with transformers 5, which stacks them, and save it again"
        )
    note, named = directory / NOTE_NAME, {_canonical(name): entry for name, entry in entries.items()}
    return StoredAdapter(
        directory=directory,
        config=config,
        entries={name: entry for name, entry in named.items() if not name.endswith(BASE_WEIGHT)},
        copies={
            name.removesuffix(BASE_WEIGHT) + ".weight": entry
            for name, entry in named.items()
            if name.endswith(BASE_WEIGHT)
        },
        base=read_json(note).get("base") if note.is_file() else None,
    )


def _check_settings(directory: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"model.adapter: {directory} is a {kind} adapter; only LORA can go on here")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise ValueError(f"model.adapter: {directory} trains biases too; only adapters with bias: none can go on here")
    if unknown := [name for name in OTHER_FORMS if config.get(name)]:
        raise ValueError(f"model.adapter: {directory} sets {', '.join(unknown)}, which is not computed here")
    if (start := str(config.get("init_lora_weights")).lower()).startswith(CHANGED_BASES):
        raise ValueError(
            f"model.adapter: {directory} has init_lora_weights {start}, so that peft adds it to other weights than the "
            "model's; convert it by peft (save_pretrained with path_initial_model_for_weight_conversion), or merge it"
        )
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float):
            raise ValueError(
                f"model.adapter: {directory / CONFIG_NAME}: expected a number as {name}, got {config.get(name)}"
            )


def adapted_weights(stored: StoredAdapter, assemblies: Mapping[str, Assembly]) -> dict[str, LoraConfig]:
    """The weights of ours that an adapter adapts, with its own rank, scaling and kind for each.

    Of what it holds beyond them `load_adapter` says so. Raises: ValueError for DoRA on what has none here.
    """
    first = ".lora_A.weight"
    stems = {name.removesuffix(first) for name in stored.entries if name.endswith(first)}
    parameters = {name.rpartition(".")[2] for name in stored.config.get("target_parameters") or ()}
    found = {}
    for base, target in adapter_targets(assemblies).items():
        stem, is_stacked = canonical_name(target.published), target.parameter is not None
        if is_stacked and f"{stem}.base_layer" in stems:  # PEFT wraps once per parameter, gate_up_proj's is the inner
            stem += ".base_layer" if target.parameter == "gate_up_proj" else ""
        elif is_stacked and target.parameter not in parameters:
            continue
        if stem not in stems:
            continue
        dora = f"{stem}.lora_magnitude_vector" in stored.entries
        if dora and (is_stacked or target.name == "lm_head"):
            raise ValueError(f"model.adapter: {stored.directory} has DoRA on {target.name}, which has none here")
        rank, alpha = stored.size(target.name)
        rslora = bool(stored.config.get("use_rslora"))
        found[base] = LoraConfig(rank=rank, alpha=alpha, rslora=rslora, dora=dora)
    return found


def check_base(stored: StoredAdapter, source: HFCheckpoint, name: str) -> None:
    """Raises: ValueError if the adapter says that it was trained on another model than `source`, called `name`."""
    if stored.base is not None:
        if stored.base != fingerprint(source):
            raise ValueError(f"model.adapter: {stored.directory} was trained on another model than {name}")
        return
    told = stored.config.get("base_model_name_or_path")
    if told and _names(Path(told)).isdisjoint(_names(Path(name)) | _names(source.directory.resolve())):
        raise ValueError(
            f"model.adapter: {stored.directory} was trained on {told}, model.path is {name}; if they are "
            f"the same model, correct base_model_name_or_path in its {CONFIG_NAME}"
        )
    held = {canonical_name(published): published for published in source.shapes}
    for weight in stored.copies:
        copy = stored.tensor(weight)
        if weight not in held or not torch.equal(copy, source.read_slice(held[weight]).to(copy.dtype)):
            raise ValueError(
                f"model.adapter: {stored.directory} has a {weight} of its own, not that of {name}; merge it by peft "
                "and take the merged model as model.path"
            )


def _names(path: Path) -> set[str]:
    """By which a model is known: the end of a path or hub id; of a snapshot in the hub's cache, that of its id, too."""
    snapshots = path.parent
    return {path.name} | ({snapshots.parent.name.rpartition("--")[2]} if snapshots.name == "snapshots" else set())


@torch.no_grad()
def load_adapter(
    stored: StoredAdapter,
    parameters: Mapping[str, Tensor],
    assemblies: Mapping[str, Assembly],
    adapters: Collection[Adapter],
    tied: Mapping[str, Tied],
) -> None:
    """Fill adapters, and weights that were trained beside them, from a PEFT adapter; plain or DTensor, no collectives.

    Raises: ValueError unless the adapter has exactly the tensors, shapes and scalings of `adapters`.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, values in adapter_values(stored, shapes, assemblies, adapters, tied):
        fill(parameters[name], values)


def adapter_values(
    stored: StoredAdapter,
    shapes: Mapping[str, Shape],
    assemblies: Mapping[str, Assembly],
    adapters: Collection[Adapter],
    tied: Mapping[str, Tied],
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an adapter by our parameter's name, in its shape; `tied` as `KeyMap.tied`.

    Raises: as `load_adapter`.
    """
    assemblies = {name: assembly for name, assembly in assemblies.items() if name in shapes}
    targets = adapter_targets(assemblies)
    parts = {_canonical(part.key): part for part in _parts(adapters, targets)}
    seconds = {rule.ours: rule.same_as for rule in tied.values()}  # of a pipeline's last stage, a copy of its own
    saved = saved_weights(stored, assemblies, tied)
    first = {part.parameter: name for name, part in saved.items()}
    again = {name: first[rule.same_as] for name, rule in tied.items() if rule.same_as in first}
    parts |= saved | {name: saved[other] for name, other in again.items() if name in stored.entries}
    _check_fit(stored, parts, shapes, targets, adapters)
    for name, other in again.items():
        _check_tied(stored, name, other, parts[other].parameter)
    for name, part in parts.items():
        values = part.from_peft(stored.tensor(name), shapes[part.parameter])
        yield part.parameter, values
        yield from ((second, values) for second, same in seconds.items() if same == part.parameter and second in shapes)


def saved_weights(
    stored: StoredAdapter, assemblies: Mapping[str, Assembly], tied: Mapping[str, Tied]
) -> dict[str, _Part]:
    """The weights that trained beside an adapter (`modules_to_save`), by their names in its file."""
    seconds = {rule.ours for rule in tied.values()}
    whole = {part.key: part for part in map(_whole_part, assemblies.values()) if part.parameter not in seconds}
    return {name: whole[name] for name in stored.entries if name in whole}


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy all values of a parameter into it, plain or DTensor; each rank its slice."""
    if (region := local_region(parameter)) is not None:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(values[tuple(slice(*bounds) for bounds in region)])


@torch.no_grad()
def fill_magnitudes(parameters: Mapping[str, Tensor], adapters: Collection[Adapter]) -> None:
    """Row norms of the base weights, with which DoRA starts. Collective where parameters are sharded."""
    for adapter in adapters:
        if adapter.magnitude is not None:
            norms = torch.linalg.vector_norm(parameters[adapter.base].detach().float(), dim=-1)
            fill(parameters[adapter.magnitude], norms.full_tensor() if isinstance(norms, DTensor) else norms)


def _canonical(key: str) -> str:
    return canonical_name(key.removeprefix(PREFIX))


def name_in_memory(assembly: Assembly) -> str:
    """Of transformers' parameter that holds a weight of ours alone, less what its classes do not share."""
    return _whole_part(assembly).key


def _whole_parts(assemblies: Mapping[str, Assembly], trained: Collection[str], tied: Mapping[str, Tied]) -> list[_Part]:
    """What trained beside adapters, and then its second names."""
    parts = [_whole_part(assemblies[name]) for name in trained]
    seconds = [(name, part) for name, rule in tied.items() for part in parts if part.parameter == rule.same_as]
    return [*parts, *(replace(part, key=name) for name, part in seconds)]


def _whole_part(assembly: Assembly) -> _Part:
    """A weight that trains beside adapters, under transformers' name; stacked experts stay stacked."""
    target = adapter_targets({assembly.ours: assembly}).get(assembly.ours)
    if target is not None and target.parameter is not None:
        return _Part(key=target.name, parameter=assembly.ours)
    piece = assembly.pieces[0]
    return _Part(key=canonical_name(piece.published), parameter=assembly.ours, layout=piece.reshape)


def _check_tied(stored: StoredAdapter, second: str, first: str, parameter: str) -> None:
    """Raises: ValueError where two names of one weight of the model are two weights in the adapter."""
    if second not in stored.entries:
        is_two = stored.base is None  # omniloom once wrote the first alone
        found = f"{parameter} without {second}, which peft leaves as published"
    else:
        is_two = not torch.equal(stored.tensor(first), stored.tensor(second))
        found = f"two values for {parameter}, one of them as {second}"
    if is_two:
        raise ValueError(
            f"model.adapter: {stored.directory} has {found}, where the model has one weight for both; merge it by peft "
            "and take the merged model as model.path"
        )


def _check_fit(
    stored: StoredAdapter,
    parts: Mapping[str, _Part],
    shapes: Mapping[str, Shape],
    targets: Mapping[str, Target],
    adapters: Collection[Adapter],
) -> None:
    faults = [f"it has {name}, which the policy does not adapt" for name in stored.entries if name not in parts]
    faults += [f"it lacks {name}, which the policy adapts" for name in parts if name not in stored.entries]
    for name, part in parts.items():
        if name in stored.entries:
            shape = part.shape_in_file(shapes[part.parameter])
            flat = part.layout == "flatten" and prod(shape) == prod(stored.entries[name].shape)
            if stored.entries[name].shape != shape and not flat:
                faults.append(f"{name} is {list(stored.entries[name].shape)}, here {list(shape)}")
    for adapter in adapters:
        name = targets[adapter.base].name
        scaling = stored.scaling(name)
        if abs(scaling - adapter.scaling) > 1e-6 * scaling:
            faults.append(f"{name} is scaled by {scaling:g}, here by {adapter.scaling:g}")
    if faults:
        raise ValueError(
            f"model.adapter: {stored.directory} does not fit the model and its policy; it needs lora with "
            f"{stored.needs}:\n  " + listed(faults, "\n  ")
        )
