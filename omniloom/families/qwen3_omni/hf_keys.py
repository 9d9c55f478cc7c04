"""Names of Qwen3-Omni's published tensors and ours."""

from __future__ import annotations

from omniloom.families.hf_rules import (
    audio_layer_rules,
    decoder_rules,
    expert_rules,
    linears,
    router_rule,
    vision_rules,
)
from omniloom.families.qwen3_omni.config import Qwen3OmniConfig
from omniloom.keymap import KeyMap, Rule

CARRIED = ("talker.", "code2wav.")


def key_map(config: Qwen3OmniConfig) -> KeyMap:
    model, audio = "thinker.model", "thinker.audio_tower"
    ends = {
        "conv2d1": "stem.conv1",
        "conv2d2": "stem.conv2",
        "conv2d3": "stem.conv3",
        "proj1": "projector.proj1",
        "proj2": "projector.proj2",
    }
    merger = {"ln_q": "norm", "mlp.0": "fc1", "mlp.2": "fc2"}
    return KeyMap(
        rules=(
            *vision_rules("thinker.visual", merger=merger, deepstack="merger_list"),
            *linears(audio, "audio", ends, bias=True),
            Rule(published=f"{audio}.conv_out.weight", ours="audio.stem.out.weight"),
            *audio_layer_rules(audio),
            *decoder_rules(model, "thinker.lm_head", config.text),
            router_rule(model),
            *expert_rules(model),
        ),
        carried=CARRIED,
    )
