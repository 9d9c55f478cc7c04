"""What a rank holds, foretold from shapes, is what it holds once a layout is installed; on meta, with no other rank."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from omniloom.config import MemoryConfig, ParallelConfig
from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.parallel.apply import apply_parallelism
from omniloom.parallel.degrees import resolve_degrees
from omniloom.parallel.mesh import build_layout
from omniloom.parallel.pipeline import layer_owners
from omniloom.parallel.shares import local_shape, stages_of
from tests.device.fake_device import one_of
from tests.distributed.tiny_omni import Dims, make_config, make_model

LAYOUTS = {
    "shard": {},
    "hsdp": {"replicate": 2},
    "context": {"context": 2},
    "tensor": {"tensor": 2},
    "tensor_and_context": {"tensor": 4, "context": 2},
    "pipeline": {"pipeline": 2},
    "stages_of_tensor": {"pipeline": 2, "tensor": 2},
    "expert": {"expert": 4},
    "experts_over_tensor": {"tensor": 2, "expert": 4},
    "all": {"pipeline": 2, "tensor": 2, "context": 2, "expert": 2},
}
WORLD = 8


@pytest.mark.parametrize("tie", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_rank_holds_is_known_from_shapes(name: str, rank: int, tie: bool) -> None:
    config, parallel = make_config(Dims(heads=8, tie=tie)), ParallelConfig(**LAYOUTS[name])
    degrees, plan = resolve_degrees(parallel, WORLD, packs_per_step=16), SPEC.sharding(config)
    with one_of(WORLD, rank, torch.device("cpu")) as ranks:
        layout = build_layout(degrees, ranks)
        with torch.device("meta"):
            model, whole = make_model(config), make_model(config)
        apply_parallelism(model, layout, plan, parallel=parallel, memory=MemoryConfig(), compute_dtype=torch.bfloat16)
        held = {
            name: parameter.to_local() for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)
        }
    owners, stage = layer_owners(plan, degrees), layout.pipeline_rank
    found = {name: local_shape(name, tuple(weight.shape), plan, degrees, rank)
             for name, weight in whole.named_parameters() if stage in stages_of(name, plan, owners)}  # fmt: skip
    if tie and "text.loss_head.head.weight" in held:  # the copy of the last stage
        held["text.embed.weight"] = held.pop("text.loss_head.head.weight")
    assert found == {name: tuple(local.shape) for name, local in held.items()}
