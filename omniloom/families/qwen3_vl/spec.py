"""Qwen3-VL's record in the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omniloom.families.qwen3_vl.config import read_config, reduce_config
from omniloom.families.qwen3_vl.hf_keys import key_map
from omniloom.families.spec import SEEING, SEEING_COMPONENTS, ModelSpec

if TYPE_CHECKING:
    from omniloom.processors.chat import ChatProcessor


def make_processor(*arguments: Any) -> ChatProcessor:
    # imported at use: tokenizers come with transformers, which a bare GPU machine may lack
    from omniloom.families.qwen3_vl.processor import make_processor

    return make_processor(*arguments)


SPEC = ModelSpec(
    name="qwen3_vl",
    model_type="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration",),
    modalities=SEEING,
    components=tuple(name for name in SEEING_COMPONENTS if name not in ("text.router", "text.experts")),
    read_config=read_config,
    reduce_config=reduce_config,
    key_map=key_map,
    make_processor=make_processor,
)
