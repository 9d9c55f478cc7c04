"""One rank takes the same path as many, clipped over a world of one; it is sharded only where that casts."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layout_worker import Case, freeze, load, make_reference, run_reference
from tiny_omni import Dims, make_config, make_model
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from omniloom.config import MemoryConfig, ParallelConfig, load_config
from omniloom.data.agreement import report_pack, settle
from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.models.fusion import OmniModel
from omniloom.models.layers import LayerCall
from omniloom.parallel.apply import apply_parallelism, check_plan, materialize
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.gradients import clip_gradients, gradient_norm
from omniloom.parallel.mesh import Layout, build_layout, close_distributed, init_distributed
from omniloom.parallel.optimizer import make_optimizer
from omniloom.parallel.recompute import RecomputingCall
from omniloom.parallel.step import Objective, evaluate, run_packs
from omniloom.run.opening import build_model, open_workshop
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import MetricsLog, StepFigures, StepMetrics, read_lines
from omniloom.types import (
    BadSample,
    Extent,
    LoadedPack,
    LossTerms,
    PackedBatch,
    PackPlan,
    PackStats,
    PlannedSample,
    StepPlan,
    Targets,
    TowerRows,
)


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield build_layout(Degrees(), init_distributed(timeout_seconds=30))
    close_distributed()


class Divided(TorchDispatchMode):
    """The largest row of numbers that was divided."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "aten.div" in str(func) and out.ndim == 1:
            self.largest = max(self.largest, out.numel())
        return out


def test_decays_of_a_delta_rule_are_computed_in_float32_beside_weights_in_bfloat16(layout: Layout) -> None:
    case = Case(dims=Dims(hybrid=True))
    config = make_config(case.dims)
    plan = SPEC.sharding(config)
    with torch.device("meta"):
        model = make_model(config)
    settings = {"parallel": ParallelConfig(), "memory": MemoryConfig(), "compute_dtype": torch.bfloat16}
    apply_parallelism(model, layout, plan, **settings)
    materialize(model, layout.device)
    load(model, case.weights())
    seen: dict[str, set[torch.dtype]] = {"decay": set(), "norm": set()}
    attention = model.get_submodule("text.layers.0.attention")
    for name, found in seen.items():
        attention.get_submodule(name).register_forward_hook(
            lambda module, *_, found=found: found.update(p.dtype for p in module.parameters())
        )
    objective = Objective(coefficients={"text": 1.0, "router": 0.1}, weight_sums={"text": 1.0, "router": 1.0})
    with Divided() as divided:
        run_packs(model, case.packs()[:1], layout, objective, EncoderPool(layout, plan, "group"))
    assert divided.largest < 1000, "a lone rank's gradients are copied to be divided by 1"
    assert seen == {"decay": {torch.float32}, "norm": {torch.bfloat16}}
    assert model.get_parameter("text.layers.0.attention.decay.A_log").grad.dtype == torch.float32


def test_one_rank_gives_what_a_plain_model_gives(layout: Layout) -> None:
    case = Case(frozen=("vision.patch_embed",))
    reference = run_reference(case)
    config = make_config(case.dims)
    plan = SPEC.sharding(config)
    with torch.device("meta"):
        model = make_model(config)
    freeze(model, case.frozen)
    memory = MemoryConfig(recompute=2)
    apply_parallelism(model, layout, plan, parallel=ParallelConfig(), memory=memory, compute_dtype=torch.float32)
    materialize(model, layout.device)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    load(model, case.weights())
    pool = EncoderPool(layout, plan, "group")
    packs = case.packs()
    before = [evaluate(model, pack, layout, pool).sums["text"].item() for pack in packs]
    terms = [run_packs(model, [pack], layout, reference.objective, pool) for pack in packs]
    loss = sum(term.sums["text"].item() for term in terms) / reference.objective.weight_sums["text"]
    # float32 sums in another order: 1e-6
    assert loss == pytest.approx(reference.loss, rel=1e-6)
    assert before == pytest.approx([term.sums["text"].item() for term in terms], rel=1e-6, abs=1e-6)
    assert gradient_norm(model.parameters(), layout.device).item() == pytest.approx(reference.norm, rel=1e-6)
    for name, expected in reference.gradients.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * reference.norm)
    assert model.get_parameter("vision.patch_embed.weight").grad is None


