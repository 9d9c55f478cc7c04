"""Names of Qwen2.5-VL's published tensors, which transformers 5 saves too, and ours."""

from __future__ import annotations

from omniloom.keymap import KeyMap
from omniloom.models.hf_rules import decoder_rules, window_vision_rules
from omniloom.models.qwen2_5_vl.config import Qwen25VLConfig


def key_map(config: Qwen25VLConfig) -> KeyMap:
    return KeyMap(
        rules=(
            *window_vision_rules("visual", attention={"attn.qkv": "qkv", "attn.proj": "proj"}),
            *decoder_rules("model", "lm_head", config.text),
        )
    )
