"""Carries an object full of tensors from a worker process to its parent without copying it through a pipe.

The tensors' bytes go into one file of a folder in shared memory; what travels is the small rest. The reader maps the
file and unlinks it at once, so that the memory goes when the last tensor does. Where the folder is full, the bytes
travel with the message.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_IN_MESSAGE_BYTES = 2048  # smaller tensors are not worth a place in the file
_ALIGNMENT = 64


def make_transfer_dir() -> Path:
    """A fresh folder, in shared memory where the system has it. Whoever makes it removes it."""
    shared = Path("/dev/shm")
    parent = shared if os.access(shared, os.W_OK | os.X_OK) else None
    return Path(tempfile.mkdtemp(prefix="omniloom-", dir=parent))


def send(value: Any, directory: Path) -> bytes:
    """Write the tensors of `value` (contiguous or not, on the CPU) to a file; returns the message for `receive`."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _TensorPickler(stream, buffers).dump(value)
    views = [buffer.raw() for buffer in buffers]
    sizes = [view.nbytes for view in views]
    path = _write(views, directory) if views else None
    inline = [view.tobytes() for view in views] if path is None else None
    return pickle.dumps((stream.getvalue(), path, sizes, inline), protocol=5)


def receive(message: bytes) -> Any:
    """The value of a message made by `send`. Its tensors are writable and belong to the caller."""
    body, path, sizes, inline = pickle.loads(message)
    if path is None:
        return pickle.loads(body, buffers=[bytearray(part) for part in inline])
    with open(path, "r+b") as handle:
        mapped = mmap.mmap(handle.fileno(), 0)
    os.unlink(path)
    view, start, buffers = memoryview(mapped), 0, []
    for size in sizes:
        buffers.append(view[start : start + size])
        start += size + -size % _ALIGNMENT
    return pickle.loads(body, buffers=buffers)


class _TensorPickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, buffers: list[pickle.PickleBuffer]) -> None:
        def keep(buffer: pickle.PickleBuffer) -> bool:
            if buffer.raw().nbytes < _IN_MESSAGE_BYTES:
                return True  # stays in the stream
            buffers.append(buffer)
            return False

        super().__init__(stream, protocol=5, buffer_callback=keep)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        assert value.device.type == "cpu", f"a worker sends CPU tensors, got one on {value.device}"
        flat = value.detach().contiguous().view(-1)
        # numpy has no bfloat16, so every tensor travels as bytes; a view of no elements has no bytes to view.
        data = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, dtype=np.uint8)
        return _rebuild, (data, value.dtype, tuple(value.shape))


def _rebuild(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if data.size == 0:
        return torch.empty(shape, dtype=dtype)
    if not data.flags.writeable:  # arrays that stayed in the stream are backed by bytes
        data = data.copy()
    return torch.from_numpy(data).view(dtype).view(shape)


def _write(views: list[memoryview], directory: Path) -> str | None:
    """One file with all buffers, each aligned; None where there is no room for it."""
    path = None
    try:
        descriptor, path = tempfile.mkstemp(dir=directory)
        with os.fdopen(descriptor, "wb") as handle:
            for view in views:
                handle.write(view)
                handle.write(bytes(-view.nbytes % _ALIGNMENT))
    except OSError:
        if path is not None:
            os.unlink(path)
        return None
    return path
