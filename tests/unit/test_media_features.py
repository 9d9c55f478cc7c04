"""The features equal transformers' processors, clip by clip."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.processors.features import (
    log_mel,
    normalise_pixels,
    pixel_patches,
    resize,
    sample_frame_indices,
    smart_resize,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def whisper():
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=128, n_fft=400, hop_length=160, sampling_rate=16000)


@settings(deadline=None, max_examples=300)
@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    factor=st.sampled_from([28, 32, 16, 8]),
    low=st.integers(1, 300_000),
    ratio=st.integers(2, 50),
)
def test_smart_resize_equals_transformers(height, width, factor, low, ratio):
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as oracle

    arguments = {"factor": factor, "min_pixels": low, "max_pixels": low * ratio}
    try:
        expected = oracle.smart_resize(height, width, **arguments)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, **arguments)
        return
    assert smart_resize(height, width, **arguments) == expected


def test_smart_resize_of_an_empty_image_is_an_error():
    with pytest.raises(ValueError, match="1x1"):
        smart_resize(0, 5, 28, 28, 28 * 28)


@pytest.mark.parametrize(("patch", "merge"), [(14, 2), (16, 2), (4, 3), (8, 1)])
@pytest.mark.parametrize(("height", "width"), [(170, 300), (33, 500), (64, 64), (299, 41)])
def test_image_patches_equal_transformers_exactly(patch, merge, height, width):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    low, high = 20 * 20, 120 * 130
    oracle = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=2,
        size={"shortest_edge": low, "longest_edge": high},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    expected = oracle(image, return_tensors="pt")
    resized = resize(image, *smart_resize(height, width, patch * merge, low, high))
    pixels = pixel_patches(resized[None], patch=patch, temporal_patch=2, merge=merge)
    assert pixels.dtype == torch.uint8
    rules = torch.tensor([(255.0,) * 3, CLIP_MEAN, CLIP_STD]).repeat_interleave(2 * patch**2, dim=1)
    patches = normalise_pixels(pixels, rules)
    assert torch.equal(patches, expected["pixel_values"])
    assert expected["image_grid_thw"].tolist() == [[1, resized.shape[0] // patch, resized.shape[1] // patch]]


@settings(deadline=None, max_examples=30)
@given(
    num_frames=st.integers(1, 5),
    patch=st.integers(1, 3),
    temporal=st.integers(1, 3),
    merge=st.integers(1, 3),
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
)
def test_video_patches_equal_the_formula_read_element_by_element(num_frames, patch, temporal, merge, rows, columns):
    height, width = rows * merge * patch, columns * merge * patch
    pixels = np.random.default_rng(height).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    expected = []
    for t in range(math.ceil(num_frames / temporal)):
        for block_row in range(rows):
            for block_column in range(columns):
                for row in range(merge):
                    for column in range(merge):
                        y, x = (block_row * merge + row) * patch, (block_column * merge + column) * patch
                        clip = [frames[min(t * temporal + k, num_frames - 1)] for k in range(temporal)]
                        cut = torch.stack([frame[:, y : y + patch, x : x + patch] for frame in clip], dim=1)
                        expected.append(cut.flatten())  # C, time, y, x
    found = pixel_patches(pixels, patch=patch, temporal_patch=temporal, merge=merge)
    assert torch.equal(found.float() / 255, torch.stack(expected))


@settings(deadline=None, max_examples=300)
@given(
    num_frames=st.integers(1, 3000),
    video_fps=st.sampled_from([1.0, 23.976, 24.0, 25.0, 29.97, 30.0, 59.94, 0.5]),
    fps=st.sampled_from([0.1, 1.0, 2.0, 2.5, 30.0]),
    max_frames=st.integers(2, 768),
)
def test_sampled_frames_follow_the_published_rule(num_frames, video_fps, fps, max_frames):
    indices = sample_frame_indices(num_frames, video_fps, fps, max_frames)
    wanted = min(num_frames, max_frames, math.floor(num_frames / video_fps * fps))
    count = max(2, wanted // 2 * 2)
    assert len(indices) == count
    if num_frames == 1:
        assert indices == [0, 0]
    else:
        # Qwen2VLVideoProcessor.sample_frames; its arange may overshoot by one index through float rounding
        assert indices == torch.arange(0, num_frames, num_frames / count).int().tolist()[:count]
        assert indices[0] == 0
        assert indices[-1] < num_frames
        assert sorted(set(indices)) == indices


def test_sampling_respects_a_minimum_as_transformers_does():
    assert len(sample_frame_indices(100, 25.0, 0.5, 768, min_frames=4)) == 4
    assert len(sample_frame_indices(3, 25.0, 0.5, 768, min_frames=4)) == 2


@pytest.mark.parametrize(("num_frames", "video_fps", "fps"), [(0, 25.0, 2.0), (5, 0.0, 2.0), (5, math.nan, 2.0)])
def test_sampling_without_frames_or_rate_is_an_error(num_frames, video_fps, fps):
    with pytest.raises(ValueError, match="expected"):
        sample_frame_indices(num_frames, video_fps, fps, 10)


@pytest.mark.parametrize("num_samples", [201, 319, 320, 400, 16000, 16001, 48159, 16000 * 31 + 77])
def test_log_mel_equals_whisper_clip_by_clip(whisper, num_samples):
    waveform = np.random.default_rng(num_samples).standard_normal(num_samples).astype(np.float32) * 0.1
    features = whisper(waveform, sampling_rate=16000, padding="longest", truncation=False, return_attention_mask=True)
    ours = log_mel(waveform, 128)
    assert ours.dtype == torch.float32
    assert ours.shape == (128, num_samples // 160)
    # the same float32 operations; the filters differ by rounding in the last bit of the mel edges
    assert np.abs(ours.numpy() - features["input_features"][0]).max() < 1e-5
    assert int(np.sum(features["attention_mask"])) == num_samples // 160


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_log_mel_of_silence_and_of_a_tone_equals_whisper(num_mel_bins):
    from transformers import WhisperFeatureExtractor

    whisper = WhisperFeatureExtractor(feature_size=num_mel_bins)
    tone = np.sin(np.arange(8000) * 2 * np.pi * 440 / 16000).astype(np.float32)
    for waveform in (tone, np.zeros(8000, np.float32)):
        expected = whisper(waveform, sampling_rate=16000, padding="longest", truncation=False)["input_features"][0]
        assert np.abs(log_mel(waveform, num_mel_bins).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("num_samples", [160, 199, 200])
def test_clips_too_short_to_reflect_are_padded_with_silence(num_samples):
    waveform = np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
    features = log_mel(waveform)
    assert features.shape == (128, 1)
    assert torch.isfinite(features).all()
    padded = log_mel(np.pad(waveform, (0, 201 - num_samples)))
    assert torch.equal(features, padded)


def test_a_clip_shorter_than_one_frame_is_an_error():
    with pytest.raises(ValueError, match="160 samples"):
        log_mel(np.zeros(159, np.float32))
