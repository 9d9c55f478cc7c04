"""Qwen2.5-Omni's dims, read from a checkpoint's `config.json`, and the same file for a model of fewer layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from omniloom.families.config_fields import (
    ConfigReader,
    audio_rules,
    decoder_rules,
    read_audio_dims,
    read_decoder,
    read_thinker,
    read_window_vision,
    reduce_layers,
    vision_rules,
)
from omniloom.families.decoder import DecoderConfig
from omniloom.models.audio import AudioTowerConfig
from omniloom.models.vision import VisionTowerConfig

MODEL_TYPE = "qwen2_5_omni"


@dataclass(frozen=True, kw_only=True)
class Qwen25OmniConfig:
    vision: VisionTowerConfig
    audio: AudioTowerConfig
    text: DecoderConfig
    image_token_id: int
    video_token_id: int
    audio_token_id: int
    vision_start_token_id: int
    audio_start_token_id: int
    position_id_per_seconds: int
    seconds_per_chunk: int  # of video, then as much of its sound


reduce_config = partial(reduce_layers, parent="thinker_config")


def read_config(config_json: Mapping[str, Any]) -> Qwen25OmniConfig:
    """Dims of the thinker. Raises: ValueError listing everything that is missing or cannot be."""
    reader = ConfigReader(MODEL_TYPE)
    thinker = read_thinker(reader, config_json)
    text = reader.section(thinker, "text_config")
    audio = read_audio_dims(reader, reader.section(thinker, "audio_config"))
    config = Qwen25OmniConfig(
        vision=read_window_vision(reader, reader.section(thinker, "vision_config"), fused_qkv=False),
        audio=AudioTowerConfig(
            **audio,
            n_window_infer=2 * audio["n_window"],  # a chunk attends to itself
            downsample_hidden_size=None,
            key_bias=False,
            pool=2,
            projector_layers=1,
        ),
        text=read_decoder(
            reader,
            text,
            has_experts=False,
            qk_norm=False,
            attention_biases=(True, True, True, False),
            mrope_layout="blocks",
            tie_word_embeddings=bool(thinker.get("tie_word_embeddings", False)),
        ),
        image_token_id=reader.field(thinker, "image_token_index", "image_token_id"),
        video_token_id=reader.field(thinker, "video_token_index", "video_token_id"),
        audio_token_id=reader.field(thinker, "audio_token_index", "audio_token_id"),
        vision_start_token_id=reader.field(thinker, "vision_start_token_id"),
        audio_start_token_id=reader.field(thinker, "audio_start_token_id"),
        position_id_per_seconds=reader.field(thinker, "position_id_per_seconds"),
        seconds_per_chunk=reader.field(thinker, "seconds_per_chunk"),
    )
    reader.finish()
    reader.require(
        vision_rules(config.vision, config.text)
        | audio_rules(config.audio, config.text)
        | decoder_rules(config.text)
        | {"text_config.use_sliding_window is false": not text.get("use_sliding_window")}
    )
    return config
