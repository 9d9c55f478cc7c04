"""Names of Qwen2.5-VL's tensors and ours: as published, and as transformers holds them, by which some tools save."""

from __future__ import annotations

from omniloom.families.hf_rules import decoder_rules, window_vision_rules
from omniloom.families.qwen2_5_vl.config import Qwen25VLConfig
from omniloom.keymap import KeyMap


def key_map(config: Qwen25VLConfig) -> KeyMap:
    rules = [
        rule
        for tower, model in (("visual", "model"), ("model.visual", "model.language_model"))
        for rule in (
            *window_vision_rules(tower, attention={"attn.qkv": "qkv", "attn.proj": "proj"}),
            *decoder_rules(model, "lm_head", config.text),
        )
    ]
    return KeyMap(rules=tuple(dict.fromkeys(rules)))  # the head's is in both
