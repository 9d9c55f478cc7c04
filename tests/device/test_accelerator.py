"""Steps through the branches that an accelerator takes, on devices that compute nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from omniloom.parallel.degrees import resolve_degrees
from omniloom.run.footprint import ModelSizes
from omniloom.tools.tiny import FAMILIES
from tests.device.cases import CASES, FAST, LORA, OFFLOADED, SLOW
from tests.device.steps import open_case

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What the cases did, by kind of device; all of a kind that are asked for together are run in one process."""

    @cache
    def run(kind: str, names: tuple[str, ...]) -> dict[str, Any]:
        out, environment = tmp_path_factory.mktemp("steps") / "out.json", dict(os.environ)
        if kind == "cuda":
            environment["LD_PRELOAD"] = str(build_fake_cuda(out.parent))
        command = [sys.executable, "-W", "ignore", "-m", "tests.device.worker", kind, str(out), *names]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], timeout=600
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(out.read_text(encoding="utf-8"))

    return run


def build_fake_cuda(directory: Path) -> Path:
    """Compile the device type `cuda` that does nothing."""
    import torch

    library, home = directory / "fake_cuda.so", Path(torch.__file__).parent
    command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{home / 'include'}", str(HERE / "fake_cuda.cpp")]
    command += [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return library


ON_CUDA = ("context_experts_full_recompute",)
SIZES, MOVE = "parallel/collectives.py:exchange_sizes", "parallel/staging.py:to_device.<locals>.move"
SUMS = "run/optimizer_step.py:OptimizerStep._sum_over_ranks"
CODES = "ops/nf4.py:_numbers"  # what 4-bit codes stand for
COPIES = "parallel/device.py:HostCopies._copy"  # to the host and back
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build a device type `cuda`")
each_step = pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("fake", name) for name in FAST),
        *(pytest.param("fake", name, marks=pytest.mark.full) for name in SLOW),
        *(pytest.param("cuda", name, marks=needs_compiler) for name in ON_CUDA),
    ],
)


@pytest.fixture
def step(steps, kind, name):
    return steps(kind, ON_CUDA if kind == "cuda" else tuple(SLOW if name in SLOW else FAST))[name]


@each_step
def test_gradients_and_optimizer_states_are_on_the_device_in_their_dtypes(step, kind, name):
    case = CASES[name]
    wanted = ["torch.bfloat16" if case.policy is LORA else "torch.float32"]
    states = wanted if "optimizer_states" not in case.train else ["torch.float32", "torch.int8", "torch.uint8"]
    devices = ["cpu", kind] if case.memory is OFFLOADED else [kind]
    assert (step["gradients"], step["states"], step["devices"]) == (wanted, states, devices)
    assert step["num_trained"] > 0


@each_step
def test_the_host_waits_for_the_sums_of_a_step_and_the_sizes_of_an_exchange_between_experts_alone(step, name):
    case = CASES[name]
    num_layers = case.layers["text"] // case.parallel.get("pipeline", 1)
    num_waits = num_layers * (case.num_packs + case.evaluates) if case.parallel.get("expert", 1) > 1 else 0
    assert step["wait"] == {**({SIZES: num_waits} if num_waits else {}), SUMS: 1}


@each_step
def test_all_copies_to_the_device_are_made_in_one_place_from_pinned_memory(step, name):
    case = CASES[name]
    others = {COPIES} if case.memory is OFFLOADED else {CODES} if case.quantize else set()
    assert set(step["copy"]) == {MOVE} | others
    assert step["pinned"] == step["copy"]
    is_shared = {"context", "tensor", "pipeline", "encoder_pool"} & case.parallel.keys()
    if not is_shared and not case.evaluates:
        assert step["copy"][MOVE] == case.num_packs, "a staged pack is one copy"


@each_step
def test_what_is_offloaded_goes_to_pinned_memory_and_comes_back(step, name):
    assert set(step["offload"]) == ({COPIES} if CASES[name].memory is OFFLOADED else set())
    if step["offload"]:
        assert step["copy"][COPIES] == step["offload"][COPIES]


@each_step
def test_no_layer_is_gathered_only_after_the_host_has_waited_for_its_layer(step):
    assert step["late_gathers"] == 0


@each_step
def test_what_waits_for_backward_is_what_is_planned(step, name, tmp_path):
    case = CASES[name]
    if case.model in FAMILIES:
        pytest.skip("where tensors are tiny, others than those that are planned count")
    workshop = open_case(case, tmp_path)
    degrees = resolve_degrees(
        workshop.config.parallel, case.world_size, packs_per_step=case.world_size * case.num_packs
    )
    sizes, memory = ModelSizes(workshop), workshop.config.memory
    # where all else is on the host: tensors that are too small for that, and the rows that a layer is called with
    left = (2**20 * len(sizes.kept) + case.pack_tokens * sizes.kept[0].row) * memory.offload_activations
    planned = sizes.layers_keep(degrees, memory, step["stage"])
    assert step["live"]["layers"] == pytest.approx(planned, rel=0.1, abs=left)
    of_towers = sum(sizes.tower_bytes(tower, rows, degrees, memory) for tower, rows in step["rows"].items())
    assert step["live"]["towers"] == pytest.approx(of_towers, rel=0.1)
    if step["live"]["loss"]:
        of_loss = sizes.loss_bytes(degrees, memory, step["stage"])
        assert step["live"]["loss"] == pytest.approx(of_loss, rel=0.1)
