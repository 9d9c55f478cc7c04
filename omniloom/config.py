"""The whole configuration tree and the one place where it is read and checked.

Plain frozen dataclasses: the annotation of a key says its type, its range and, in one line, what it does. One walk over
those annotations reads a YAML file, a dict or command-line overrides, reports every fault at once with its path and,
for a wrong name, the nearest right one. Needs neither torch nor pydantic.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from omniloom.options import (
    Count,
    CountOrZero,
    Decay,
    FieldNames,
    Format,
    NotNegative,
    OptionReader,
    Positive,
    ProcessorOptions,
    Range,
    Share,
    load_yaml,
    members_of,
)
from omniloom.types import Kernels, suggest

Dtype = Literal["bf16", "float32"]
Modality = Literal["text", "image", "video", "audio"]
Recompute = Literal["none", "selective", "full"]
OptimizerStates = Literal["float32", "bf16", "8bit"]

OTHER_TRAINERS = Path(__file__).with_name("other_trainers.yaml")


class ConfigError(ValueError):
    """One or more faults of a configuration; the message lists all of them."""

    def __init__(self, faults: list[str], where: str) -> None:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        super().__init__(f"{len(faults)} fault{'s' * (len(faults) != 1)} in {where}:\n{listed}")
        self.faults = faults


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """Layers to keep from the front of the checkpoint."""

    text: Annotated[Count | None, "decoder layers to keep from the front; fewer to try a run out"] = None
    vision: Annotated[Count | None, "vision layers to keep from the front; null keeps all"] = None
    audio: Annotated[Count | None, "audio layers to keep from the front; null keeps all"] = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: Annotated[str, "directory of a published checkpoint, or a hub's id"] = ""
    adapter: Annotated[str | None, "a PEFT adapter of this model, from which LoRA goes on"] = None
    modalities: Annotated[tuple[Modality, ...] | None, "what to build; fewer where rows have fewer"] = None
    num_layers: LayerCounts = field(default_factory=LayerCounts)
    new_speakers: Annotated[dict[str, str], "voices to train beside the checkpoint's: name: the one it starts from"] = (
        field(default_factory=dict)
    )
    quantize: Annotated[
        Literal["nf4"] | None, "hold frozen matrices beside LoRA as 4-bit codes (QLoRA); heads and embeddings stay"
    ] = None
    attention: Kernels = field(default_factory=Kernels)
    dtype: Annotated[
        Literal["auto", "bf16", "float32"],
        "of compute and frozen weights; auto is bf16 where the device computes in it, which many CPUs do ten times "
        "slower, else float32. Weights that train are float32",
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    limit_seconds: Annotated[Positive, "a longer file is refused undecoded; raise it where you have such"] = 7200.0


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set, and what it has in place of the data section: any of `OWN_OPTIONS`, in `options`."""

    path: Annotated[str, "a file, a pattern of files, or a folder"] = ""
    name: Annotated[str | None, "what metrics call it; null is the last part of the path"] = None
    part: Annotated[str | None, "of a folder that has several, as train and val; null is train for data.train"] = None
    weight: Annotated[Positive | None, "its share of the rows of an epoch, against those of the others"] = None
    repeat: Annotated[Positive, "how often an epoch goes through it, where there are no weights"] = 1.0
    loss_weight: Annotated[NotNegative, "multiplies the weights of its rows"] = 1.0
    stream: Annotated[bool, "a name or folder for the package datasets, read in order as it comes"] = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataConfig(ProcessorOptions):
    """Which rows there are, and what becomes of them."""

    train: Annotated[tuple[str | DataSource, ...], "data sets: paths, or records of a path with options"] = ()
    eval: Annotated[tuple[str | DataSource, ...], "as train, to evaluate on; shows what is learnt by heart"] = ()
    split: Annotated[Share, "share of the training rows held out for evaluation where `eval` is empty"] = 0.0
    format: Annotated[Format, "of the rows; auto detects it row by row, name it where preview is wrong"] = "auto"
    attr: FieldNames = field(default_factory=FieldNames)
    max_samples: Annotated[Count | None, "per data set: the first N rows only, to try a run out"] = None
    exclude: Annotated[str | None, "a file that names rows to leave out, as check --write-excludes writes it"] = None
    media_dir: Annotated[str | None, "where relative media paths start; null is the folder of each data file"] = None
    allow_outside_media_dir: Annotated[bool, "read media outside the media folder, where you trust the rows"] = False
    allow_urls: Annotated[bool, "fetch media by http, rows from any URL or hub, where you trust them"] = False
    unplaced_media: Annotated[Literal["error", "front"], "clips without a placeholder; front puts them first"] = "error"
    pack_tokens: Annotated[
        Count, "tokens of a pack; a sample is never cut. Less where memory is short, more where rows are longer"
    ] = 8192
    window: Annotated[Count, "rows planned together; more fill packs better, and the first step waits for them"] = 2048
    overlong: Annotated[
        Literal["drop", "shrink", "error"],
        "samples longer than a pack are listed as bad (drop), have their media made smaller (shrink), or end the "
        "run (error)",
    ] = "drop"
    max_bad_fraction: Annotated[
        Share, "share of bad rows in a window beyond which the run stops; raise it to go on without known ones"
    ] = 0.05
    workers: Annotated[CountOrZero, "loader processes per rank; more where the screen shows that steps wait"] = 2
    prefetch_packs: Annotated[Count, "packs loaded ahead; more where rows take unequally long to load"] = 4
    stream_shards: Annotated[Count, "readers of a stream of several files; as many as ranks at least"] = 8
    shuffle: Annotated[bool, "draw rows in random order, by train.seed; false where theirs is meant"] = True
    cache: Annotated[str | None, "a folder for decoded media, where decoding them anew holds later epochs up"] = None
    cache_gigabytes: Annotated[Positive, "of data.cache at most; what was not used for longest goes first"] = 100.0
    cache_dir: Annotated[str | None, "where measured sizes are kept, for all runs; null is cache/ of the run"] = None
    scratch: Annotated[str | None, "of each node, for indexes and unpacked files; null is in TMPDIR, if large"] = None
    audio: AudioConfig = field(default_factory=AudioConfig)


