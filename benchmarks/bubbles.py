"""What stages cost without measuring: how long ranks of a pipeline wait, and how evenly layers divide.

Counted from the order of work that `omniloom.parallel.pipeline` gives, for passes of equal length, a backward pass
being twice a forward pass. `benchmarks/layouts.py` prints both tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from omniloom.parallel.degrees import Degrees
from omniloom.parallel.pipeline import Action, order_of, split_layers
from omniloom.sharding import ShardingPlan

FORWARD_SECONDS, BACKWARD_SECONDS = 1.0, 2.0


def idle_share(num_ranks: int, stages_per_rank: int, num_packs: int) -> float:
    """Of a step's time that ranks wait for one another, the mean over them; passing rows takes no time."""
    orders = [order_of(rank, num_ranks, stages_per_rank, num_packs) for rank in range(num_ranks)]
    ends: dict[Action, float] = {}
    clocks, places = [0.0] * num_ranks, [0] * num_ranks
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for rank, order in enumerate(orders):
            while places[rank] < len(order) and (begin := _earliest(order[places[rank]], ends, orders)) is not None:
                action = order[places[rank]]
                seconds = (BACKWARD_SECONDS if action.is_backward else FORWARD_SECONDS) / stages_per_rank
                clocks[rank] = ends[action] = max(clocks[rank], begin) + seconds
                places[rank] += 1
    return 1 - num_packs * (FORWARD_SECONDS + BACKWARD_SECONDS) / max(clocks)


def _earliest(action: Action, ends: dict[Action, float], orders: Sequence[Sequence[Action]]) -> float | None:
    """When what an action needs is there; None where it is not yet known."""
    last = len(orders) * (len({own.stage for own in orders[0]})) - 1
    needs: list[Action] = []
    if action.is_backward:
        needs.append(Action(action.stage, action.pack, is_backward=False))
        if action.stage < last:
            needs.append(Action(action.stage + 1, action.pack, is_backward=True))
    elif action.stage > 0:
        needs.append(Action(action.stage - 1, action.pack, is_backward=False))
    if any(need not in ends for need in needs):
        return None
    return max((ends[need] for need in needs), default=0.0)


def formula(num_ranks: int, stages_per_rank: int, num_packs: int) -> float:
    """The same by Narayanan et al. 2021 (arXiv 2104.04473), section 2.2, as a share of the whole time."""
    waiting = (num_ranks - 1) / stages_per_rank
    return waiting / (num_packs + waiting)


def busiest_over_mean(plan: ShardingPlan, degrees: Degrees) -> float:
    """Forward cost of the busiest pipeline rank over the mean, embedding and head included."""
    costs, start = [0.0] * degrees.pipeline, 0
    sizes = split_layers(plan, degrees)
    for stage, size in enumerate(sizes):
        costs[stage % degrees.pipeline] += sum(plan.layer_costs[start : start + size])
        start += size
    costs[0] += plan.embed_cost
    costs[-1] += plan.head_cost
    return max(costs) / (sum(costs) / len(costs))


def tables(plan: ShardingPlan) -> list[str]:
    """Waiting by schedule, and the balance of a model's stages, as markdown."""
    lines = ["| ranks | stages per rank | packs | waiting | by formula |", "|---|---|---|---|---|"]
    for ranks, stages, packs in ((2, 1, 8), (4, 1, 8), (4, 1, 32), (4, 2, 8), (4, 2, 32), (8, 1, 32), (8, 4, 32)):
        found, expected = idle_share(ranks, stages, packs), formula(ranks, stages, packs)
        lines.append(f"| {ranks} | {stages} | {packs} | {found:.3f} | {expected:.3f} |")
    lines += ["", "| ranks | stages per rank | layers of each stage | busiest over mean |", "|---|---|---|---|"]
    for ranks, stages in ((2, 1), (4, 1), (8, 1), (4, 2), (4, 3)):
        degrees = Degrees(pipeline=ranks, stages_per_rank=stages)
        sizes = ", ".join(map(str, split_layers(plan, degrees)))
        lines.append(f"| {ranks} | {stages} | {sizes} | {busiest_over_mean(plan, degrees):.3f} |")
    return lines
