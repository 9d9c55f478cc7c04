"""The whole configuration tree and the one place where it is read and checked.

Plain frozen dataclasses, so that the training core runs without pydantic; `load_config` imports it to check types and
reports every error at once, each with its path in the file and, for a wrong name, the nearest right one.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

Kernel = Literal["auto", "eager", "sdpa", "flash", "flex"]


class ConfigError(ValueError):
    """One or more faults of a configuration; the message lists all of them."""

    def __init__(self, faults: list[str], where: str) -> None:
        noun = "fault" if len(faults) == 1 else "faults"
        super().__init__(f"{len(faults)} {noun} in {where}:\n" + "\n".join(f"  - {fault}" for fault in faults))
        self.faults = faults


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """Layers to keep from the front of the checkpoint; None keeps all."""

    text: int | None = None
    vision: int | None = None
    audio: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    text: Kernel = "auto"
    vision: Kernel = "auto"
    audio: Kernel = "auto"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = ""
    adapter: str | None = None  # a PEFT adapter of this model, from which LoRA goes on
    modalities: tuple[Literal["text", "image", "video", "audio"], ...] | None = None  # None: all the model has
    num_layers: LayerCounts = field(default_factory=LayerCounts)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    dtype: Literal["bf16", "float32"] = "bf16"  # compute and frozen weights; weights that train are float32


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    min_pixels: int | None = None  # None: the checkpoint's processor config
    max_pixels: int | None = None
    limit_pixels: int = 178_956_970  # a larger file is refused before it is decoded (pillow's bomb bound)


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    min_pixels: int | None = None  # per frame
    max_pixels: int | None = None
    fps: float = 2.0
    max_frames: int = 128
    use_audio: bool = False  # interleave the sound of every video that has no word of its own about it
    no_audio: Literal["error", "video_only"] = "error"  # where sound is asked for and there is none
    limit_seconds: float = 7200.0


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    limit_seconds: float = 7200.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    split: float = 0.0  # share of the training rows held out for evaluation where `eval` is empty
    format: str = "auto"
    attr: dict[str, str | bool | None] = field(default_factory=dict)  # field names of rows, as in the guides' `attr`
    max_samples: int | None = None  # per data set: the first N rows only
    media_dir: str | None = None  # None: the folder of each data file
    allow_outside_media_dir: bool = False
    allow_urls: bool = False
    unplaced_media: Literal["error", "front"] = "error"  # clips without a placeholder; front: before the first question
    template: str = "auto"
    system: str | None = None  # for rows that have no system turn
    train_on_prompt: bool = False
    last_turn_only: bool = False
    enable_thinking: bool = True  # thinking templates: train the empty <think> block of answers without reasoning
    pack_tokens: int = 8192
    window: int = 2048  # rows planned together
    overlong: Literal["drop", "shrink", "error"] = "drop"
    max_bad_fraction: float = 0.05
    workers: int = 2
    prefetch_packs: int = 4
    shuffle: bool = True
    cache_dir: str | None = None  # None: <run_dir>/cache
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    run_dir: str = "runs/train"
    steps: int | None = None
    epochs: float | None = None
    packs_per_step: int = 8
    learning_rate: float = 1e-5
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # 0: no clipping, the norm is still measured
    loss: Literal["token", "sample", "sqrt", "batch"] = "token"
    router_loss: float = 0.0
    nonfinite: Literal["stop", "skip"] = "stop"
    seed: int = 0
    deterministic: bool = False
    eval_every: int = 0  # 0: only at the end
    eval_answers: int = 0  # held-out rows to answer, greedily, at each evaluation
    eval_answer_tokens: int = 64  # at most, per answer
    time_limit_minutes: float | None = None
    step_timeout_seconds: float = 1800.0


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    dtype: Literal["bf16", "float32"] = "float32"  # of the adapters and their optimizer states
    # transformers' module names: their ends (q_proj), or regular expressions of whole names; None: every linear
    modules: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyRule:
    """What holds for the parameters of one component. None leaves the outer rule or the train section in force."""

    freeze: bool | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    recompute: bool | None = None
    lora: LoraConfig | None = None  # trains in place of the component's own weights


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    replicate: int = 1
    shard: int | Literal["auto"] = "auto"
    tensor: int = 1
    context: int = 1
    expert: int = 1
    pipeline: int = 1
    encoder_pool: Literal["group", "data"] = "group"  # ranks that share tower work: model-parallel group, or all data
    prefetch: int = 1  # blocks whose parameters are gathered ahead, forward and backward
    reshard_after_forward: bool | int = True
    cpu_offload: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    recompute: Literal["none", "full"] | int = "none"  # an int n: every n-th block
    offload_activations: bool = False
    loss_chunk_tokens: int | Literal["auto"] = "auto"
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 500
    keep: int = 2
    resume: str = "auto"  # auto | none | a checkpoint directory
    export: bool = True  # write hf/ at the end
    save_optimizer: bool = True
    load_optimizer: bool = True
    load_rng: bool = True
    asynchronous: bool = False


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = 1
    tensorboard: bool = True
    profile: tuple[int, int] | None = None  # first and last step of a trace


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    policy: dict[str, PolicyRule] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


# ---------------------------------------------------------------------------------------- reading


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read one YAML file (or none), apply dotted `a.b=value` overrides (`null` removes a key), check everything.

    Raises: ConfigError listing every fault at once.
    """
    where = str(path) if path is not None else "the command line"
    tree = _read_yaml(Path(path)) if path is not None else {}
    faults: list[str] = []
    for override in overrides:
        _apply_override(tree, override, faults)
    return parse_config(tree, where=where, faults=faults)


