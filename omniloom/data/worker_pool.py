"""Worker processes that may die: each runs one task at a time, and what it held is run again by its successor.

Owns processes, pipes and threads, and knows which row a worker was at when it died: a row that kills its worker twice
is passed over by name (`skip`) instead of being tried for ever. Knows nothing of what tasks do; a target object, built
once per worker by a factory, has methods that take `skip` and `report` last.

Plain processes and not `concurrent.futures.ProcessPoolExecutor`: that fails all tasks of all workers when one dies and
cannot say whose fault it was. Workers come from a fork server, since the training process holds threads and a device.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import pickle
import queue
import shutil
import signal
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from omniloom.data import tensor_transfer
from omniloom.types import RunError

_log = logging.getLogger(__name__)
# Imported once by the fork server instead of by every worker; what a machine lacks is passed over.
_PRELOAD = (
    "torch",
    "numpy",
    "omniloom.data.rows",
    "omniloom.data.worker_pool",
    "transformers.models.auto.tokenization_auto",
    "av",
    "soxr",
    "PIL.Image",
)
_DEATHS_PER_ROW = 2  # the first may be chance (memory, a kill from outside)
_DEATHS_PER_TASK = 6
_STOP_SECONDS = 5.0


class PoolClosed(RuntimeError):
    """The pool was closed before the task was done."""


@dataclass(order=True)
class _Task:
    priority: int
    number: int
    method: str = field(compare=False)
    arguments: tuple = field(compare=False)
    future: Future = field(compare=False)
    skip: dict[int, str] = field(compare=False, default_factory=dict)
    row: int | None = field(compare=False, default=None)  # that a worker is at now, None before the first
    deaths: list[int | None] = field(compare=False, default_factory=list)  # the row of each


class WorkerPool:
    """Runs methods of a per-process target in `num_workers` processes; lower `priority` goes first."""

    def __init__(self, factory: Callable[[], Any], num_workers: int) -> None:
        assert num_workers >= 1, num_workers
        self._factory = factory
        self._directory = tensor_transfer.make_transfer_dir()
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)  # also at exit, if never closed
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOAD))
        self._tasks: queue.PriorityQueue[_Task] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._closed = threading.Event()
        self._processes: list[Any] = [None] * num_workers
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"omniloom-worker-{slot}", daemon=True)
            for slot in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, method: str, *arguments: Any, priority: int = 0) -> Future:
        """Call `target.method(*arguments, skip, report)` in a worker; the future has its result or its exception."""
        future: Future = Future()
        if self._closed.is_set():
            future.set_exception(PoolClosed("the data workers are closed"))
            return future
        number = next(self._numbers)
        self._tasks.put(_Task(priority=priority, number=number, method=method, arguments=arguments, future=future))
        return future

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process is not None and process.is_alive()]

    def close(self) -> None:
        """End all workers now; tasks that are not done fail with PoolClosed."""
        if self._closed.is_set():
            return
        self._closed.set()
        for process in self._processes:
            if process is not None:
                process.terminate()
        for _ in self._threads:
            self._put_stop()
        for thread in self._threads:
            thread.join(_STOP_SECONDS)
        while not self._tasks.empty():
            _fail(self._tasks.get_nowait().future, PoolClosed("the data workers were closed"))
        shutil.rmtree(self._directory, ignore_errors=True)

    def _put_stop(self) -> None:
        self._tasks.put(_Task(priority=-1, number=-1, method="", arguments=(), future=Future()))

    # ------------------------------------------------------------------------------------ one thread per worker

    def _serve(self, slot: int) -> None:
        connection: Connection | None = None
        while not self._closed.is_set():
            task = self._tasks.get()
            if self._closed.is_set():
                _fail(task.future, PoolClosed("the data workers were closed"))
                break
            while not task.future.done():
                try:
                    connection = connection or self._start(slot)
                    self._run(task, connection)
                except (EOFError, OSError):  # the pipe's other end is gone, and the worker with it, or none started
                    self._bury(slot, connection)
                    connection = None
                    if self._closed.is_set():
                        _fail(task.future, PoolClosed("the data workers were closed"))
                    else:
                        self._blame(task, slot)
        self._bury(slot, connection)

    def _start(self, slot: int) -> Connection:
        """A new worker; the connection is ready for tasks. Raises: EOFError if it died at once."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._factory, self._directory), name=f"omniloom-data-{slot}", daemon=True
        )
        process.start()
        theirs.close()  # so that the worker's death is the end of file on ours
        self._processes[slot] = process
        if self._closed.is_set():  # closed while it started: nobody else will end it
            process.terminate()
        return ours

    def _run(self, task: _Task, connection: Connection) -> None:
        task.row = None
        connection.send((task.method, task.arguments, task.skip))
        while True:
            kind, value = connection.recv()
            if kind == "row":
                task.row = value
            elif kind == "result":
                task.future.set_result(tensor_transfer.receive(value))
                return
            else:
                task.future.set_exception(value)
                return

    def _bury(self, slot: int, connection: Connection | None) -> None:
        if connection is not None:
            connection.close()
        process, self._processes[slot] = self._processes[slot], None
        if process is None:
            return
        process.join(_STOP_SECONDS if not self._closed.is_set() else 1.0)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()

    def _blame(self, task: _Task, slot: int) -> None:
        """Decide what becomes of a task whose worker died."""
        row = task.row
        task.deaths.append(row)
        at = f"at row {row}" if row is not None else "before its first row"
        _log.warning("data worker %d died in %s, %s; another takes over", slot, task.method, at)
        if row is not None and task.deaths.count(row) >= _DEATHS_PER_ROW:
            task.skip[row] = f"it ended the process that read it, {_DEATHS_PER_ROW} times"
        if len(task.deaths) - sum(dead in task.skip for dead in task.deaths) >= _DEATHS_PER_TASK:
            message = f"data workers died {len(task.deaths)} times in {task.method}, last {at}; is memory short?"
            task.future.set_exception(RunError(message))


def _fail(future: Future, error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


# ---------------------------------------------------------------------------------------- in the worker


def _work(connection: Connection, factory: Callable[[], Any], directory: Path) -> None:
    """Serve tasks until the pipe ends, which it also does when the training process dies in whatever way."""
    for number in (signal.SIGINT, signal.SIGUSR1):  # for the training process, which then ends this one
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    target, fault = None, None
    try:
        target = factory()
    except BaseException as error:  # noqa: BLE001 - told to the training process with every task
        fault = _portable(error)
    try:
        while True:
            method, arguments, skip = connection.recv()
            if fault is not None:
                connection.send(("error", fault))
                continue
            try:
                value = getattr(target, method)(*arguments, skip, lambda row: connection.send(("row", row)))
                answer = ("result", tensor_transfer.send(value, directory))
            except BrokenPipeError:
                raise
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                answer = ("error", _portable(error))
            connection.send(answer)
    except (EOFError, OSError):
        # Nobody listens any more. If the training process was killed, nobody else removes what lies in shared memory.
        if not multiprocessing.parent_process().is_alive():
            shutil.rmtree(directory, ignore_errors=True)


def _portable(error: BaseException) -> Exception:
    """The exception as it can be sent, with its traceback as a note."""
    trace = "in a data worker:\n" + "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
        assert isinstance(copy, Exception)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, AssertionError):
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(trace)
    return copy
