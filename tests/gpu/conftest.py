"""Where the tests of this folder run: `pytest tests/gpu` on a CUDA GPU, or skipped.

`pytest tests/gpu --device cpu` runs all that a CPU has too: that the tests themselves are sound can be seen anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from omniloom.parallel.degrees import Degrees
from omniloom.parallel.mesh import Layout, build_layout, close_distributed, init_distributed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", choices=("cuda", "cpu"), help="where tests/gpu runs")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    kind = request.config.getoption("--device", default="cuda")  # unknown where this folder was not named
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")


@pytest.fixture(scope="module")
def layout(device: torch.device) -> Iterator[Layout]:
    yield build_layout(Degrees(), init_distributed(timeout_seconds=120, device=device))
    close_distributed()
