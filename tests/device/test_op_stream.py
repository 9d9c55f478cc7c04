"""What a step costs an accelerator, by the committed count: no change may make it worse unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "benchmarks/results/op_stream_small.json"
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
    worse = [
        f"{row['name']}: {figure} {row[figure]:g}, committed {known[figure]:g}"
        for row, known in zip(counted["rows"], reference["rows"], strict=True)
        for figure in ("seconds", "kernels", "bytes")
        if row[figure] > 1.02 * known[figure]
    ]
    assert not worse, f"{'; '.join(worse)}. If that is worth it, say why and run {AGAIN}"


def test_a_decoder_layer_keeps_little_of_a_16k_pack(counted):
    assert counted["kept"]["Qwen3-VL-4B"] <= 1.3e9
    assert counted["kept"]["Qwen3-Omni-30B-A3B"] <= 1.1e9


def test_no_layer_keeps_more_for_backward_than_is_committed(counted):
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))["kept"]
    assert counted["kept"].keys() == reference.keys()
    worse = {name: count for name, count in counted["kept"].items() if count > 1.02 * reference[name]}
    assert not worse, f"bytes kept {worse}, committed {reference}. If that is worth it, say why and run {AGAIN}"
