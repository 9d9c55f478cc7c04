"""Trading compute for memory: blocks recomputed in backward, and saved activations kept on the host.

Hook-based, so that modules and parameter names stay as they are. A router's choice of experts is kept, not made again:
two choices that differ in the last bit would send rows to different experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint

OFFLOAD_MIN_BYTES = 2**20  # smaller tensors cost more to move than they free


class Kept(nn.Module):
    """Wraps a submodule whose results a recomputing backward takes over from the forward pass instead of making anew.

    For results without gradient: choices, and sizes that were agreed on with other ranks.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._results: list[Any] | None = None
        self._repeats = False

    def forward(self, *inputs: Any) -> Any:
        if self._results is None:
            return self.inner(*inputs)
        if self._repeats:
            return self._results.pop(0)
        result = self.inner(*inputs)
        self._results.append(result)
        return result

    @contextmanager
    def using(self, results: list[Any], *, repeats: bool) -> Iterator[None]:
        self._results, self._repeats = results, repeats
        try:
            yield
        finally:
            self._results = None


def recompute_blocks(blocks: list[nn.Module], how: Literal["none", "full"] | int) -> None:
    """Recompute in backward: no block, every block, or every n-th one, counted from the first."""
    if how == "none":
        return
    every = 1 if how == "full" else how
    for block in blocks[::every]:
        kept = tuple(module for module in block.modules() if isinstance(module, Kept))
        # dropout is keyed by step and module, never by global random state, so none needs to be kept
        checkpoint(block, context_fn=partial(_contexts, kept), preserve_rng_state=False)


def _contexts(kept: tuple[Kept, ...]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What surrounds one forward pass of a block and its repetition."""
    results: list[list[Any]] = [[] for _ in kept]
    return _surround(kept, results, repeats=False), _surround(kept, results, repeats=True)


@contextmanager
def _surround(kept: tuple[Kept, ...], results: list[list[Any]], *, repeats: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for module, own in zip(kept, results, strict=True):
            stack.enter_context(module.using(own, repeats=repeats))
        yield


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