def config_from_words(words: Sequence[str]) -> Config:
    """The config that command-line words describe: `[FILE] a.b=c ...`. Raises: ConfigError."""
    path = words[0] if words and "=" not in words[0] else None
    return load_config(path, list(words[1:] if path else words))


def parse_config(tree: dict[str, Any], *, where: str, faults: list[str] | None = None) -> Config:
    """Turn a nested dict, as YAML gives it, into a Config. Raises: ConfigError."""
    from pydantic import TypeAdapter, ValidationError

    faults = [] if faults is None else faults
    tree = _normalise(tree)
    _find_unknown_keys(tree, Config, "", faults)
    try:
        # extra keys were reported above with the nearest name, so pydantic may ignore them here
        config = TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        for item in error.errors():
            path = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("int", "literal", "bool")))
            fault = f"{path}: {item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r})"
            if fault.split(":")[0] not in {known.split(":")[0] for known in faults}:
                faults.append(fault)
        raise ConfigError(faults, where) from None
    faults.extend(_find_bad_values(config))
    if faults:
        raise ConfigError(faults, where)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The tree as plain YAML types, for `config.yaml` beside a run."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    tree = plain(dataclasses.asdict(config))
    assert isinstance(tree, dict)
    # an empty lora section would be refused when it is read again
    tree["policy"] = {name: {k: v for k, v in rule.items() if v is not None} for name, rule in tree["policy"].items()}
    return tree


def save_config(config: Config, path: Path) -> None:
    path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError([f"no such file: {path}{hint}"], "the command line")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError([f"not valid YAML: {place}{problem}"], str(path)) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError([f"expected sections (model, data, train, ...), got a {type(tree).__name__}"], str(path))
    return tree


def _apply_override(tree: dict[str, Any], override: str, faults: list[str]) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        faults.append(f"{override!r} is not an override; expected section.key=value, e.g. train.steps=100")
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    keys = name.split(".")
    if keys[0] == "policy" and len(keys) > 3:  # component names have dots of their own
        tail = 2 if keys[-2] == "lora" else 1
        keys = ["policy", ".".join(keys[1:-tail]), *keys[-tail:]]
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        elif not isinstance(child, dict):
            faults.append(f"{name}: {key} holds a value, not a section")
            return
        node = child
    if value is None and text.strip():
        node.pop(keys[-1], None)
        if keys[0] == "policy" and len(keys) == 3 and not node:  # a rule without keys would be refused
            del tree["policy"][keys[1]]
    else:
        node[keys[-1]] = value


def _normalise(tree: dict[str, Any]) -> dict[str, Any]:
    """Accept the spellings people write: one file where a list is meant, an empty section, `1e-5` as YAML's string."""
    tree = {key: ({} if value is None else value) for key, value in tree.items()}
    data = tree.get("data")
    if isinstance(data, dict):
        data = dict(data)
        for key in ("train", "eval"):
            if isinstance(data.get(key), str):
                data[key] = [part.strip() for part in data[key].split(",") if part.strip()]
        tree["data"] = data
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("modalities"), str):
        tree["model"] = {**model, "modalities": [part.strip() for part in model["modalities"].split(",")]}
    policy = tree.get("policy")
    if isinstance(policy, dict):
        tree["policy"] = {name: _with_module_list(rule) for name, rule in policy.items()}
    return tree


def _with_module_list(rule: Any) -> Any:
    lora = rule.get("lora") if isinstance(rule, dict) else None
    if not isinstance(lora, dict) or not isinstance(lora.get("modules"), str):
        return rule
    return {**rule, "lora": {**lora, "modules": [part.strip() for part in lora["modules"].split(",")]}}


