"""The way of a batch from the host to the accelerator: from pinned memory, so that the host never waits for a copy.

The one place where anything is copied there. Knows batches, no model and no rank.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from omniloom.parallel.device import use_in_thread
from omniloom.types import PackedBatch

ALIGNMENT = 256  # bytes, as the device's allocator has it


def stage(batch: PackedBatch, device: torch.device, dtype: torch.dtype) -> PackedBatch:
    """A pack on the host in one buffer of pinned memory, which `to_device` copies as one; for the CPU as it is.

    Log-mel frames and patches that are normalised come in `dtype`, that of the towers; pixels stay bytes. Passes over
    all bytes: for a thread that runs ahead of the training loop.
    """
    if device.type == "cpu":
        return batch
    use_in_thread(device)
    vision, audio = batch.vision, batch.audio
    batch = replace(
        batch,
        vision=replace(vision, patches=vision.patches.to(dtype))
        if vision is not None and vision.pixel_rules is None
        else vision,
        audio=None if audio is None else replace(audio, features=audio.features.to(dtype)),
    )
    tensors = list_tensors(batch)
    starts = [0, *accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)]
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    places = zip(starts, tensors, strict=False)
    staged = iter([_view(buffer, start, tensor).copy_(tensor) for start, tensor in places])
    return map_tensors(batch, lambda _: next(staged))


def to_device(value: Any, device: torch.device) -> Any:
    """Copy a tensor, or every tensor inside (nested) dataclasses, tuples and dicts, to `device`.

    Accelerators get what is staged as one copy, and what is not pinned by way of a pinned copy. All other values pass
    through unchanged.
    """
    if device.type == "cpu":
        return map_tensors(value, lambda tensor: tensor.to(device))
    wanted: Counter[int] = Counter()
    for tensor in list_tensors(value):
        wanted[tensor.untyped_storage().data_ptr()] += tensor.nbytes
    buffers: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        if not (tensor.is_pinned() and tensor.is_contiguous()):
            return tensor.contiguous().pin_memory().to(device, non_blocking=True)
        storage = tensor.untyped_storage()
        if 2 * wanted[storage.data_ptr()] < storage.nbytes():  # a rank's rows of a pack that it shares
            return tensor.to(device, non_blocking=True)
        if storage.data_ptr() not in buffers:
            buffer = torch.empty(0, dtype=torch.uint8).set_(storage)
            buffers[storage.data_ptr()] = buffer.to(device, non_blocking=True)
        return _view(buffers[storage.data_ptr()], int(tensor.storage_offset()) * tensor.itemsize, tensor)

    return map_tensors(value, move)


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor changed, inside (nested) dataclasses, tuples and dicts; the rest as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return replace(value, **changed)
    return value


def list_tensors(value: Any) -> list[Tensor]:
    """Every tensor inside (nested) dataclasses, tuples and dicts, in the order of `map_tensors`."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, keep)
    return found
