"""Qwen3-VL's dims, read from a checkpoint's `config.json`, and the same file for a model of fewer layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from omniloom.families.config_fields import (
    ConfigReader,
    decoder_rules,
    read_decoder,
    read_vision,
    reduce_layers,
    vision_rules,
)
from omniloom.families.decoder import DecoderConfig
from omniloom.models.vision import VisionTowerConfig


@dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig:
    """Of both kinds of decoder, dense and with experts."""

    vision: VisionTowerConfig
    text: DecoderConfig
    audio: None = None
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int


TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
reduce_config = partial(reduce_layers, parent=None)


def read_config(
    config_json: Mapping[str, Any], *, model_type: str = "qwen3_vl", has_experts: bool = False
) -> Qwen3VLConfig:
    """Raises: ValueError listing everything that is missing or cannot be."""
    reader = ConfigReader(model_type)
    text = reader.section(config_json, "text_config")
    config = Qwen3VLConfig(
        vision=read_vision(reader, reader.section(config_json, "vision_config")),
        text=read_decoder(
            reader,
            text,
            has_experts=has_experts,
            qk_norm=True,
            attention_biases=(bool(text.get("attention_bias", False)),) * 4,
            mrope_layout="interleaved",
            tie_word_embeddings=bool(config_json.get("tie_word_embeddings", False)),
        ),
        **reader.fields(config_json, TOKEN_IDS),
    )
    reader.finish()
    reader.require(vision_rules(config.vision, config.text) | decoder_rules(config.text))
    return config
