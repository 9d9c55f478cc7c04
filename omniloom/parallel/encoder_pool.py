"""The pool of encoders: who decodes a clip, who encodes its segments, and where the rows go.

Each clip is decoded by one rank; its segments (frames, windows of audio) are spread by cost over the ranks of a pool; a
row of embeddings travels once to the rank that owns its token, and one gradient row comes back. Plans are made on the
host from sizes alone, equally on every rank of the pool. Knows batches and sizes, no model.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from omniloom.parallel.collectives import exchange_rows
from omniloom.parallel.mesh import Layout
from omniloom.parallel.segments import SegmentSizes, measure_audio, measure_vision, rebuild_audio, rebuild_vision
from omniloom.parallel.staging import to_device
from omniloom.sharding import ShardingPlan
from omniloom.types import AudioBatch, PackedBatch, PackPlan, TowerRows, VisionBatch

SLACK = 0.1  # of the mean load: what a rank may carry beyond it before a segment's features are moved elsewhere


# ---------------------------------------------------------------------------------------- who decodes


def assign_clips(pack: PackPlan, num_ranks: int) -> tuple[frozenset[tuple[int, int]], ...]:
    """The (sample, clip) pairs of a pack that each of its ranks reads and decodes: every clip once, evenly by size.

    A function of the plan alone, so every rank finds the same answer without a word.
    """
    sizes = [
        (_clip_cost(clip.grid_thw, clip.num_mel_frames), sample, index)
        for sample, planned in enumerate(pack.samples)
        for index, clip in enumerate(planned.extent.clips)
    ]
    shares: list[set[tuple[int, int]]] = [set() for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for cost, sample, index in sorted(sizes, key=lambda item: (-item[0], item[1], item[2])):
        load, rank = heapq.heappop(loads)
        shares[rank].add((sample, index))
        heapq.heappush(loads, (load + cost, rank))
    return tuple(frozenset(share) for share in shares)


def _clip_cost(grid_thw: tuple[int, int, int] | None, num_mel_frames: int) -> int:
    patches = 0 if grid_thw is None else grid_thw[0] * grid_thw[1] * grid_thw[2]
    return 1 + patches + num_mel_frames // 8


# ---------------------------------------------------------------------------------------- who encodes


@dataclass(frozen=True, kw_only=True)
class TowerMeta:
    """What a rank tells the pool about one tower's batch."""

    sizes: SegmentSizes
    is_fixed: bool  # segments stay where they are: geometry that this module cannot cut


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A rank of the pool: the pack it works on (by data rank), and how many token rows, from which on, are its own."""

    data_rank: int
    first_token: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class TowerRoute:
    """One tower's traffic as seen from one rank. Splits are per rank of the pool."""

    is_fixed: bool
    moves: bool  # whether any rank of the pool sends features to another
    unit_order: np.ndarray  # own real units to encode here or send, by destination
    unit_send: list[int]
    unit_receive: list[int]
    lengths: np.ndarray  # units of each segment encoded here (audio: rows)
    num_null: int  # length of this rank's own null segment
    row_order: np.ndarray  # tower rows to send, by owner of their token
    row_send: list[int]
    row_receive: list[int]
    token_index: np.ndarray  # own token row of each row received


def assign_segments(
    holders: Sequence[Sequence[int]], costs: Sequence[int], fixed: Sequence[bool], loads: list[int]
) -> list[int]:
    """Choose the rank that encodes each segment, adding to `loads`, the ranks' work so far.

    Heaviest first, each to the least loaded rank, or to one that holds its features already if that one is not much
    busier than the mean. Deterministic.
    """
    mean = (sum(costs) + sum(loads)) / len(loads)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    chosen = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        while heap[0][0] != loads[heap[0][1]]:
            heapq.heappop(heap)  # an entry from before its rank got more
        holder = min(holders[index], key=lambda rank: (loads[rank], rank))
        least, rank = heap[0]
        stays = loads[holder] + costs[index] <= mean * (1 + SLACK) or loads[holder] <= least + SLACK * mean
        if fixed[index] or stays:
            rank = holder
        chosen[index] = rank
        loads[rank] += costs[index]
        heapq.heappush(heap, (loads[rank], rank))
    return chosen


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """A segment after planning: its place on the rank that holds it, and who encodes it."""

    source: int
    index: int
    encoder: int


