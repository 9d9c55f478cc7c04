"""Names of Qwen2.5-VL's published tensors and ours."""

from __future__ import annotations

from omniloom.families.hf_rules import decoder_rules, window_vision_rules
from omniloom.families.qwen2_5_vl.config import Qwen25VLConfig
from omniloom.keymap import KeyMap


def key_map(config: Qwen25VLConfig) -> KeyMap:
    attention = {"attn.qkv": "qkv", "attn.proj": "proj"}
    return KeyMap(
        rules=(
            *window_vision_rules("visual", attention=attention),
            *decoder_rules("model", "lm_head", config.text),
        )
    )
