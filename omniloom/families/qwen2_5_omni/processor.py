"""Qwen2.5-Omni's media as tokens: a video's sound follows its frames in chunks of two seconds.

Source: transformers, processing_qwen2_5_omni.py, and get_rope_index of modeling_qwen2_5_omni.py.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from omniloom.processors.clips import ClipTokens, FamilyClips
from omniloom.processors.positions import merge_by_chunks
from omniloom.types import ClipGeometry


class Qwen25OmniClips(FamilyClips):
    pads: ClassVar = {"image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>"}
    wrappers: ClassVar = {"vision": ("<|vision_bos|>", "<|vision_eos|>"), "audio": ("<|audio_bos|>", "<|audio_eos|>")}
    templates = ("qwen2_omni",)
    whole_positions = True
    relative_boxes = False
    # per frame; no file of a published checkpoint says it. Source: transformers, Qwen2_5OmniProcessor.videos_kwargs
    video_pixels = (128 * 28 * 28, 768 * 28 * 28)

    def held(self, clip: ClipGeometry) -> str:
        """Of a video with sound both ends share a position, so they are put in together."""
        return self.wrappers["vision"][1] if clip.grid_thw and clip.num_mel_frames else ""

    def with_sound(self, block: np.ndarray, times: np.ndarray, num_audio: int) -> ClipTokens:
        """The sound starts where the video starts, and ends where it ends."""
        order = merge_by_chunks(times, num_audio, self.positions_per_second * self.seconds_per_chunk)
        start, end = self.wrapper_ids["audio"]
        return self.interleave(block, order, before=[start], after=[end, self.wrapper_ids["vision"][1]], start=-1)
