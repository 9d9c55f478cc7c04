"""Qwen3-Omni's dims, read from a checkpoint's `config.json`, and the same file for a model of fewer layers."""

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
    read_vision,
    reduce_layers,
    vision_rules,
)
from omniloom.families.decoder import DecoderConfig
from omniloom.models.audio import AudioTowerConfig
from omniloom.models.vision import VisionTowerConfig

MODEL_TYPE = "qwen3_omni_moe"
CHUNK_ROWS = 13  # rows of a full audio chunk, a constant in the published length arithmetic


@dataclass(frozen=True, kw_only=True)
class Qwen3OmniConfig:
    vision: VisionTowerConfig
    audio: AudioTowerConfig
    text: DecoderConfig
    image_token_id: int
    video_token_id: int
    audio_token_id: int
    vision_start_token_id: int
    audio_start_token_id: int
    position_id_per_seconds: int


reduce_config = partial(reduce_layers, parent="thinker_config")


def read_config(config_json: Mapping[str, Any]) -> Qwen3OmniConfig:
    """Dims of the thinker. Raises: ValueError listing everything that is missing or cannot be."""
    reader = ConfigReader(MODEL_TYPE)
    thinker = read_thinker(reader, config_json)
    text = reader.section(thinker, "text_config")
    audio = reader.section(thinker, "audio_config")
    config = Qwen3OmniConfig(
        vision=read_vision(reader, reader.section(thinker, "vision_config")),
        audio=AudioTowerConfig(
            **read_audio_dims(reader, audio),
            n_window_infer=reader.field(audio, "n_window_infer"),
            downsample_hidden_size=reader.field(audio, "downsample_hidden_size"),
        ),
        text=read_decoder(
            reader,
            text,
            has_experts=True,
            qk_norm=True,
            attention_biases=(bool(text.get("attention_bias", False)),) * 4,
            mrope_layout="interleaved",
            tie_word_embeddings=bool(thinker.get("tie_word_embeddings", False)),
        ),
        image_token_id=reader.field(thinker, "image_token_id"),
        video_token_id=reader.field(thinker, "video_token_id"),
        audio_token_id=reader.field(thinker, "audio_token_id"),
        vision_start_token_id=reader.field(thinker, "vision_start_token_id"),
        audio_start_token_id=reader.field(thinker, "audio_start_token_id"),
        position_id_per_seconds=reader.field(thinker, "position_id_per_seconds"),
    )
    reader.finish()
    window = config.audio.n_window
    reader.require(
        vision_rules(config.vision, config.text)
        | audio_rules(config.audio, config.text)
        | decoder_rules(config.text)
        | {
            f"audio_config: 2 x n_window frames make {CHUNK_ROWS} rows (got n_window {window})": (
                config.audio.chunk_rows == CHUNK_ROWS
            )
        }
    )
    return config
