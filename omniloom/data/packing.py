"""Packing of one window: which samples share a pack, by tokens first and integer cost second, and which packs a step.

Sees token counts and costs, never ranks, rows' content or media. Every choice depends on the
numbers and their order, so that all ranks, on any world size, find the same packs. The planner calls it per window.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from omniloom.types import BadSample, PackPlan, PlannedSample, StepPlan

LEFT_OVER = -1  # the pack number of a sample that no pack took
_FULL_ENOUGH = 0.005  # share of a pack's room that is not worth a search for a better filling
_STRETCH_PACKS = 512  # packed together by `pack_everything`
_EVEN_ENOUGH = 0.01  # spread of costs, over their mean, below which swapping stops


def fill_packs(
    tokens: np.ndarray, costs: np.ndarray, *, pack_tokens: int, num_packs: int, num_carried: int = 0
) -> np.ndarray:
    """Put samples into `num_packs` packs so that these are full and equally heavy.

    The first `num_carried` samples come first, so that nothing waits for ever; then the longest go to the emptiest
    pack, which spreads long and short samples, and with them the modalities, over all packs. Swaps with what is left
    over then close gaps, and swaps of similar lengths between packs even out the cost.

    tokens, costs: int64 [n]. Returns: int64 [n], the pack of each sample or LEFT_OVER.
    """
    assert tokens.shape == costs.shape, (tokens.shape, costs.shape)
    positions = np.arange(len(tokens))
    order = np.lexsort((positions, -tokens, positions >= num_carried))
    packs = np.full(len(tokens), LEFT_OVER, dtype=np.int64)
    heap = [(-pack_tokens, pack) for pack in range(num_packs)]
    for item in order.tolist():
        size = int(tokens[item])
        if not heap or size > -heap[0][0]:
            continue
        room, pack = heap[0]
        heapq.heapreplace(heap, (room + size, pack))
        packs[item] = pack
    if (packs == LEFT_OVER).any():
        _close_gaps(packs, tokens, pack_tokens, num_packs, num_carried)
    _even_out(packs, tokens, costs, pack_tokens, num_packs)
    return packs


def pack_everything(tokens: np.ndarray, costs: np.ndarray, *, pack_tokens: int) -> np.ndarray:
    """Like `fill_packs`, with as many packs as it takes to leave nothing over. Returns: int64 [n], packs from 0.

    Swapping looks at all pairs of packs, so that long lists are packed a stretch of them after another.
    """
    assert len(tokens) == 0 or int(tokens.max()) <= pack_tokens, "a sample longer than a pack reached the packing"
    packs, num_packs = np.zeros_like(tokens), 0
    stretch = (tokens.cumsum() - 1) // (_STRETCH_PACKS * pack_tokens)
    for part in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(stretch)) + 1):
        packs[part] = num_packs + _pack_stretch(tokens[part], costs[part], pack_tokens)
        num_packs = int(packs[part].max(initial=-1)) + 1
    return packs


def _pack_stretch(tokens: np.ndarray, costs: np.ndarray, pack_tokens: int) -> np.ndarray:
    num_packs = -(-int(tokens.sum()) // pack_tokens)
    while True:
        packs = fill_packs(tokens, costs, pack_tokens=pack_tokens, num_packs=num_packs)
        left = int(tokens[packs == LEFT_OVER].sum())
        if left == 0:
            return packs
        num_packs += max(1, left // pack_tokens)


# ---------------------------------------------------------------------------------------- samples to packs to steps


def pack_window(
    samples: Sequence[PlannedSample], *, num_carried: int, pack_tokens: int, packs_per_step: int, leave_nothing: bool
) -> tuple[list[list[PlannedSample]], tuple[PlannedSample, ...]]:
    """Packs for whole steps, and what is carried on; with `leave_nothing` nothing is, and empty packs fill up."""
    tokens = np.array([sample.extent.num_tokens for sample in samples], dtype=np.int64)
    costs = np.array([sample.extent.cost for sample in samples], dtype=np.int64)
    if leave_nothing:
        places = pack_everything(tokens, costs, pack_tokens=pack_tokens)
    else:
        num_packs = int(tokens.sum()) // pack_tokens // packs_per_step * packs_per_step
        places = fill_packs(tokens, costs, pack_tokens=pack_tokens, num_packs=num_packs, num_carried=num_carried)
    packs: dict[int, list[PlannedSample]] = {}
    carried = []
    for sample, place in zip(samples, places.tolist(), strict=True):
        if place == LEFT_OVER:
            carried.append(sample)
        else:
            packs.setdefault(place, []).append(sample)
    # Packs stand in the order of their longest sample among those given: unbiased where rows are shuffled.
    longest_of: dict[int, int] = {}
    for item in np.lexsort((np.arange(len(tokens)), -tokens)).tolist():
        longest_of.setdefault(int(places[item]), item)
    ordered = [packs[place] for place in sorted(packs, key=lambda place: longest_of[place])]
    ordered += [[] for _ in range(-len(ordered) % packs_per_step)]
    return ordered, tuple(carried)


def plan_steps(
    packs: Sequence[Sequence[PlannedSample]],
    *,
    packs_per_step: int,
    first_step: int,
    rows_before: int,
    bad_rows: tuple[BadSample, ...],
    loss: str,
) -> tuple[StepPlan, ...]:
    """Packs numbered as steps, the loss mode expressed as weights; the first step reports the bad rows."""
    steps: list[StepPlan] = []
    for start in range(0, len(packs), packs_per_step):
        chosen = packs[start : start + packs_per_step]
        step = first_step + len(steps)
        rows_before += sum(len(pack) for pack in chosen)
        plans = (
            PackPlan(index=step * packs_per_step + offset, samples=_weigh(pack, loss))
            for offset, pack in enumerate(chosen)
        )
        reported = () if steps else bad_rows
        steps.append(StepPlan(step=step, packs=tuple(plans), rows_planned=rows_before, bad_rows=reported))
    return tuple(steps)


def _weigh(samples: Sequence[PlannedSample], loss: str) -> tuple[PlannedSample, ...]:
    """Express the loss mode as a scale of each sample's weights."""
    tokens = sum(sample.extent.num_loss_tokens for sample in samples)
    codes = sum(sample.extent.num_code_labels for sample in samples)

    def scale(valid: int, in_pack: int) -> float:
        valid = valid or 1  # no speech
        return {"token": 1.0, "sample": 1.0 / valid, "sqrt": float(valid**-0.5), "batch": 1.0 / (in_pack or 1)}[loss]

    return tuple(
        replace(
            sample,
            weight_scale=scale(sample.extent.num_loss_tokens, tokens),
            speech_scale=scale(sample.extent.num_code_labels, codes),
        )
        for sample in samples
    )


