"""Positions of text and clips on the three axes. Equality with transformers is in tests/parity."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.processors.positions import merge_by_time, sample_positions, text_block, vision_block


def test_text_counts_up_on_all_axes():
    assert torch.equal(sample_positions([5]), torch.arange(5).expand(3, 5))
    assert sample_positions([]).shape == (3, 0)


def test_a_run_cut_in_two_keeps_its_positions():
    block = vision_block((2, 4, 6), 2, 1.0, 13)
    assert torch.equal(sample_positions([3, 4, block, 2]), sample_positions([7, block, 1, 1]))
    assert torch.equal(sample_positions([3, text_block(4), 2]), sample_positions([9]))


def test_a_clip_starts_past_the_text_and_the_text_past_the_clip():
    positions = sample_positions([2, vision_block((1, 4, 8), 2, 0.0, 13), 2])
    time, height, width = positions.tolist()
    assert time == [0, 1, *[2] * 8, 6, 7]  # the widest axis, 4 columns, decides where text goes on
    assert height == [0, 1, *[2] * 4, *[3] * 4, 6, 7]
    assert width == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]


def test_text_may_go_on_past_rows_and_columns_only():
    video = vision_block((3, 4, 4), 2, 1.0, 5)
    assert sample_positions([1, video, 1])[:, -1].tolist() == [12] * 3  # the third grid has time 1 + 10
    assert sample_positions([1, video, 1], past_time=False)[:, -1].tolist() == [3] * 3


def test_positions_stay_whole_and_exact_far_out():
    positions = sample_positions([2**20, vision_block((1, 4, 4), 2, 0.0, 13), 2**20])
    assert positions.dtype == torch.int64
    assert torch.equal(positions[:, -(2**20) :], torch.arange(2**20 + 2, 2**21 + 2).expand(3, -1))


def _merge_one_by_one(video_times, num_audio):
    order, video, audio = [], 0, 0
    while video < len(video_times) or audio < num_audio:
        if audio == num_audio or (video < len(video_times) and video_times[video] <= audio):
            order.append(video)
            video += 1
        else:
            order.append(len(video_times) + audio)
            audio += 1
    return order


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from((0.5, 1.0, 2 / 3, 1.06, 8.0, 0.01)), st.integers(0, 60))
def test_merging_by_time_equals_merging_one_token_at_a_time(num_grids, per_grid, seconds, num_audio):
    times = np.repeat(np.arange(num_grids) * seconds * 13, per_grid)
    assert merge_by_time(times, num_audio).tolist() == _merge_one_by_one(times.tolist(), num_audio)
