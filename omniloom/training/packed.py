"""Frozen weights beside adapters as 4-bit codes (QLoRA): which ones, and the modules that hold them.

A packed weight keeps its name and has another shape and dtype (`ops.nf4`); the operations take it apart where they
use it. Source: Dettmers et al. 2023 (arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from omniloom.ops.linear_map import LinearMap, linears
from omniloom.ops.nf4 import BLOCK, packed_shape
from omniloom.training.lora import is_linear
from omniloom.training.policy import ParameterPolicy


class PackedLinear(nn.Module):
    """A frozen linear without an adapter, its weight packed."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias

    def forward(self, x: Tensor, draw_key: Tensor | None = None) -> Tensor:
        """[N, in] -> [N, out]."""
        (out,) = linears(x, self.as_map(draw_key))
        return out

    def as_map(self, draw_key: Tensor | None) -> LinearMap:
        return LinearMap(self.weight, self.bias)


def choose_packed(
    model: nn.Module, policies: Mapping[str, ParameterPolicy], adaptable: Collection[str], adapted: Iterable[str]
) -> tuple[str, ...]:
    """The linears and stacked experts to pack: frozen ones, of parts of the model in which some are `adapted`.

    Not among them: heads, as in peft and bitsandbytes, and rows that are no whole blocks. `adaptable` and `adapted` are
    names of the bare model's weights, `policies` theirs.
    """
    roots = {name.split(".")[0] for name in adapted}
    return tuple(
        name
        for name in adaptable
        if name.split(".")[0] in roots
        and not policies[name].trainable
        and "head" not in name
        and is_linear(model, name)
        and model.get_parameter(name).shape[-1] % BLOCK == 0
    )


def install_packed(model: nn.Module, names: Iterable[str]) -> None:
    """Put packed weights, values undefined, in the place of others: after `install_lora`, before any parallelism."""
    for name in names:
        holder_name, _, key = name.rpartition(".")
        holder = model.get_submodule(holder_name)
        if isinstance(holder, nn.Linear):
            holder = PackedLinear(holder)
            model.set_submodule(holder_name, holder)
        weight = holder.get_parameter(key)
        codes = weight.new_empty(packed_shape(tuple(weight.shape)), dtype=torch.uint8)
        holder.register_parameter(key, nn.Parameter(codes, requires_grad=False))
