"""The pool of encoders: who decodes a clip, who encodes its segments, and where the rows go.

Each clip is decoded by one rank; its segments (frames, windows of audio) are spread by cost over the ranks of a pool; a
row of embeddings travels once to the rank that owns its token, and one gradient row comes back. Routes are planned on
the host ahead of the step, from the sizes that ranks tell each other with what they loaded. Knows batches and sizes, no
model.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from omniloom.parallel.collectives import exchange_rows
from omniloom.parallel.context import move_chunks
from omniloom.parallel.mesh import Layout, Seat
from omniloom.parallel.pipeline import layer_owners
from omniloom.parallel.segments import (
    Ints,
    TowerSizes,
    join_audio,
    join_sizes,
    join_vision,
    measure_audio,
    measure_vision,
    rebuild_audio,
    rebuild_vision,
    spread,
    valid_rows,
)
from omniloom.sharding import ShardingPlan
from omniloom.types import MediaRoute, PackedBatch, PackPlan, Segments, TowerRoute, TowerRows

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


class _Placed(NamedTuple):
    """A segment after planning: who encodes it, and its place on the rank that sends its features."""

    encoder: int
    source: int
    index: int  # type: ignore[assignment]  # a tuple's method has this name


def route_tower(
    sizes: Sequence[TowerSizes],
    seats: Sequence[Seat],
    me: int,
    loads: list[int],
    *,
    pack_tokens: int,
    num_packs: int = 1,
    rows_per_chunk: int = 1,  # of audio
) -> TowerRoute:
    """Plan one tower's traffic, alike on every rank but for `me`, adding to `loads`; token rows count on over packs."""
    placed, mine = _place(sizes, seats, loads), sizes[me]
    fixed = any(size.is_fixed for size in sizes)
    here = [segment for segment in placed if segment.encoder == me]
    leaving: list[list[int]] = [[] for _ in seats]
    for segment in (segment for segment in placed if segment.source == me):
        leaving[segment.encoder].append(segment.index)
    receive = [0] * len(seats)
    for segment in here:
        receive[segment.source] += int(sizes[segment.source].unit_lengths[segment.index])
    order = [index for part in leaving for index in part]
    segments, valid_index = (None, None) if fixed else _encoded_here(here, sizes, mine, rows_per_chunk)
    row_order, row_send = _leaving_rows(here, sizes, seats, pack_tokens, fixed)
    row_receive, tokens = _landing_rows(placed, sizes, seats, me, pack_tokens)
    landing, token_index = _by_pack(tokens, seats[me], pack_tokens, num_packs)
    return TowerRoute(
        segments=segments,
        valid_index=valid_index,
        num_null_units=mine.num_null if mine.chunk_rows is None else 1,
        moves=any(segment.source != segment.encoder for segment in placed),
        unit_order=torch.from_numpy(spread(mine.unit_starts[order], mine.unit_lengths[order])),
        unit_send=tuple(int(mine.unit_lengths[part].sum()) for part in leaving),
        unit_receive=tuple(receive),
        row_order=torch.from_numpy(row_order),
        row_send=row_send,
        row_receive=row_receive,
        landing=torch.from_numpy(landing) if num_packs > 1 else None,
        token_index=token_index,
    )


def _encoded_here(
    here: Sequence[_Placed], sizes: Sequence[TowerSizes], mine: TowerSizes, rows_per_chunk: int
) -> tuple[Segments, Tensor | None]:
    """What attention in the tower counts of the segments here, and audio's valid rows; the null segment last."""
    lengths = [int(sizes[segment.source].lengths[segment.index]) for segment in here]
    segments = Segments.from_lengths([*lengths, mine.num_null])
    if mine.chunk_rows is None:
        return segments, None
    chunks = [_chunk_rows(sizes[segment.source], segment.index) for segment in here]
    return segments, valid_rows(np.concatenate([*chunks, mine.chunk_rows[-1:]]), rows_per_chunk)


