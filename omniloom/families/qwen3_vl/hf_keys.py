"""Names of Qwen3-VL's published tensors and ours."""

from __future__ import annotations

from omniloom.families.hf_rules import decoder_rules, vision_rules
from omniloom.families.qwen3_vl.config import Qwen3VLConfig
from omniloom.keymap import KeyMap, Rule

MODEL = "model.language_model"
MERGER = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}


def key_map(config: Qwen3VLConfig, *, experts: tuple[Rule, ...] = ()) -> KeyMap:
    """`experts`: rules for what a decoder with experts has beyond a dense one."""
    return KeyMap(
        rules=(
            *vision_rules("model.visual", merger=MERGER, deepstack="deepstack_merger_list"),
            *decoder_rules(MODEL, "lm_head", config.text),
            *experts,
        )
    )
