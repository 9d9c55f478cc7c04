"""Tiny random checkpoints in the published Hugging Face layout, complete enough for every tool that reads one.

Owns the random weights and the files of `omniloom tiny`; what is particular to a family is its recipe
(`tiny_<family>.py`). The weights are written by transformers itself, so that names, nesting and sharding are those of a
published checkpoint by construction; nothing here is imported by training.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniloom.processors.chat_template import TEMPLATE_DIR
from omniloom.tools import tiny_qwen2_5_omni, tiny_qwen2_5_vl, tiny_qwen3_omni, tiny_qwen3_vl, tiny_tokenizer
from omniloom.tools.tiny_recipe import SIZES, Recipe
from omniloom.types import suggest

RECIPES: Mapping[str, Recipe] = {
    "qwen3_omni": tiny_qwen3_omni.RECIPE,
    "qwen2_5_omni": tiny_qwen2_5_omni.RECIPE,
    "qwen3_vl": tiny_qwen3_vl.DENSE,
    "qwen3_vl_moe": tiny_qwen3_vl.EXPERTS,
    "qwen2_5_vl": tiny_qwen2_5_vl.RECIPE,
}
FAMILIES = tuple(RECIPES)


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

    `size` is "tiny" (a few 100k parameters, for tests) or "20m" (a thinker of about 20M, for benchmarks).
    `overrides` changes config.json by dotted path, e.g. `{"thinker_config.text_config.num_hidden_layers": 1}`.
    The same arguments always give the same bytes. Weights are bfloat16, larger than a usual initialisation so that
    routers decide clearly and norms and biases differ from their neutral values.

    Raises: ValueError for an unknown family, size or override, and for a directory that holds files.
    """
    recipe = _find(RECIPES, family, "family")
    _find(dict.fromkeys(SIZES), size, "size")
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; name a new directory or empty it first")
    directory.mkdir(parents=True, exist_ok=True)
    ids = tiny_tokenizer.write_tokenizer(
        directory,
        num_words=num_words,
        tokens=recipe.tokens,
        token_names=recipe.token_names,
        chat_template=(TEMPLATE_DIR / recipe.chat_template).read_text(encoding="utf-8"),
        processor_class=recipe.processor_class,
    )
    vocab_size = -(-(max(ids.values()) + 1) // 64) * 64  # padded like the published ones
    config = recipe.config(size, ids, vocab_size)
    for path, value in (overrides or {}).items():
        _override(config, path, value)
    _write_weights(recipe, config, directory, seed, max_shard_size or ("600KB" if size == "tiny" else "20MB"))
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", _generation_config(ids))
    for name, content in recipe.processor_files.items():
        _write_json(directory / name, content)
    if recipe.write_extra is not None:
        recipe.write_extra(directory)
    return directory


def _find(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name in table:
        return table[name]
    raise ValueError(f"unknown {what} {name!r}{suggest(name, table)}")


def _override(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = config
    for key in parents:
        node = node.get(key) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ValueError(f"override {path!r}: config.json has no section {key!r}")
    if last not in node:
        raise ValueError(f"override {path!r}: no such key{suggest(last, node, among='known here:')}")
    node[last] = value


def _write_weights(recipe: Recipe, config: dict[str, Any], directory: Path, seed: int, max_shard_size: str) -> None:
    import torch
    import transformers

    settings = getattr(transformers, recipe.config_class).from_dict(copy.deepcopy(config))
    with torch.device("meta"):
        model = getattr(transformers, recipe.architecture)(settings)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for name in recipe.float32_modules:
        model.get_submodule(name).float()
    model.tie_weights()  # which to_empty has parted
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_random_weight(name, parameter, generator))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    for shard in directory.glob("*.safetensors"):
        if recipe.turned:
            _turn(shard, recipe.turned)
        shard.chmod(0o644)  # written through private temporary files; others may want to read them


def _turn(shard: Path, endings: tuple[str, ...]) -> None:
    """Swap the last two dims of some tensors of a file: transformers does not write them as they were published."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    turned = {name: value.mT.contiguous() if name.endswith(endings) else value for name, value in tensors.items()}
    save_file(turned, shard, metadata={"format": "pt"})


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


def _generation_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "do_sample": False,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
