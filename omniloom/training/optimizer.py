"""Which parameters an optimizer steps alike, by what the policy says of them, and their learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.nn import Parameter

from omniloom.training.policy import ParameterPolicy


def parameter_groups(
    parameters: Iterable[tuple[str, Parameter]], policies: Mapping[str, ParameterPolicy], *, muon: bool = False
) -> list[dict[str, Any]]:
    """One group of what trains per (learning rate, weight decay, mesh): one kernel call takes tensors of one mesh.

    Each group keeps `peak_learning_rate` and `names`. Vectors (norms, biases) are never decayed. With `muon` matrices
    of layers, routers and convolutions of single channels aside, come in groups of their own, marked `orthogonal`.
    """
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        policy = policies[name]
        decay = policy.weight_decay if parameter.ndim > 1 else 0.0
        mesh = getattr(parameter, "device_mesh", None)  # set on DTensors only
        orthogonal = muon and is_orthogonal(name, parameter.ndim, policy)
        key = (policy.learning_rate, decay, mesh, orthogonal)
        group = groups.setdefault(key, _empty_group(policy.learning_rate, decay, orthogonal=orthogonal))
        group["params"].append(parameter)
        group["names"].append(name)
    # torch wants one even where a stage has nothing that trains
    return list(groups.values()) or [_empty_group(0.0, 0.0, orthogonal=False)]


def _empty_group(rate: float, decay: float, *, orthogonal: bool) -> dict[str, Any]:
    settings = {"lr": rate, "peak_learning_rate": rate, "weight_decay": decay, "orthogonal": orthogonal}
    return {"params": [], "names": [], **settings}


def is_orthogonal(name: str, num_dims: int, policy: ParameterPolicy) -> bool:
    """Whether Muon, where it is asked for, steps this parameter: a matrix of a layer that is no router.

    A convolution of single channels is none: its rows have nothing to do with one another.
    """
    is_other = policy.component.endswith(".router") or name.endswith(".conv1d.weight")
    return ".layers." in name and num_dims > 1 and not is_other
