"""Qwen2.5-VL's media as tokens: a video is one block, its time steps as far apart as its frames truly are.

Source: transformers, processing_qwen2_5_vl.py, and get_rope_index of modeling_qwen2_5_vl.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omniloom.families.qwen3_vl.processor import Qwen3VLClips
from omniloom.processors.clips import FamilyClips
from omniloom.processors.tower_inputs import Features
from omniloom.types import ClipGeometry, MediaHeader, MediaSource


class Qwen25VLClips(FamilyClips):
    pads, wrappers = Qwen3VLClips.pads, Qwen3VLClips.wrappers
    templates = ("qwen2_vl",)
    past_time = False
    whole_positions = True
    relative_boxes = False
    # per frame; no file of a published checkpoint says it. Source: transformers, Qwen2VLVideoProcessor
    video_pixels = (128 * 28 * 28, 768 * 28 * 28)
    min_frames = 4

    def video_geometry(self, source: MediaSource, header: MediaHeader, scale: float) -> ClipGeometry:
        clip = super().video_geometry(source, header, scale)
        rate = header.fps or self.towers.frame_bounds(source.options, header, self.min_frames)[0]  # as for the frames
        # in transformers' order of operations: the last bit decides where the floor of a position falls
        sampled_fps = len(clip.frame_indices) / header.num_frames * rate
        return replace(clip, seconds_per_grid=self.towers.vision.temporal_patch_size / sampled_fps)

    def generation_inputs(
        self, input_ids: Tensor, clips: Sequence[ClipGeometry], features: Sequence[Features]
    ) -> dict[str, Any]:
        inputs = super().generation_inputs(input_ids, clips, features)
        if seconds := [clip.seconds_per_grid for clip in clips if clip.kind == "video"]:
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        return inputs
