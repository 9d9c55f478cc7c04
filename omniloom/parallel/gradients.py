"""The norm of gradients that live on unlike meshes, and clipping by it, within the optimizer's step.

PyTorch's own clipping refuses DTensors of different meshes. Here each rank adds up the squares of what it holds,
divided by how many ranks hold the same values, and one scalar all-reduce gives the total. Knows no model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from omniloom.ops import torch_operators


def gradient_norm(
    parameters: Iterable[nn.Parameter], device: torch.device, repeated: Collection[nn.Parameter] = ()
) -> Tensor:
    """Euclidean norm over all gradients as a float32 scalar on `device`, the same on every rank.

    Parameters without a gradient count nothing, nor do those `repeated`, which other ranks count. Collective over all
    ranks: one all-reduce of one float32. The result is not finite if any gradient is not.
    """
    by_copies: dict[tuple[int, torch.device], list[Tensor]] = defaultdict(list)
    elsewhere = {id(parameter) for parameter in repeated}
    for parameter in parameters:
        if parameter.grad is not None and id(parameter) not in elsewhere:
            local, copies = _local_part(parameter.grad)
            if local.numel():
                by_copies[copies, local.device].append(local)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for (copies, _), tensors in by_copies.items():
        norms = torch_operators.foreach_norm(tensors, 2, dtype=torch.float32)
        total += torch.stack(norms).square().sum().to(device) / copies
    dist.all_reduce(total)
    return total.sqrt()


def clip_gradients(
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    device: torch.device,
    repeated: Collection[nn.Parameter] = (),
) -> Tensor:
    """Have the optimizer's next step divide all gradients so that their norm is at most `max_norm`; 0 only measures.

    A pass over all gradients of its own would cost a fifth of AdamW. `repeated` are divided and not counted.

    Returns the norm as it is, float32 scalar on `device`, without waiting for the device. Gradients that are not finite
    are left as they are: the caller reads the norm and decides. Collective over all ranks.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = gradient_norm(parameters, device, repeated)
    divisor = None
    if max_norm > 0 and parameters:
        divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
        divisor = torch.where(norm.isfinite(), divisor, 1.0).to(parameters[0].device)
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]  # what PyTorch's own fused optimizers divide by
    return norm


def _local_part(gradient: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a gradient, and how many ranks hold the same."""
    if not isinstance(gradient, DTensor):
        return gradient, dist.get_world_size()
    mesh = gradient.device_mesh
    copies = math.prod(
        mesh.size(axis) for axis, placement in enumerate(gradient.placements) if placement.is_replicate()
    )
    return gradient.to_local(), copies  # ranks outside of the mesh are other stages' and hold other parameters
