"""One rank takes the same path as many, clipped over a world of one; it is sharded only where that casts."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator

import pytest
import torch
from layout_worker import Case, freeze, load, run_reference
from tiny_omni import Dims, make_config, make_model, random_weights
from torch.distributed.tensor import DTensor

from omniloom.config import MemoryConfig, ParallelConfig, load_config
from omniloom.families.qwen3_omni.sharding import sharding
from omniloom.parallel.apply import apply_parallelism, check_plan, materialize
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.gradients import clip_gradients
from omniloom.parallel.mesh import Degrees, Layout, build_layout, close_distributed, init_distributed
from omniloom.parallel.step import evaluate, forward_backward
from omniloom.run.opening import build_model, open_workshop
from omniloom.tools.tiny import make_tiny


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield build_layout(Degrees(), init_distributed(timeout_seconds=30))
    close_distributed()


def test_one_rank_gives_what_a_plain_model_gives(layout: Layout) -> None:
    case = Case(frozen=("vision.patch_embed",))
    reference = run_reference(case)
    config = make_config(case.dims)
    plan = sharding(config)
    with torch.device("meta"):
        model = make_model(config)
    freeze(model, case.frozen)
    memory = MemoryConfig(recompute=2)
    apply_parallelism(model, layout, plan, parallel=ParallelConfig(), memory=memory, compute_dtype=torch.float32)
    materialize(model, layout.device)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    load(model, random_weights(config, case.seed))
    pool = EncoderPool(layout, plan, "group")
    packs = case.packs(config)
    before = [evaluate(model, pack, layout, pool).loss_sum.item() for pack in packs]
    terms = [forward_backward(model, pack, layout, reference.objective, pool) for pack in packs]
    loss = sum(term.loss_sum.item() for term in terms) / reference.objective.weight_sum
    # float32 sums in another order: 1e-6
    assert loss == pytest.approx(reference.loss, rel=1e-6)
    assert before == pytest.approx([term.loss_sum.item() for term in terms], rel=1e-6, abs=1e-6)
    assert clip_gradients(model.parameters(), 0.0, layout.device).item() == pytest.approx(reference.norm, rel=1e-6)
    for name, expected in reference.gradients.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * reference.norm)
    assert model.get_parameter("vision.patch_embed.weight").grad is None


def test_a_policy_recomputes_its_root_and_no_other(layout: Layout, tmp_path, monkeypatch) -> None:
    made: dict[int, str | int] = {}
    monkeypatch.setattr(
        "omniloom.parallel.apply.recompute_blocks",
        lambda blocks, how: made.update({id(block): how for block in blocks}),
    )
    make_tiny("qwen3_vl", tmp_path / "model")
    words = [f"model.path={tmp_path / 'model'}", "memory.recompute=2", "policy.text.recompute=false"]
    model, _ = build_model(open_workshop(load_config(None, words)), layout)
    assert {made[id(layer)] for layer in model.text.layers.values()} == {"none"}
    assert {made[id(layer)] for layer in model.vision.layers} == {2}


def test_groups_made_later_wait_as_long_as_the_job_does(layout: Layout) -> None:
    for name in ("planning", "agreement", "checkpoint"):
        options = layout.channels[name]._get_backend(torch.device("cpu")).options
        assert options._timeout == layout.ranks.timeout == datetime.timedelta(seconds=30)


def test_gradients_that_are_not_finite_are_seen_and_left_alone(layout: Layout) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, float("nan"), 2.0])
    assert clip_gradients([parameter], 0.5, layout.device).isnan()
    assert parameter.grad[0] == 1.0


def test_a_model_that_cannot_be_divided_is_refused_at_once(layout: Layout) -> None:
    plan = sharding(make_config(Dims(num_experts=6, heads=4)))
    wide = dataclasses.replace(layout, degrees=Degrees(context=3, expert=4))
    with pytest.raises(ValueError) as caught:
        check_plan(plan, wide)
    assert "4 attention heads do not divide over 3 context ranks; choose from [1, 2, 4]" in str(caught.value)
    assert "6 experts do not divide over 4 ranks; choose from [1, 2, 3, 6]" in str(caught.value)
    with pytest.raises(ValueError, match="this model has no experts; set it to 1"):
        check_plan(dataclasses.replace(plan, num_experts=0), wide)


def test_bfloat16_compute_keeps_masters_and_gradients_in_float32(layout: Layout) -> None:
    case = Case(dims=Dims(moe_width=13))
    reference = run_reference(case)
    config = make_config(case.dims)
    plan = sharding(config)
    with torch.device("meta"):
        model = make_model(config)
    parallel, memory = ParallelConfig(), MemoryConfig()
    apply_parallelism(model, layout, plan, parallel=parallel, memory=memory, compute_dtype=torch.bfloat16)
    materialize(model, layout.device)
    load(model, random_weights(config, case.seed))
    terms = [forward_backward(model, pack, layout, reference.objective) for pack in case.packs(config)]
    loss = sum(term.loss_sum.item() for term in terms) / reference.objective.weight_sum
    assert loss == pytest.approx(reference.loss, rel=0.02)  # 8 bits of mantissa
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.dtype == torch.float32
