"""What opening a processor is to every family: its own media words, its templates, and the dims that batches need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from omniloom.families.cost import sample_cost
from omniloom.families.spec import FamilyConfig
from omniloom.processors.chat import ChatProcessor, FamilyClips, open_processor
from omniloom.processors.tower_inputs import TowerInputs
from omniloom.types import ProcessorOptions

Config = TypeVar("Config", bound=FamilyConfig)


def open_family_processor(
    make_media: Callable[[Config, TowerInputs, Any], FamilyClips],
    templates: Sequence[str],
    checkpoint_dir: str | Path,
    config: Config,
    options: ProcessorOptions | None = None,
    *,
    past_time: bool = True,
) -> ChatProcessor:
    """A family's `make_processor` is a partial of this, and a partial of that the factory that loader workers get.

    `make_media` gets the family's config, the towers' inputs and the tokenizer as transformers loads it; `templates`
    and `past_time`: see `open_processor`. Raises: ValueError where the checkpoint lacks a file or a field.
    """
    return open_processor(
        checkpoint_dir,
        options,
        vision=config.vision,
        audio=config.audio,
        vocab_size=config.text.vocab_size,
        cost=partial(sample_cost, config.text, config.vision, config.audio),
        make_media=partial(make_media, config),
        templates=templates,
        past_time=past_time,
    )