def _by_pack(tokens: Ints, seat: Seat, pack_tokens: int, num_packs: int) -> tuple[Ints, tuple[Tensor, ...]]:
    """The order of received rows by pack, and for each pack the own token rows that they fill."""
    packs, local = np.divmod(tokens, pack_tokens)
    landing = np.argsort(packs, kind="stable")
    local = local[landing] - seat.sharer_rank * (pack_tokens // seat.sharers)
    counts = np.bincount(packs, minlength=num_packs)
    return landing, tuple(torch.from_numpy(part) for part in np.split(local, np.cumsum(counts)[:-1]))


def _chunk_rows(sizes: TowerSizes, index: int) -> Ints:
    assert sizes.chunk_rows is not None, "no audio"
    return sizes.chunk_rows[sizes.unit_starts[index] :][: sizes.unit_lengths[index]]


def _place(sizes: Sequence[TowerSizes], seats: Sequence[Seat], loads: list[int]) -> list[_Placed]:
    """Merge what several ranks hold alike, and choose who encodes. In a fixed order."""
    holders: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, (size, seat) in enumerate(zip(sizes, seats, strict=True)):
        firsts = size.tokens()[np.cumsum(size.row_lengths) - size.row_lengths].tolist()
        for index, token in enumerate(firsts):
            holders.setdefault((seat.data_rank, token), []).append((rank, index))
    places = [holders[key] for key in sorted(holders)]
    costs_of, fixed_of = [size.cost.tolist() for size in sizes], [size.is_fixed for size in sizes]
    encoders = assign_segments(
        [[rank for rank, _ in place] for place in places],
        [costs_of[rank][index] for (rank, index), *_ in places],
        [fixed_of[rank] for (rank, _), *_ in places],
        loads,
    )
    return sorted(
        _Placed(encoder, *next((item for item in place if item[0] == encoder), place[0]))
        for place, encoder in zip(places, encoders, strict=True)
    )


def _tokens_of(segments: Sequence[_Placed], sizes: Sequence[TowerSizes]) -> list[Ints]:
    """The token rows of each segment."""
    known = {source: sizes[source] for source in {segment.source for segment in segments}}
    tokens = {source: size.tokens() for source, size in known.items()}
    ends = {source: np.cumsum(size.row_lengths) for source, size in known.items()}
    return [
        tokens[s.source][ends[s.source][s.index] - known[s.source].row_lengths[s.index] : ends[s.source][s.index]]
        for s in segments
    ]


def _leaving_rows(
    here: Sequence[_Placed], sizes: Sequence[TowerSizes], seats: Sequence[Seat], pack_tokens: int, fixed: bool
) -> tuple[Ints, tuple[int, ...]]:
    """Rows of the tower here by the owner of their token, and how many each owner gets."""
    tokens = _tokens_of(here, sizes)
    first, sharers = min(seat.data_rank for seat in seats), seats[0].sharers
    num_owners = sharers * (1 + max(seat.data_rank for seat in seats) - first)
    lengths = np.array(list(map(len, tokens)), dtype=np.int64)
    # a fixed tower encodes all that its rank holds, in the order it was loaded
    starts = np.array([sizes[s.source].row_starts[s.index] for s in here], dtype=np.int64)
    places = spread(starts if fixed else np.cumsum(lengths) - lengths, lengths)
    data_rank = np.repeat(np.array([seats[s.source].data_rank for s in here], dtype=np.int64) - first, lengths)
    owners = data_rank * sharers + _sharer_rank(_concatenate(tokens), pack_tokens, sharers)
    return places[np.argsort(owners, kind="stable")], tuple(np.bincount(owners, minlength=num_owners).tolist())


def _landing_rows(
    placed: Sequence[_Placed], sizes: Sequence[TowerSizes], seats: Sequence[Seat], me: int, pack_tokens: int
) -> tuple[tuple[int, ...], Ints]:
    """How many rows come from each rank, and the token row of each, in the order in which they come."""
    seat = seats[me]
    coming = [segment for segment in placed if seats[segment.source].data_rank == seat.data_rank]
    parts = _tokens_of(coming, sizes)
    encoders = np.repeat(np.array([segment.encoder for segment in coming], dtype=np.int64), list(map(len, parts)))
    tokens = _concatenate(parts)
    lands = _sharer_rank(tokens, pack_tokens, seat.sharers) == seat.sharer_rank
    return tuple(np.bincount(encoders[lands], minlength=len(seats)).tolist()), tokens[lands]


def _sharer_rank(tokens: Ints, pack_tokens: int, sharers: int) -> Ints:
    return tokens % pack_tokens // (pack_tokens // sharers)


def _concatenate(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


# ---------------------------------------------------------------------------------------- the pool


MediaSizes = tuple[TowerSizes | None, TowerSizes | None]  # of one pack's vision and audio


class EncoderPool:
    """Plans routes and carries them out: features to where they are encoded, rows to where their tokens are, gradients
    back.

    The pool is a model-parallel group (`group`) or all ranks (`data`). Made once, collectively, on every rank.
    """

    def __init__(self, layout: Layout, plan: ShardingPlan, scope: Literal["group", "data"]) -> None:
        self.layout = layout
        self.patches_per_row, self.rows_per_chunk = plan.patches_per_row, plan.audio_rows_per_chunk
        self._layer_owners = layer_owners(plan, layout.degrees)
        self.group = dist.group.WORLD if scope == "data" else _group_of(layout)
        members = list(range(layout.world_size))
        if scope == "group":
            members = [rank for rank in members if layout.seat(rank).data_rank == layout.data_rank]
        self.seats = [layout.seat(rank) for rank in members]
        self.members, self.me = members, members.index(layout.rank)
        # who owns the token rows of each data and context rank, by the stage that reads them
        self._owners = [
            [member for member, seat in enumerate(self.seats) if seat.pipeline_rank == stage]
            for stage in range(layout.degrees.pipeline)
        ]

    @property
    def is_alone(self) -> bool:
        """One rank: nothing to exchange."""
        return len(self.members) == 1

    # ------------------------------------------------------------------------------------ on the host, ahead

    def measure(self, batch: PackedBatch) -> MediaSizes | None:
        """What the other ranks must know of a pack's media, as loaded here, on the host."""
        if self.is_alone:
            return None
        move = partial(move_chunks, num_tokens=batch.input_ids.shape[0], ring=self.layout.degrees.ring)
        vision, audio = batch.vision, batch.audio
        if vision is not None:
            vision = replace(vision, token_index=move(vision.token_index))
        if audio is not None:
            audio = replace(audio, token_index=move(audio.token_index))
        return (
            None if vision is None else measure_vision(vision, self.patches_per_row),
            None if audio is None else measure_audio(audio, self.rows_per_chunk),
        )

    def route(self, packs: Sequence[PackedBatch], measured: Sequence[Sequence[MediaSizes | None]]) -> list[PackedBatch]:
        """This rank's packs of a step with their routes. `measured` are all ranks' sizes, pack by pack.

        Under a pipeline the towers are called once for all packs, so the first one comes with the media of all.
        """
        if self.is_alone:
            return list(packs)
        known = [measured[rank] for rank in self.members]
        if self.layout.degrees.pipeline > 1:
            first, *others = packs
            vision = [pack.vision for pack in packs if pack.vision is not None]
            audio = [pack.audio for pack in packs if pack.audio is not None]
            first = replace(
                first,
                vision=join_vision(vision) if vision else None,
                audio=join_audio(audio, self.rows_per_chunk) if audio else None,
                media_route=self._plan(known, first.input_ids.shape[0]),
            )
            return [first, *(replace(pack, vision=None, audio=None) for pack in others)]
        return [
            replace(pack, media_route=self._plan([[sizes[number]] for sizes in known], pack.input_ids.shape[0]))
            for number, pack in enumerate(packs)
        ]

    def plan(self, packs: Sequence[PackedBatch]) -> list[PackedBatch]:
        """`route` for packs that no stream has routed. Collective over all ranks: one exchange of objects."""
        if self.is_alone:
            return list(packs)
        return self.route(packs, self.layout.exchange([self.measure(pack) for pack in packs]))

    def _plan(self, sizes: Sequence[Sequence[MediaSizes | None]], pack_tokens: int) -> MediaRoute:
        """Of the packs whose sizes are given, by member of the pool."""
        loads, routes = [0] * len(sizes), list[TowerRoute | None]()
        for tower in (0, 1):
            found = [[size for pack in own if pack is not None and (size := pack[tower])] for own in sizes]
            joined = [join_sizes(own, pack_tokens) for own in found if own]
            routes.append(
                route_tower(
                    joined,
                    self.seats,
                    self.me,
                    loads,
                    pack_tokens=pack_tokens,
                    num_packs=len(sizes[0]),
                    rows_per_chunk=self.rows_per_chunk,
                )
                if joined
                else None
            )
        return MediaRoute(vision=routes[0], audio=routes[1])

    # ------------------------------------------------------------------------------------ on the device, in the step

    def gather_features(self, batch: PackedBatch) -> PackedBatch:
        """The media that this rank encodes. `batch` on the device. Collective over the pool where features move."""
        route = batch.media_route
        assert route is not None, "media of a pool without routes: see EncoderPool.plan"
        vision, audio = batch.vision, batch.audio
        if vision is not None and route.vision is not None and route.vision.segments is not None:
            vision = rebuild_vision(vision, route.vision, partial(self._move_units, route.vision))
        if audio is not None and route.audio is not None and route.audio.segments is not None:
            audio = rebuild_audio(audio, route.audio, partial(self._move_units, route.audio))
        return replace(batch, vision=vision, audio=audio)

    def _move_units(self, route: TowerRoute, field: Tensor) -> Tensor:
        leaving = field.index_select(0, route.unit_order)
        return self._exchange(leaving, route.unit_send, route.unit_receive) if route.moves else leaving

    def _exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        assert self.group is not None, "a lone rank exchanges nothing"
        return exchange_rows(rows, list(send), list(receive), self.group)

    def send_rows(self, media: PackedBatch, rows: TowerRows, num_packs: int) -> list[tuple[PackedBatch, TowerRows]]:
        """Tower rows to the owners of their tokens. Collective over the pool: one all-to-all per tower and stage.

        Returns for each of the packs its media, with this rank's own token rows as `token_index`, and the rows that
        fill them, detached; deepstack levels travel beside the rows they belong to, or to the stage that adds them.
        Rows that another stage reads are none here.
        """
        route, vision, audio = media.media_route, media.vision, media.audio
        assert route is not None, "media of a pool without routes"
        found = list[tuple[PackedBatch, TowerRows]]()
        visual = self._send([rows.vision, *rows.deepstack], route.vision, num_packs)
        heard = self._send([rows.audio], route.audio, num_packs)
        for number, ((seen, *deepstack), (sound,)) in enumerate(zip(visual, heard, strict=True)):
            if vision is not None and route.vision is not None:
                vision = replace(vision, token_index=route.vision.token_index[number])
            if audio is not None and route.audio is not None:
                audio = replace(audio, token_index=route.audio.token_index[number])
            local = replace(media, vision=vision, audio=audio)
            levels = tuple(level for level in deepstack if level is not None)
            found.append((local, TowerRows(vision=seen, deepstack=levels, audio=sound)))
        return found

    def _send(
        self, levels: Sequence[Tensor | None], route: TowerRoute | None, num_packs: int
    ) -> list[list[Tensor | None]]:
        """Per pack what landed of each level; None of a tower that there is not."""
        packs: list[list[Tensor | None]] = [[None] * len(levels) for _ in range(num_packs)]
        if route is None:
            return packs
        present = [level for level in levels if level is not None]
        for stage, numbers in self._levels_by_stage(len(present)):
            leaving = torch.cat([present[i].detach().index_select(0, route.row_order) for i in numbers], dim=1)
            send, receive = self._splits(stage, route)
            rows = self._exchange(leaving, send, receive)
            if route.landing is not None and stage == self.layout.pipeline_rank:
                rows = rows.index_select(0, route.landing)
            lengths = [len(index) if stage == self.layout.pipeline_rank else 0 for index in route.token_index]
            for pack, part in zip(packs, rows.split(lengths), strict=True):
                widths = [present[i].shape[1] for i in numbers]
                for i, level in zip(numbers, part.split(widths, dim=1), strict=True):
                    pack[i] = level.contiguous()
        return packs

    def _levels_by_stage(self, num_levels: int) -> list[tuple[int, list[int]]]:
        """The pipeline ranks that read levels, and which: the first reads rows, the owner of layer i level i + 1."""
        owners = [0, *self._layer_owners][:num_levels]
        return [(stage, [i for i, owner in enumerate(owners) if owner == stage]) for stage in sorted(set(owners))]

    def _splits(self, stage: int, route: TowerRoute) -> tuple[list[int], list[int]]:
        """Rows to and from each member, where those of `stage` are the owners."""
        send = [0] * len(self.members)
        for member, count in zip(self._owners[stage], route.row_send, strict=True):
            send[member] = count
        here = stage == self.layout.pipeline_rank
        return send, list(route.row_receive) if here else [0] * len(self.members)

    def return_gradients(self, rows: TowerRows, gradients: Sequence[TowerRows], route: MediaRoute) -> TowerRows:
        """Gradients of received rows, pack by pack, back to the towers that made them: shaped like `rows`, zero for the
        rest. Collective over the pool as `send_rows`."""
        vision, *deepstack = self._return(
            [rows.vision, *rows.deepstack], [(given.vision, *given.deepstack) for given in gradients], route.vision
        )
        (audio,) = self._return([rows.audio], [(given.audio,) for given in gradients], route.audio)
        levels = tuple(level for level in deepstack if level is not None)
        return TowerRows(vision=vision, deepstack=levels, audio=audio)

    def _return(
        self, likes: Sequence[Tensor | None], packs: Sequence[Sequence[Tensor | None]], route: TowerRoute | None
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(likes)
        if route is None:
            return found
        present = [like for like in likes if like is not None]
        for stage, numbers in self._levels_by_stage(len(present)):
            given = [[part for i in numbers if (part := pack[i]) is not None] for pack in packs]
            leaving = torch.cat([torch.cat(parts, dim=1) for parts in given])
            if route.landing is not None and stage == self.layout.pipeline_rank:
                leaving = torch.empty_like(leaving).index_copy_(0, route.landing, leaving)
            send, receive = self._splits(stage, route)
            landed = self._exchange(leaving, receive, send)
            parts = landed.split([present[i].shape[1] for i in numbers], dim=1)
            for i, part in zip(numbers, parts, strict=True):
                like = present[i]
                found[i] = torch.zeros_like(like).index_copy(0, route.row_order, part.to(like.dtype))
        return found


def _group_of(layout: Layout) -> dist.ProcessGroup | None:
    """The ranks that work on the same packs; None for one alone. Collective over all ranks."""
    if layout.degrees.pipeline == 1:
        return layout.sharers_group
    if layout.degrees.sharers == 1:
        return layout.upward
    by_data: dict[int, list[int]] = {}
    for rank in range(layout.world_size):
        by_data.setdefault(layout.seat(rank).data_rank, []).append(rank)
    return dist.new_subgroups_by_enumeration(list(by_data.values()), timeout=layout.ranks.timeout)[0]
