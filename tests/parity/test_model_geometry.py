"""What `vision_batch` and `audio_batch` compute on the CPU, against transformers' own index functions."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.dims import AudioTowerConfig, VisionTowerConfig
from omniloom.processors.tower_batches import audio_batch, vision_batch
from omniloom.types import AudioClip, VisionClip
from tests.parity.builders import audio_rows


def vision_config(merge: int = 2, side: int = 5) -> VisionTowerConfig:
    return VisionTowerConfig(
        depth=1,
        hidden_size=8,
        hidden_act="gelu",
        intermediate_size=8,
        num_heads=1,
        in_channels=3,
        patch_size=2,
        temporal_patch_size=2,
        spatial_merge_size=merge,
        out_hidden_size=8,
        num_position_embeddings=side**2,
        deepstack_visual_indexes=(),
        rope_theta=10_000.0,
    )


def audio_config(n_window: int = 50, chunks_per_window: int = 2) -> AudioTowerConfig:
    return AudioTowerConfig(
        num_mel_bins=3,
        encoder_layers=1,
        encoder_attention_heads=1,
        encoder_ffn_dim=4,
        d_model=4,
        activation_function="gelu",
        n_window=n_window,
        n_window_infer=2 * n_window * chunks_per_window,
        output_dim=4,
        downsample_hidden_size=2,
    )


def vision_clip(grid: tuple[int, int, int], config: VisionTowerConfig, start: int = 0) -> VisionClip:
    count = grid[0] * grid[1] * grid[2]
    rows = torch.arange(start, start + count // config.spatial_merge_size**2)
    return VisionClip(patches=torch.randn(count, config.patch_dim), grid_thw=grid, token_index=rows)


def audio_clip(num_frames: int, config: AudioTowerConfig, start: int = 0) -> AudioClip:
    rows = torch.arange(start, start + audio_rows(num_frames, config.chunk_frames))
    return AudioClip(features=torch.randn(config.num_mel_bins, num_frames), token_index=rows)


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), max_size=4),
    merge=st.integers(1, 3),
    side=st.integers(1, 9),
)
def test_patch_positions_and_segments_equal_transformers(blocks, merge, side):
    from transformers.vision_utils import (
        get_vision_cu_seqlens,
        get_vision_interpolation_indices_and_weights,
        get_vision_position_ids,
    )

    config = vision_config(merge, side)
    grids = [(t, h * merge, w * merge) for t, h, w in blocks]
    batch = vision_batch([vision_clip(grid, config) for grid in grids], config)
    thw = torch.tensor([*grids, (1, merge, merge)])  # the null segment is last
    assert torch.equal(batch.rotary_index, get_vision_position_ids(thw, merge))
    assert torch.equal(batch.segments.cu_seqlens, get_vision_cu_seqlens(thw))
    assert batch.segments.max_length == int(get_vision_cu_seqlens(thw).diff().max())
    index, weights = get_vision_interpolation_indices_and_weights(
        thw, num_grid_per_side=side, align_corners=True, spatial_merge_size=merge
    )
    table = torch.randn(side**2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # compared by what they fetch: a tap of weight zero may point anywhere
    torch.testing.assert_close(
        (table[batch.interpolation_index] * batch.interpolation_weights).sum(1),
        (table[index] * weights).sum(1),
        rtol=1e-6,
        atol=1e-6,
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 110), st.integers(90, 900)), min_size=1, max_size=4),
    n_window=st.integers(49, 52),
    chunks_per_window=st.integers(1, 3),
)
def test_audio_chunks_rows_and_windows_equal_transformers(lengths, n_window, chunks_per_window):
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as theirs

    config = audio_config(n_window, chunks_per_window)
    clips = [audio_clip(length, config) for length in [*lengths, config.chunk_frames]]  # one is long: all pad to it
    batch = audio_batch(clips, config)
    frames = torch.tensor([*lengths, config.chunk_frames])
    joined = torch.cat([clip.features for clip in clips], dim=1)
    features, chunk_lengths = theirs.chunk_and_pad_features(joined, frames, n_window)
    assert torch.equal(batch.features[:-1], features)  # the null segment is last
    valid = theirs.get_valid_indices(chunk_lengths, n_window)
    assert torch.equal(batch.valid_index[:-2], valid)
    cu_seqlens = theirs.get_audio_cu_seqlens(chunk_lengths, frames, config.n_window_infer, n_window)
    assert torch.equal(batch.segments.cu_seqlens[:-1], cu_seqlens)
    assert batch.segments.cu_seqlens[-1] == cu_seqlens[-1] + 2


def test_no_clips_leave_the_null_segment_alone():
    vision, audio = vision_batch([], vision_config()), audio_batch([], audio_config())
    assert vision.patches.shape[0] == 4
    assert vision.segments.cu_seqlens.tolist() == [0, 4]
    assert vision.token_index.shape == (0,)
    assert audio.features.shape == (1, 3, 100)
    assert audio.valid_index.tolist() == [0, 1]
    assert audio.token_index.shape == (0,)
    assert audio.token_index.dtype == vision.token_index.dtype == torch.int64


def test_clips_keep_their_order_and_rows():
    config = vision_config()
    batch = vision_batch([vision_clip((1, 2, 4), config, 7), vision_clip((2, 2, 2), config, 30)], config)
    assert batch.token_index.tolist() == [7, 8, 30, 31]
    config = audio_config()
    batch = audio_batch([audio_clip(9, config, 5), audio_clip(101, config, 40)], config)
    assert batch.token_index.tolist() == [5, 6, *range(40, 54)]
    assert batch.chunk_frames.tolist() == [9, 100, 100, 9]


def test_clips_that_do_not_fit_their_tokens_are_refused():
    config = vision_config()
    short = VisionClip(patches=torch.zeros(8, 24), grid_thw=(1, 2, 4), token_index=torch.arange(3))
    with pytest.raises(AssertionError):
        vision_batch([short], config)
    with pytest.raises(AssertionError):
        vision_batch([VisionClip(patches=torch.zeros(8, 24), grid_thw=(1, 4, 4), token_index=torch.arange(4))], config)
    with pytest.raises(AssertionError):
        vision_batch([VisionClip(patches=torch.zeros(3, 24), grid_thw=(1, 1, 3), token_index=torch.arange(1))], config)
    sound = audio_config()
    with pytest.raises(AssertionError):
        audio_batch([AudioClip(features=torch.zeros(3, 9), token_index=torch.arange(1))], sound)
    with pytest.raises(AssertionError):
        audio_batch([AudioClip(features=torch.zeros(4, 9), token_index=torch.arange(2))], sound)


def test_a_clips_rows_do_not_depend_on_what_stands_beside_it():
    """Our tower alone; agreement with transformers' is in the model's tests."""
    from omniloom.models.audio import AudioTower

    rng = random.Random(0)
    config = audio_config()
    tower = AudioTower(config, kernel="auto")
    clips = [audio_clip(rng.choice([7, 42, 100, 230, 555]), config) for _ in range(6)]
    together = tower(audio_batch(clips, config))
    start = 0
    for clip in clips:
        count = clip.token_index.shape[0]
        alone = tower(audio_batch([clip], config))[:count]
        torch.testing.assert_close(together[start : start + count], alone, rtol=1e-5, atol=1e-6)
        start += count
