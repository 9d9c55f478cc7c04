"""Qwen3-VL with a dense decoder: dims and tensor names."""

from __future__ import annotations

from omniloom.families.config_fields import ConfigSection, FamilyConfig, read_decoder, read_vision
from omniloom.families.hf_rules import decoder_rules, vision_rules
from omniloom.families.qwen3_vl.processor import Qwen3VLClips
from omniloom.families.spec import SEEING, ModelSpec
from omniloom.keymap import KeyMap

MODEL = "model.language_model"
MERGER = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}


def read_parts(file: ConfigSection) -> FamilyConfig:
    return FamilyConfig(vision=read_vision(file), text=read_decoder(file))


def key_map(config: FamilyConfig) -> KeyMap:
    vision = vision_rules("model.visual", merger=MERGER, deepstack="deepstack_merger_list")
    return KeyMap(rules=(*vision, *decoder_rules(MODEL, "lm_head", config.text)))


SPEC = ModelSpec(
    name="qwen3_vl",
    model_type="qwen3_vl",
    modalities=SEEING,
    read_parts=read_parts,
    key_map=key_map,
    clips=Qwen3VLClips,
)