# ---------------------------------------------------------------------------------------- arithmetic of places


def _close_gaps(packs: np.ndarray, tokens: np.ndarray, pack_tokens: int, num_packs: int, num_carried: int) -> None:
    """Exchange samples for longer ones from the left-over pool where that fills a pack better. In place."""
    pool = np.flatnonzero(packs == LEFT_OVER)
    pool = pool[np.argsort(tokens[pool], kind="stable")]
    sizes = tokens[pool]  # ascending, kept in step with `pool`
    used = _sums(packs, tokens, num_packs)
    members = _members(packs, num_packs)
    for pack in np.argsort(used, kind="stable").tolist():
        for _ in range(4):  # a few exchanges close nearly all of a gap; more would only polish
            room = pack_tokens - int(used[pack])
            inside = members[pack][members[pack] >= num_carried]  # who waited once is not sent back to wait
            if room <= _FULL_ENOUGH * pack_tokens or len(inside) == 0:
                break
            best = np.searchsorted(sizes, tokens[inside] + room, side="right") - 1
            gain = np.where(best >= 0, sizes[np.maximum(best, 0)] - tokens[inside], 0)
            choice = int(np.argmax(gain))
            if gain[choice] <= 0:
                break
            leaving, slot = int(inside[choice]), int(best[choice])
            entering = int(pool[slot])
            packs[entering], packs[leaving] = pack, LEFT_OVER
            members[pack] = np.append(members[pack][members[pack] != leaving], entering)
            used[pack] += int(gain[choice])
            pool, sizes = np.delete(pool, slot), np.delete(sizes, slot)
            slot = int(np.searchsorted(sizes, tokens[leaving]))
            pool, sizes = np.insert(pool, slot, leaving), np.insert(sizes, slot, tokens[leaving])


