"""Optimizers over shards: the layout changes neither a step nor what a run goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from optimizer_worker import SETTINGS, STEPS, Weights, run_job
from rank_jobs import run_ranks
from torch import Tensor

WORLD = 3  # nothing divides by it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizers")
    run_ranks(run_job, WORLD, str(folder))
    return folder


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", SETTINGS)
def test_shards_step_as_the_whole_does(folder: Path, name: str) -> None:
    alone = Weights(SETTINGS[name], sharded=False)
    alone.take_steps(0, STEPS)
    in_one_go, resumed = torch.load(folder / "found.pt")[name]
    assert_same(in_one_go, alone.full())
    for weight, again in zip(in_one_go.values(), resumed.values(), strict=True):
        assert torch.equal(weight, again)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_rank_goes_on_from_the_states_of_several(folder: Path, name: str) -> None:
    in_one_go, _ = torch.load(folder / "found.pt")[name]
    assert_same(Weights(SETTINGS[name], sharded=False).go_on(folder / name), in_one_go)
