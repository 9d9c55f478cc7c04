"""Qwen3-VL-MoE's dims: Qwen3-VL's with experts in the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omniloom.families.qwen3_vl import config as qwen3_vl


def read_config(config_json: Mapping[str, Any]) -> qwen3_vl.Qwen3VLConfig:
    """Raises: ValueError listing everything that is missing or cannot be."""
    config = qwen3_vl.read_config(config_json, model_type="qwen3_vl_moe", has_experts=True)
    if not config.text.norm_topk_prob:
        raise ValueError("config.json: text_config.norm_topk_prob is false; this family's router always normalises")
    return config
