"""Qwen2.5-VL: dims and tensor names. As published, the decoder's dims lie in the file itself."""

from __future__ import annotations

from omniloom.families.config_fields import ConfigSection, FamilyConfig, read_decoder, read_window_vision
from omniloom.families.hf_rules import decoder_rules, window_vision_rules
from omniloom.families.qwen2_5_vl.processor import Qwen25VLClips
from omniloom.families.spec import SEEING, ModelSpec
from omniloom.keymap import KeyMap


def read_parts(file: ConfigSection) -> FamilyConfig:
    return FamilyConfig(
        vision=read_window_vision(file, fused_qkv=True),
        text=read_decoder(file, qwen2_5=True, flat=True),
        positions_per_second=file.section("vision_config").field("tokens_per_second"),
    )


def key_map(config: FamilyConfig) -> KeyMap:
    attention = {"attn.qkv": "qkv", "attn.proj": "proj"}
    vision = window_vision_rules("visual", attention=attention)
    return KeyMap(rules=(*vision, *decoder_rules("model", "lm_head", config.text)))


SPEC = ModelSpec(
    name="qwen2_5_vl",
    model_type="qwen2_5_vl",
    modalities=SEEING,
    read_parts=read_parts,
    key_map=key_map,
    clips=Qwen25VLClips,
)
