"""Qwen2.5-Omni's media as tokens: a video's sound follows its frames in chunks of two seconds.

Source: transformers, processing_qwen2_5_omni.py, and get_rope_index of modeling_qwen2_5_omni.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from omniloom.families.processor import open_family_processor
from omniloom.families.qwen2_5_omni.config import Qwen25OmniConfig
from omniloom.processors.chat import ClipLayout, FamilyClips, sound_layout, vision_layout
from omniloom.processors.positions import merge_by_chunks, text_block, vision_block
from omniloom.processors.tower_inputs import TowerInputs
from omniloom.types import ClipGeometry, MediaHeader, MediaSource

# per frame; no file of a published checkpoint says it. Source: transformers, Qwen2_5OmniProcessor.videos_kwargs
VIDEO_PIXELS = (128 * 28 * 28, 768 * 28 * 28)


class Qwen25OmniMedia(FamilyClips):
    relative_boxes = False

    def __init__(self, config: Qwen25OmniConfig, towers: TowerInputs, tokenizer: Any) -> None:
        ids = {"image": config.image_token_id, "video": config.video_token_id, "audio": config.audio_token_id}
        pads = {kind: str(tokenizer.convert_ids_to_tokens(token_id)) for kind, token_id in ids.items()}
        start = tokenizer.convert_ids_to_tokens(config.vision_start_token_id)
        words = {kind: start + pads[kind] + tokenizer.vision_eos_token for kind in ("image", "video")}
        start = tokenizer.convert_ids_to_tokens(config.audio_start_token_id)
        words["audio"] = start + pads["audio"] + tokenizer.audio_eos_token
        super().__init__(towers, ids=ids, pads=pads, words=words)
        self.config = config
        self._vision_end = str(tokenizer.vision_eos_token)
        self._end_ids = tokenizer.convert_tokens_to_ids([tokenizer.audio_eos_token, tokenizer.vision_eos_token])

    def video_geometry(self, source: MediaSource, header: MediaHeader, scale: float) -> ClipGeometry:
        return self.towers.video_geometry(source, header, scale, VIDEO_PIXELS)

    def held(self, clip: ClipGeometry) -> str:
        """Of a video with sound both ends share a position, so they are part of its layout."""
        return self._vision_end if clip.grid_thw and clip.num_mel_frames else ""

    def layouts(self, clip: ClipGeometry) -> tuple[ClipLayout, ...]:
        """One block of tokens per clip; a video with sound holds the start of its audio and both ends."""
        config = self.config
        num_audio = self.towers.num_audio_tokens(clip.num_mel_frames)
        if clip.grid_thw is None:
            return (sound_layout(config.audio_token_id, num_audio),)
        per_second = config.position_id_per_seconds
        block = np.floor(
            vision_block(clip.grid_thw, config.vision.spatial_merge_size, clip.seconds_per_grid, per_second)
        )
        token_id = config.image_token_id if clip.kind == "image" else config.video_token_id
        if not num_audio:
            return (vision_layout(token_id, block),)
        num_vision = block.shape[1]
        times = np.arange(clip.grid_thw[0]) * clip.seconds_per_grid * per_second
        chunk = per_second * config.seconds_per_chunk
        order = merge_by_chunks(np.repeat(times, num_vision // clip.grid_thw[0]), num_audio, chunk)
        inner_ids = np.repeat([token_id, config.audio_token_id], [num_vision, num_audio])[order]
        inner = np.concatenate([block, text_block(num_audio)], axis=1)[:, order]
        start = np.full((3, 1), -1, np.float32)  # where the video's start is
        ends = np.full((3, 2), inner[:, -1].max() + 1, np.float32)
        layout = ClipLayout(
            ids=np.concatenate([[config.audio_start_token_id], inner_ids, self._end_ids]),
            block=np.concatenate([start, inner, ends], axis=1),
            vision_rows=1 + np.flatnonzero(order < num_vision),
            audio_rows=1 + np.flatnonzero(order >= num_vision),
        )
        return (layout,)


make_processor = partial(open_family_processor, Qwen25OmniMedia, ("qwen2_omni",))
