"""Qwen3-Omni: dims and tensor names. The vocoder is carried along, and so is a talker that a run does not use."""

from __future__ import annotations

from omniloom.dims import AudioTowerConfig
from omniloom.families.config_fields import ConfigSection, FamilyConfig, read_decoder, read_vision
from omniloom.families.hf_rules import (
    audio_layer_rules,
    decoder_rules,
    expert_rules,
    linears,
    router_rule,
    vision_rules,
)
from omniloom.families.qwen3_omni.processor import Qwen3OmniClips
from omniloom.families.qwen3_omni.talker import add_speakers, make_talker, open_speech, read_talker, talker_rules
from omniloom.families.spec import OMNI, ModelSpec
from omniloom.keymap import KeyMap, Rule

CHUNK_ROWS = 13  # rows of a full audio chunk, a constant in the published length arithmetic


def read_parts(thinker: ConfigSection) -> FamilyConfig:
    audio = thinker.section("audio_config").record(AudioTowerConfig)
    thinker.demands[f"audio_config: 2 x n_window frames make {CHUNK_ROWS} rows (got n_window {audio.n_window})"] = (
        audio.chunk_rows == CHUNK_ROWS
    )
    return FamilyConfig(
        vision=read_vision(thinker),
        audio=audio,
        text=read_decoder(thinker, has_experts=True),
        positions_per_second=thinker.field("position_id_per_seconds"),
    )


def key_map(config: FamilyConfig) -> KeyMap:
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
            *(talker_rules() if config.talker is not None else ()),
        ),
        carried=("talker.", "code2wav.") if config.talker is None else ("code2wav.",),
    )


SPEC = ModelSpec(
    name="qwen3_omni",
    model_type="qwen3_omni_moe",
    modalities=OMNI,
    parent="thinker_config",
    read_parts=read_parts,
    key_map=key_map,
    clips=Qwen3OmniClips,
    read_talker=read_talker,
    make_talker=make_talker,
    open_speech=open_speech,
    add_speakers=add_speakers,
)
