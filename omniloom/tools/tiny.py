"""Tiny random checkpoints in the published Hugging Face layout, complete enough for every tool that reads one.

Owns the random weights and the files of `omniloom tiny`; what is particular to a family is data (`tiny_models/`). The
weights are written by transformers itself, so that names, nesting and sharding are those of a published checkpoint by
construction; nothing here is imported by training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from omniloom.checkpoint.files import read_json, write_json
from omniloom.processors.chat_template import TEMPLATE_DIR
from omniloom.tools.tiny_tokenizer import write_tokenizer
from omniloom.types import suggest

_MODELS = Path(__file__).parent / "tiny_models"
FAMILIES = ("qwen3_omni", "qwen2_5_omni", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe")


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """How one family's tiny checkpoint is made, as its file in `tiny_models/` says. Class names are transformers'."""

    architecture: str
    config_class: str
    processor_class: str
    chat_template: str  # a file of `processors/templates`
    tokens: tuple[str, ...]  # added ones, in the order of their ids
    token_names: dict[str, str]
    config: dict[str, Any]  # config.json of the smallest size; `token X` is the id of X
    sizes: dict[str, dict[str, Any]]  # what each size changes, by dotted path
    processor_files: dict[str, dict[str, Any]]  # file name -> content
    turned: tuple[str, ...] = ()  # endings of tensors that are published with their last two dims the other way round
    zero_centred: tuple[str, ...] = ()  # endings of norms whose factor is 1 + the weight
    carried: dict[str, list[int]] = field(default_factory=dict)  # shapes of tensors that are published beside these
    float32_modules: tuple[str, ...] = ()  # published wide; all else is bfloat16
    speakers: dict[str, int] = field(default_factory=dict)  # of spk_dict.pt: first tokens


def _read_model(family: str, size: str) -> TinyModel:
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}{suggest(family, FAMILIES)}")
    tree = yaml.safe_load((_MODELS / f"{family}.yaml").read_text(encoding="utf-8"))
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
    if size not in fields["sizes"]:
        raise ValueError(f"unknown size {size!r}{suggest(size, fields['sizes'])}")
    return TinyModel(**fields)


def tiny_config(family: str) -> dict[str, Any]:
    """config.json of a tiny checkpoint, with made-up ids of its tokens. Raises: ValueError for an unknown family."""
    model = _read_model(family, "tiny")
    words = (*model.tokens, "system", "user", "assistant")
    return _config(model, {token: number for number, token in enumerate(words)}, {})


def make_tiny(
    family: str,
    directory: str | Path,
    *,
    size: str = "tiny",
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    num_words: int = 1100,
    max_shard_size: str | None = None,
) -> Path:
    """Write a random checkpoint of `family` into `directory`, which may exist if it is empty; return the directory.

    `size` is "tiny" (a few 100k parameters, for tests), "20m" (a thinker of 20M, to measure) or Qwen3-Omni's "demo".
    `overrides` changes config.json by dotted path, e.g. `{"thinker_config.text_config.num_hidden_layers": 1}`.
    The same arguments always give the same bytes. Weights are bfloat16, larger than a usual initialisation so that
    routers decide clearly and norms and biases differ from their neutral values.

    Raises: ValueError for an unknown family, size or override, and for a directory that holds files.
    """
    model, directory = _read_model(family, size), Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; name a new directory or empty it first")
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(
        directory,
        num_words=num_words,
        tokens=model.tokens,
        token_names=model.token_names,
        chat_template=(TEMPLATE_DIR / model.chat_template).read_text(encoding="utf-8"),
        processor_class=model.processor_class,
    )
    config = _config(model, ids, {**model.sizes[size], **(overrides or {})})
    _write_weights(model, config, directory, seed, max_shard_size or ("20MB" if size == "20m" else "600KB"))
    end, blank = ids["<|im_end|>"], ids["<|endoftext|>"]
    generation = {"do_sample": False, "eos_token_id": [end, blank], "pad_token_id": blank}
    files = {"config.json": config, "generation_config.json": generation, **model.processor_files}
    for name, content in files.items():
        write_json(directory / name, content)
    _write_speakers(directory, model)
    return directory


def _config(model: TinyModel, ids: Mapping[str, int], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the ids of tokens, some values changed by dotted path. Raises: ValueError for a wrong path."""
    known = {f"token {text}": number for text, number in ids.items()}
    known["vocab_size"] = -(-(max(ids.values()) + 1) // 64) * 64  # padded like the published ones
    config: dict[str, Any] = _filled(model.config, known)
    for path, value in changes.items():
        _override(config, path, value)
    return config


def _filled(node: Any, known: Mapping[str, int]) -> Any:
    """A tree with the ids in place of their names."""
    if isinstance(node, dict):
        return {key: _filled(value, known) for key, value in node.items()}
    return known.get(node, node) if isinstance(node, str) else copy.copy(node)


def _override(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node: Any = config
    for key in parents:
        node = node.get(key) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ValueError(f"override {path!r}: config.json has no section {key!r}")
    if last not in node:
        raise ValueError(f"override {path!r}: no such key{suggest(last, node, among='known here:')}")
    node[last] = value


def _write_weights(tiny: TinyModel, config: dict[str, Any], directory: Path, seed: int, max_shard_size: str) -> None:
    import torch
    import transformers

    settings = getattr(transformers, tiny.config_class).from_dict(copy.deepcopy(config))
    with torch.device("meta"):
        model = getattr(transformers, tiny.architecture)(settings)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for name in tiny.float32_modules:
        model.get_submodule(name).float()
    model.tie_weights()  # which to_empty has parted
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_random_weight(name, parameter, generator) - float(name.endswith(tiny.zero_centred)))
    with quiet_transformers():
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    shards = sorted(directory.glob("*.safetensors"))
    if tiny.carried:
        carried = {name: torch.randn(s, generator=generator).bfloat16() for name, s in tiny.carried.items()}
        _rewrite(shards[-1], lambda tensors: tensors | carried)
        if (path := directory / "model.safetensors.index.json").is_file():
            index = read_json(path)
            write_json(path, index | {"weight_map": index["weight_map"] | dict.fromkeys(carried, shards[-1].name)})
    for shard in shards:
        if turned := tiny.turned:  # the last two dims of these are published the other way round
            _rewrite(shard, lambda found: {n: t.mT.contiguous() if n.endswith(turned) else t for n, t in found.items()})
        shard.chmod(0o644)  # written through private temporary files; others may want to read them


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' remarks, and its bars, which are longer on the screen than small files take to write."""
    import transformers

    remarks: Any = transformers.utils.logging
    level, bars = remarks.get_verbosity(), remarks.is_progress_bar_enabled()
    remarks.set_verbosity_error()
    remarks.disable_progress_bar()
    try:
        yield
    finally:
        remarks.set_verbosity(level)
        if bars:
            remarks.enable_progress_bar()


def _rewrite(shard: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a file of weights anew where transformers does not write them as they were published."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(shard)), shard, metadata={"format": "pt"})


def _random_weight(name: str, parameter: Any, generator: Any) -> Any:
    import torch

    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() > 1:
        if "embed" in name or "pos_" in name:
            return noise * 0.5
        fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()
        gain = 2.0 if name.endswith("gate.weight") else 1.0  # routers: gaps far above rounding
        return noise * (gain * fan_in**-0.5)
    if name.endswith("weight"):  # norms
        return 1.0 + 0.1 * noise
    return 0.05 * noise


def _write_speakers(directory: Path, model: TinyModel) -> None:
    """The voices that transformers asks for beside the weights, of families that speak by them."""
    import torch

    if not model.speakers:
        return
    generator = torch.Generator().manual_seed(0)
    vocoder = model.config["token2wav_config"]
    speakers = {
        name: {
            "bos_token": first,
            "cond": torch.randn(1, vocoder["dit_config"]["enc_emb_dim"], generator=generator),
            "ref_mel": torch.randn(1, 30, vocoder["bigvgan_config"]["mel_dim"], generator=generator),
        }
        for name, first in model.speakers.items()
    }
    torch.save(speakers, directory / "spk_dict.pt")
