"""Qwen2.5-Omni: dims and tensor names. The vocoder is carried along, and so is a talker that a run does not use."""

from __future__ import annotations

from omniloom.dims import AudioTowerConfig
from omniloom.families.config_fields import ConfigSection, FamilyConfig, read_decoder, read_window_vision
from omniloom.families.hf_rules import audio_layer_rules, decoder_rules, linears, window_vision_rules
from omniloom.families.qwen2_5_omni.processor import Qwen25OmniClips
from omniloom.families.qwen2_5_omni.talker import make_talker, open_speech, read_talker, talker_rules
from omniloom.families.spec import OMNI, ModelSpec
from omniloom.keymap import KeyMap

CARRIED = (
    "token2wav.",
    "thinker.audio_tower.audio_bos_eos_token.",  # published, and used by nothing
)


def read_parts(thinker: ConfigSection) -> FamilyConfig:
    audio = thinker.section("audio_config")
    return FamilyConfig(
        vision=read_window_vision(thinker, fused_qkv=False),
        audio=audio.record(
            AudioTowerConfig,
            n_window_infer=2 * audio.field("n_window"),  # a chunk attends to itself
            downsample_hidden_size=None,
            key_bias=False,
            pool=2,
            projector_layers=1,
        ),
        text=read_decoder(thinker, qwen2_5=True),
        positions_per_second=thinker.field("position_id_per_seconds"),
        seconds_per_chunk=thinker.field("seconds_per_chunk"),
    )


def key_map(config: FamilyConfig) -> KeyMap:
    audio = "thinker.audio_tower"
    attention = {"attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj", "attn.proj": "o_proj"}
    ends = {"conv1": "stem.conv1", "conv2": "stem.conv2", "proj": "projector.proj2"}
    return KeyMap(
        rules=(
            *window_vision_rules("thinker.visual", attention=attention),
            *linears(audio, "audio", ends, bias=True),
            *audio_layer_rules(audio),
            *decoder_rules("thinker.model", "thinker.lm_head", config.text),
            *(talker_rules() if config.talker is not None else ()),
        ),
        carried=CARRIED if config.talker is not None else ("talker.", *CARRIED),
    )


SPEC = ModelSpec(
    name="qwen2_5_omni",
    model_type="qwen2_5_omni",
    modalities=OMNI,
    parent="thinker_config",
    read_parts=read_parts,
    key_map=key_map,
    clips=Qwen25OmniClips,
    read_talker=read_talker,
    make_talker=make_talker,
    open_speech=open_speech,
)
