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

from tests.device.cases import CASES

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


FAST = tuple(name for name, known in CASES.items() if not known.is_slow)
SLOW = tuple(name for name, known in CASES.items() if known.is_slow)
ON_CUDA = ("context_experts_full_recompute",)
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
    return steps(kind, ON_CUDA if kind == "cuda" else SLOW if CASES[name].is_slow else FAST)[name]


@each_step
def test_gradients_and_optimizer_states_are_on_the_device_in_their_dtypes(step, kind, name):
    assert tuple(step["gradients"]) == CASES[name].dtypes
    assert tuple(step["states"]) == CASES[name].dtypes
    assert step["devices"] == [kind]
    assert step["num_trained"] > 0


@each_step
def test_the_host_waits_only_for_the_sizes_of_an_exchange_between_experts(step, name):
    assert step["wait"] == CASES[name].waits


@each_step
def test_the_host_copies_to_the_device_where_and_as_often_as_is_known(step, name):
    assert step["copy"] == CASES[name].copies
    assert step["pinned"] == {}, "batches come from pinned memory now: say so in CASES"


@each_step
def test_experts_are_gathered_after_their_layers_wait_as_often_as_is_known(step, name):
    assert step["late_gathers"] == CASES[name].late_gathers
