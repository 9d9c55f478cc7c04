"""Names of Qwen3-VL-MoE's published tensors and ours: experts stacked, inputs before outputs."""

from __future__ import annotations

from omniloom.families.hf_rules import router_rule
from omniloom.families.qwen3_vl import hf_keys
from omniloom.families.qwen3_vl.config import Qwen3VLConfig
from omniloom.keymap import KeyMap, Rule


def key_map(config: Qwen3VLConfig) -> KeyMap:
    text = config.text
    theirs, ours = f"{hf_keys.MODEL}.layers.{{i}}.mlp.experts", "text.layers.{i}.moe.experts"
    return hf_keys.key_map(
        config,
        experts=(
            router_rule(hf_keys.MODEL),
            Rule(
                layout="transpose",
                published=f"{theirs}.gate_up_proj",
                ours=f"{ours}.gate_up",
                unless=(text.num_experts, 2 * text.moe_intermediate_size, text.hidden_size),
            ),
            Rule(
                layout="transpose",
                published=f"{theirs}.down_proj",
                ours=f"{ours}.down",
                unless=(text.num_experts, text.hidden_size, text.moe_intermediate_size),
            ),
        ),
    )
