"""Qwen3-VL with experts in the decoder, which are published stacked, inputs before outputs."""

from __future__ import annotations

from dataclasses import replace

from omniloom.families.config_fields import ConfigSection, FamilyConfig, read_decoder, read_vision
from omniloom.families.hf_rules import router_rule
from omniloom.families.qwen3_vl import spec as qwen3_vl
from omniloom.keymap import KeyMap, Rule


def read_parts(file: ConfigSection) -> FamilyConfig:
    config = FamilyConfig(vision=read_vision(file), text=read_decoder(file, has_experts=True))
    file.demands["text_config.norm_topk_prob is true, since this family's router always normalises"] = (
        config.text.norm_topk_prob
    )
    return config


def key_map(config: FamilyConfig) -> KeyMap:
    text = config.text
    theirs, ours = f"{qwen3_vl.MODEL}.layers.{{i}}.mlp.experts", "text.layers.{i}.moe.experts"
    experts = (
        router_rule(qwen3_vl.MODEL),
        Rule(
            reshape="transpose",
            published=f"{theirs}.gate_up_proj",
            ours=f"{ours}.gate_up",
            unless=(text.num_experts, 2 * text.moe_intermediate_size, text.hidden_size),
        ),
        Rule(
            reshape="transpose",
            published=f"{theirs}.down_proj",
            ours=f"{ours}.down",
            unless=(text.num_experts, text.hidden_size, text.moe_intermediate_size),
        ),
    )
    return KeyMap(rules=(*qwen3_vl.key_map(config).rules, *experts))


SPEC = replace(
    qwen3_vl.SPEC,
    name="qwen3_vl_moe",
    model_type="qwen3_vl_moe",
    read_parts=read_parts,
    key_map=key_map,
)
