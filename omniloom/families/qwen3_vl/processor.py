"""Qwen3-VL's media as tokens: each temporal grid of a video is a picture of its own, its time written before it.

Source: transformers, processing_qwen3_vl.py and video_processing_qwen3_vl.py.
"""

from __future__ import annotations

import math
from typing import ClassVar

from omniloom.processors.clips import ClipTokens, FamilyClips, picture_tokens
from omniloom.processors.features import smart_resize_video, spread_frames
from omniloom.processors.positions import vision_block
from omniloom.types import ClipGeometry, ClipOptions, MediaHeader, MediaSource

MAX_VIDEO_TOKENS = 768  # per frame, where a checkpoint asks for that cap
MIN_FRAME_TOKENS = 128  # of qwen-vl-utils


class Qwen3VLClips(FamilyClips):
    pads: ClassVar = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    wrappers: ClassVar = {"vision": ("<|vision_start|>", "<|vision_end|>")}
    templates = ("qwen3_vl_nothink", "qwen3_vl")
    # both as transformers' Qwen3VLVideoProcessor, where a checkpoint has no file of its own; of all frames together
    video_pixels = (128 * 32 * 32, 768 * 32 * 32)
    min_frames = 4

    def video_geometry(self, source: MediaSource, header: MediaHeader, scale: float) -> ClipGeometry:
        """Frames from the first to the last, at least four; bounds on the pixels of all of them together."""
        vision, options = self.towers.vision, source.options
        temporal, factor = vision.temporal_patch_size, vision.patch_size * vision.spatial_merge_size
        min_frames = self.towers.settings.video.whole("min_frames", self.min_frames)
        fps, least, most = self.towers.frame_bounds(options, header, min_frames)
        rate = header.fps or fps  # a list of frames without a rate of its own is taken as already sampled
        count = max(int(header.num_frames / rate * fps), least)
        count = max(min(count, most, header.num_frames), temporal)  # one frame alone is shown twice
        if scale < 1:
            count = max(int(count * math.sqrt(scale)), temporal)
        height, width = self._frame_size(options, header, count, factor, scale)
        grid = (-(-count // temporal), height // vision.patch_size, width // vision.patch_size)
        seconds = header.duration_seconds or header.num_frames / rate
        frames = spread_frames(header.num_frames, count, first=header.first_frame, reach_last=True)
        return ClipGeometry(
            kind="video",
            num_tokens=self.towers.num_merged(grid),
            grid_thw=grid,
            frame_indices=tuple(frames),
            source_fps=rate,
            duration_seconds=seconds,
            seconds_per_grid=seconds / grid[0],
        )

    def _frame_size(
        self, options: ClipOptions, header: MediaHeader, count: int, factor: int, scale: float
    ) -> tuple[int, int]:
        """Height and width of each of `count` frames."""
        if options.resized_height is not None:  # the same for a frame as for an image
            patch = self.towers.vision.patch_size
            rows, columns = self.towers.grid(options, header, (1, 1), math.sqrt(scale))
            return rows * patch, columns * patch
        temporal, size = self.towers.vision.temporal_patch_size, (header.height, header.width)
        low, high = self._pixels(options, count)
        height, width = smart_resize_video(count, *size, temporal, factor, low, high)
        if scale < 1:
            high = max(int(count * height * width * math.sqrt(scale)), count * factor**2)
            height, width = smart_resize_video(count, *size, temporal, factor, min(low, high), high)
        return height, width

    def _pixels(self, asked: ClipOptions, num_frames: int) -> tuple[int, int]:
        """Least and most pixels of all frames together. Ours are given per frame, the checkpoint's for all."""
        options, settings = self.towers.options, self.towers.settings.video
        of_checkpoint = settings.pixels(self.video_pixels)
        low = options.video.min_pixels if asked.min_pixels is None else asked.min_pixels
        high = options.video.max_pixels if asked.max_pixels is None else asked.max_pixels
        most = of_checkpoint[1] if high is None else high * num_frames
        least = of_checkpoint[0] if low is None else low * num_frames
        factor = self.towers.vision.patch_size * self.towers.vision.spatial_merge_size
        if high is None and settings.values.get("cap_pixels_per_frame"):
            cap = settings.whole("max_video_tokens", MAX_VIDEO_TOKENS) * factor**2
            most = max(min(cap, most // num_frames), int(least * 1.05)) * num_frames
        if asked.total_pixels is not None:  # by qwen-vl-utils, whose bounds are those of each frame
            floor = low if low is not None else MIN_FRAME_TOKENS * factor**2
            share = asked.total_pixels * self.towers.vision.temporal_patch_size // num_frames
            most = min(most, max(share, int(floor * 1.05)) * num_frames)
        return min(least, most), most

    def placeholder(self, clip: ClipGeometry) -> str:
        """Each grid of a video has its time and wrappers of its own, inside those that the chat template wrote."""
        if clip.kind == "image":
            return self.pads["image"]
        return "".join(f"<{seconds:.1f} seconds>{self.words['video']}" for seconds in self.timestamps(clip))

    def timestamps(self, clip: ClipGeometry) -> list[float]:
        """Seconds at the middle of each temporal grid, between its first frame and its last."""
        frames, temporal = clip.frame_indices, self.towers.vision.temporal_patch_size
        frames += frames[-1:] * (-len(frames) % temporal)
        times = [frame / clip.source_fps for frame in frames]
        return [(times[first] + times[first + temporal - 1]) / 2 for first in range(0, len(times), temporal)]

    def tokens_of(self, clip: ClipGeometry) -> tuple[ClipTokens, ...]:
        """Those of an image, or of each temporal grid of a video."""
        assert clip.grid_thw is not None
        num_grids, height, width = clip.grid_thw
        block = vision_block((1, height, width), self.towers.vision.spatial_merge_size, 0.0, 0.0)
        return (picture_tokens(self.ids[clip.kind], block),) * num_grids
