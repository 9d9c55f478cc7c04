"""Trading compute for memory: blocks recomputed in backward, and saved activations kept on the host.

Recompute takes the place of the calls of layers, so that modules and parameter names stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from omniloom.parallel.device import HostCopies
from omniloom.parallel.staging import list_tensors

Recompute = Literal["none", "selective", "full"] | int
OFFLOAD_MIN_BYTES = 2**20  # smaller tensors cost more to move than they free


# Operations by their names, or parts of them. A router's choice, and what ranks told each other of it, is never made
# anew: two choices that differ in the last bit would send rows to different experts, and asking again costs a wait.
ROUTING = ("aten.topk.default", "omniloom.exchange_sizes.default", "omniloom.sum_over_group.default")
# What most of a layer's time goes to, as far as backward asks for it: not the experts' last product and its way home.
COSTLY = ("attention", "omniloom.grouped_mm", "routed_experts", "all_to_all_rows.default")


class RecomputingCall(nn.Module):
    """In place of a call of layers: recomputes every n-th of them in backward, counted from the first."""

    def __init__(self, every: int, saved: Sequence[str]) -> None:
        """`saved` names operations whose results are taken over from the forward pass."""
        super().__init__()
        self.every = every
        self.saved = tuple(saved)

    def forward(self, index: int, layer: nn.Module, hidden: Tensor, *others: object) -> Any:
        if index % self.every:
            return _call_with_view(layer, hidden, *others)
        # dropout is keyed by pack and module, never by global random state, so none needs to be kept
        policy = partial(_save_named, self.saved)
        contexts = partial(create_selective_checkpoint_contexts, policy) if self.saved else noop_context_fn
        call = partial(_call_with_view, layer)
        return checkpoint(call, hidden, *others, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _call_with_view(layer: nn.Module, hidden: Tensor, *others: object) -> Any:
    """FSDP gives a layer a view of its rows, but not the layer's repetition, which would be compiled for itself; and
    where only every n-th layer is repeated, the others are called alike."""
    return layer(hidden.view_as(hidden), *others)


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


@dataclass(eq=False)
class _Moved:
    """What autograd keeps of one layer's call in host memory, in the order in which it was computed."""

    before: _Moved | None  # of the call before, whose backward comes next
    hosts: list[Tensor] = field(default_factory=list)
    arriving: dict[int, tuple[Tensor, Any]] | None = None  # by place, once they were sent for


class OffloadingCall(nn.Module):
    """Around a call of layers: what autograd keeps of a layer waits for its backward in host memory.

    While backward works on a layer, what the one before it needs is on its way back. Weights, gathered ones too, what
    all layers are given (angles, bounds), small tensors, and results that `selective` saves stay where they are. Of a
    recomputed layer only its input is kept.
    """

    def __init__(self, call: nn.Module, copies: HostCopies, *, least_bytes: int = OFFLOAD_MIN_BYTES) -> None:
        super().__init__()
        self.call = call
        self._copies, self._least_bytes = copies, least_bytes
        self._latest: tuple[int, ReferenceType[_Moved]] | None = None

    def forward(self, index: int, layer: nn.Module, *inputs: object) -> Any:
        if not torch.is_grad_enabled():
            return self.call(index, layer, *inputs)
        number, latest = (index, None) if self._latest is None else self._latest
        moved = _Moved(latest() if latest is not None and number < index else None)
        self._latest = index, ref(moved)
        shared = {StorageWeakRef(tensor.untyped_storage()) for tensor in list_tensors(inputs[1:])}
        self._copies.turn()
        with torch.autograd.graph.saved_tensors_hooks(partial(self._to_host, moved, layer, shared), self._from_host):
            return self.call(index, layer, *inputs)

    def _to_host(
        self, moved: _Moved, layer: nn.Module, shared: set[StorageWeakRef], tensor: Tensor
    ) -> Tensor | tuple[_Moved, int]:
        if tensor.nbytes < self._least_bytes or tensor.device.type != self._copies.device.type:
            return tensor
        storage = StorageWeakRef(tensor.untyped_storage())
        weights = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in layer.parameters())
        if storage in shared or any(StorageWeakRef(weight.untyped_storage()) == storage for weight in weights):
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._copies.pins)
        self._copies.put(tensor, host)
        moved.hosts.append(host)
        return moved, len(moved.hosts) - 1

    def _from_host(self, kept: Tensor | tuple[_Moved, int]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        moved, place = kept
        for call in (moved, moved.before):
            if call is not None and call.arriving is None:
                self._copies.turn()
                last_first = reversed(list(enumerate(call.hosts)))
                call.arriving = {number: self._copies.fetch(host) for number, host in last_first}
        assert moved.arriving is not None
        fetched = moved.arriving.pop(place, None)  # asked for twice, it comes twice
        return self._copies.wait(fetched or self._copies.fetch(moved.hosts[place]))
