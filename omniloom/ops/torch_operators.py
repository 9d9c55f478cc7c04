"""Operators of PyTorch that have no public name, in one place. tests/unit/test_torch_operators.py says if one changes.

Public functions around them keep more for backward than is needed, or hide what backward takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

rms_norm = torch.ops.aten._fused_rms_norm
rms_norm_backward = torch.ops.aten._fused_rms_norm_backward
cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# of packed segments; takes fewer heads of keys than of queries
flash_attention = torch.ops.aten._flash_attention_forward
flash_attention_backward = torch.ops.aten._flash_attention_backward
foreach_norm = torch._foreach_norm


# What differs between packs in layers' arguments, whatever it was in the first two: numbers that stood still in those
# would have a graph made for the second, and another for the first pack in which they move.
UNLIKE = ("L['segments'].cu_seqlens", "L['segments'].max_length")


def compile_module(module: torch.nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have a module compiled when it is next called. Integers that it reads from tensors become sizes in its graph."""
    import torch._dynamo.config  # slow to import
    import torch.compiler.config

    torch._dynamo.config.capture_scalar_outputs = True  # else the graph ends there
    torch.compiler.config.dynamic_sources = ",".join(UNLIKE)
    module.compile(backend=backend)


def count_graphs() -> int:
    """Graphs that this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # slow to import, and there wherever something was compiled
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
