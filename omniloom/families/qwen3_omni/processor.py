"""Qwen3-Omni's media as tokens: a video is one block without timestamps; its sound interleaves with it in time.

Source: transformers, processing_qwen3_omni_moe.py.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from omniloom.processors.clips import ClipTokens, FamilyClips
from omniloom.processors.positions import merge_by_time


class Qwen3OmniClips(FamilyClips):
    pads: ClassVar = {"image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|audio_pad|>"}
    wrappers: ClassVar = {
        "vision": ("<|vision_start|>", "<|vision_end|>"),
        "audio": ("<|audio_start|>", "<|audio_end|>"),
    }
    templates = ("qwen3_omni_nothink", "qwen3_omni")
    # per frame; no file of a published checkpoint says it. Source: transformers, Qwen3OmniMoeProcessor.videos_kwargs
    video_pixels = (128 * 32 * 32, 768 * 32 * 32)

    def with_sound(self, block: np.ndarray, times: np.ndarray, num_audio: int) -> ClipTokens:
        """The wrappers of the sound stand inside those of the video."""
        start, end = self.wrapper_ids["audio"]
        return self.interleave(block, merge_by_time(times, num_audio), before=[start], after=[end], start=0)