def test_a_policy_recomputes_its_root_and_no_other(layout: Layout, tmp_path) -> None:
    make_tiny("qwen3_vl", tmp_path / "model")
    words = [f"model.path={tmp_path / 'model'}", "memory.recompute=2", "policy.text.recompute=false"]
    model, _ = build_model(open_workshop(load_config(None, words)), layout)
    assert type(model.text.call) is LayerCall
    assert isinstance(model.vision.call, RecomputingCall)
    assert model.vision.call.every == 2


def test_the_blocks_are_compiled_where_the_config_says_so(layout: Layout, tmp_path, monkeypatch) -> None:
    make_tiny("qwen3_vl", tmp_path / "model")
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, backend: compiled.append(module))
    for word, among in (("memory.compile=false", False), ("memory.compile=true", True)):
        model, _ = build_model(open_workshop(load_config(None, [f"model.path={tmp_path / 'model'}", word])), layout)
        blocks = [*model.vision.layers.children(), *model.text.layers.children()]
        assert [block in compiled for block in blocks] == [among] * len(blocks)


def test_groups_made_later_wait_as_long_as_the_job_does(layout: Layout) -> None:
    for name in ("planning", "agreement", "checkpoint"):
        options = layout.channels[name]._get_backend(torch.device("cpu")).options
        assert options._timeout == layout.ranks.timeout == datetime.timedelta(seconds=30)


@pytest.mark.parametrize("states", ["float32", "bf16"])
def test_gradients_are_divided_to_the_norm_within_the_step_unless_they_are_not_finite(layout: Layout, states) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    group = {"params": [parameter], "names": ["w"], "lr": 0.0, "weight_decay": 0.0, "orthogonal": False}
    train = load_config(None, [f"train.optimizer_states={states}"]).train
    optimizer = make_optimizer([group], train, offload=False, device=layout.device, compute_dtype=torch.float32)
    parameter.grad = torch.full((2, 2), 3.0)
    assert clip_gradients(optimizer, 0.5, layout.device).item() == pytest.approx(6.0)
    optimizer.step()
    gradient = optimizer.state[parameter]["exp_avg"].float() / (1 - train.betas[0])
    torch.testing.assert_close(gradient, torch.full((2, 2), 0.25), rtol=1e-2, atol=0)  # rounded to bfloat16
    parameter.grad = torch.full((2, 2), float("nan"))
    assert clip_gradients(optimizer, 0.5, layout.device).isnan()
    assert optimizer.grad_scale.item() == 1.0
    clip_gradients(optimizer, 0.0, layout.device)
    assert optimizer.grad_scale is None


def test_a_model_that_cannot_be_divided_is_refused_at_once(layout: Layout) -> None:
    plan = SPEC.sharding(make_config(Dims(num_experts=6, heads=4)))
    wide = dataclasses.replace(layout, degrees=Degrees(context=3, expert=4))
    with pytest.raises(ValueError) as caught:
        check_plan(plan, wide.degrees)
    assert "4 attention heads do not divide over 3 context ranks; choose from [1, 2, 4]" in str(caught.value)
    assert "6 experts do not divide over 4 ranks; choose from [1, 2, 3, 6]" in str(caught.value)
    with pytest.raises(ValueError, match="this model has no experts; set it to 1"):
        check_plan(dataclasses.replace(plan, num_experts=0), wide.degrees)
    hybrid = SPEC.sharding(make_config(Dims(hybrid=True)))
    with pytest.raises(ValueError, match="layers with a recurrence hand a state from token to token"):
        check_plan(hybrid, Degrees(context=4, ring=2))


def test_bfloat16_compute_keeps_masters_and_gradients_in_float32(layout: Layout) -> None:
    case = Case(dims=Dims(moe_width=13))
    reference = run_reference(case)
    config = make_config(case.dims)
    plan = SPEC.sharding(config)
    with torch.device("meta"):
        model = make_model(config)
    parallel, memory = ParallelConfig(), MemoryConfig()
    apply_parallelism(model, layout, plan, parallel=parallel, memory=memory, compute_dtype=torch.bfloat16)
    materialize(model, layout.device)
    load(model, case.weights())
    terms = run_packs(model, case.packs(), layout, reference.objective)
    loss = terms.sums["text"].item() / reference.objective.weight_sums["text"]
    assert loss == pytest.approx(reference.loss, rel=0.02)  # 8 bits of mantissa
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.dtype == torch.float32


