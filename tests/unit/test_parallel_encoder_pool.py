"""The pool's plans: every clip decoded once, every segment encoded once, every row delivered to its token's owner."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.dims import AudioTowerConfig
from omniloom.parallel.encoder_pool import SLACK, assign_clips, assign_segments, route_tower
from omniloom.parallel.mesh import Seat
from omniloom.parallel.segments import (
    TowerSizes,
    join_audio,
    join_sizes,
    join_vision,
    measure_audio,
    measure_vision,
    rebuild_audio,
    rebuild_vision,
)
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


def sizes_of(lengths: list[int], tokens: np.ndarray, fixed: bool) -> TowerSizes:
    """Segments of so many rows of two units each, then a null segment of one row."""
    total = 2 * sum(lengths) + 2
    batch = VisionBatch(
        patches=torch.zeros(total, 1),
        segments=Segments.from_lengths([*(2 * length for length in lengths), 2]),
        rotary_index=torch.zeros(total, 2),
        interpolation_index=torch.zeros(total, 4),
        interpolation_weights=torch.zeros(total, 4),
        token_index=torch.from_numpy(tokens),
        window_segments=Segments.from_lengths([total]) if fixed else None,
    )
    return measure_vision(batch, 2)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_every_row_reaches_the_owner_of_its_token_once(
    context: int, data: int, num_packs: int, shared_loading: bool, fixed: bool, seed: int
) -> None:
    """Plays all ranks of a pool in one process: features and rows are tagged with (data rank, pack, token row)."""
    rng = np.random.default_rng(seed)
    local = 24
    pack_tokens = local * context
    seats, sizes, features = [], [], []
    for data_rank in range(data):
        clips_of_pack = []
        for _ in range(num_packs):
            tokens = rng.permutation(pack_tokens)
            bounds = np.unique(np.concatenate([[0], np.cumsum(rng.integers(1, 5, size=rng.integers(0, 7)))]))
            clips_of_pack.append([np.sort(tokens[low:high]) for low, high in pairwise(bounds.clip(max=local).tolist())])
        for sharer_rank in range(context):
            seats.append(Seat(data_rank=data_rank, sharer_rank=sharer_rank, sharers=context))
            own, tags = [], []
            for number, clips in enumerate(clips_of_pack):
                mine = [clip for clip in (clips if shared_loading else clips[sharer_rank::context]) if len(clip)]
                index = np.concatenate([*mine, np.zeros(0, dtype=np.int64)]).astype(np.int64)
                own.append(sizes_of([len(clip) for clip in mine], index, fixed))
                tags.append(np.repeat(data_rank * 10_000 + number * pack_tokens + index, 2))
                tags.append(np.array([-1, -1]))  # the null segment
            sizes.append(join_sizes(own, pack_tokens))
            features.append(np.concatenate(tags))
    ranks = range(len(seats))
    routes = [
        route_tower(sizes, seats, me, [0] * len(seats), pack_tokens=pack_tokens, num_packs=num_packs) for me in ranks
    ]
    encoded = features
    if not fixed:
        encoded = exchange(features, [(r.unit_order.numpy(), r.unit_send, r.unit_receive) for r in routes])
        for rank in ranks:
            assert routes[rank].segments.cu_seqlens[-1] == len(encoded[rank]) + 2
    rows = [units[::2] for units in encoded]
    landed = exchange(rows, [(r.row_order.numpy(), r.row_send, r.row_receive) for r in routes])
    for rank, seat in enumerate(seats):
        route, first = routes[rank], seat.sharer_rank * local
        wanted = {
            int(token)
            for size, other in zip(sizes, seats, strict=True)
            if other.data_rank == seat.data_rank
            for token in size.tokens()
            if first <= token % pack_tokens < first + local
        }
        found = np.concatenate(
            [number * pack_tokens + first + index.numpy() for number, index in enumerate(route.token_index)]
        )
        assert sorted(found.tolist()) == sorted(wanted)
        by_pack = landed[rank] if route.landing is None else landed[rank][route.landing.numpy()]
        assert (by_pack == seat.data_rank * 10_000 + found).all()


def exchange(values: list[np.ndarray], traffic: list[tuple[np.ndarray, list[int], list[int]]]) -> list[np.ndarray]:
    """An all-to-all among arrays; what is sent must be what is expected."""
    parts = []
    for value, (order, send, _) in zip(values, traffic, strict=True):
        parts.append(np.split(value[order], np.cumsum(send)[:-1]))
        assert sum(send) == len(order)
    landed = []
    for rank, (_, _, receive) in enumerate(traffic):
        arriving = [parts[source][rank] for source in range(len(values))]
        assert [len(part) for part in arriving] == list(receive)
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


ALONE = Seat(data_rank=0, sharer_rank=0, sharers=2)
BESIDE = Seat(data_rank=0, sharer_rank=1, sharers=2)


def test_a_vision_batch_is_put_together_from_chosen_frames() -> None:
    batch, other = vision_of([2, 1, 3]), vision_of([])
    sizes = [measure_vision(batch, 4), measure_vision(other, 4)]
    assert sizes[0].row_starts.tolist() == [0, 2, 3]
    assert sizes[0].unit_lengths.tolist() == [8, 4, 12]
    route = route_tower(sizes, [ALONE, BESIDE], 0, [0, 1000], pack_tokens=8)  # the other is busy: all stay
    built = rebuild_vision(batch, route, lambda field: field.index_select(0, route.unit_order))
    assert torch.equal(built.patches, batch.patches)
    route = route_tower(sizes, [ALONE, BESIDE], 0, [0, 0], pack_tokens=8)
    stays = route.unit_order[: route.unit_send[0]]
    built = rebuild_vision(batch, route, lambda field: field.index_select(0, stays))
    assert torch.equal(built.patches, batch.patches[[*stays.tolist(), *range(24, 28)]])
    assert built.segments.cu_seqlens.tolist() == [0, 12, 16]
    assert built.segments.max_length == 12


def audio_of(rows: list[int], lengths: list[int], rows_per_chunk: int = 3) -> AudioBatch:
    """Chunks of so many valid rows, the last one being the null segment's."""
    valid = (torch.arange(rows_per_chunk) < torch.tensor(rows)[:, None]).flatten().nonzero().squeeze(1)
    return AudioBatch(
        features=torch.arange(float(len(rows)))[:, None, None].expand(-1, 2, 4).clone(),
        chunk_frames=torch.arange(len(rows)),
        valid_index=valid,
        segments=Segments.from_lengths(lengths),
        token_index=torch.arange(len(valid) - rows[-1]),
    )


