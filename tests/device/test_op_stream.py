"""What a step costs an accelerator, by the committed count: no change may make it worse unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "benchmarks/results/op_stream_small.json"
PROBE = """
import contextlib, json
import torch
from functools import partial
from tests.device.compiled import install_inductor, launching
from tests.device.fake_device import Record, install

device, found = install("fake"), []
install_inductor(device)

def note(launches):
    found.extend((launch.names, launch.bytes, launch.operation is not None) for launch in launches)
    return contextlib.nullcontext()

def three_passes(rows, square):
    return (((rows * 2).exp() + 1) @ square).mean(dim=1)

with Record(device=device), torch.no_grad():
    given = (torch.empty(size, 512, device=device, dtype=torch.bfloat16) for size in (4096, 512))
    torch.compile(three_passes, backend=partial(launching, rows=0, on_launches=note), fullgraph=True)(*given)
print(json.dumps(found))
"""
AGAIN = f"python benchmarks/op_stream.py --small --json {REFERENCE.relative_to(ROOT)}"


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    out = tmp_path_factory.mktemp("op_stream") / "out.json"
    command = [sys.executable, "-W", "ignore", "benchmarks/op_stream.py", "--small", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


def test_no_step_costs_an_accelerator_more_than_is_committed(counted):
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    assert [row["name"] for row in counted["rows"]] == [row["name"] for row in reference["rows"]]
    both = list(zip(counted["rows"], reference["rows"], strict=True))
    both += [(row["compiled"], known["compiled"]) for row, known in both if known["compiled"]]
    worse = [
        f"{known['name']}: {figure} {row[figure]:g}, committed {known[figure]:g}"
        for row, known in both
        for figure in ("seconds", "kernels", "bytes", "graphs")
        if row[figure] > 1.02 * known[figure]
    ]
    assert not worse, f"{'; '.join(worse)}. If that is worth it, say why and run {AGAIN}"


def test_compiled_blocks_multiply_as_much_and_move_less(counted):
    rows = [row for row in counted["rows"] if row["compiled"]]
    assert len(rows) >= 4
    for row in rows:
        assert flops(row["compiled"]) == pytest.approx(flops(row), rel=0.03), row["name"]
        assert row["compiled"]["bytes"] < 0.95 * row["bytes"], row["name"]
        assert row["compiled"]["kernels"] < row["kernels"], row["name"]


def flops(row):
    return sum(cost["flops"] for kinds in row["phases"].values() for cost in kinds.values())


def test_inductor_makes_one_kernel_of_passes_and_one_of_each_product():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    rows, square = 2 * 4096 * 512, 2 * 512 * 512  # bytes
    assert json.loads(done.stdout) == [
        ["add exp mul", 2 * rows, False],  # of three passes, one read and one write
        ["mm", 2 * rows + square, True],
        ["mean", rows + 2 * 4096, False],
    ]


def test_a_decoder_layer_keeps_little_of_a_16k_pack(counted):
    assert counted["kept"]["Qwen3-VL-4B"] <= 1.3e9
    assert counted["kept"]["Qwen3-Omni-30B-A3B"] <= 1.1e9


def test_no_layer_keeps_more_for_backward_than_is_committed(counted):
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))["kept"]
    assert counted["kept"].keys() == reference.keys()
    worse = {name: count for name, count in counted["kept"].items() if count > 1.02 * reference[name]}
    assert not worse, f"bytes kept {worse}, committed {reference}. If that is worth it, say why and run {AGAIN}"
