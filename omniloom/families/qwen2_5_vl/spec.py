"""Qwen2.5-VL's record in the registry: Qwen3-VL's parts in other sizes, names and positions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omniloom.families.qwen2_5_vl.config import MODEL_TYPE, read_config
from omniloom.families.qwen2_5_vl.hf_keys import key_map
from omniloom.families.qwen3_vl.spec import SPEC as QWEN3_VL

if TYPE_CHECKING:
    from omniloom.processors.chat import ChatProcessor


def make_processor(*arguments: Any) -> ChatProcessor:
    # imported at use: tokenizers come with transformers, which a bare GPU machine may lack
    from omniloom.families.qwen2_5_vl.processor import make_processor

    return make_processor(*arguments)


SPEC = replace(
    QWEN3_VL,
    name="qwen2_5_vl",
    model_type=MODEL_TYPE,
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    components=tuple(name for name in QWEN3_VL.components if name != "vision.deepstack"),
    read_config=read_config,
    key_map=key_map,
    make_processor=make_processor,
)