def route_tower(
    metas: Sequence[TowerMeta], seats: Sequence[Seat], me: int, loads: list[int], *, by_rows: bool
) -> TowerRoute:
    """Plan one tower's traffic. Every rank calls it with the same `metas`, `seats` and `loads` and its own `me`."""
    placed = _place(metas, seats, loads)
    fixed, ranks, mine = any(meta.is_fixed for meta in metas), range(len(seats)), metas[me].sizes
    encoded_here = [segment for segment in placed if segment.encoder == me]
    leaving: list[list[np.ndarray]] = [[] for _ in ranks]
    for segment in placed:
        if segment.source == me:
            leaving[segment.encoder].append(np.arange(mine.units[segment.index], mine.units[segment.index + 1]))
    receive = [0] * len(seats)
    for segment in encoded_here:
        receive[segment.source] += _length(metas[segment.source].sizes.units, segment.index)
    lengths = [
        _length(metas[s.source].sizes.rows if by_rows else metas[s.source].sizes.units, s.index) for s in encoded_here
    ]
    token, owner, encoder, tower_row = _follow_rows(placed, metas, seats, fixed)
    leaves, lands = encoder == me, owner == me
    order = np.argsort(owner[leaves], kind="stable")
    return TowerRoute(
        is_fixed=fixed,
        moves=any(segment.source != segment.encoder for segment in placed),
        unit_order=_concatenate([part for parts in leaving for part in parts]),
        unit_send=[sum(map(len, parts)) for parts in leaving],
        unit_receive=receive,
        lengths=np.array(lengths, dtype=np.int64),
        num_null=mine.num_null,
        row_order=tower_row[leaves][order],
        row_send=np.bincount(owner[leaves], minlength=len(seats)).tolist(),
        row_receive=np.bincount(encoder[lands], minlength=len(seats)).tolist(),
        token_index=token[lands] - seats[me].first_token,
    )


def _place(metas: Sequence[TowerMeta], seats: Sequence[Seat], loads: list[int]) -> list[_Placed]:
    """Merge what several ranks hold alike, and choose who encodes. In a fixed order."""
    holders: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, (meta, seat) in enumerate(zip(metas, seats, strict=True)):
        firsts = meta.sizes.token_index[meta.sizes.rows[:-1]].tolist()
        for index, token in enumerate(firsts):
            holders.setdefault((seat.data_rank, token), []).append((rank, index))
    places = [holders[key] for key in sorted(holders)]
    costs = [int(metas[place[0][0]].sizes.cost[place[0][1]]) for place in places]
    fixed = [metas[place[0][0]].is_fixed for place in places]
    encoders = assign_segments([[rank for rank, _ in place] for place in places], costs, fixed, loads)
    placed = []
    for place, encoder in zip(places, encoders, strict=True):
        source, index = next((item for item in place if item[0] == encoder), place[0])
        placed.append(_Placed(source=source, index=index, encoder=encoder))
    return sorted(placed, key=lambda segment: (segment.encoder, segment.source, segment.index))


