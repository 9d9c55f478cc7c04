"""The pool's plans: every clip decoded once, every segment encoded once, every row delivered to its token's owner."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.models.audio import AudioTowerConfig
from omniloom.parallel.encoder_pool import SLACK, Seat, TowerMeta, assign_clips, assign_segments, route_tower
from omniloom.parallel.segments import SegmentSizes, measure_audio, measure_vision, rebuild_audio, rebuild_vision
from omniloom.processors.tower_batches import audio_batch
from omniloom.types import (
    AudioBatch,
    AudioClip,
    ClipGeometry,
    Extent,
    PackPlan,
    PlannedSample,
    Segments,
    VisionBatch,
)


def planned(sizes: list[tuple[int, int]]) -> PlannedSample:
    clips = tuple(
        ClipGeometry(kind="video", num_tokens=1, grid_thw=(frames, 2, 2), num_mel_frames=mel) for frames, mel in sizes
    )
    extent = Extent(num_tokens=1, num_loss_tokens=1, weight_sum=1.0, clips=clips)
    return PlannedSample(row=0, epoch=0, extent=extent, weight_scale=1.0)


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 900)), max_size=4), max_size=6),
    st.integers(1, 5),
)
@settings(deadline=None, max_examples=60)
def test_every_clip_is_decoded_by_exactly_one_rank(samples: list[list[tuple[int, int]]], num_ranks: int) -> None:
    pack = PackPlan(index=0, samples=tuple(planned(sizes) for sizes in samples))
    shares = assign_clips(pack, num_ranks)
    assert len(shares) == num_ranks
    wanted = sorted((s, c) for s, sizes in enumerate(samples) for c in range(len(sizes)))
    assert sorted(clip for share in shares for clip in share) == wanted


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=80)
def test_segments_that_one_rank_holds_are_spread_evenly(costs: list[int], num_ranks: int, random) -> None:
    holders = [[random.randrange(num_ranks)] for _ in costs]
    loads = [0] * num_ranks
    chosen = assign_segments(holders, costs, [False] * len(costs), loads)
    assert loads == [sum(c for c, rank in zip(costs, chosen, strict=True) if rank == r) for r in range(num_ranks)]
    # greedy: no rank exceeds the mean by more than one segment and the slack that saves moving
    assert max(loads) <= sum(costs) / num_ranks * (1 + SLACK) + max(costs)


def test_segments_stay_with_their_holder_where_loads_are_even() -> None:
    assert assign_segments([[0], [1], [0], [1]], [5, 5, 5, 5], [False] * 4, [0, 0]) == [0, 1, 0, 1]


def test_fixed_segments_never_move() -> None:
    assert assign_segments([[1]] * 5, [9] * 5, [True] * 5, [0, 0]) == [1] * 5


@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_every_row_reaches_the_owner_of_its_token_once(
    context: int, data: int, shared_loading: bool, fixed: bool, seed: int
) -> None:
    """Plays all ranks of a pool in one process: features and rows are tagged with (data rank, token row)."""
    rng = np.random.default_rng(seed)
    num_tokens = 24
    seats, metas, features = [], [], []
    for data_rank in range(data):
        tokens = rng.permutation(num_tokens * context)
        lengths = rng.integers(1, 5, size=rng.integers(0, 7))
        bounds = np.concatenate([[0], np.cumsum(lengths)]).clip(max=num_tokens)
        bounds = np.unique(bounds)
        clips = [np.sort(tokens[low:high]) for low, high in pairwise(bounds.tolist())]
        for context_rank in range(context):
            seats.append(Seat(data_rank=data_rank, first_token=context_rank * num_tokens, num_tokens=num_tokens))
            mine = clips if shared_loading else clips[context_rank::context]
            rows = np.concatenate([[0], np.cumsum([len(clip) for clip in mine])]).astype(np.int64)
            index = np.concatenate([*mine, np.zeros(0, dtype=np.int64)]).astype(np.int64)
            sizes = SegmentSizes(units=2 * rows, rows=rows, cost=np.diff(rows), token_index=index, num_null=1)
            metas.append(TowerMeta(sizes=sizes, is_fixed=fixed))
            features.append(np.repeat(data_rank * 1000 + index, 2))
    ranks = range(len(seats))
    routes = [route_tower(metas, seats, me, [0] * len(seats), by_rows=False) for me in ranks]
    encoded = features if fixed else exchange(features, [(r.unit_order, r.unit_send, r.unit_receive) for r in routes])
    if not fixed:
        for rank in ranks:
            assert routes[rank].lengths.sum() == len(encoded[rank])
    rows = [units[::2] for units in encoded]
    landed = exchange(rows, [(r.row_order, r.row_send, r.row_receive) for r in routes])
    for rank, seat in enumerate(seats):
        wanted = {
            int(token)
            for meta, other in zip(metas, seats, strict=True)
            if other.data_rank == seat.data_rank
            for token in meta.sizes.token_index
            if seat.first_token <= token < seat.first_token + num_tokens
        }
        found = routes[rank].token_index + seat.first_token
        assert sorted(found.tolist()) == sorted(wanted)
        assert (landed[rank] == seat.data_rank * 1000 + found).all()


def exchange(values: list[np.ndarray], traffic: list[tuple[np.ndarray, list[int], list[int]]]) -> list[np.ndarray]:
    """An all-to-all among arrays; what is sent must be what is expected."""
    parts = []
    for value, (order, send, _) in zip(values, traffic, strict=True):
        parts.append(np.split(value[order], np.cumsum(send)[:-1]))
        assert sum(send) == len(order)
    landed = []
    for rank, (_, _, receive) in enumerate(traffic):
        arriving = [parts[source][rank] for source in range(len(values))]
        assert [len(part) for part in arriving] == receive
        landed.append(np.concatenate(arriving))
    return landed


def vision_of(frames: list[int]) -> VisionBatch:
    """Frames of so many merged rows of four patches, then a null frame of one."""
    lengths = [4 * rows for rows in frames] + [4]
    total = sum(lengths)
    return VisionBatch(
        patches=torch.arange(total * 3.0).view(total, 3),
        segments=Segments.from_lengths(lengths),
        rotary_index=torch.arange(total * 2).view(total, 2),
        interpolation_index=torch.zeros(total, 4, dtype=torch.int64),
        interpolation_weights=torch.rand(total, 4),
        token_index=torch.arange(sum(frames)),
    )


def test_a_vision_batch_is_put_together_from_chosen_frames() -> None:
    batch = vision_of([2, 1, 3])
    sizes = measure_vision(batch, 4)
    assert sizes.rows.tolist() == [0, 2, 3, 6]
    assert sizes.units.tolist() == [0, 8, 12, 24]
    chosen = torch.cat([torch.arange(12, 24), torch.arange(0, 8)])  # the third frame, then the first
    built = rebuild_vision(batch, np.array([12, 8]), sizes.num_null, lambda field: field.index_select(0, chosen))
    assert torch.equal(built.patches, batch.patches[[*chosen.tolist(), *range(24, 28)]])
    assert built.segments.cu_seqlens.tolist() == [0, 12, 20, 24]
    assert built.segments.max_length == 12


def test_an_audio_batch_is_put_together_from_chosen_windows() -> None:
    """Two clips, one of two windows of two chunks (the last one short), one of a single chunk; then the null chunk."""
    rows_per_chunk = 3
    rows = torch.tensor([3, 3, 3, 2, 1, 1])  # valid rows of each chunk
    valid = (torch.arange(rows_per_chunk) < rows[:, None]).flatten().nonzero().squeeze(1)
    batch = AudioBatch(
        features=torch.arange(6.0)[:, None, None].expand(6, 2, 4).clone(),
        chunk_frames=torch.arange(6),
        valid_index=valid,
        segments=Segments.from_lengths([6, 5, 1, 1]),
        token_index=torch.arange(12),
    )
    sizes = measure_audio(batch, rows_per_chunk)
    assert sizes.units.tolist() == [0, 2, 4, 5]
    assert sizes.rows.tolist() == [0, 6, 11, 12]
    chosen = torch.tensor([4, 2, 3])  # the second clip, then the first clip's second window
    built = rebuild_audio(
        batch, np.array([1, 5]), sizes.num_null, rows_per_chunk, lambda field: field.index_select(0, chosen)
    )
    assert built.features[:, 0, 0].tolist() == [4, 2, 3, 5]
    assert built.chunk_frames.tolist() == [4, 2, 3, 5]
    assert built.valid_index.tolist() == [0, 3, 4, 5, 6, 7, 9]
    assert built.segments.cu_seqlens.tolist() == [0, 1, 6, 7]


@given(st.lists(st.integers(3, 45), max_size=6))
@settings(deadline=None, max_examples=60)
def test_every_segment_of_a_pooled_audio_batch_has_rows(clip_frames: list[int]) -> None:
    """A window of one row at a clip's end is paired with nothing, and segments are told apart by their first tokens."""
    config = AudioTowerConfig(
        num_mel_bins=4,
        encoder_layers=1,
        encoder_attention_heads=1,
        encoder_ffn_dim=4,
        d_model=4,
        activation_function="gelu",
        n_window=4,
        n_window_infer=8,
        output_dim=4,
        downsample_hidden_size=None,
        pool=2,
    )
    starts = np.cumsum([0, *(config.num_tokens(frames) for frames in clip_frames)])
    clips = [
        AudioClip(features=torch.zeros(4, frames), token_index=torch.arange(low, high))
        for frames, (low, high) in zip(clip_frames, pairwise(starts), strict=True)
    ]
    sizes = measure_audio(audio_batch(clips, config), config.chunk_rows)
    assert (np.diff(sizes.rows) > 0).all()
    assert (np.diff(sizes.units) > 0).all()
    assert sizes.rows[0] == sizes.units[0] == 0
    assert sizes.rows[-1] == starts[-1]
    assert sizes.units[-1] == sum(-(-frames // 8) for frames in clip_frames)
