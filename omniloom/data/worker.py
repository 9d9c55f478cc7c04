"""A data worker: a process forked from a server of ours, which serves the tasks of one pool, one at a time.

The server is a fresh interpreter that imports what workers need and forks: no worker imports the caller's main module,
inherits its threads or its device. Owns both ends of a result's way to the training process: its tensors' bytes lie in
one anonymous file of memory, which goes with the last tensor that uses it, whatever becomes of either process.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch
from torch import Tensor

# Imported once by the server instead of by every worker; what a machine lacks is passed over.
_PRELOAD = ("numpy", "omniloom.data.rows", "transformers.models.auto.tokenization_auto", "av", "soxr", "PIL.Image")
_ALIGNMENT = 64


def serve_forks(descriptor: int) -> None:
    """Fork a worker for every connection that comes over the given one, until it ends. Never returns in a worker."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # for the training process, whose end is theirs
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for name in _PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    requests = Connection(descriptor)
    while True:
        try:
            connection = Connection(recv_handle(requests))
        except (EOFError, OSError):  # the training process is gone
            return
        if os.fork() == 0:
            try:
                requests.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _serve_tasks(connection)
            finally:
                os._exit(0)
        connection.close()


def _serve_tasks(connection: Connection) -> None:
    """Serve tasks until the connection ends, which it also does when the training process dies in whatever way."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        connection.send(os.getpid())
        sys.path[:], folder = connection.recv()
        os.chdir(folder)  # in which relative paths are meant, where the caller has moved since the server began
        target, fault = None, None
        try:
            target = connection.recv()()
        except BaseException as error:  # noqa: BLE001 - told to the training process with every task
            fault = _portable(error)
        while True:
            method, arguments, skip = connection.recv()
            try:
                if fault is not None:
                    raise fault
                value = getattr(target, method)(*arguments, skip, lambda row: connection.send(("row", row)))
                send_result(connection, value)
            except BrokenPipeError:
                raise
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                connection.send(("error", _portable(error)))


def _portable(error: BaseException) -> Exception:
    """The exception as it can be sent, with its traceback as a note."""
    copy: Exception
    try:
        copy = pickle.loads(pickle.dumps(error))
        assert isinstance(copy, Exception)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, AssertionError):
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    if not getattr(copy, "__notes__", None):
        copy.add_note("in a data worker:\n" + "".join(traceback.format_exception(error)))
    return copy


# ---------------------------------------------------------------------------------------- results


def send_result(connection: Connection, value: Any) -> None:
    """Send ("result", ...) for `receive_result`; tensors must be on the CPU. Raises: OSError if memory is short."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _TensorPickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    sizes = [buffer.raw().nbytes for buffer in buffers]
    if not sizes:
        connection.send(("result", (stream.getvalue(), sizes)))
        return
    # not a file of /dev/shm: that folder is often small, and a name in it outlives a process that is killed
    with open(os.memfd_create("omniloom"), "wb") as file:
        for buffer in buffers:
            file.write(buffer.raw())
            file.write(bytes(-buffer.raw().nbytes % _ALIGNMENT))
        file.flush()
        connection.send(("result", (stream.getvalue(), sizes)))
        send_handle(connection, file.fileno(), os.getppid())


def receive_result(connection: Connection, message: tuple[bytes, list[int]]) -> Any:
    """The value that `send_result` sent. Its tensors are writable and belong to the caller."""
    body, sizes = message
    if not sizes:
        return pickle.loads(body)
    length = sum(size + -size % _ALIGNMENT for size in sizes)
    with open(recv_handle(connection), "r+b") as file:  # mapped by torch, since `mmap` would keep a descriptor open
        mapped = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=length, dtype=torch.uint8)
    view = memoryview(mapped.numpy().data)
    start, buffers = 0, []
    for size in sizes:
        buffers.append(view[start : start + size])
        start += size + -size % _ALIGNMENT
    return pickle.loads(body, buffers=buffers)


class _TensorPickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        assert value.device.type == "cpu", f"a worker sends CPU tensors, got one on {value.device}"
        data: Any = b""
        if value.numel():  # as_strided, since a single element is contiguous with any stride, and keeps it in a view
            whole = value.detach().contiguous()
            data = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data
        return _rebuild, (pickle.PickleBuffer(data), value.dtype, tuple(value.shape))


def _rebuild(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)
