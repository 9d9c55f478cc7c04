"""The start of one of hundreds of ranks, the others imagined: nothing of it grows faster than their number.

Meshes, groups, sharding, the first window's plan and a checkpoint's metadata, of a published model on meta. What other
ranks would say in an exchange is what this one says.
"""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from omniloom.checkpoint.dcp import _local_tensors, _Planner, model_state
from omniloom.config import load_config
from omniloom.data.agreement import PlanningRanks
from omniloom.data.planner import Planner
from omniloom.parallel.apply import apply_parallelism
from omniloom.parallel.degrees import resolve_degrees
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.mesh import build_layout
from omniloom.run.opening import Workshop, apply_policy
from omniloom.types import Extent
from tests.device.fake_device import one_of
from tests.device.steps import Case, open_case

LAYOUTS = {"plain": {}, "hybrid": {"replicate": 2, "expert": 8, "context": 2, "tensor": 2, "pipeline": 2}}
WINDOW = 2048


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a rank had to do with others."""

    groups: int  # that it is in
    makings: int  # calls that make groups, which all ranks take part in
    received: int  # bytes of the exchanges of the first window's plan
    shard: int  # bytes of its part of the model
    metadata: int  # bytes of what all ranks tell the first one of a checkpoint


def start(workshop: Workshop, world_size: int, parallel: dict[str, int]) -> Start:
    config = load_config({"parallel": parallel, "train": {"packs_per_step": 512}, "data": {"window": WINDOW}})
    plan, received, window = workshop.spec.sharding(workshop.family), list[int](), list[int]()
    extent = Extent(num_tokens=900, num_loss_tokens=400, weight_sum=400.0, cost=1000, tower_cost=0)

    def exchange(value: Any) -> list[Any]:
        """What others measured is as many rows as are theirs, and the rest what this rank says."""
        failure, own = value
        values = [value] * world_size
        if isinstance(own, list) and window:
            num_rows = window.pop()
            values = [(failure, [extent] * len(range(rank, num_rows, world_size))) for rank in range(world_size)]
        received.append(sum(len(pickle.dumps(each)) for each in values))
        return values

    class Ranks(PlanningRanks):
        def measure(self, rows: list[int], measure: Any) -> list[Any]:
            window.append(len(rows))
            return super().measure(rows, measure)

    with one_of(world_size, world_size - 1, torch.device("cpu")) as ranks:
        degrees = resolve_degrees(config.parallel, world_size, packs_per_step=512)
        layout = build_layout(degrees, ranks)
        EncoderPool(layout, plan, config.parallel.encoder_pool)
        with torch.device("meta"):
            model = workshop.build()
        apply_policy(workshop, model)
        apply_parallelism(
            model, layout, plan, parallel=config.parallel, memory=config.memory, compute_dtype=torch.bfloat16
        )
        world = dist.distributed_c10d._world
        groups, makings = len(world.pg_map), world.group_count
        state = model_state(dict(model.named_parameters()))
        saving = _Planner(_local_tensors(state, None))
        saving.set_up_planner(state, is_coordinator=False)
        metadata = world_size * len(pickle.dumps(saving.create_local_plan()))
        shard = sum(parameter.to_local().nbytes for parameter in model.parameters())
    planner = Planner(
        rows_per_source=[100_000],
        config=config,
        measure=lambda rows: [extent] * len(rows),
        locate=lambda row: ("rows.json", row),
        ranks=Ranks(exchange=exchange, rank=world_size - 1, world_size=world_size),
    )
    assert planner.next_step() is not None
    planner.close()
    return Start(groups=groups, makings=makings, received=sum(received[:2]), shard=shard, metadata=metadata)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    layers = {"text": 12, "vision": 2, "audio": 2}
    return open_case(Case(model="Qwen3-Omni-30B-A3B", layers=layers), Path(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_rank_does_at_the_start_grows_no_faster_than_ranks(name, workshop, record_property) -> None:
    few, many = (start(workshop, world_size, LAYOUTS[name]) for world_size in (64, 512))
    record_property("64 ranks", asdict(few))
    record_property("512 ranks", asdict(many))
    assert many.groups == few.groups < 30
    assert many.makings <= 8 * few.makings
    assert many.received <= 8 * few.received
    assert many.metadata <= 8.2 * few.metadata
    assert many.shard < few.shard
