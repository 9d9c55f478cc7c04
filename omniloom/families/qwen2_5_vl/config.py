"""Qwen2.5-VL's dims, read from a checkpoint's `config.json`: the decoder's lie in the file itself as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omniloom.families.config_fields import ConfigReader, decoder_rules, read_decoder, read_window_vision, vision_rules
from omniloom.families.qwen3_vl.config import TOKEN_IDS, Qwen3VLConfig

MODEL_TYPE = "qwen2_5_vl"


@dataclass(frozen=True, kw_only=True)
class Qwen25VLConfig(Qwen3VLConfig):
    tokens_per_second: int  # positions on the time axis, of a video


def read_config(config_json: Mapping[str, Any]) -> Qwen25VLConfig:
    """Raises: ValueError listing everything that is missing or cannot be."""
    reader = ConfigReader(MODEL_TYPE)
    # transformers 5 writes a section, and tie_word_embeddings beside it
    text = reader.section(config_json, "text_config") if "text_config" in config_json else config_json
    vision = reader.section(config_json, "vision_config")
    config = Qwen25VLConfig(
        vision=read_window_vision(reader, vision, fused_qkv=True),
        text=read_decoder(
            reader,
            text,
            has_experts=False,
            qk_norm=False,
            attention_biases=(True, True, True, False),
            mrope_layout="blocks",
            tie_word_embeddings=bool(config_json.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        ),
        **reader.fields(config_json, TOKEN_IDS),
        tokens_per_second=reader.field(vision, "tokens_per_second"),
    )
    reader.finish()
    reader.require(
        vision_rules(config.vision, config.text)
        | decoder_rules(config.text)
        | {"use_sliding_window is false": not text.get("use_sliding_window")}
    )
    return config
