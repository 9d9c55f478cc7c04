"""Qwen2.5-Omni's record in the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omniloom.families.qwen2_5_omni.config import MODEL_TYPE, read_config, reduce_config
from omniloom.families.qwen2_5_omni.hf_keys import key_map
from omniloom.families.spec import COMPONENTS, OMNI, ModelSpec

if TYPE_CHECKING:
    from omniloom.processors.chat import ChatProcessor


def _make_processor(*arguments: Any) -> ChatProcessor:
    # imported at use: tokenizers come with transformers, which a bare GPU machine may lack
    from omniloom.families.qwen2_5_omni.processor import make_processor

    return make_processor(*arguments)


SPEC = ModelSpec(
    name="qwen2_5_omni",
    model_type=MODEL_TYPE,
    architectures=("Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel"),  # the latter as first published
    modalities=OMNI,
    components=tuple(name for name in COMPONENTS if name not in ("text.router", "text.experts", "vision.deepstack")),
    read_config=read_config,
    reduce_config=reduce_config,
    key_map=key_map,
    make_processor=_make_processor,
)