def _find_unknown_keys(tree: Any, kind: Any, path: str, faults: list[str]) -> None:
    if not isinstance(tree, dict):
        return
    hints = typing.get_type_hints(kind)
    for key, value in tree.items():
        full = f"{path}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), list(hints), n=1)
            elsewhere = [name for name in _all_keys(Config, "") if name.rsplit(".", 1)[-1] == key]
            hint = f"did you mean {path}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            if not near and elsewhere:
                hint = f"did you mean {elsewhere[0]}?"
            noun = "section" if not path else "key"
            faults.append(f"{full}: unknown {noun}; {hint}")
            continue
        if full == "policy" and isinstance(value, dict):
            sections = [(f"policy.{component}", rule or None, PolicyRule) for component, rule in value.items()]
        else:
            sections = [(full, value, section)] if (section := _dataclass_of(hints[key])) else []
        for where, inner, section in sections:
            if inner is None:
                faults.append(
                    f"{where}: empty; give it keys ({', '.join(typing.get_type_hints(section))}) or remove it"
                )
            elif not isinstance(inner, dict):
                faults.append(f"{where}: expected a section with keys, got {inner!r}")
            _find_unknown_keys(inner, section, f"{where}.", faults)


def _dataclass_of(kind: Any) -> Any:
    for candidate in (kind, *typing.get_args(kind)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _all_keys(kind: Any, path: str) -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(kind).items():
        keys.append(path + name)
        if (section := _dataclass_of(hint)) is not None:
            keys += _all_keys(section, f"{path}{name}.")
    return keys


OPERATORS = {"at least": operator.ge, "more than": operator.gt, "at most": operator.le, "less than": operator.lt}
BOUNDS = {  # and the keys that they hold for
    "at least 2": "data.video.max_frames",
    "at least 1": "model.num_layers.* data.pack_tokens data.window data.prefetch_packs data.max_samples data.*_pixels "
    "train.steps train.packs_per_step train.eval_answer_tokens train.step_timeout_seconds policy.*.lora.rank "
    "parallel.replicate parallel.shard parallel.tensor parallel.context parallel.expert parallel.pipeline "
    "parallel.reshard_after_forward memory.recompute memory.loss_chunk_tokens checkpoint.keep log.every",
    "at least 0": "data.split data.max_bad_fraction data.workers train.warmup_steps train.min_learning_rate "
    "train.weight_decay train.clip_norm train.router_loss train.eval_every train.eval_answers train.betas.* "
    "policy.*.weight_decay policy.*.lora.dropout parallel.prefetch checkpoint.every",
    "more than 0": "data.*.fps data.*.limit_seconds train.learning_rate train.epochs train.time_limit_minutes "
    "train.epsilon policy.*.learning_rate policy.*.lora.alpha",
    "at most 1": "data.split data.max_bad_fraction",
    "less than 1": "train.betas.* policy.*.lora.dropout",
}


def _numbers(node: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a tree with their paths."""
    if isinstance(node, dict | list):
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _numbers(item, f"{path}.{key}" if path else str(key))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path, node


def _find_bad_values(config: Config) -> list[str]:
    """Range checks and rules between keys. Each fault names its key, what is allowed and what came."""
    numbers = list(_numbers(config_to_dict(config)))
    faults = [
        f"{path}: expected {words}, got {value!r}"
        for words, keys in BOUNDS.items()
        for pattern in keys.split()
        for path, value in numbers
        if fnmatchcase(path, pattern) and not OPERATORS[words[:-2]](value, int(words[-1]))
    ]
    if config.log.profile is not None and not 1 <= config.log.profile[0] <= config.log.profile[1]:
        faults.append(f"log.profile: expected [first step, last step] from 1 on, got {list(config.log.profile)}")
    if config.train.steps is not None and config.train.epochs is not None:
        faults.append("train.steps and train.epochs are both set; keep one")
    if config.data.split and config.data.eval:
        faults.append("data.split and data.eval are both set; keep one")
    if 0 < config.train.learning_rate < config.train.min_learning_rate:
        faults.append(
            f"train.min_learning_rate ({config.train.min_learning_rate:g}) is above "
            f"train.learning_rate ({config.train.learning_rate:g})"
        )
    for name, rule in config.policy.items():
        if rule.lora is not None and rule.freeze is False:
            faults.append(f"policy.{name}: lora trains in place of the weights, freeze: false trains them; keep one")
        if rule.lora is not None and rule.lora.modules == ():
            faults.append(f"policy.{name}.lora.modules: expected at least one name; leave it out for every linear")
        for entry in (rule.lora and rule.lora.modules) or ():
            try:
                re.compile(entry)
            except re.error as error:
                faults.append(
                    f"policy.{name}.lora.modules: {entry!r} is neither a name nor a regular expression: {error}"
                )
    shards = config.parallel.context * config.parallel.tensor
    if shards > 0 and config.data.pack_tokens % shards:
        faults.append(
            f"data.pack_tokens: {config.data.pack_tokens} does not divide by parallel.context x parallel.tensor = "
            f"{shards}; the next that does is {-(-config.data.pack_tokens // shards) * shards}"
        )
    return faults
