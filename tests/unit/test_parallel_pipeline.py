"""Stages: who has which layers, in which order packs pass, and that a refusal names what would do."""

from __future__ import annotations

import weakref
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, _get_1f1b_rank_ops

from benchmarks.bubbles import busiest_over_mean, formula, idle_share
from omniloom.families.registry import find_spec
from omniloom.parallel.apply import check_plan
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.pipeline import Pipeline, _Mail, layer_owners, order_of, split_layers
from omniloom.sharding import ShardingPlan
from tests.parity.published_configs import PUBLISHED


def library_order(rank: int, num_ranks: int, stages_per_rank: int, num_packs: int) -> list[tuple[int, int, bool]]:
    """What torch.distributed.pipelining's schedules do, less the waiting: 1F1B is interleaving of one stage per rank
    that runs half as far ahead."""
    if stages_per_rank == 1:
        ahead = min(num_ranks - 1 - rank, num_packs)
        actions = _get_1f1b_rank_ops(
            1, num_ranks, ahead, num_packs - ahead, ahead, rank, lambda _: rank, lambda _: rank
        )
    else:
        schedule = SimpleNamespace(
            n_local_stages=stages_per_rank,
            pp_group_size=num_ranks,
            _n_microbatches=num_packs,
            microbatches_per_round=num_packs // max(1, num_packs // num_ranks),
        )
        actions = ScheduleInterleaved1F1B._calculate_single_rank_operations(schedule, rank)
    return [(a.stage_index, a.microbatch_index, "B" in str(a.computation_type)) for a in actions if a is not None]


def test_the_order_is_that_of_the_library() -> None:
    for num_ranks, stages_per_rank, num_packs in product((2, 3, 4), (1, 2, 3), (4, 6, 8, 12)):
        if stages_per_rank > 1 and num_packs % (num_packs // num_ranks):
            continue
        for rank in range(num_ranks):
            found = [tuple(action) for action in order_of(rank, num_ranks, stages_per_rank, num_packs)]
            assert found == library_order(rank, num_ranks, stages_per_rank, num_packs)


def plan_of(num_layers: int, head_cost: int = 0) -> ShardingPlan:
    return ShardingPlan(roots=("text",), blocks=(), layer_costs=(10,) * num_layers, head_cost=head_cost)


def test_layers_are_balanced_with_the_head_among_them() -> None:
    assert split_layers(plan_of(8), Degrees(pipeline=4)) == (2, 2, 2, 2)
    assert split_layers(plan_of(8, head_cost=20), Degrees(pipeline=2)) == (5, 3)
    assert min(split_layers(plan_of(4, head_cost=1000), Degrees(pipeline=4))) == 1
    sizes = split_layers(plan_of(7), Degrees(pipeline=2, stages_per_rank=2))
    assert sum(sizes) == 7
    assert max(sizes) == 2


def test_the_busiest_stage_of_48_layers_and_a_vocabulary_of_150_thousand_is_near_the_mean() -> None:
    config = PUBLISHED["Qwen3-VL-30B-A3B"].config
    spec = find_spec(config)
    plan = spec.sharding(spec.read_config(config))
    head = plan.head_cost / plan.layer_costs[0]
    for ranks, stages in ((2, 1), (4, 1), (8, 1), (4, 2), (4, 3), (8, 2)):
        degrees = Degrees(pipeline=ranks, stages_per_rank=stages)
        assert sum(split_layers(plan, degrees)) == 48
        # layers are whole: 8 ranks of 6 and a head of 2.4 have one too few, so one rank has 7, where 6.3 is the mean
        bound = 7 / ((48 + head) / 8) + 1e-4 if ranks == 8 else 1.05
        assert busiest_over_mean(plan, degrees) < bound, (ranks, stages)


def test_a_rank_whose_last_stage_has_the_head_has_fewer_layers_in_its_others() -> None:
    plan = plan_of(12, head_cost=20)
    assert busiest_over_mean(plan, Degrees(pipeline=2, stages_per_rank=3)) == 1.0


@pytest.mark.parametrize(("ranks", "stages", "packs"), [(2, 1, 2), (4, 1, 8), (4, 2, 8), (3, 3, 9), (4, 3, 16)])
def test_ranks_wait_as_long_as_the_formula_of_their_schedule_says(ranks: int, stages: int, packs: int) -> None:
    assert idle_share(ranks, stages, packs) == pytest.approx(formula(ranks, stages, packs), rel=1e-9)


def test_stages_of_a_rank_lie_apart() -> None:
    assert layer_owners(plan_of(4), Degrees(pipeline=2, stages_per_rank=2)) == (0, 1, 0, 1)
    assert layer_owners(plan_of(3), Degrees(pipeline=2, pipeline_layers=(1, 2))) == (0, 1, 1)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((1, 10, 10, 8), "are 29 layers in 4 stages; expected 4 numbers of at least 1 that add up to 28"),
        ((0, 10, 10, 8), "of at least 1"),
        ((14, 14), "are 28 layers in 2 stages; expected 4"),
    ],
)
def test_a_list_of_stages_that_does_not_fit_is_refused_with_one_that_does(layers, words) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        check_plan(plan_of(28), Degrees(pipeline=4, pipeline_layers=layers))
    assert "[7, 7, 7, 7]" in str(caught.value)


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers do not make 4 stages; choose at most 3"):
        check_plan(plan_of(3), Degrees(pipeline=4))
    for layers in ((), (1, 1, 1, 0)):
        with pytest.raises(ValueError, match=r"4 stages; choose at most 1, or fewer parallel\.stages_per_rank$"):
            check_plan(plan_of(3), Degrees(pipeline=2, stages_per_rank=2, pipeline_layers=layers))


def test_rows_that_have_arrived_are_not_kept_until_the_step_is_over(monkeypatch) -> None:
    works: list[SimpleNamespace] = []

    def isend(*_: object, **__: object) -> SimpleNamespace:
        works.append(SimpleNamespace(is_completed=lambda: False, wait=lambda: None))
        return works[-1]

    monkeypatch.setattr("torch.distributed.isend", isend)
    layout: Any = SimpleNamespace(pipeline_rank=0, upward=object(), downward=object())
    mail, sent = _Mail(layout, torch.zeros(2, 3), {}), []
    for pack in range(3):
        rows = torch.zeros(2, 3)
        sent.append(weakref.ref(rows))
        mail.send(rows, 1)
        del rows
        if pack == 0:
            works[0].is_completed = lambda: True
    assert [rows() is not None for rows in sent] == [False, True, True]


@pytest.mark.parametrize("rank", [0, 2])
def test_both_ends_of_a_tied_weight_meet_in_the_upward_group_first(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A communicator that they have not used yet is made by both together: in two orders neither would be."""
    groups: list[str] = []

    def begin(*_: object, group: str, **__: object) -> SimpleNamespace:
        groups.append(group)
        return SimpleNamespace(wait=lambda: None)

    for name in ("isend", "irecv"):
        monkeypatch.setattr(torch.distributed, name, begin)
    tied = torch.nn.Parameter(torch.ones(2))
    tied.grad = torch.ones(2)
    layout = SimpleNamespace(upward="up", downward="down")
    Pipeline._sum_tied(SimpleNamespace(tied=tied, num_ranks=3, rank=rank, layout=layout))
    assert groups == ["up", "down"]
