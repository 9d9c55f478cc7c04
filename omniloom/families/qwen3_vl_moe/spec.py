"""Qwen3-VL-MoE's record in the registry: Qwen3-VL but for dims and names of the experts."""

from __future__ import annotations

from dataclasses import replace

from omniloom.families.qwen3_vl.spec import SPEC as QWEN3_VL
from omniloom.families.qwen3_vl_moe.config import read_config
from omniloom.families.qwen3_vl_moe.hf_keys import key_map
from omniloom.families.spec import SEEING_COMPONENTS

SPEC = replace(
    QWEN3_VL,
    name="qwen3_vl_moe",
    model_type="qwen3_vl_moe",
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    components=SEEING_COMPONENTS,
    read_config=read_config,
    key_map=key_map,
)
