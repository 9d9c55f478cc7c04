"""Qwen3-Omni's media as tokens: a video is one block without timestamps; its sound interleaves with it in time.

Source: transformers, processing_qwen3_omni_moe.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from omniloom.families.cost import sample_cost
from omniloom.families.qwen3_omni.config import Qwen3OmniConfig
from omniloom.processors.chat import ChatProcessor, ClipLayout, open_processor, sound_layout, vision_layout
from omniloom.processors.positions import merge_by_time, text_block, vision_block
from omniloom.processors.settings import find_word
from omniloom.processors.tower_inputs import Features, TowerInputs, sound_inputs, vision_inputs
from omniloom.types import ClipGeometry, MediaHeader, MediaSource, ProcessorOptions

# per frame; no file of a published checkpoint says it. Source: transformers, Qwen3OmniMoeProcessor.videos_kwargs
VIDEO_PIXELS = (128 * 32 * 32, 768 * 32 * 32)


def make_processor(
    checkpoint_dir: str | Path, config: Qwen3OmniConfig, options: ProcessorOptions | None = None
) -> ChatProcessor:
    """The checkpoint's processor; `functools.partial` of this is the factory that loader workers get.

    Raises: ValueError where the checkpoint lacks a file or a field.
    """
    return open_processor(
        checkpoint_dir,
        options,
        vision=config.vision,
        audio=config.audio,
        vocab_size=config.text.vocab_size,
        cost=partial(sample_cost, config.text, config.vision, config.audio),
        make_media=partial(Qwen3OmniMedia, config),
        templates=("qwen3_omni_nothink", "qwen3_omni"),
    )


class Qwen3OmniMedia:
    """The family's `FamilyClips`."""

    def __init__(self, config: Qwen3OmniConfig, towers: TowerInputs, tokenizer: Any) -> None:
        self.config = config
        self.towers = towers
        self.pad_ids = frozenset((config.image_token_id, config.video_token_id, config.audio_token_id))
        self.pads = {
            kind: find_word(tokenizer, f"{kind}_token_id", token_id, f"<|{kind}_pad|>")
            for kind, token_id in (
                ("image", config.image_token_id),
                ("video", config.video_token_id),
                ("audio", config.audio_token_id),
            )
        }
        vision_start = find_word(tokenizer, "vision_start_token_id", config.vision_start_token_id, "<|vision_start|>")
        audio_start = find_word(tokenizer, "audio_start_token_id", config.audio_start_token_id, "<|audio_start|>")
        self.words = {
            "image": vision_start + self.pads["image"] + tokenizer.vision_eos_token,
            "video": vision_start + self.pads["video"] + tokenizer.vision_eos_token,
            "audio": audio_start + self.pads["audio"] + tokenizer.audio_eos_token,
        }
        self._audio_end_token_id = tokenizer.convert_tokens_to_ids(tokenizer.audio_eos_token)

    def video_geometry(self, source: MediaSource, header: MediaHeader, scale: float) -> ClipGeometry:
        return self.towers.video_geometry(source, header, scale, VIDEO_PIXELS)

    def placeholder(self, clip: ClipGeometry) -> str:
        return self.pads[clip.kind]

    def held(self, clip: ClipGeometry) -> str:
        return ""

    def layouts(self, clip: ClipGeometry) -> tuple[ClipLayout, ...]:
        """One block of tokens per clip; a video with sound has its audio wrappers inside the block."""
        config = self.config
        num_audio = self.towers.num_audio_tokens(clip.num_mel_frames)
        if clip.grid_thw is None:
            return (sound_layout(config.audio_token_id, num_audio),)
        block = vision_block(
            clip.grid_thw, config.vision.spatial_merge_size, clip.seconds_per_grid, config.position_id_per_seconds
        )
        token_id = config.image_token_id if clip.kind == "image" else config.video_token_id
        if not num_audio:
            return (vision_layout(token_id, block),)
        num_vision = block.shape[1]
        times = np.arange(clip.grid_thw[0]) * clip.seconds_per_grid * config.position_id_per_seconds
        order = merge_by_time(np.repeat(times, num_vision // clip.grid_thw[0]), num_audio)
        inner_ids = np.repeat([token_id, config.audio_token_id], [num_vision, num_audio])[order]
        inner = np.concatenate([block, text_block(num_audio)], axis=1)[:, order] + np.float32(1)
        end = np.full((3, 1), inner[:, -1].max() + 1, np.float32)
        layout = ClipLayout(
            ids=np.concatenate([[config.audio_start_token_id], inner_ids, [self._audio_end_token_id]]),
            block=np.concatenate([np.zeros((3, 1), np.float32), inner, end], axis=1),
            vision_rows=1 + np.flatnonzero(order < num_vision),
            audio_rows=1 + np.flatnonzero(order >= num_vision),
        )
        return (layout,)

    def generation_inputs(
        self, input_ids: Tensor, clips: Sequence[ClipGeometry], features: Sequence[Features]
    ) -> dict[str, Any]:
        return vision_inputs(clips, features) | sound_inputs(clips, features)
