"""What a run says of itself before its first step: model, layout, kernels, rows, and what will be slow."""

from __future__ import annotations

from dataclasses import asdict

import torch

from omniloom.data.sources import Sources
from omniloom.models.fusion import OmniModel
from omniloom.ops.attention import resolve_kernel
from omniloom.ops.grouped_gemm import ROW_BYTES, fits_grouped_gemm
from omniloom.ops.nf4 import shape_of
from omniloom.parallel.device import waits_for_grouped_products
from omniloom.parallel.mesh import Layout
from omniloom.run.opening import Workshop
from omniloom.run.rows import describe_files, describe_template
from omniloom.training.schedule import describe_warmup


def describe_run(workshop: Workshop, layout: Layout, model: OmniModel, rows: Sources) -> list[str]:
    """Lines for the log. Raises: ValueError for a kernel that this device or dtype does not have."""
    device = layout.device
    train = workshop.config.train
    warning = None if train.steps is None else describe_warmup(train.warmup_steps, train.steps)
    dtype = str(workshop.compute_dtype).removeprefix("torch.")
    return [
        f"model  {workshop.spec.name} on {layout.degrees.describe()} ({device.type}, {dtype}), attention "
        f"{describe_kernels(workshop, device)}",
        *(f"       {line}" for line in describe_slow_ways(workshop, model, device)),
        f"data   {rows.described_size}, template {describe_template(workshop, rows)}",
        *(f"       {line}" for line in describe_files(rows, workshop.config)),
        *([warning] if warning is not None else []),
    ]


def describe_kernels(workshop: Workshop, device: torch.device) -> str:
    """The attention kernel of each of the model's parts. Raises: ValueError for one that is not of this device."""
    return ", ".join(
        f"{name} {resolve_kernel(kernel, device.type, workshop.compute_dtype)}"
        for name, kernel in asdict(workshop.config.model.attention).items()
        if getattr(workshop.family, name, None) is not None  # delta_rule is none: `ops.delta_rule` has its own kernels
    )


def describe_slow_ways(workshop: Workshop, model: OmniModel, device: torch.device) -> list[str]:
    """What will run otherwise than the config and the model's sizes would let one think, a line each."""
    lines, config, dtype = [], workshop.config, workshop.compute_dtype
    if config.model.dtype == "bf16" and not workshop.computes_bf16:
        lines.append("model.dtype: this device has no products of bf16, float32 is some ten times faster here")
    widths = {
        width
        for name, weight in model.named_parameters()
        if workshop.spec.component_of(name) == "text.experts" and name not in workshop.adapter_names
        for width in shape_of(weight)[1:]
        if not fits_grouped_gemm(width, dtype)
    }
    if widths:
        wide = " and ".join(map(str, sorted(widths)))
        lines.append(
            f"experts have rows of {wide} numbers, no whole {ROW_BYTES} bytes: grouped products pad them, slower"
        )
    if workshop.family.text.num_experts and waits_for_grouped_products(device, dtype):
        lines.append(
            "experts: but for bf16 on compute capability 9 and 10 (H100, H200, B200) PyTorch's grouped products read "
            "their sizes on the host, which waits for the device at each of them, some eight times a layer and pack"
        )
    moves = {
        "parallel.cpu_offload": config.parallel.cpu_offload,
        "memory.offload_activations": config.memory.offload_activations,
        "memory.offload_optimizer": config.memory.offload_optimizer,
    }
    if device.type == "cpu":
        lines += [f"{name}: the device is the host, so nothing moves" for name, is_set in moves.items() if is_set]
    return lines
