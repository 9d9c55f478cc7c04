"""That what waits for a GPU is sound: it runs on a CPU, at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_the_benchmark_of_a_gpu_runs_every_row_at_tiny_sizes(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "benchmarks/gpu.py", "--tiny", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    faults = {
        (name, loop): result["fault"] for name, row in rows.items() for loop, result in row.items() if "fault" in result
    }
    assert not faults
    assert len(rows) == 4


@pytest.mark.full
def test_the_tests_of_a_gpu_pass_on_a_cpu() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/gpu/test_steps.py",
        "tests/gpu/test_runs.py",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:]
