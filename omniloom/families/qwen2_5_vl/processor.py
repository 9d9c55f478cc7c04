"""Qwen2.5-VL's media as tokens: a video is one block, its time steps as far apart as its frames truly are.

Source: transformers, processing_qwen2_5_vl.py, and get_rope_index of modeling_qwen2_5_vl.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omniloom.families.processor import open_family_processor
from omniloom.families.qwen2_5_vl.config import Qwen25VLConfig
from omniloom.families.qwen3_vl.processor import PictureMedia
from omniloom.processors.chat import ClipLayout, vision_layout
from omniloom.processors.positions import vision_block
from omniloom.processors.tower_inputs import Features, TowerInputs
from omniloom.types import ClipGeometry, MediaHeader, MediaSource

# per frame; no file of a published checkpoint says it. Source: transformers, Qwen2VLVideoProcessor
VIDEO_PIXELS = (128 * 28 * 28, 768 * 28 * 28)
MIN_FRAMES = 4


class Qwen25VLMedia(PictureMedia):
    relative_boxes = False

    def __init__(self, config: Qwen25VLConfig, towers: TowerInputs, tokenizer: Any) -> None:
        super().__init__(config, towers, tokenizer)
        self.config = config

    def video_geometry(self, source: MediaSource, header: MediaHeader, scale: float) -> ClipGeometry:
        clip = self.towers.video_geometry(source, header, scale, VIDEO_PIXELS, MIN_FRAMES)
        rate = header.fps or self.towers.frame_bounds(source.options, header, MIN_FRAMES)[0]  # as for the frames
        # in transformers' order of operations: the last bit decides where the floor of a position falls
        sampled_fps = len(clip.frame_indices) / header.num_frames * rate
        return replace(clip, seconds_per_grid=self.config.vision.temporal_patch_size / sampled_fps)

    def layouts(self, clip: ClipGeometry) -> tuple[ClipLayout, ...]:
        assert clip.grid_thw is not None
        merge, per_second = self.config.vision.spatial_merge_size, self.config.tokens_per_second
        block = np.floor(vision_block(clip.grid_thw, merge, clip.seconds_per_grid, per_second))
        return (vision_layout(self.ids[clip.kind], block),)

    def generation_inputs(
        self, input_ids: Tensor, clips: Sequence[ClipGeometry], features: Sequence[Features]
    ) -> dict[str, Any]:
        inputs = super().generation_inputs(input_ids, clips, features)
        if seconds := [clip.seconds_per_grid for clip in clips if clip.kind == "video"]:
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        return inputs


make_processor = partial(open_family_processor, Qwen25VLMedia, ("qwen2_vl",), past_time=False)