def _even_out(packs: np.ndarray, tokens: np.ndarray, costs: np.ndarray, pack_tokens: int, num_packs: int) -> None:
    """Move or exchange samples between the heaviest and lighter packs while that lowers the spread. In place."""
    if num_packs < 2:
        return
    heavy = _sums(packs, costs, num_packs)
    room = pack_tokens - _sums(packs, tokens, num_packs)
    members = _members(packs, num_packs)
    settled = np.zeros(num_packs, dtype=bool)  # packs that found no partner as the heaviest
    tolerance = _EVEN_ENOUGH * float(heavy.mean())
    for _ in range(4 * num_packs):
        source = int(np.argmax(np.where(settled, np.iinfo(np.int64).min, heavy)))
        lightest = np.argsort(heavy, kind="stable")[:4].tolist()
        if settled.all() or heavy[source] - heavy[lightest[0]] <= tolerance:
            return
        for target in lightest:
            pair = _best_swap(members[source], members[target], tokens, costs, heavy, room, source, target)
            if pair is not None:
                break
        else:
            settled[source] = True
            continue
        for item, start, end in ((pair[0], source, target), (pair[1], target, source)):
            if item < 0:
                continue
            packs[item] = end
            members[start] = members[start][members[start] != item]
            members[end] = np.append(members[end], item)
            heavy[start] -= costs[item]
            heavy[end] += costs[item]
            room[start] += tokens[item]
            room[end] -= tokens[item]


def _best_swap(
    ours: np.ndarray,
    theirs: np.ndarray,
    tokens: np.ndarray,
    costs: np.ndarray,
    heavy: np.ndarray,
    room: np.ndarray,
    source: int,
    target: int,
) -> tuple[int, int] | None:
    """The pair whose exchange brings two packs' costs closest, or None. A partner of -1 is a plain move."""
    gap = int(heavy[source] - heavy[target])
    if gap <= 0 or len(ours) == 0:
        return None
    their_tokens = np.append(tokens[theirs], 0)
    their_costs = np.append(costs[theirs], 0)
    longer = tokens[ours][:, None] - their_tokens[None, :]  # what the target would gain in tokens
    moved = costs[ours][:, None] - their_costs[None, :]
    allowed = (longer <= room[target]) & (-longer <= room[source]) & (moved > 0) & (moved < gap)
    # A hundredth of the gap is the least worth moving; below it the search would creep.
    distance = np.where(allowed, np.abs(2 * moved - gap), gap)
    best = int(np.argmin(distance))
    if int(distance.flat[best]) >= gap - gap // 100:
        return None
    row, column = divmod(best, len(their_costs))
    return int(ours[row]), int(theirs[column]) if column < len(theirs) else -1


def _sums(packs: np.ndarray, values: np.ndarray, num_packs: int) -> np.ndarray:
    sums = np.zeros(num_packs, dtype=np.int64)
    placed = packs >= 0
    np.add.at(sums, packs[placed], values[placed])
    return sums


def _members(packs: np.ndarray, num_packs: int) -> list[np.ndarray]:
    order = np.argsort(packs, kind="stable")
    bounds = np.searchsorted(packs[order], np.arange(num_packs + 1))
    return [order[bounds[pack] : bounds[pack + 1]] for pack in range(num_packs)]
