"""Qwen3-Omni's record in the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omniloom.families.qwen3_omni.config import read_config, reduce_config
from omniloom.families.qwen3_omni.hf_keys import key_map
from omniloom.families.spec import COMPONENTS, OMNI, ModelSpec

if TYPE_CHECKING:
    from omniloom.processors.chat import ChatProcessor


def _make_processor(*arguments: Any) -> ChatProcessor:
    # imported at use: tokenizers come with transformers, which a bare GPU machine may lack
    from omniloom.families.qwen3_omni.processor import make_processor

    return make_processor(*arguments)


SPEC = ModelSpec(
    name="qwen3_omni",
    model_type="qwen3_omni_moe",
    architectures=("Qwen3OmniMoeForConditionalGeneration",),
    modalities=OMNI,
    components=COMPONENTS,
    read_config=read_config,
    reduce_config=reduce_config,
    key_map=key_map,
    make_processor=_make_processor,
)
