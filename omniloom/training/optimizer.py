"""AdamW over the trainable parameters, grouped by what the policy says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import Parameter

from omniloom.training.policy import ParameterPolicy


def build_optimizer(
    parameters: Iterable[tuple[str, Parameter]],
    policies: Mapping[str, ParameterPolicy],
    *,
    betas: tuple[float, float],
    epsilon: float,
) -> torch.optim.AdamW:
    """Fused AdamW; one group per (learning rate, weight decay, mesh), since one kernel call takes tensors of one mesh.

    Each group keeps `peak_learning_rate` and `names`. Vectors (norms, biases) are never decayed.
    Source: Loshchilov & Hutter 2019 (arXiv 1711.05101).
    """
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        policy = policies[name]
        decay = policy.weight_decay if parameter.ndim > 1 else 0.0
        mesh = getattr(parameter, "device_mesh", None)  # set on DTensors only
        key = (policy.learning_rate, decay, mesh)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "names": [],
                "lr": policy.learning_rate,
                "peak_learning_rate": policy.learning_rate,
                "weight_decay": decay,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return torch.optim.AdamW(list(groups.values()), betas=betas, eps=epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group from its peak; return the highest rate, for the metrics line."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"] * factor
    return float(max(group["lr"] for group in optimizer.param_groups))
