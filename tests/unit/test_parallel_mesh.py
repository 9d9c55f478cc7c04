"""Degrees: what fits, what is refused, and that a refusal names what would do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from omniloom.config import ParallelConfig
from omniloom.parallel.context import check_heads
from omniloom.parallel.degrees import Degrees, resolve_degrees
from omniloom.parallel.mesh import init_distributed


def test_shard_auto_fills_the_world() -> None:
    degrees = resolve_degrees(ParallelConfig(replicate=2, context=2), 16, packs_per_step=8)
    assert degrees == Degrees(replicate=2, shard=4, context=2)
    assert degrees.world == 16


@pytest.mark.parametrize(
    ("parallel", "world", "packs", "words"),
    [
        (ParallelConfig(shard=3), 4, 8, ("parallel", "3 ranks, but 4 were started", "set parallel.shard to 4 or auto")),
        (ParallelConfig(context=3), 4, 8, ("degrees from [1, 2, 4]", "or start 3 ranks")),
        (ParallelConfig(expert=3), 4, 8, ("parallel.expert: 3 does not divide", "choose from [1, 2, 4]")),
        (ParallelConfig(), 4, 3, ("train.packs_per_step: 3", "4 data-parallel ranks", "at least 4")),
        (ParallelConfig(replicate=8, shard=1), 4, 8, ("8 ranks, but 4 were started",)),
        (ParallelConfig(reshard_after_forward=3), 4, 8, ("groups of 3 ranks do not divide the 4", "true, false, 2, 4")),
        (ParallelConfig(reshard_after_forward=8), 4, 8, ("groups of 8 ranks", "choose true, false, 2, 4")),
        (ParallelConfig(reshard_after_forward=2), 1, 8, ("groups of 2 ranks", "choose true, false")),
        (
            ParallelConfig(reshard_after_forward=4, expert=2),
            4,
            8,
            ("groups of 4 ranks", "the 2 that share experts", "choose true, false, 2"),
        ),
        (ParallelConfig(tensor=3), 4, 8, ("degrees from [1, 2, 4]", "or start 3 ranks")),
        (ParallelConfig(reshard_after_forward=4, tensor=2), 4, 8, ("do not divide the 2", "choose true, false, 2")),
        (ParallelConfig(pipeline=3), 4, 8, ("pipeline 3 x shard auto makes 3 ranks", "degrees from [1, 2, 4]")),
        (ParallelConfig(pipeline=4), 8, 6, ("3 for each of 2 data", "pipeline of 4 ranks cannot", "set it to 8 or 10")),
        (
            ParallelConfig(pipeline=2, pipeline_schedule="interleaved"),
            2,
            5,
            ("5 packs are 5 for each of 1", "equal rounds", "set it to 6 or 8"),
        ),
        (ParallelConfig(pipeline_layers=(2, 2)), 4, 8, ("but parallel.pipeline is 1",)),
    ],
)
def test_a_degree_that_does_not_fit_is_refused_with_what_would(
    parallel: ParallelConfig, world: int, packs: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_degrees(parallel, world, packs_per_step=packs)
    for word in words:
        assert word in str(caught.value)


def test_experts_that_are_not_sharded_take_any_group_of_the_rest() -> None:
    assert resolve_degrees(ParallelConfig(reshard_after_forward=2, expert=4), 4, packs_per_step=4).expert == 4


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        resolve_degrees(ParallelConfig(shard=4, expert=3), 4, packs_per_step=2)
    assert "parallel.expert" in str(caught.value)
    assert "train.packs_per_step" in str(caught.value)


def test_heads_that_do_not_divide_are_refused_and_key_value_heads_may() -> None:
    check_heads(12, 2, 4)  # two key-value heads over four ranks: repeated
    check_heads(12, 6, 4)  # six over four: repeated up to twelve
    with pytest.raises(
        ValueError, match=r"12 attention heads do not divide over 5 .* choose from \[1, 2, 3, 4, 6, 12\]"
    ):
        check_heads(12, 4, 5)


def test_description_names_the_axes_in_use() -> None:
    assert Degrees(shard=4, context=2, expert=8).describe() == "shard 4 x context 2 x expert 8"
    assert Degrees(context=8, ring=2).describe() == "ulysses 4 x ring 2"
    assert Degrees().describe() == "one rank"


@pytest.mark.parametrize("kind", ["cuda", "xpu", "cpu"])
def test_the_job_is_bound_to_no_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else NCCL sends all messages of stages one after another, and other backends cannot make meshes."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **given: asked.update(given))
    init_distributed(device=torch.device(kind, 0))
    assert asked.get("device_id") is None


def test_memory_that_tensors_free_on_the_cpu_is_not_asked_for_again() -> None:
    script = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from omniloom.parallel.device import choose_device
    choose_device(0)
def step():
    kept = [torch.ones(2**20) for _ in range(20)]  # 4 MiB each
    del kept
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(), step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for name in ("kept", "plain"):
        done = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=True)
        faults[name] = int(done.stdout)
    if faults["plain"] < 1000:
        pytest.skip("this C library keeps freed memory anyway")
    assert faults["kept"] < faults["plain"] / 2