OWN_OPTIONS = (  # of the data section, what a data set may have of its own
    *("format", "attr", "max_samples", "split", "media_dir", "unplaced_media", "image", "video", "audio"),
    *("template", "template_variables", "system", "train_on_prompt", "last_turn_only", "enable_thinking"),
)


def as_source(entry: str | DataSource) -> DataSource:
    return DataSource(path=entry) if isinstance(entry, str) else entry


def options_of(data: DataConfig, entry: str | DataSource) -> DataConfig:
    """The data section as it holds for one data set."""
    return dataclasses.replace(data, **as_source(entry).options)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    run_dir: Annotated[str, "directory of the run"] = "runs/train"
    steps: Annotated[Count | None, "optimizer steps; one epoch where neither steps nor epochs is set"] = None
    epochs: Annotated[Positive | None, "passes over the rows, in place of steps"] = None
    packs_per_step: Annotated[
        Count, "packs of a step, on all ranks together: with data.pack_tokens the global batch. A multiple of the ranks"
    ] = 8
    learning_rate: Annotated[Positive, "peak, after the warm-up; LoRA takes some ten times that of full training"] = (
        1e-5
    )
    min_learning_rate: Annotated[NotNegative, "where the schedule ends"] = 0.0
    warmup_steps: Annotated[CountOrZero, "steps of linear growth at the start; more where the loss jumps there"] = 0
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], "of the rate after the warm-up; constant where steps may be added"
    ] = "cosine"
    optimizer: Annotated[Literal["adamw", "muon"], "muon: for the matrices of layers, and adamw for the rest"] = "adamw"
    optimizer_states: Annotated[
        OptimizerStates, "of its moments; float32 is as wide as the weights, bf16 and 8bit are for want of memory"
    ] = "float32"
    betas: Annotated[tuple[Decay, Decay], "AdamW's; the first is Muon's momentum, too"] = (0.9, 0.95)
    epsilon: Annotated[Positive, "AdamW's"] = 1e-8
    weight_decay: Annotated[NotNegative, "AdamW's and Muon's"] = 0.0
    clip_norm: Annotated[NotNegative, "largest gradient norm; less where the loss has spikes, 0 only measures"] = 1.0
    loss: Annotated[
        Literal["token", "sample", "sqrt", "batch"],
        "what a token weighs: 1 (token), or the tokens of a sample 1 together (sample) or the root of their number "
        "(sqrt), or those of a pack 1 together (batch); sample or sqrt where long answers drown short ones, batch "
        "to repeat a trainer that takes the mean of micro-batch means",
    ] = "token"
    router_loss: Annotated[
        NotNegative,
        "coefficient of the experts' load-balancing loss; raise it where the report shows experts that get ever "
        "fewer tokens",
    ] = 0.0
    codes_loss: Annotated[NotNegative, "coefficient of the codes of speech beside each frame's first"] = 0.3
    nonfinite: Annotated[
        Literal["stop", "skip"], "a step whose loss or gradient is not finite ends the run (stop) or is left out (skip)"
    ] = "stop"
    seed: Annotated[
        int, Range(ge=0, lt=2**63), "of order, adapters and dropout; another one shows what of a result is chance"
    ] = 0
    deterministic: Annotated[
        bool, "only deterministic kernels, which are slower; to compare runs bit by bit on an accelerator"
    ] = False
    eval_every: Annotated[CountOrZero, "steps between evaluations; 0 is only at the end"] = 0
    eval_answers: Annotated[CountOrZero, "held-out rows to answer, greedily, at each evaluation"] = 0
    eval_answer_tokens: Annotated[Count, "tokens of an answer at most; each is a pass, more where answers are cut"] = 64
    eval_metrics: Annotated[tuple[str, ...], "your functions of answers: module:function or file.py:function"] = ()
    patience: Annotated[Count | None, "evaluations in a row without a better checkpoint.best that end the run"] = None
    time_limit_minutes: Annotated[Positive | None, "then the run saves and stops; less than the scheduler's"] = None
    step_timeout_seconds: Annotated[float, Range(ge=1), "a rank silent for longer is gone; more for long steps"] = (
        1800.0
    )

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """By the loss's name, what multiplies its mean in the objective."""
        return {"text": 1.0, "router": self.router_loss, "code0": 1.0, "codes": self.codes_loss}

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows so many steps, whatever comes then."""
        return bool(self.eval_every and step) and step % self.eval_every == 0


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: Annotated[Count, "of every adapter; more can learn more, and takes more memory"] = 16
    alpha: Annotated[Positive, "scaling is alpha / rank; to be raised with the rank"] = 32.0
    dropout: Annotated[Decay, "before the adapter; some 0.05 where rows are few"] = 0.0
    rslora: Annotated[bool, "scaling is alpha / sqrt(rank), which suits high ranks"] = False
    dora: Annotated[bool, "train magnitudes of the weights' rows, too; slower, where LoRA learns too little"] = False
    dtype: Annotated[Dtype, "of the adapters and their optimizer states"] = "float32"
    modules: Annotated[
        tuple[str, ...] | None,
        "ends of transformers' module names, or regular expressions of whole ones; null is every linear",
    ] = None


@dataclass(frozen=True, kw_only=True)
class PolicyRule:
    """What holds for the parameters of one component. None leaves the outer rule or the train section in force."""

    freeze: Annotated[bool | None, "keep the weights as published, as of towers that know such media"] = None
    learning_rate: Annotated[Positive | None, "in place of train.learning_rate, as less for towers"] = None
    weight_decay: Annotated[NotNegative | None, "in place of train.weight_decay"] = None
    recompute: Annotated[bool | None, "in place of memory.recompute, of a whole tower or the decoder"] = None
    lora: Annotated[LoraConfig | None, "adapters train in place of the component's own weights"] = None


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Ranks that divide a pack's tokens, by what they exchange in attention."""

    ulysses: Annotated[Count, "ranks that swap tokens for heads, as far as the query heads divide"] = 1
    ring: Annotated[Count, "ranks that pass keys and values on, whatever the heads"] = 1


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    layout: Annotated[
        Literal["given", "auto"], "auto takes the degrees with the least estimated step time; `parallel: auto` says so"
    ] = "given"
    replicate: Annotated[Count, "copies of the sharded model; as many as machines where their links are slow"] = 1
    shard: Annotated[Count | Literal["auto"], "ranks that share parameters; auto is all that are left"] = "auto"
    tensor: Annotated[
        Count, "ranks that divide each matrix; within a machine, where a layer is too large for a device"
    ] = 1
    context: Annotated[
        Count | ContextConfig,
        "ranks that divide a pack's tokens, where packs are too long for a device; a number is those of ulysses",
    ] = 1
    expert: Annotated[
        Count, "ranks that divide the experts; where gathering all experts of a layer takes too long or does not fit"
    ] = 1
    pipeline: Annotated[
        Count, "ranks that divide the layers; across machines, where parameters do not fit or links are slow"
    ] = 1
    pipeline_layers: Annotated[tuple[CountOrZero, ...] | None, "layers of each stage; null is balanced by cost"] = None
    pipeline_schedule: Annotated[Literal["1f1b", "interleaved"], "order of packs through the stages"] = "1f1b"
    stages_per_rank: Annotated[Count, "stages of each pipeline rank under pipeline_schedule=interleaved"] = 2
    encoder_pool: Annotated[Literal["group", "data"], "ranks that share tower work: a model-parallel group or all"] = (
        "group"
    )
    prefetch: Annotated[CountOrZero, "blocks gathered ahead, both ways; more hides slow links and takes memory"] = 1
    reshard_after_forward: Annotated[
        bool | Count, "free gathered parameters; false where memory allows, a number is the ranks that share"
    ] = True
    cpu_offload: Annotated[bool, "keep parameters and optimizer states in host memory; slow, the last resort"] = False

    @property
    def ulysses(self) -> int:
        return self.context.ulysses if isinstance(self.context, ContextConfig) else self.context

    @property
    def ring(self) -> int:
        return self.context.ring if isinstance(self.context, ContextConfig) else 1


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    recompute: Annotated[
        Recompute | Count,
        "activations computed anew in backward: selective, then full, where memory is short, none where it is not; "
        "n is every n-th block",
    ] = "none"
    offload_activations: Annotated[
        bool, "keep activations in host memory until backward; where full recompute is not enough"
    ] = False
    offload_optimizer: Annotated[
        bool, "keep the optimizer's states in host memory between steps; where they do not fit the device"
    ] = False
    loss_chunk_tokens: Annotated[Count | Literal["auto"], "tokens with logits at once; fewer for want of memory"] = (
        "auto"
    )
    compile: Annotated[
        bool | Literal["auto"], "compile the blocks; auto: on CPU with a C++ compiler, in runs of over 20 minutes"
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Annotated[CountOrZero, "steps between checkpoints: what a kill may cost; 0 is only at the end"] = 500
    keep: Annotated[Count, "newest checkpoints that are kept"] = 2
    best: Annotated[str | None, "figure of evaluations, as eval_loss or eval_wer, whose best checkpoints are kept"] = (
        None
    )
    best_is: Annotated[Literal["lowest", "highest"] | None, "null is lowest of losses and error rates alone"] = None
    keep_best: Annotated[Count, "checkpoints that are kept for checkpoint.best, beside the newest"] = 1
    resume: Annotated[str, "auto, none, or a checkpoint directory, to branch off another run"] = "auto"
    export: Annotated[bool, "write hf/ at the end; omniloom export does it later"] = True
    save_optimizer: Annotated[
        bool, "checkpoints hold the optimizer's states; false is smaller, and nothing goes on exactly from them"
    ] = True
    load_optimizer: Annotated[bool, "go on with its optimizer states; false for a branch with other data"] = True
    load_rng: Annotated[bool, "go on with the checkpoint's random generators"] = True
    asynchronous: Annotated[bool, "write from a copy in host memory meanwhile, where saving holds steps up"] = False


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: Annotated[Count, "steps between lines on the screen"] = 1
    tensorboard: Annotated[bool, "write event files"] = True
    wandb: Annotated[str | None, "project of Weights & Biases to log to, where wandb is installed"] = None
    swanlab: Annotated[str | None, "project of SwanLab to log to, where swanlab is installed"] = None
    mlflow: Annotated[str | None, "experiment of MLflow to log to, where mlflow is installed"] = None
    profile: Annotated[tuple[Count, Count] | None, "first and last step of a trace of where time goes"] = None


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    policy: Annotated[dict[str, PolicyRule], "what trains, by component"] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(source: str | Path | Mapping[str, Any] | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or sections as a dict, or nothing; apply `a.b=value` overrides, check everything.

    An override's text is read by its key's type: text stays as it is, `null` alone unsets the key.
    Raises: ConfigError listing every fault at once.
    """
    faults: list[str] = []
    if source is None or isinstance(source, Mapping):
        where, tree = "the command line" if source is None else "the configuration", _copy(source or {})
    else:
        where, tree = str(source), _read_yaml(Path(source))
    for override in overrides:
        _apply_override(tree, override, faults)
    return _checked(tree, where, faults)


def config_from_words(words: Sequence[str]) -> Config:
    """The config that command-line words describe: `[FILE] a.b=c ...`. Raises: ConfigError."""
    is_file = bool(words) and not is_override(words[0])
    return load_config(words[0] if is_file else None, words[1:] if is_file else words)


def is_override(word: str) -> bool:
    """Whether a word of a command sets a key; else it names a file."""
    return re.match(r"[\w.]*=", word) is not None and not Path(word).exists()


def override_config(config: Config, overrides: Sequence[str], *, verb: str, takes: Sequence[str]) -> Config:
    """`config` with the overrides that a verb takes: keys, or whole sections as `data.image.*`.

    Raises: ConfigError, also for a key that the verb would not use.
    """
    faults: list[str] = []
    tree = config_to_dict(config)
    known = {path for path, *_ in keys_of()}
    for override in overrides:
        name = override.partition("=")[0]
        taken = any(fnmatchcase(name, pattern) or fnmatchcase(f"{name}.", pattern) for pattern in takes)
        if not taken and (name in known or name.startswith("policy.")):
            faults.append(f"{name}: {verb} does not use it; it takes {', '.join(takes)}")
        else:
            _apply_override(tree, override, faults)
    return _checked(tree, "the command line", faults)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The tree as plain YAML types, for `config.yaml` beside a run."""
    tree: dict[str, Any] = _copy(dataclasses.asdict(config))
    data = tree["data"]
    data["attr"] = _without_nulls(data["attr"])
    for name in ("train", "eval"):  # an empty section would be refused when it is read again
        data[name] = [
            _without_nulls({**entry.pop("options"), **entry}) if isinstance(entry, dict) else entry
            for entry in data[name]
        ]
    tree["policy"] = {name: _without_nulls(rule) for name, rule in tree["policy"].items()}
    return tree


def _without_nulls(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value is not None
    }


def dump_config(config: Config) -> str:
    return str(yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True))


def keys_of(section: Any = None, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key below a section class, in order: dotted path, annotation, default.

    A component's name, and the place of a record in a list, is a `*`.
    """
    section = Config if section is None else section
    hints = typing.get_type_hints(section, include_extras=True)
    for item in dataclasses.fields(section):
        kind = hints[item.name]
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        yield path + item.name, kind, default
        for member in members_of(kind):
            arguments = typing.get_args(member)
            if dataclasses.is_dataclass(member):
                yield from keys_of(member, f"{path}{item.name}.")
            elif typing.get_origin(member) is dict and dataclasses.is_dataclass(arguments[1]):
                yield from keys_of(arguments[1], f"{path}{item.name}.*.")


def _hints(section: Any) -> dict[str, Any]:
    """The keys that a section may have in a file, with their annotations."""
    hints = typing.get_type_hints(section, include_extras=True)
    if section is DataSource:
        whole = typing.get_type_hints(DataConfig, include_extras=True)
        del hints["options"]
        hints |= {name: whole[name] for name in OWN_OPTIONS}
    return hints


def _copy(value: Any) -> Any:
    """Nested dicts and lists of one's own, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        fault = (
            f"expected a YAML file, got a directory; a model is given as model.path={path}, rows as data.train={path}"
        )
        raise ConfigError([fault], str(path))
    if not path.is_file():
        near = suggest(path.name, [p.name for p in path.parent.glob("*.y*ml")], among="", before=f"{path.parent}/")
        raise ConfigError([f"no such file: {path}{near}"], "the command line")
    hint = "" if path.suffix in (".yaml", ".yml") else f"; rows are given as data.train={path}"
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError([f"not valid YAML: {place}{problem}{hint}"], str(path)) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        got = type(tree).__name__
        raise ConfigError([f"expected sections (model, data, train, ...), got a {got}{hint}"], str(path))
    return tree


def _apply_override(tree: dict[str, Any], override: str, faults: list[str]) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        faults.append(f"{override!r} is not an override; expected section.key=value, e.g. train.steps=100")
        return
    keys, kind = _find_key(name.split("."))
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        elif not isinstance(child, dict):
            faults.append(f"{name}: {key} holds a value, not a section")
            return
        node = child
    if text.strip() == "null":
        node.pop(keys[-1], None)
        if keys[0] == "policy" and len(keys) == 3 and not node:  # a rule without keys would be refused
            del tree["policy"][keys[1]]
    else:
        node[keys[-1]] = _value_of(text, kind)


def _find_key(keys: list[str]) -> tuple[list[str], Any]:
    """The path of a key in the tree, since component names have dots of their own, and its annotation, if known."""
    kind: Any = Config
    if keys[0] == "policy" and len(keys) > 1:
        hints = typing.get_type_hints(PolicyRule, include_extras=True)
        mistyped = len(keys) > 2 and suggest(keys[-1], hints, among="")
        at = next((at for at in range(2, len(keys)) if keys[at] in hints), len(keys) - 1 if mistyped else len(keys))
        keys, kind = ["policy", ".".join(keys[1:at]), *keys[at:]], PolicyRule
    for key in keys[2 if kind is PolicyRule else 0 :]:
        section = next((member for member in members_of(kind) if dataclasses.is_dataclass(member)), None)
        kind = typing.get_type_hints(section, include_extras=True).get(key) if section is not None else None
    return keys, kind


def _value_of(text: str, kind: Any) -> Any:
    """The text of an override by its key's type; what is no text is YAML."""
    members = members_of(kind)
    if any(typing.get_origin(member) is tuple for member in members):
        return text  # the walk splits it, as in a file
    if members and all(member is str or typing.get_origin(member) is Literal for member in members):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


# ---------------------------------------------------------------------------------------- checking


def _checked(tree: dict[str, Any], where: str, faults: list[str]) -> Config:
    """The tree as a Config. Raises: ConfigError with `faults` and all that is wrong with the tree."""
    tree = {key: {} if value is None else value for key, value in tree.items()}
    if tree.get("parallel") == "auto":
        tree["parallel"] = {"layout": "auto"}
    reader = _ConfigReader()
    config = reader.section(Config, tree, "")
    faults = faults + reader.faults
    if not faults:
        faults = _contradictions(config)
    if faults:  # wrong names first, since they may be why others follow
        raise ConfigError(sorted(faults, key=lambda fault: (": unknown" not in fault, fault)), where)
    assert isinstance(config, Config)
    return config


class _ConfigReader(OptionReader):
    def section(self, kind: Any, value: Mapping[Any, Any], path: str) -> Any:
        hints = _hints(kind)
        fields: dict[str, Any] = {}
        for key, item in value.items():
            if key in hints:
                fields[key] = self.read(hints[key], item, f"{path}{key}")
                continue
            elsewhere = [name for name, *_ in keys_of() if name.rpartition(".")[2] == key]
            hint = of_other_trainers(str(key)) or suggest(str(key), hints, among="known here:", before=path)
            if elsewhere and "did you mean" not in hint:
                hint = f"; did you mean {elsewhere[0]}?"
            self.faults.append(f"{path}{key}: unknown {'key' if path else 'section'}{hint}")
        if kind is DataSource:
            fields["options"] = {name: fields.pop(name) for name in OWN_OPTIONS if name in fields}
        return kind(**fields)


def of_other_trainers(name: str) -> str:
    """What to say of a name that LLaMA-Factory, ms-swift, transformers or Megatron have; empty for others."""
    tree = yaml.safe_load(OTHER_TRAINERS.read_text(encoding="utf-8"))
    name = name.replace("-", "_")
    for names, words in tree.pop("together").items():
        if name in names.split():
            return f"; here it is {words}"
    for rules in reversed(tree.values()):  # names of transformers are the commoner ones
        if name in rules["keys"]:
            key, _, *note = rules["keys"][name]
            return f"; here it is {key}" + (f" ({note[0]})" if note and note[0] else "")
        for kind in ("needless", "lost"):
            if why := next((why for why, names in rules[kind].items() if name in names.split()), None):
                return f"; {'not needed here' if kind == 'needless' else 'without a counterpart here'}: {why}"
    return ""


def _contradictions(config: Config) -> list[str]:
    """Rules between keys. Each fault names its keys, what is allowed and what came."""
    data, train = config.data, config.train
    faults = []
    if config.log.profile is not None and config.log.profile[0] > config.log.profile[1]:
        faults.append(f"log.profile: expected [first step, last step], got {list(config.log.profile)}")
    for one, other, both in (
        ("train.steps", "train.epochs", train.steps is not None and train.epochs is not None),
        ("data.split", "data.eval", data.eval and any(options_of(data, entry).split for entry in data.train)),
        ("data.train_on_prompt", "data.last_turn_only", data.train_on_prompt and data.last_turn_only),
    ):
        if both:
            faults.append(f"{one} and {other} are both set; keep one")
    faults += _source_contradictions(data)
    for low, high, of in (
        ("train.min_learning_rate", "train.learning_rate", (train.min_learning_rate, train.learning_rate)),
        ("data.image.min_pixels", "data.image.max_pixels", (data.image.min_pixels, data.image.max_pixels)),
        ("data.video.min_pixels", "data.video.max_pixels", (data.video.min_pixels, data.video.max_pixels)),
    ):
        if of[0] is not None and of[1] is not None and of[0] > of[1]:
            faults.append(f"{low} ({of[0]:g}) is above {high} ({of[1]:g})")
    faults += _rule_contradictions(config.policy, config.model.quantize)
    if config.parallel.layout == "auto":
        chosen = ("replicate", "shard", "tensor", "context", "expert", "pipeline", "pipeline_layers")
        given = [name for name in chosen if getattr(config.parallel, name) != getattr(ParallelConfig(), name)]
        if given:
            faults.append(f"parallel.layout: auto chooses parallel.{given[0]} itself; remove one of the two")
    parallel = config.parallel
    parts, chunks = parallel.ulysses * parallel.ring * parallel.tensor, 2 * parallel.ring if parallel.ring > 1 else 1
    shards = math.lcm(parts, chunks)
    if data.pack_tokens % shards:
        of_ring = "" if shards == parts else f", in two chunks for each of {parallel.ring} ring ranks: {shards}"
        faults.append(
            f"data.pack_tokens: {data.pack_tokens} does not divide by parallel.context x parallel.tensor = "
            f"{parts}{of_ring}; the next that does is {-(-data.pack_tokens // shards) * shards}"
        )
    return faults


def _source_contradictions(data: DataConfig) -> list[str]:
    faults = []
    weights = [as_source(entry).weight for entry in data.train]
    if any(weights) and not all(weights):
        faults.append(
            f"data.train.{weights.index(None)}.weight: not set, while other data sets have one; set it for all"
        )
    attrs = {"data.attr": data.attr}
    for name, entries in (("train", data.train), ("eval", data.eval)):
        for index, entry in enumerate(entries):
            if isinstance(entry, DataSource) and not entry.path:
                faults.append(f"data.{name}.{index}.path: not set; name the file of the source")
            if isinstance(entry, DataSource) and "attr" in entry.options:
                attrs[f"data.{name}.{index}.attr"] = entry.options["attr"]
    for path, attr in attrs.items():
        for name in ("ranking", "chosen", "rejected", "kto_tag"):
            if value := getattr(attr, name):
                faults.append(f"{path}.{name}: preference data are not trained here; expected null, got {value}")
    return faults


def _rule_contradictions(rules: Mapping[str, PolicyRule], quantize: str | None) -> list[str]:
    faults = []
    if quantize and not any(rule.lora for rule in rules.values()):
        faults.append(
            f"model.quantize: {quantize} is for frozen weights beside LoRA; add policy.text.lora or remove it"
        )
    for name, rule in rules.items():
        if quantize and rule.lora is not None and rule.lora.dora:
            faults.append(f"policy.{name}.lora.dora: not under model.quantize, which keeps no norms of rows; set false")
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
    return faults
