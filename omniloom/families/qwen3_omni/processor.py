"""Qwen3-Omni's media as tokens: a video is one block without timestamps; its sound interleaves with it in time.

Source: transformers, processing_qwen3_omni_moe.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from omniloom.families.processor import open_family_processor
from omniloom.families.qwen3_omni.config import Qwen3OmniConfig
from omniloom.processors.chat import ClipLayout, FamilyClips, sound_layout, vision_layout
from omniloom.processors.positions import merge_by_time, text_block, vision_block
from omniloom.processors.settings import find_word
from omniloom.processors.tower_inputs import TowerInputs
from omniloom.types import ClipGeometry, MediaHeader, MediaSource

# per frame; no file of a published checkpoint says it. Source: transformers, Qwen3OmniMoeProcessor.videos_kwargs
VIDEO_PIXELS = (128 * 32 * 32, 768 * 32 * 32)


class Qwen3OmniMedia(FamilyClips):
    def __init__(self, config: Qwen3OmniConfig, towers: TowerInputs, tokenizer: Any) -> None:
        ids = {"image": config.image_token_id, "video": config.video_token_id, "audio": config.audio_token_id}
        pads = {kind: find_word(tokenizer, f"{kind}_token_id", ids[kind], f"<|{kind}_pad|>") for kind in ids}
        start = find_word(tokenizer, "vision_start_token_id", config.vision_start_token_id, "<|vision_start|>")
        words = {kind: start + pads[kind] + tokenizer.vision_eos_token for kind in ("image", "video")}
        start = find_word(tokenizer, "audio_start_token_id", config.audio_start_token_id, "<|audio_start|>")
        words["audio"] = start + pads["audio"] + tokenizer.audio_eos_token
        super().__init__(towers, ids=ids, pads=pads, words=words)
        self.config = config
        self._audio_end_token_id = tokenizer.convert_tokens_to_ids(tokenizer.audio_eos_token)

    def video_geometry(self, source: MediaSource, header: MediaHeader, scale: float) -> ClipGeometry:
        return self.towers.video_geometry(source, header, scale, VIDEO_PIXELS)

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


make_processor = partial(open_family_processor, Qwen3OmniMedia, ("qwen3_omni_nothink", "qwen3_omni"))
