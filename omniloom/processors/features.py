"""From decoded media to what a tower reads: sizes, sampled frames, patches, log-mel spectrograms.

Owns the pure arithmetic that a family's processor needs, on arrays that are already decoded. It knows no file, no
container and no model: patch sizes, pixel bounds and mel counts are arguments. Each function equals the transformers
processor that it names, clip by clip, so that extents, training and published inference agree.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omniloom.types import SampleError

MAX_ASPECT_RATIO = 200  # beyond it the published processors refuse
BAND_BINS = 16  # of the mel scale, multiplied together


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width to resize to: multiples of `factor`, the area within bounds, the aspect ratio nearly kept.

    `factor` is patch size x merge size. Raises: SampleError for an aspect ratio over 200 or a side below 1.
    Source: transformers, Qwen2VLImageProcessor.smart_resize.
    """
    if min(height, width) < 1:
        raise SampleError("images", f"expected an image of at least 1x1 pixels, got {width}x{height}")
    return _fit(1, 1, height, width, factor, min_pixels, max_pixels)


def smart_resize_video(
    num_frames: int, height: int, width: int, temporal: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """As `smart_resize`, the bounds being those of all frames together; frames under `factor` are enlarged first.

    Raises: SampleError for an aspect ratio over 200 or a side below 1.
    Source: transformers, video_processing_qwen3_vl.smart_resize.
    """
    if min(height, width) < 1:
        raise SampleError("videos", f"expected frames of at least 1x1 pixels, got {width}x{height}")
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    whole_frames = round(num_frames / temporal) * temporal
    return _fit(num_frames, whole_frames, height, width, factor, min_pixels, max_pixels)


def _fit(
    num_frames: int, whole_frames: int, height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """As published, an area is tested with the frames of whole grids and scaled by all there are."""
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise SampleError(
            "media", f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {ratio:.1f} ({width}x{height})"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    area = whole_frames * new_height * new_width
    if area > max_pixels:
        beta = math.sqrt(num_frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif area < min_pixels:
        beta = math.sqrt(min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def sample_frame_indices(
    num_frames: int, video_fps: float, fps: float, max_frames: int, min_frames: int = 2, multiple: int = 2
) -> list[int]:
    """Indices of the frames to keep: `fps` per second, evenly spread, a multiple of `multiple` of them.

    The count is floor(duration x fps), at least `min_frames`, at most `max_frames` and the frames there are. A video
    with fewer than `multiple` frames repeats its last one. Raises: SampleError for no frames or no rate.
    Source: transformers, Qwen2VLVideoProcessor.sample_frames.
    """
    if num_frames < 1:
        raise SampleError("videos", f"expected a video with at least one frame, got {num_frames}")
    if not video_fps > 0 or not fps > 0:
        raise SampleError(
            "videos", f"expected positive frame rates, got {video_fps!r} of the video and {fps!r} asked for"
        )
    if num_frames < multiple:
        return spread_frames(num_frames, multiple)
    most = max(min(max_frames, num_frames) // multiple, 1) * multiple
    count = min(max(num_frames / video_fps * fps, min_frames, multiple), most)
    count = math.floor(count / multiple) * multiple
    return spread_frames(num_frames, count)


def spread_frames(num_frames: int, count: int, *, first: int = 0, reach_last: bool = False) -> list[int]:
    """Indices of `count` frames evenly spread over `num_frames` from `first` on; the last repeats if there are fewer.

    Each stands for a stretch of equal length and begins it; with `reach_last` they run from the first to the last.
    Source: transformers, Qwen2VLVideoProcessor.sample_frames and, with `reach_last`, Qwen3VLVideoProcessor's.
    """
    if num_frames < count:
        return [first + min(index, num_frames - 1) for index in range(count)]
    if reach_last:
        return [int(index) for index in np.linspace(first, first + num_frames - 1, count).round()]
    # arange in torch's own rounding, so that indices equal transformers'; it may yield one index too many
    indices = torch.arange(0, num_frames, num_frames / count).int()[:count].tolist()
    assert len(indices) == count, (len(indices), count)
    return [first + index for index in indices]


def resize(image: NDArray[np.uint8], height: int, width: int, resample: int = 3) -> NDArray[np.uint8]:
    """Resize uint8 [H, W, 3] to uint8 [height, width, 3] with PIL's filter of that number, bicubic being 3.

    Raises: ValueError for a number that is none of PIL's. Source: transformers, PilBackend.resize.
    """
    from PIL import Image  # not needed to import a model

    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), resample=Image.Resampling(resample)))


def pixel_patches(frames: NDArray[np.uint8], *, patch: int, temporal_patch: int, merge: int) -> Tensor:
    """Cut frames uint8 [N, H, W, C] into patches uint8 [P, C * temporal_patch * patch * patch].

    H and W divide by patch x merge. Where N does not divide by `temporal_patch` the last frame is repeated, so an
    image is a video of one frame. Rows run over time, block row, block column, row and column within the block.
    Source: transformers, Qwen2VLImageProcessorPil and Qwen2VLVideoProcessor: patchify.
    """
    if len(frames) > 1 and (missing := -len(frames) % temporal_patch):
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    height, width, channels = frames.shape[1:]
    assert height % (patch * merge) == width % (patch * merge) == 0, (height, width, patch, merge)
    shown = min(len(frames), temporal_patch)  # frames of a row of patches that differ
    rows, columns = height // (patch * merge), width // (patch * merge)
    run = np.dtype(np.complex128 if patch == 16 else (np.void, patch))  # a row of a patch: its bytes move as one
    planes = np.ascontiguousarray(frames.transpose(0, 3, 1, 2)).view(run)
    blocks = planes.reshape(-1, shown, channels, rows, merge, patch, columns, merge)
    cut = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5)  # t, block row, block column, row, column, C, frame, y
    pixels = np.empty((*cut.shape[:6], temporal_patch, patch), run)
    pixels[..., :shown, :] = cut
    pixels[..., shown:, :] = pixels[..., shown - 1 : shown, :]
    return torch.from_numpy(pixels.view(np.uint8).reshape(-1, channels * temporal_patch * patch * patch))


def normalise_pixels(patches: Tensor, rules: Tensor) -> Tensor:
    """Patches uint8 [P, patch_dim] as float32, by `VisionBatch.pixel_rules`.

    Source: transformers, Qwen2VLImageProcessorPil: rescale and normalize, to the last bit: of all 256 values x / 255
    in float32 equals their x * (1 / 255) in float64, rounded.
    """
    divisor, mean, std = rules
    return patches.float().div_(divisor).sub_(mean).div_(std)


def log_mel(
    waveform: Tensor | np.ndarray,
    num_mel_bins: int = 128,
    *,
    sampling_rate: int = 16000,
    n_fft: int = 400,
    hop_length: int = 160,
) -> Tensor:
    """Log-mel spectrogram float32 [num_mel_bins, num_samples // hop_length] of one mono clip float32 [num_samples].

    Clips of half a window and less are padded with silence first, since they cannot be reflected at their ends; the
    number of frames is the same formula. Raises: SampleError for a clip shorter than one hop.
    Source: transformers, WhisperFeatureExtractor on a single clip, padding "longest", no truncation.
    """
    samples = torch.as_tensor(waveform, dtype=torch.float32)
    num_frames = samples.shape[0] // hop_length
    if num_frames < 1:
        raise SampleError(
            "audios",
            f"expected at least {hop_length} samples ({hop_length / sampling_rate * 1000:g} ms) of audio, "
            f"got {samples.shape[0]}",
        )
    if samples.shape[0] <= n_fft // 2:
        samples = torch.nn.functional.pad(samples, (0, n_fft // 2 + 1 - samples.shape[0]))
    spectrum = torch.stft(samples, n_fft, hop_length, window=torch.hann_window(n_fft), return_complex=True)
    squares = torch.view_as_real(spectrum.T[:num_frames]).square_().flatten(1).T  # real and imaginary parts in turns
    bands = _mel_bands(num_mel_bins, sampling_rate, n_fft)
    power = torch.cat([filters @ squares[first:end] for first, end, filters in bands])
    spectrogram = power.clamp_(min=1e-10).log10_()
    return spectrogram.clamp_(min=spectrogram.max() - 8.0).add_(4.0).div_(4.0)


@lru_cache(maxsize=4)
def _mel_bands(num_mel_bins: int, sampling_rate: int, n_fft: int) -> tuple[tuple[int, int, Tensor], ...]:
    """The filters by BAND_BINS at a time, each band with the stretch (first, end) of squares that it takes: in all a
    fifth of the products of the whole matrix, which is nearly empty."""
    bands = []
    for filters in _mel_filters(num_mel_bins, sampling_rate, n_fft).split(BAND_BINS):
        taken = filters.any(dim=0).nonzero()
        first, end = int(taken.min()), int(taken.max()) + 1
        bands.append((2 * first, 2 * end, filters[:, first:end].repeat_interleave(2, dim=1)))
    return tuple(bands)


def _mel_filters(num_mel_bins: int, sampling_rate: int, n_fft: int) -> Tensor:
    """Triangular filters on Slaney's mel scale, area-normalised, up to 8 kHz: float32 [num_mel_bins, n_fft // 2 + 1].

    Source: Slaney, Auditory Toolbox (1998); transformers, audio_utils.mel_filter_bank.
    """
    edges_mel = np.linspace(_hertz_to_mel(0.0), _hertz_to_mel(8000.0), num_mel_bins + 2)
    edges = np.where(edges_mel < 15.0, 200.0 * edges_mel / 3.0, 1000.0 * np.exp(np.log(6.4) / 27.0 * (edges_mel - 15)))
    frequencies = np.linspace(0, sampling_rate // 2, n_fft // 2 + 1)
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - lower) / (centre - lower)
    falling = (upper - frequencies) / (upper - centre)
    filters = np.maximum(0, np.minimum(rising, falling)) * (2.0 / (upper - lower))
    return torch.from_numpy(filters.astype(np.float32))


def _hertz_to_mel(hertz: float) -> float:
    if hertz < 1000.0:
        return 3.0 * hertz / 200.0
    return 15.0 + math.log(hertz / 1000.0) * 27.0 / math.log(6.4)
