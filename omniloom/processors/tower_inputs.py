"""What the towers read of a clip: its planned size, its patches and log-mel frames, and batches of them.

Owns what all families' media have in common, given the dims of their towers and the settings of the checkpoint's
feature extractors. How a clip is written as tokens is the family's (`processor.py` of its folder), as are the frames
of a video where they differ from Qwen2-VL's. Reads no media file: headers and decoded arrays are handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from omniloom.dims import AudioTowerConfig, VisionTowerConfig
from omniloom.options import ProcessorOptions
from omniloom.processors.features import (
    log_mel,
    normalise_pixels,
    pixel_patches,
    resize,
    sample_frame_indices,
    smart_resize,
)
from omniloom.processors.settings import ExtractorSettings, PixelRules, bounds
from omniloom.types import (
    ClipGeometry,
    ClipOptions,
    DecodedClip,
    MediaHeader,
    MediaSource,
    SampleError,
)

Features = tuple[Tensor | None, Tensor | None]  # patches and log-mel frames of a clip
Cost = Callable[[int, int, Sequence[ClipGeometry]], tuple[int, int]]
ASKED_SIZE_TOKENS = (4, 16384)  # least and most of a picture whose size a row asks for. Source: qwen-vl-utils


class TowerInputs:
    """Sizes, features and batches of clips for one model's towers."""

    def __init__(
        self,
        *,
        vision: VisionTowerConfig,
        audio: AudioTowerConfig | None,
        cost: Cost,
        settings: ExtractorSettings,
        options: ProcessorOptions,
    ) -> None:
        """`cost`: estimated forward FLOPs / 1e6 of tokens, tokens with a loss and clips: in the decoder, in towers."""
        self.vision = vision
        self.audio = audio
        self.cost = cost
        self.settings = settings
        self.options = options

    # ------------------------------------------------------------------------------------ sizes

    def grid(
        self,
        options: ClipOptions,
        header: MediaHeader,
        pixels: tuple[int, int],
        scale: float = 1.0,
        num_frames: int | None = None,
    ) -> tuple[int, int]:
        """Rows and columns of patches; the clip's own bounds win over `pixels`, `scale` multiplies the area.

        Source, where the row asks for a size or a total: qwen-vl-utils, fetch_image and fetch_video.
        """
        patch = self.vision.patch_size
        factor = patch * self.vision.spatial_merge_size
        wanted = header.height, header.width
        low, high = bounds(options.min_pixels, options.max_pixels, pixels)
        if options.total_pixels is not None and num_frames is not None:
            share = options.total_pixels * self.vision.temporal_patch_size / num_frames
            high = min(high, max(int(share), int(low * 1.05)))
        if options.resized_height is not None and options.resized_width is not None:
            wanted = options.resized_height, options.resized_width
            low, high = (num_tokens * factor**2 for num_tokens in ASKED_SIZE_TOKENS)
        height, width = smart_resize(*wanted, factor, low, high)
        if scale < 1:
            high = max(int(height * width * scale), factor**2)
            height, width = smart_resize(*wanted, factor, min(low, high), high)
        return height // patch, width // patch

    def num_merged(self, grid_thw: tuple[int, int, int]) -> int:
        """Tower rows of an image or a video."""
        return math.prod(grid_thw) // self.vision.spatial_merge_size**2

    def num_audio_tokens(self, num_mel_frames: int) -> int:
        return self.audio.num_tokens(num_mel_frames) if self.audio is not None else 0

    def image_geometry(self, source: MediaSource, header: MediaHeader, scale: float) -> ClipGeometry:
        grid = (1, *self.grid(source.options, header, self.settings.image_pixels, scale))
        return ClipGeometry(kind="image", num_tokens=self.num_merged(grid), grid_thw=grid)

    def audio_geometry(self, header: MediaHeader) -> ClipGeometry:
        if self.audio is None:
            raise SampleError("audios", "the model has no audio tower; remove the clip or train an omni model")
        num_mel_frames = header.num_audio_samples // self.settings.hop_length
        if num_mel_frames < self.audio.least_frames:
            least = self.audio.least_frames * self.settings.hop_length
            raise SampleError("audios", f"too short: {header.num_audio_samples} samples, at least {least} make a token")
        return ClipGeometry(
            kind="audio",
            num_tokens=self.num_audio_tokens(num_mel_frames),
            duration_seconds=(seconds := header.num_audio_samples / self.settings.sampling_rate),
            sound_seconds=seconds,
            num_mel_frames=num_mel_frames,
            num_audio_samples=header.num_audio_samples,
        )

    def video_geometry(
        self,
        source: MediaSource,
        header: MediaHeader,
        scale: float,
        default_pixels: tuple[int, int],
        min_frames: int = 2,
    ) -> ClipGeometry:
        """A video by Qwen2-VL's rules: so many frames per second, bounds on each frame's pixels.

        Source: transformers, Qwen2VLVideoProcessor.
        """
        of_checkpoint = self.settings.video.pixels(default_pixels)
        pixels = bounds(self.options.video.min_pixels, self.options.video.max_pixels, of_checkpoint)
        options, temporal = source.options, self.vision.temporal_patch_size
        fps, least, most = self.frame_bounds(options, header, min_frames)
        rate = header.fps or fps  # a list of frames without a rate of its own is taken as already sampled
        indices = sample_frame_indices(header.num_frames, rate, fps, most, least, temporal)
        if scale < 1:
            most = max(int(len(indices) * math.sqrt(scale)), temporal)
            indices = sample_frame_indices(header.num_frames, rate, fps, most, min(least, most), temporal)
        num_grids = len(indices) // temporal
        grid = (num_grids, *self.grid(options, header, pixels, math.sqrt(scale), len(indices)))
        seconds = header.duration_seconds or header.num_frames / rate
        # As published, a grid lasts temporal / fps; only where a bound kept fewer frames, as long as it truly does.
        wanted = max(math.floor(header.num_frames / rate * fps / temporal), 1)
        as_published = wanted == num_grids and options.num_frames is None
        num_samples = self._num_sound_samples(source, header)
        num_mel_frames = num_samples // self.settings.hop_length if num_samples else 0
        return ClipGeometry(
            kind="video",
            num_tokens=self.num_merged(grid) + self.num_audio_tokens(num_mel_frames),
            grid_thw=grid,
            frame_indices=tuple(header.first_frame + index for index in indices),
            duration_seconds=seconds,
            seconds_per_grid=temporal / fps if as_published else seconds / num_grids,
            num_mel_frames=num_mel_frames,
            num_audio_samples=num_samples,
            sound_seconds=num_samples / self.settings.sampling_rate if num_samples else 0.0,
        )

    def frame_bounds(self, options: ClipOptions, header: MediaHeader, min_frames: int) -> tuple[float, int, int]:
        """Frames per second, and frames at least and at most, that are asked of a video.

        Raises: SampleError where a row asks for more frames than there are.
        """
        fps = self.options.video.fps if options.fps is None else options.fps
        if options.num_frames is None:
            most = self.options.video.max_frames if options.max_frames is None else options.max_frames
            return fps, min_frames if options.min_frames is None else options.min_frames, most
        if options.num_frames > header.num_frames:
            reason = f"nframes asks for {options.num_frames} frames, there are {header.num_frames}"
            raise SampleError("videos", reason)
        return fps, options.num_frames, options.num_frames

    def _num_sound_samples(self, source: MediaSource, header: MediaHeader) -> int:
        if not source.use_audio:
            return 0
        if self.audio is None:
            raise SampleError("videos", "its sound is asked for, but the model has no audio tower")
        if header.has_audio and header.num_audio_samples >= self.audio.least_frames * self.settings.hop_length:
            return header.num_audio_samples
        if self.options.video.no_audio == "error":
            raise SampleError(
                "videos",
                "its sound is asked for, but it has none; data.video.no_audio=video_only takes the pictures alone",
            )
        return 0

    # ------------------------------------------------------------------------------------ features

    def features(self, clip: ClipGeometry, decoded: DecodedClip) -> Features:
        """Patches (see `VisionClip`) and log-mel float32 [num_mel_bins, L], None for what the clip lacks.

        Raises: SampleError where the decoded arrays are not of the planned size.
        """
        mel = None if not clip.num_mel_frames else self._mel(clip, decoded.waveform)
        frames = self.resized(clip, decoded).pixels
        if frames is None:
            return None, mel
        patches = pixel_patches(
            frames[None] if frames.ndim == 3 else frames,
            patch=self.vision.patch_size,
            temporal_patch=self.vision.temporal_patch_size,
            merge=self.vision.spatial_merge_size,
        )
        if self.pixel_rules is None:
            patches = normalise_pixels(patches, self._rules_of(self._pixel_rules(clip)))
        return patches, mel

    def resized(self, clip: ClipGeometry, decoded: DecodedClip) -> DecodedClip:
        """The clip with pictures in their planned size. Raises: SampleError where there are not as many as planned."""
        if clip.grid_thw is None:
            return replace(decoded, pixels=None)
        pixels, num_frames = decoded.pixels, max(len(clip.frame_indices), 1)
        num_decoded = 0 if pixels is None else 1 if pixels.ndim == 3 else len(pixels)
        if pixels is None or num_decoded != num_frames:
            reason = f"expected {num_frames} decoded frames as planned, got {num_decoded or 'none'}"
            raise SampleError(f"{clip.kind}s", reason)
        size = clip.grid_thw[1] * self.vision.patch_size, clip.grid_thw[2] * self.vision.patch_size
        resample = self._pixel_rules(clip).resample
        if pixels.ndim == 3:
            return replace(decoded, pixels=resize(pixels, *size, resample))
        return replace(decoded, pixels=np.stack([resize(frame, *size, resample) for frame in pixels]))

    def _pixel_rules(self, clip: ClipGeometry) -> PixelRules:
        return self.settings.image if clip.kind == "image" else self.settings.frames

    @cached_property
    def pixel_rules(self) -> Tensor | None:
        """What holds for the pixels of images and videos alike, float32 [3, patch_dim]; None where they differ."""
        image, frames = self._rules_of(self.settings.image), self._rules_of(self.settings.frames)
        return image if torch.equal(image, frames) else None

    def _rules_of(self, rules: PixelRules) -> Tensor:
        mean, std = (0.0,) * 3, (1.0,) * 3
        if rules.mean is not None and rules.std is not None:
            mean, std = rules.mean, rules.std
        divisor = 1.0 if rules.rescale is None else 1 / rules.rescale
        by_channel = torch.tensor([(divisor,) * 3, mean, std], dtype=torch.float64).float()
        return by_channel.repeat_interleave(self.vision.patch_dim // 3, dim=1)

    def normalised(self, features: Features) -> Features:
        """The same with pixels as numbers, for who does not normalise them: transformers."""
        patches, mel = features
        if patches is not None and self.pixel_rules is not None:
            patches = normalise_pixels(patches, self.pixel_rules)
        return patches, mel

    def _mel(self, clip: ClipGeometry, waveform: np.ndarray | None) -> Tensor:
        assert self.audio is not None, "a clip with sound for a model without an audio tower"
        if waveform is None or len(waveform) != clip.num_audio_samples:
            got = "none" if waveform is None else len(waveform)
            raise SampleError(
                f"{clip.kind}s", f"expected {clip.num_audio_samples} samples of sound as planned, got {got}"
            )
        return log_mel(
            waveform,
            self.audio.num_mel_bins,
            sampling_rate=self.settings.sampling_rate,
            n_fft=self.settings.n_fft,
            hop_length=self.settings.hop_length,
        )