def test_an_audio_batch_is_put_together_from_chosen_windows() -> None:
    """Two clips, one of two windows of two chunks (the last one short), one of a single chunk; then the null chunk."""
    batch, other = audio_of([3, 3, 3, 2, 1, 1], [6, 5, 1, 1]), audio_of([1], [1])
    sizes = [measure_audio(batch, 3), measure_audio(other, 3)]
    assert sizes[0].unit_starts.tolist() == [0, 2, 4]
    assert sizes[0].row_lengths.tolist() == [6, 5, 1]
    here, there = (route_tower(sizes, [ALONE, BESIDE], me, [0, 0], pack_tokens=12, rows_per_chunk=3) for me in range(2))
    assert (here.unit_send, there.unit_receive) == ((2, 3), (3, 0))  # the first window stays, the others leave
    stays, leaves = here.unit_order[:2], here.unit_order[2:]
    built = rebuild_audio(batch, here, lambda field: field.index_select(0, stays))
    assert built.features[:, 0, 0].tolist() == [0, 1, 5]
    assert built.valid_index.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert built.segments.cu_seqlens.tolist() == [0, 6, 7]
    built = rebuild_audio(other, there, lambda field: field.new_zeros(len(leaves), *field.shape[1:]))
    assert built.valid_index.tolist() == [0, 1, 2, 3, 4, 6, 9]
    assert built.segments.cu_seqlens.tolist() == [0, 5, 6, 7]


def test_batches_of_several_packs_become_one_with_their_null_segments() -> None:
    joined = join_vision([vision_of([2, 1]), vision_of([]), vision_of([3])])
    assert joined.segments.cu_seqlens.tolist() == [0, 8, 12, 16, 20, 32, 36]
    audio = [audio_of([3, 2, 1], [5, 1]), audio_of([1], [1]), audio_of([2, 1], [2, 1])]
    sizes = join_sizes([measure_audio(batch, 3) for batch in audio], 10)
    whole = join_audio(audio, 3)
    assert whole.valid_index.tolist() == [0, 1, 2, 3, 4, 6, 9, 12, 13, 15]
    assert whole.segments.cu_seqlens.tolist() == [0, 5, 6, 7, 9, 10]
    assert sizes.unit_starts.tolist() == [0, 4]
    assert sizes.row_starts.tolist() == [0, 7]
    assert sizes.tokens().tolist() == [0, 1, 2, 3, 4, 20, 21]
    assert sizes.chunk_rows.tolist() == [3, 2, 1, 1, 2, 1]


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
    assert (sizes.row_lengths > 0).all()
    assert (sizes.unit_lengths > 0).all()
    assert sizes.row_lengths.sum() == starts[-1]
    assert sizes.unit_lengths.sum() == sum(-(-frames // 8) for frames in clip_frames)