class WithCodes(OmniModel):
    """A model with a loss of its own: how far embedded rows are from what the pack has for them."""

    def decode(self, batch: PackedBatch, media: TowerRows) -> LossTerms:
        terms, targets = super().decode(batch, media), batch.targets["codes"]
        rows = self.text.embed_rows(batch, media)[targets.token_index]
        sums = {**terms.sums, "codes": (targets.weights * (rows - targets.values).square().mean(dim=1)).sum()}
        return dataclasses.replace(terms, sums=sums)


def with_codes(pack: PackedBatch, seed: int, width: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(0, 30, 2)
    weights, values = torch.rand(len(rows), generator=generator), torch.randn(len(rows), width, generator=generator)
    targets = Targets(token_index=rows, weights=weights, values=values)
    bounds = pack.segments.bounds[:4]
    return dataclasses.replace(pack, targets={"codes": targets}, sample_ids=("a", "b", "c"), sample_bounds=bounds)


def test_a_third_loss_is_agreed_trained_and_written_by_its_name(layout: Layout, tmp_path) -> None:
    """From the pack to the metrics, and nothing on the way knows of it. Another rank could not load a sample."""
    case = Case(num_packs=2)
    plain = make_reference(case)
    model = WithCodes(vision=plain.vision, audio=plain.audio, text=plain.text)
    batches = [with_codes(pack, i, case.dims.hidden_size) for i, pack in enumerate(case.packs())]
    extent = Extent(num_tokens=1, num_loss_tokens=1, weight_sum=1.0)
    samples = tuple(PlannedSample(row=row, epoch=0, extent=extent, weight_scale=1.0) for row in range(3))
    step = StepPlan(step=0, packs=tuple(PackPlan(index=i, samples=samples) for i in range(2)), rows_planned=6)
    packs = [LoadedPack(index=i, batch=batch, stats=PackStats()) for i, batch in enumerate(batches)]
    reports = [report_pack(pack) for pack in packs]
    elsewhere = dataclasses.replace(
        reports[1],
        weight_sums={name: (sums[0], 0.0, sums[2]) for name, sums in reports[1].weight_sums.items()},
        bad=((1, BadSample(file="f", line=1, field="images", reason="gone")),),
    )
    agreement, packs = settle(step, packs, [reports, [elsewhere]])
    kept = [pack.batch.targets["codes"].weights for pack in packs]
    assert kept[1].count_nonzero() < len(kept[1])
    assert agreement.weight_sums["codes"] == pytest.approx(sum(float(weights.double().sum()) for weights in kept))
    objective = Objective(coefficients={"text": 1.0, "codes": 0.5}, weight_sums=agreement.weight_sums)
    terms = run_packs(model, [pack.batch for pack in packs], layout, objective)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sums = [model(pack.batch).sums for pack in packs]
    means = {name: sum(own[name] for own in sums) / agreement.weight_sums[name] for name in ("text", "codes")}
    (means["text"] + 0.5 * means["codes"]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    measured = objective.means({name: float(value) for name, value in terms.sums.items()})
    assert measured["codes"] == pytest.approx(means["codes"].item(), rel=1e-6)
    figures = StepFigures(losses=measured, grad_norm=1.0, learning_rate=1.0)
    names = [field.name for field in dataclasses.fields(StepMetrics) if field.default is dataclasses.MISSING]
    others = {name: value for name, value in figures.losses.items() if name != "text"}
    log = MetricsLog(tmp_path, first_step=0)
    log.write(StepMetrics(**{**dict.fromkeys(names, 0), "loss": figures.loss, "other_losses": others}))
    log.close()
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["codes_loss"] == pytest.approx(means["codes"].item(), rel=1e-6)
    assert line["loss"] == pytest.approx(means["text"].item(), rel=1e-6)
