"""What a run says of sizes and settings under which it is slower, or does less, than it seems."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from omniloom.config import load_config
from omniloom.parallel.device import computes_bf16
from omniloom.run.description import describe_kernels, describe_slow_ways
from omniloom.run.opening import open_workshop
from omniloom.tools.tiny import make_tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("width", "dtype", "said"), [(20, "bf16", "20"), (20, "float32", None), (16, "bf16", None)])
def test_expert_sizes_that_grouped_products_do_not_take_are_said(tmp_path, width, dtype, said) -> None:
    overrides = {"text_config.moe_intermediate_size": width}
    make_tiny("qwen3_vl_moe", tmp_path / "model", overrides=overrides)
    workshop = open_workshop(load_config(None, [f"model.path={tmp_path / 'model'}", f"model.dtype={dtype}"]))
    with torch.device("meta"):
        lines = describe_slow_ways(workshop, workshop.build(), CUDA)
    assert len(lines) == (said is not None)
    assert said is None or f"rows of {said} numbers" in lines[0]


def test_kernels_are_named_of_the_parts_that_there_are(tmp_path) -> None:
    for family, parts in (("qwen3_vl", ["text", "vision"]), ("qwen3_omni", ["text", "vision", "audio"])):
        workshop = open_workshop(load_config(None, [f"model.path={make_tiny(family, tmp_path / family)}"]))
        assert [words.split()[0] for words in describe_kernels(workshop, CPU).split(", ")] == parts


def test_settings_that_move_nothing_on_a_cpu_are_said(tmp_path) -> None:
    make_tiny("qwen3_vl", tmp_path / "model")
    words = [f"model.path={tmp_path / 'model'}", "parallel.cpu_offload=true"]
    words += ["memory.offload_activations=true", "memory.offload_optimizer=true"]
    workshop = open_workshop(load_config(None, words))
    with torch.device("meta"):
        model = workshop.build()
    assert [line.split(":")[0] for line in describe_slow_ways(workshop, model, CPU)] == [
        "parallel.cpu_offload",
        "memory.offload_activations",
        "memory.offload_optimizer",
    ]
    assert not describe_slow_ways(workshop, model, CUDA)


@pytest.mark.parametrize(
    ("has_bf16", "asked", "taken", "said"),
    [(True, "auto", "bfloat16", 0), (False, "auto", "float32", 0), (False, "bf16", "bfloat16", 1)],
)
def test_the_dtype_is_what_the_device_computes_in_unless_asked(
    tmp_path, monkeypatch, has_bf16, asked, taken, said
) -> None:
    """Of processors, as they tell what they have: bf16 without its instructions is ten times slower than float32."""
    make_tiny("qwen3_vl", tmp_path / "model")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has_bf16})
    workshop = open_workshop(load_config(None, [f"model.path={tmp_path / 'model'}", f"model.dtype={asked}"]))
    workshop = replace(workshop, computes_bf16=computes_bf16(CPU))
    assert workshop.compute_dtype == getattr(torch, taken)
    with torch.device("meta"):
        lines = describe_slow_ways(workshop, workshop.build(), CPU)
    assert ["model.dtype" in line for line in lines] == [True] * said


@pytest.mark.parametrize(
    ("capability", "dtype", "waits"),
    [((8, 0), "bf16", True), ((9, 0), "bf16", False), ((10, 0), "bf16", False), ((12, 0), "bf16", True),
     ((9, 0), "float32", True)],
)  # fmt: skip
def test_what_experts_cost_where_grouped_products_wait_is_said(tmp_path, monkeypatch, capability, dtype, waits) -> None:
    make_tiny("qwen3_vl_moe", tmp_path / "model")
    workshop = open_workshop(load_config(None, [f"model.path={tmp_path / 'model'}", f"model.dtype={dtype}"]))
    with torch.device("meta"):
        model = workshop.build()
    named = SimpleNamespace(get_device_capability=lambda device: capability)
    monkeypatch.setattr(torch, "get_device_module", lambda device: named)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert ["waits for the device" in line for line in describe_slow_ways(workshop, model, CUDA)] == [True] * waits
