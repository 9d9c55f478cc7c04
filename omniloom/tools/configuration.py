"""What there is to configure, from the annotations in `config.py`: `omniloom config` and docs/configuration.md."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_origin

import torch

from omniloom.config import ConfigError, keys_of, of_other_trainers
from omniloom.families.registry import SPECS
from omniloom.families.spec import ModelSpec
from omniloom.options import as_yaml, describe_type, members_of
from omniloom.tools.tiny import tiny_config
from omniloom.types import suggest

HEAD = """\
# Every key of the configuration

This page is written by `omniloom config --page`; the same words are in `omniloom config train`, `omniloom config
train.loss`, and, as a whole file with every default, in `omniloom config --defaults`. A key is set in a YAML file or
behind the verb: `omniloom train config.yaml train.steps=100 data.train=a.json,b.jsonl`. An unknown key is refused with
the nearest known one; names of LLaMA-Factory, ms-swift, transformers and Megatron are answered with ours.

- `null` as an override takes a key back to its default; a text that begins with `~/` is a path in the home directory.
- Without `train.steps` and `train.epochs` a run is one pass over the rows.
- Without a word about it a component trains, unless some component has adapters or the talker trains: naming one LoRA,
  or `policy.talker.freeze=false`, freezes all others that have no rule of their own. `policy.text.freeze=true` freezes
  the decoder with all its parts.
"""


@dataclass(frozen=True, kw_only=True)
class Key:
    name: str  # dotted; `*` stands for a component of the model
    type: str  # in words
    default: Any
    words: str  # what it does
    is_section: bool

    @property
    def has_value(self) -> bool:
        """Whether there is a default to show that is no section."""
        return not self.is_section or isinstance(self.default, int)


def keys() -> Iterator[Key]:
    """Every key of the tree, in order, those of optional sections and of one component's rule too."""
    for name, kind, default in keys_of():
        words = next((argument for argument in typing.get_args(kind)[1:] if isinstance(argument, str)), "")
        is_section = any(dataclasses.is_dataclass(member) or get_origin(member) is dict for member in members_of(kind))
        yield Key(name=name, type=describe_type(kind), default=default, words=words, is_section=is_section)


def describe(name: str | None) -> str:
    """The keys of a section, one key, or the whole tree, with types, defaults and words. Raises: ConfigError."""
    found = [key for key in keys() if name is None or key.name == name or key.name.startswith(f"{name}.")]
    found = found or [key for key in keys() if f".{name}." in f"{key.name}."]  # a part of a name
    if not found:
        hint = of_other_trainers(str(name)) or suggest(str(name), [key.name for key in keys()], among="")
        raise ConfigError([f"{name}: no such section or key{hint}"], "the command line")
    return "\n".join(_paragraph(key) for key in found if not key.is_section or key.words or key.name == name)


def _paragraph(key: Key) -> str:
    default = f"; default {as_yaml(key.default)}" if key.has_value else ""
    words = textwrap.fill(key.words, 80, initial_indent="    ", subsequent_indent="    ")
    return f"{key.name}: {key.type}{default}" + (f"\n{words}" if key.words else "")


def defaults() -> str:
    """A complete YAML file: every key with its default and, as a comment, its words; rules of a policy as comments."""
    lines, outside = [], ""
    for key in keys():
        depth = key.name.count(".")
        optional = outside and key.name.startswith(outside)
        if not optional:
            outside = ""
        if key.is_section and not dataclasses.is_dataclass(key.default):
            outside, value = f"{key.name}.", as_yaml(key.default)
        else:
            value = "" if key.is_section else as_yaml(key.default)
        text = f"{'  ' * depth}{key.name.rpartition('.')[2]}: {value}".rstrip()
        if optional and "*" in key.name:
            text = f"#   {key.name.removeprefix('policy.')}: {value}".rstrip()
        elif optional:
            text = f"# {text}"
        lines.append(f"{text:<44}  # {key.words}" if key.words else text)
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/configuration.md."""
    parts = [HEAD]
    section = ""
    for key in keys():
        top = key.name.partition(".")[0]
        if top != section:
            section = top
            parts.append(f"\n## {section}\n\n{key.words}\n" if key.words else f"\n## {section}\n")
            parts.append("| key | value | default | what it does |\n|---|---|---|---|")
        if not key.is_section or ("." in key.name and key.words):
            default = f"`{as_yaml(key.default)}`" if key.has_value else ""
            cells = (f"`{key.name}`", key.type, default, key.words)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    parts += [
        "\n## Components\n",
        "What a key of `policy` names, or an outer part of it; `lm_head` too where the head is not the embedding:\n",
    ]
    parts.append("| family | components |\n|---|---|")
    parts += [f"| {spec.name} | {', '.join(f'`{name}`' for name in _components(spec))} |" for spec in SPECS]
    return "\n".join(parts) + "\n"


def _components(spec: ModelSpec) -> list[str]:
    """In the order of the model's parameters."""
    with torch.device("meta"):
        model = spec.build(spec.read_config(tiny_config(spec.name), speaks=spec.read_talker is not None))
    return list(dict.fromkeys(spec.component_of(name) for name, _ in model.named_parameters()))
