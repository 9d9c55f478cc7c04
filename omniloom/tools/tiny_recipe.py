"""What a family's recipe for tiny checkpoints consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = ("tiny", "20m")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one family's tiny checkpoint is made. Names of classes are transformers'."""

    architecture: str
    config_class: str
    tokens: tuple[tuple[str, bool], ...]
    token_names: dict[str, str]
    chat_template: str  # a file beside this module
    processor_class: str
    config: Callable[[str, dict[str, int], int], dict[str, Any]]  # (size, token ids, vocab_size) -> config.json
    processor_files: Mapping[str, dict[str, Any]]  # file name -> content
    turned: tuple[str, ...] = ()  # endings of tensors that are published with their last two dims the other way round
    float32_modules: tuple[str, ...] = ()  # published wide; all else is bfloat16
    write_extra: Callable[[Path], None] | None = None  # files that no other family has