def _follow_rows(
    placed: Sequence[_Placed], metas: Sequence[TowerMeta], seats: Sequence[Seat], fixed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each row of embeddings, in the order of the towers that make them: its token row, the owner of that, the rank
    that encodes it, and its place in that rank's tower."""
    owner_of = np.full((1 + max(seat.data_rank for seat in seats), len(seats)), -1)
    for rank, seat in enumerate(seats):
        owner_of[seat.data_rank, seat.first_token // seat.num_tokens] = rank
    tokens, owners, places, ends = [], [], [], [0] * len(seats)
    for segment in placed:
        sizes, seat = metas[segment.source].sizes, seats[segment.source]
        low, high = sizes.rows[segment.index], sizes.rows[segment.index + 1]
        tokens.append(sizes.token_index[low:high])
        owners.append(owner_of[seat.data_rank, tokens[-1] // seat.num_tokens])
        # a fixed tower encodes all that its rank holds, in the order it was loaded
        start = low if fixed else ends[segment.encoder]
        places.append(np.arange(start, start + high - low))
        ends[segment.encoder] += high - low
    encoders = np.repeat([segment.encoder for segment in placed], list(map(len, tokens)))
    return _concatenate(tokens), _concatenate(owners), encoders.astype(np.int64), _concatenate(places)


def _concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def _length(bounds: np.ndarray, index: int) -> int:
    return int(bounds[index + 1] - bounds[index])


# ---------------------------------------------------------------------------------------- the pool


@dataclass(frozen=True, kw_only=True)
class PoolPlan:
    """The traffic of one micro-step, as seen from one rank."""

    seat: Seat
    vision: TowerRoute | None
    audio: TowerRoute | None


class EncoderPool:
    """Carries out plans: features to where they are encoded, rows to where their tokens are, gradients back.

    The pool is a model-parallel group (`group`) or all ranks (`data`). Made once, collectively, on every rank.
    """

    def __init__(self, layout: Layout, plan: ShardingPlan, scope: Literal["group", "data"]) -> None:
        degree = layout.degrees.context
        self.layout = layout
        self.patches_per_row, self.rows_per_chunk = plan.patches_per_row, plan.audio_rows_per_chunk
        if scope == "data":
            self.members = list(range(layout.world_size))
            self.group = dist.group.WORLD
            self.host_group = dist.new_group(backend="gloo", timeout=layout.ranks.timeout)
        else:
            first = layout.rank - layout.context_rank
            self.members = list(range(first, first + degree))
            self.group = layout.context_group
            made = dist.new_subgroups(degree, backend="gloo", timeout=layout.ranks.timeout) if degree > 1 else None
            self.host_group = made[0] if made else None
        self.me = self.members.index(layout.rank)

    @property
    def is_alone(self) -> bool:
        """One rank: nothing to exchange."""
        return len(self.members) == 1

    def plan(self, batch: PackedBatch) -> PoolPlan:
        """Agree on who encodes what. `batch` is the pack as loaded. Host only, collective over the pool."""
        num_tokens = batch.input_ids.shape[0] // self.layout.degrees.context
        seat = Seat(
            data_rank=self.layout.data_rank,
            first_token=self.layout.context_rank * num_tokens,
            num_tokens=num_tokens,
        )
        vision = audio = None
        if batch.vision is not None:
            sizes = measure_vision(batch.vision, self.patches_per_row)
            vision = TowerMeta(sizes=sizes, is_fixed=batch.vision.window_segments is not None)
        if batch.audio is not None:
            sizes = measure_audio(batch.audio, self.rows_per_chunk)
            audio = TowerMeta(sizes=sizes, is_fixed=batch.audio.pool_index is not None)
        gathered: list = [None] * len(self.members)
        dist.all_gather_object(gathered, (seat, vision, audio), group=self.host_group)
        seats = [item[0] for item in gathered]
        loads = [0] * len(seats)
        routes = [
            None
            if own is None
            else route_tower([item[tower] for item in gathered], seats, self.me, loads, by_rows=tower == 2)
            for tower, own in ((1, vision), (2, audio))
        ]
        return PoolPlan(seat=seat, vision=routes[0], audio=routes[1])

    def gather_features(self, batch: PackedBatch, plan: PoolPlan) -> PackedBatch:
        """The media that this rank encodes. `batch` on the device. Collective over the pool where features move."""
        vision, audio = batch.vision, batch.audio
        if vision is not None and plan.vision is not None and not plan.vision.is_fixed:
            vision = self._gather_vision(vision, plan.vision)
        if audio is not None and plan.audio is not None and not plan.audio.is_fixed:
            audio = self._gather_audio(audio, plan.audio)
        return replace(batch, vision=vision, audio=audio)

    def _gather_vision(self, batch: VisionBatch, route: TowerRoute) -> VisionBatch:
        return rebuild_vision(batch, route.lengths, route.num_null, partial(self._move_units, route))

    def _gather_audio(self, batch: AudioBatch, route: TowerRoute) -> AudioBatch:
        return rebuild_audio(
            batch, route.lengths, route.num_null, self.rows_per_chunk, partial(self._move_units, route)
        )

    def _move_units(self, route: TowerRoute, field: Tensor) -> Tensor:
        leaving = field.index_select(0, _on(route.unit_order, field))
        return exchange_rows(leaving, route.unit_send, route.unit_receive, self.group) if route.moves else leaving

    def send_rows(
        self, media: PackedBatch, rows: TowerRows, plan: PoolPlan
    ) -> tuple[VisionBatch | None, AudioBatch | None, TowerRows]:
        """Tower rows to the owners of their tokens. Collective over the pool: one all-to-all per tower.

        Returns the media batches with this rank's own token rows as `token_index`, and the rows that fill them,
        detached; deepstack levels travel beside the rows they belong to.
        """
        vision, audio = media.vision, media.audio
        vision_rows, deepstack, audio_rows = None, rows.deepstack, None
        if vision is not None and rows.vision is not None and plan.vision is not None:
            vision_rows, *deepstack = self._exchange([rows.vision, *rows.deepstack], plan.vision)
            vision = replace(vision, token_index=_on(plan.vision.token_index, rows.vision))
        if audio is not None and rows.audio is not None and plan.audio is not None:
            (audio_rows,) = self._exchange([rows.audio], plan.audio)
            audio = replace(audio, token_index=_on(plan.audio.token_index, rows.audio))
        return vision, audio, TowerRows(vision=vision_rows, deepstack=tuple(deepstack), audio=audio_rows)

    def _exchange(self, levels: list[Tensor], route: TowerRoute) -> list[Tensor]:
        order = _on(route.row_order, levels[0])
        leaving = torch.cat([level.detach().index_select(0, order) for level in levels], dim=1)
        landed = exchange_rows(leaving, route.row_send, route.row_receive, self.group)
        return [level.contiguous() for level in landed.split([level.shape[1] for level in levels], dim=1)]

    def return_gradients(self, rows: TowerRows, gradients: TowerRows, plan: PoolPlan) -> TowerRows:
        """Gradients of received rows back to the towers that made them: shaped like `rows`, zero for the rest.

        Collective over the pool: one all-to-all per tower.
        """
        vision, deepstack, audio = None, (), None
        if rows.vision is not None and plan.vision is not None:
            assert gradients.vision is not None, "rows without gradients"
            likes, given = [rows.vision, *rows.deepstack], [gradients.vision, *gradients.deepstack]
            vision, *levels = self._return(likes, given, plan.vision)
            deepstack = tuple(levels)
        if rows.audio is not None and plan.audio is not None:
            assert gradients.audio is not None, "rows without gradients"
            (audio,) = self._return([rows.audio], [gradients.audio], plan.audio)
        return TowerRows(vision=vision, deepstack=deepstack, audio=audio)

    def _return(self, likes: list[Tensor], gradients: list[Tensor], route: TowerRoute) -> list[Tensor]:
        order = _on(route.row_order, likes[0])
        landed = exchange_rows(torch.cat(gradients, dim=1), route.row_receive, route.row_send, self.group)
        parts = landed.split([like.shape[1] for like in likes], dim=1)
        return [
            torch.zeros_like(like).index_copy(0, order, part.to(like.dtype))
            for like, part in zip(likes, parts, strict=True)
        ]


def _on(index: np.ndarray, like: Tensor) -> Tensor:
    return to_device(torch.from_numpy(index), like.device)
