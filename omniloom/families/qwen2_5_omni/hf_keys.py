"""Names of Qwen2.5-Omni's published tensors and ours."""

from __future__ import annotations

from omniloom.families.hf_rules import audio_layer_rules, decoder_rules, linears, window_vision_rules
from omniloom.families.qwen2_5_omni.config import Qwen25OmniConfig
from omniloom.keymap import KeyMap

CARRIED = (
    "talker.",
    "token2wav.",
    "thinker.audio_tower.audio_bos_eos_token.",  # published, and used by nothing
)


def key_map(config: Qwen25OmniConfig) -> KeyMap:
    audio = "thinker.audio_tower"
    attention = {"attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj", "attn.proj": "o_proj"}
    ends = {"conv1": "stem.conv1", "conv2": "stem.conv2", "proj": "projector.proj2"}
    return KeyMap(
        rules=(
            *window_vision_rules("thinker.visual", attention=attention),
            *linears(audio, "audio", ends, bias=True),
            *audio_layer_rules(audio),
            *decoder_rules("thinker.model", "thinker.lm_head", config.text),
        ),
        carried=CARRIED,
    )
