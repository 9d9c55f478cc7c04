"""Qwen3.5 with experts, and one that every token takes, in each layer of the decoder."""

from __future__ import annotations

from dataclasses import replace

from omniloom.families.config_fields import ConfigSection, FamilyConfig, read_decoder, read_vision
from omniloom.families.hf_rules import expert_rules, router_rule, shared_expert_rules
from omniloom.families.qwen3_5 import spec as qwen3_5
from omniloom.families.qwen3_vl.spec import MODEL
from omniloom.keymap import KeyMap


def read_parts(file: ConfigSection) -> FamilyConfig:
    return FamilyConfig(
        vision=read_vision(file, deepstack=False), text=read_decoder(file, hybrid=True, has_experts=True)
    )


def key_map(config: FamilyConfig) -> KeyMap:
    base = qwen3_5.key_map(config)
    return replace(base, rules=(*base.rules, router_rule(MODEL), *expert_rules(MODEL), *shared_expert_rules(MODEL)))


SPEC = replace(
    qwen3_5.SPEC,
    name="qwen3_5_moe",
    model_type="qwen3_5_moe",
    read_parts=read_parts,
    key_map=key_map,
)
