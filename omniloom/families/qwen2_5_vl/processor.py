"""Qwen2.5-VL's media as tokens: a video is one block, its time steps as far apart as its frames truly are.

Source: transformers, processing_qwen2_5_vl.py, and get_rope_index of modeling_qwen2_5_vl.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omniloom.families.cost import sample_cost
from omniloom.families.qwen2_5_vl.config import Qwen25VLConfig
from omniloom.families.qwen3_vl.processor import PictureTokens
from omniloom.processors.chat import ChatProcessor, ClipLayout, open_processor, vision_layout
from omniloom.processors.positions import vision_block
from omniloom.processors.tower_inputs import Features, TowerInputs
from omniloom.types import ClipGeometry, MediaHeader, MediaSource, ProcessorOptions

# per frame; no file of a published checkpoint says it. Source: transformers, Qwen2VLVideoProcessor
VIDEO_PIXELS = (128 * 28 * 28, 768 * 28 * 28)
MIN_FRAMES = 4


def make_processor(
    checkpoint_dir: str | Path, config: Qwen25VLConfig, options: ProcessorOptions | None = None
) -> ChatProcessor:
    """The checkpoint's processor; `functools.partial` of this is the factory that loader workers get.

    Raises: ValueError where the checkpoint lacks a file or a field.
    """
    return open_processor(
        checkpoint_dir,
        options,
        vision=config.vision,
        audio=None,
        vocab_size=config.text.vocab_size,
        cost=partial(sample_cost, config.text, config.vision, None),
        make_media=partial(Qwen25VLMedia, config),
        templates=("qwen2_vl",),
        past_time=False,
    )


class Qwen25VLMedia:
    """The family's `FamilyClips`."""

    def __init__(self, config: Qwen25VLConfig, towers: TowerInputs, tokenizer: Any) -> None:
        self.config = config
        self.towers = towers
        self.tokens = PictureTokens(config, tokenizer)
        self.pad_ids, self.pads, self.words = frozenset(self.tokens.ids.values()), self.tokens.pads, self.tokens.words

    def video_geometry(self, source: MediaSource, header: MediaHeader, scale: float) -> ClipGeometry:
        clip = self.towers.video_geometry(source, header, scale, VIDEO_PIXELS, MIN_FRAMES)
        rate = header.fps or self.towers.frame_bounds(source.options, header, MIN_FRAMES)[0]  # as for the frames
        # in transformers' order of operations: the last bit decides where the floor of a position falls
        sampled_fps = len(clip.frame_indices) / header.num_frames * rate
        return replace(clip, seconds_per_grid=self.config.vision.temporal_patch_size / sampled_fps)

    def placeholder(self, clip: ClipGeometry) -> str:
        return self.pads[clip.kind]

    def held(self, clip: ClipGeometry) -> str:
        return ""

    def layouts(self, clip: ClipGeometry) -> tuple[ClipLayout, ...]:
        assert clip.grid_thw is not None
        merge, per_second = self.config.vision.spatial_merge_size, self.config.tokens_per_second
        block = np.floor(vision_block(clip.grid_thw, merge, clip.seconds_per_grid, per_second))
        return (vision_layout(self.tokens.ids[clip.kind], block),)

    def generation_inputs(
        self, input_ids: Tensor, clips: Sequence[ClipGeometry], features: Sequence[Features]
    ) -> dict[str, Any]:
        inputs = self.tokens.generation_inputs(input_ids, clips, features)
        if seconds := [clip.seconds_per_grid for clip in clips if clip.kind == "video"]:
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        return inputs
