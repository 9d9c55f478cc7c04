"""What is foretold of memory and time is what a real step takes, and what a cluster is asked for comes out in order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from omniloom.config import ConfigError, MemoryConfig, load_config
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.mesh import build_layout, close_distributed, init_distributed
from omniloom.run.footprint import ModelSizes
from omniloom.run.layouts import RECOMPUTES, choose_degrees, layouts_of, rank_layouts
from omniloom.run.opening import Workshop, build_model, build_optimizer, load_weights
from omniloom.run.step_time import Clock, Machine
from omniloom.tools.plan import show_layouts
from tests.device.cases import FROZEN_TOWERS, LORA
from tests.device.steps import Case, Content, make_pack, open_case

ROOT = Path(__file__).parents[2]
WHOLE = {"text": None, "vision": None, "audio": None}
# no rank holds more than its share of 2 GiB: everything fits
ROOMY = 2**50


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workshop:
    case = Case(model="qwen3_omni", world_size=8, num_packs=2, pack_tokens=1024)
    return open_case(case, tmp_path_factory.mktemp("tiny"))


def with_config(workshop: Workshop, **sections: dict) -> Workshop:
    config = workshop.config
    changed = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
    return replace(workshop, config=replace(config, **changed))


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("train", "policy"),
    [
        ({}, {}),
        ({"optimizer": "muon", "optimizer_states": "8bit"}, {}),
        ({"optimizer_states": "bf16"}, FROZEN_TOWERS),
        ({}, LORA),
    ],
    ids=["adamw", "muon of 8 bits", "frozen towers", "lora"],
)
def test_weights_gradients_and_states_are_those_of_a_real_step(tiny, train, policy) -> None:
    workshop = with_config(tiny, train=train)
    rules = load_config({"policy": policy}).policy
    workshop = replace(workshop, config=replace(workshop.config, policy=rules))
    ranks = init_distributed()
    try:
        model, policies = build_model(workshop, build_layout(Degrees(), ranks))
        load_weights(workshop, model)
        optimizer = build_optimizer(workshop, dict(model.named_parameters()), policies, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        weights = sum(local(parameter).nbytes for parameter in model.parameters())
        gradients = sum(local(p.grad).nbytes for p in model.parameters() if p.grad is not None)
        states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        expected = (weights, gradients, sum(local(state).nbytes for state in states))
    finally:
        close_distributed()
    found = ModelSizes(workshop).footprint(Degrees())
    assert (found.parameters, found.gradients, found.states) == expected


def local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "to_local", lambda: tensor)()


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_omni", pytest.param("qwen2_5_omni", marks=pytest.mark.full)])
def test_activations_are_within_a_tenth_of_what_autograd_keeps(family, tmp_path) -> None:
    workshop = open_case(Case(model=family, pack_tokens=1024), tmp_path)
    workshop = with_config(workshop, model={"dtype": "float32"})
    content = Content(num_samples=4, grid=(1, 16, 16), pictures=2, mel_frames=0)  # half of the tokens
    batch, kept, alive = make_pack(workshop.family, 1024, content), dict[StorageWeakRef, int](), []
    model = workshop.build()
    weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage not in weights and tensor.is_floating_point():
            kept[storage] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rows = model.encode(batch)
        of_towers = sum(kept.values())
        media = model.text.embed_rows(batch, rows)
        kept.clear()
        model.text.run_layers(media, batch, rows)
    sizes = ModelSizes(workshop)
    layers = sum(sizes.layer_bytes(layer, 1024, Degrees()) for layer in range(len(sizes.kept)))
    assert layers == pytest.approx(sum(kept.values()), rel=0.1)
    visual = batch.vision.token_index.shape[0]
    assert sizes.tower_keeps("vision", "none", False) * visual == pytest.approx(of_towers, rel=0.1)


def test_each_axis_takes_its_part_off_what_a_device_holds(tiny) -> None:
    sizes = ModelSizes(tiny)
    alone, memory = sizes.footprint(Degrees()), MemoryConfig()
    for degrees in (Degrees(shard=4), Degrees(context=4), Degrees(tensor=2), Degrees(shard=4, expert=2)):
        assert sizes.footprint(degrees).parameters < 0.6 * alone.parameters
    assert sizes.footprint(Degrees(replicate=4)).parameters == alone.parameters
    assert sizes.footprint(Degrees(context=4)).activations < 0.3 * alone.activations
    by_recompute = [sizes.footprint(Degrees(), replace(memory, recompute=how)).activations for how in RECOMPUTES]
    assert by_recompute == sorted(by_recompute, reverse=True)
    offloaded = sizes.footprint(Degrees(), replace(memory, recompute="full", offload_activations=True))
    assert offloaded.activations < by_recompute[-1]


# ---------------------------------------------------------------------------------------- time


COUNTED = {
    "Qwen3-VL-4B full, no recompute": ("Qwen3-VL-4B", {}, {}, "none"),
    "Qwen3-Omni-30B-A3B LoRA, full recompute": ("Qwen3-Omni-30B-A3B", {}, LORA, "full"),
    "Qwen3-Omni-30B-A3B LoRA, no recompute": ("Qwen3-Omni-30B-A3B", {}, LORA, "none"),
    "Qwen3-Omni-30B-A3B, 12 layers full, towers frozen": ("Qwen3-Omni-30B-A3B", {"text": 12}, FROZEN_TOWERS, "none"),
    "Qwen2.5-Omni-7B full, no recompute": ("Qwen2.5-Omni-7B", {}, {}, "none"),
}


@pytest.mark.parametrize(
    "name", [name if name.startswith("Qwen3-VL") else pytest.param(name, marks=pytest.mark.full) for name in COUNTED]
)
def test_step_times_are_within_a_tenth_of_the_counted_op_stream(name, tmp_path) -> None:
    rows = json.loads((ROOT / "benchmarks/results/op_stream_after.json").read_text())["rows"]
    (counted,) = [row for row in rows if row["name"] == name]
    model, layers, policy, recompute = COUNTED[name]
    case = Case(model=model, layers={**WHOLE, **layers}, world_size=8, policy=policy, pack_tokens=16384,
                memory={"recompute": recompute})  # fmt: skip
    workshop = open_case(case, tmp_path)
    machine = Machine()
    time = Clock(ModelSizes(workshop), machine).step(Degrees(shard=8), workshop.config.memory)
    assert time.seconds == pytest.approx(counted["seconds"], rel=0.1)
    assert time.utilisation(machine) == pytest.approx(counted["mfu"], rel=0.12)


def test_slower_links_and_bubbles_cost_time(tiny) -> None:
    sizes, near, far = ModelSizes(tiny), Machine(devices=8), Machine(devices=2)
    memory = MemoryConfig()
    for degrees in (
        Degrees(shard=8),
        Degrees(shard=2, context=4),
        Degrees(shard=2, tensor=4),
        Degrees(shard=8, expert=4),
    ):
        assert Clock(sizes, far).step(degrees, memory).seconds > Clock(sizes, near).step(degrees, memory).seconds
    sent = Clock(sizes, near).step(Degrees(shard=2, context=2, tensor=2), memory).sent
    assert set(sent) == {"fsdp", "context", "tensor"}


# ---------------------------------------------------------------------------------------- ranking


def test_the_first_layout_fits_and_is_the_fastest_that_does(tiny) -> None:
    sizes, machine = ModelSizes(tiny), Machine()
    found = rank_layouts(sizes, 8, ROOMY, machine, vary_memory=True)
    assert len(found) > 10
    assert all(candidate.degrees.world == 8 and candidate.fits(ROOMY) for candidate in found)
    seconds = [candidate.time.seconds for candidate in found]
    assert seconds[0] == pytest.approx(min(seconds), rel=0.01)
    totals = sorted(candidate.footprint.total for candidate in found)
    tight = totals[0] * 1.1
    first = rank_layouts(sizes, 8, tight, machine, vary_memory=True)[0]
    assert first.fits(tight)


def test_a_talker_is_offered_no_layout_that_it_refuses(tmp_path) -> None:
    policy = {"talker": {"freeze": False}}
    workshop = open_case(Case(model="qwen3_omni", world_size=8, pack_tokens=1024, policy=policy), tmp_path)
    found = list(layouts_of(ModelSizes(workshop), 8, Machine()))
    assert {degrees.context for degrees in found} >= {1, 2, 4}
    assert {(degrees.tensor, degrees.pipeline) for degrees in found} == {(1, 1)}


def test_auto_takes_the_first_layout_and_says_why(tiny) -> None:
    workshop = with_config(tiny, parallel={"layout": "auto"})
    degrees, why = choose_degrees(workshop, 4, memory_bytes=ROOMY, machine=Machine(devices=4))
    assert degrees == rank_layouts(ModelSizes(workshop), 4, ROOMY, Machine(devices=4), vary_memory=False)[0].degrees
    assert why[0].startswith(f"layout {degrees.describe()}: ")
    assert why[1].startswith("       next ")
    _, why = choose_degrees(workshop, 4, memory_bytes=1e6, machine=Machine(devices=4))
    assert "warning: " in why[1]


def test_parallel_auto_is_short_for_its_key_and_chooses_alone() -> None:
    assert load_config({"parallel": "auto"}).parallel.layout == "auto"
    assert load_config(None, ["parallel=auto"]).parallel.layout == "auto"
    with pytest.raises(ConfigError, match=r"auto chooses parallel\.tensor itself"):
        load_config({"parallel": {"layout": "auto", "tensor": 2}})


def test_plan_shows_layouts_with_the_keys_that_come_to_them(tiny, capsys) -> None:
    words = [f"model.path={tiny.config.model.path}", "data.pack_tokens=1024", "train.packs_per_step=16"]
    show_layouts(words, 8, 80.0, None)
    printed = capsys.readouterr().out
    assert "16 packs of 1,024 tokens on 8 devices of 80 GiB" in printed
    assert "parallel.shard=8 memory.recompute=none" in printed
    assert "(as configured)" in printed
    assert "GB a step and device:" in printed
    assert "speech" not in printed


def test_a_plan_shows_what_runs_where_the_config_itself_does_not(tiny, capsys) -> None:
    words = [f"model.path={tiny.config.model.path}", "data.pack_tokens=1024", "train.packs_per_step=2"]
    show_layouts(words, 8, 80.0, None)
    printed = capsys.readouterr().out
    assert "as configured it does not run: train.packs_per_step: 2 packs cannot feed 8 data-parallel ranks" in printed
    assert "GB a step and device:" in printed


def test_a_plan_says_what_of_a_talker_is_not_counted(tiny, capsys) -> None:
    words = [f"model.path={tiny.config.model.path}", "data.pack_tokens=1024", "policy.talker.freeze=false"]
    show_layouts(words, 1, 80.0, None)
    assert "what its layers keep and compute is not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "memory", "nodes", "message"),
    [
        (8, None, None, r"--memory: expected the GiB of each device"),
        (8, float("nan"), None, r"--memory: expected the GiB of each device, as 80, got nan"),
        (8, 80.0, 3, r"--nodes: expected a divisor of --gpus 8, got 3"),
        (2, 1e-3, None, r"no layout of 2 devices fits; the smallest takes [\d.]+ GiB \(.*\); 128 devices of this size"),
        (2, 1e-4, None, r"no layout of 2 devices fits; .*\); use larger devices"),
        (7, 80.0, None, r"--gpus 7: no layout of so many ranks divides model and packs; train.packs_per_step is 1"),
    ],
)
def test_what_cannot_be_planned_is_one_message(tiny, gpus, memory, nodes, message) -> None:
    words = [f"model.path={tiny.config.model.path}", "data.pack_tokens=1024", "train.packs_per_step=1"]
    with pytest.raises(ValueError, match=message):
        show_layouts(words, gpus, memory, nodes)
