"""Positions of the tokens of one sample on the three rotary axes (time, height, width).

Owns how text and clips follow one another: text advances all axes together, and every run starts one past the largest
coordinate of the token before it. Knows no token ids and no family; a family's processor lays out the blocks. Used by
processors in loader workers, never by a model.

Blocks are float32 while a sample is put together, as in transformers, since a video's time steps need not be whole;
the finished positions are floored to int64 (floats of lower precision collapse long contexts).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, zip_longest

import numpy as np
import torch
from torch import Tensor


def sample_positions(runs: Sequence[int | np.ndarray], *, past_time: bool = True) -> Tensor:
    """Positions int64 [3, t] of a sample given as runs: a number of text tokens, or a clip's block float32 [3, n].

    Blocks hold positions relative to their own start. Runs of no tokens are allowed. Without `past_time` a run starts
    past the rows and columns of the one before it, even where those are fewer than its time steps.
    Source: transformers, Qwen3OmniMoeThinkerForConditionalGeneration.get_rope_index; without `past_time`,
    Qwen2_5_VLModel.get_rope_index.
    """
    first_axis = 0 if past_time else 1
    lengths = [run if isinstance(run, int) else run.shape[1] for run in runs]
    positions = np.empty((3, sum(lengths)), np.float32)
    start, done = 0.0, 0
    for run, length in zip(runs, lengths, strict=True):
        if length:
            placed = positions[:, done : done + length]
            np.add(np.arange(run, dtype=np.float32) if isinstance(run, int) else run, start, out=placed)
            # The last token, not the block, as published: sound shorter than a frame is wide ends before the frame
            # does. In a picture the last token is the largest on every axis.
            start, done = max(placed[first_axis:, -1].tolist()) + 1, done + length
    return torch.from_numpy(np.floor(positions, out=positions).astype(np.int64))


def text_block(num_tokens: int) -> np.ndarray:
    """Block float32 [3, num_tokens] of tokens in a row: text, and sound, which runs like text."""
    return np.arange(num_tokens, dtype=np.float32)[None].repeat(3, axis=0)


def vision_block(
    grid_thw: tuple[int, int, int], merge: int, seconds_per_grid: float, positions_per_second: float
) -> np.ndarray:
    """Block float32 [3, n] of an image's or a video's merged patches, n = t * h * w / merge^2.

    The time axis advances by `seconds_per_grid * positions_per_second` per temporal grid.
    Source: transformers, Qwen3OmniMoePreTrainedModelForConditionalGeneration.get_llm_pos_ids_for_vision.
    """
    num_grids, rows, columns = grid_thw[0], grid_thw[1] // merge, grid_thw[2] // merge
    time = np.arange(num_grids, dtype=np.float32) * np.float32(seconds_per_grid) * np.float32(positions_per_second)
    block = np.empty((3, num_grids, rows, columns), np.float32)
    block[0], block[1], block[2] = time[:, None, None], np.arange(rows)[:, None], np.arange(columns)
    return block.reshape(3, -1)


def merge_by_time(video_times: np.ndarray, num_audio: int) -> np.ndarray:
    """Order int64 [num_video + num_audio] in which video and audio tokens of one clip alternate.

    Entries below num_video name video tokens, the others audio tokens. `video_times` [num_video] does not decrease;
    audio token i has time i. Video comes first where times are equal.
    Source: transformers, Qwen3OmniMoeProcessor.replace_video_with_audio_token.
    """
    times = np.concatenate([video_times, np.arange(num_audio)])
    return np.argsort(times, kind="stable")  # stable: ties keep video before audio


def merge_by_chunks(video_times: np.ndarray, num_audio: int, positions_per_chunk: float) -> np.ndarray:
    """As `merge_by_time`, but stretches of `positions_per_chunk` take turns: video tokens, then audio tokens.

    Where frames are further apart than a chunk, each of a frame's first tokens makes a chunk of its own, as published.
    Source: transformers, Qwen2_5OmniProcessor.replace_video_with_audio_token and get_chunked_index.
    """
    video = _chunks(video_times, positions_per_chunk)
    audio = [part + len(video_times) for part in _chunks(np.arange(num_audio), positions_per_chunk)]
    return np.concatenate([part for pair in zip_longest(video, audio) for part in pair if part is not None])


def _chunks(times: np.ndarray, size: float) -> list[np.ndarray]:
    """Indices by chunk: chunk k ends before the first token, after its own first, whose time is k x size or more."""
    bounds = [0]
    while True:
        cut = int(np.searchsorted(times, len(bounds) * size))
        cut = max(cut, bounds[-1] + 1) if len(bounds) > 1 else cut
        if cut >= len(times):
            break
        bounds.append(cut)
    return [np.arange(low, high) for low, high in pairwise([*bounds, len(times)])]
