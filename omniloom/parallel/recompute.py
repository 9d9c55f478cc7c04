"""Trading compute for memory: blocks recomputed in backward, and saved activations kept on the host.

Recompute takes the place of the calls of layers, so that modules and parameter names stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

Recompute = Literal["none", "selective", "full"] | int
OFFLOAD_MIN_BYTES = 2**20  # smaller tensors cost more to move than they free


# Operations by their names, or parts of them. A router's choice, and what ranks told each other of it, is never made
# anew: two choices that differ in the last bit would send rows to different experts, and asking again costs a wait.
ROUTING = ("aten.topk.default", "omniloom.exchange_sizes.default", "omniloom.sum_over_group.default")
COSTLY = ("attention", "varlen_attn", "grouped_mm", "routed_experts")  # what most of a layer's time goes to


class RecomputingCall(nn.Module):
    """In place of a call of layers: recomputes every n-th of them in backward, counted from the first."""

    def __init__(self, every: int, saved: Sequence[str]) -> None:
        """`saved` names operations whose results are taken over from the forward pass."""
        super().__init__()
        self.every = every
        self.saved = tuple(saved)

    def forward(self, index: int, layer: nn.Module, *inputs: object) -> Any:
        if index % self.every:
            return layer(*inputs)
        # dropout is keyed by pack and module, never by global random state, so none needs to be kept
        contexts = partial(_contexts, self.saved, layer) if self.saved else noop_context_fn
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _contexts(saved: Sequence[str], layer: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What surrounds the forward pass of a layer, and its repetition."""
    forward, again = create_selective_checkpoint_contexts(partial(_save_named, saved))
    return forward, _after_gathering(layer, again)


@contextmanager
def _after_gathering(layer: nn.Module, again: AbstractContextManager) -> Iterator[None]:
    """Gather the experts within `layer` first: torch refuses what a repetition does and the forward pass did not, where
    they were gathered before the layer began."""
    for module in layer.modules():
        if module is not layer and isinstance(module, FSDPModule):
            module.unshard()
    with again:
        yield


def _save_named(
    names: Sequence[str], _context: object, operation: object, *_: object, **__: object
) -> CheckpointPolicy:
    is_named = any(name in str(operation) for name in names)
    return CheckpointPolicy.MUST_SAVE if is_named else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_layers(root: nn.Module, how: Recompute, *, routes: bool) -> None:
    """Recompute in backward what layers of `root` keep: of none, of each, of every n-th; or of each but what is costly.

    `routes`: some of the layers have experts.
    """
    if how == "none":
        return
    saved = (*(ROUTING if routes else ()), *(COSTLY if how == "selective" else ()))
    root.call = RecomputingCall(how if isinstance(how, int) else 1, saved)


@contextmanager
def activations_on_host(enabled: bool) -> Iterator[None]:
    """Keep what autograd saves inside this context in host memory, copied back when backward asks for it.

    Parameters and small tensors stay where they are. With recompute this is the input of each block.
    """
    if not enabled:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):
        yield


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    moves = (
        tensor.device.type != "cpu"
        and not isinstance(tensor, nn.Parameter)
        and tensor.numel() * tensor.element_size() >= OFFLOAD_MIN_BYTES
    )
    if not moves:
        return tensor.device, tensor
    host = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return tensor.device, host


def _from_host(saved: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = saved
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)
