"""Worker processes that may die: each runs one task at a time, and what it held is run again by its successor.

Owns processes and the threads that talk to them, and knows which row a worker was at when it died: a row that kills its
worker twice is passed over by name (`skip`) instead of being tried for ever. Knows nothing of what tasks do; a target
object, built once per worker by a factory, has methods that take `skip` and `report` last.

Not `concurrent.futures.ProcessPoolExecutor`: that fails all tasks of all workers when one dies and cannot say whose
fault it was. Not `multiprocessing`'s fork server: its processes import the caller's main module, and run a script that
lacks its guard once more.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler, send_handle
from typing import Any

from omniloom.data.worker import receive_result
from omniloom.types import RunError

_log = logging.getLogger(__name__)
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
    arguments: tuple[Any, ...] = field(compare=False)
    future: Future[Any] = field(compare=False)
    skip: dict[int, str] = field(compare=False, default_factory=dict)
    row: int | None = field(compare=False, default=None)  # that a worker is at now, None before the first
    deaths: list[int | None] = field(compare=False, default_factory=list)  # the row of each

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(kw_only=True)
class _Worker:
    connection: Connection
    pid: int
    handle: int  # a pidfd: it names this process and never another

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def bury(self) -> None:
        """End it and wait until it has ended."""
        self.connection.close()
        self.kill()
        end = select.poll()
        end.register(self.handle, select.POLLIN)
        end.poll(1000 * _STOP_SECONDS)
        os.close(self.handle)


class WorkerPool:
    """Runs methods of a per-process target in `num_workers` processes; lower `priority` goes first."""

    def __init__(self, factory: Callable[[], Any], num_workers: int) -> None:
        assert num_workers >= 1, num_workers
        self._factory = ForkingPickler.dumps(factory)
        self._tasks: queue.PriorityQueue[_Task] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._closed = threading.Event()
        self._lock = threading.Lock()  # of the workers: none is killed after it was buried
        self._workers: list[_Worker | None] = [None] * num_workers
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"omniloom-worker-{slot}", daemon=True)
            for slot in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, method: str, *arguments: Any, priority: int = 0) -> Future[Any]:
        """Call `target.method(*arguments, skip, report)` in a worker; the future has its result or its exception."""
        task = _Task(priority, next(self._numbers), method, arguments, Future())
        if self._closed.is_set():
            task.fail(PoolClosed("the data workers are closed"))
        else:
            self._tasks.put(task)
        return task.future

    @property
    def pids(self) -> list[int]:
        """Processes that have not been found dead."""
        return [worker.pid for worker in self._workers if worker is not None]

    def close(self) -> None:
        """End all workers now; tasks that are not done fail with PoolClosed."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            for worker in self._workers:
                if worker is not None:
                    worker.kill()
        for _ in self._threads:
            self._tasks.put(_Task(-1, -1, "", (), Future()))
        for thread in self._threads:
            thread.join(_STOP_SECONDS)
        while not self._tasks.empty():
            self._tasks.get_nowait().fail(PoolClosed("the data workers were closed"))

    # ------------------------------------------------------------------------------------ one thread per worker

    def _serve(self, slot: int) -> None:
        while not self._closed.is_set():
            task = self._tasks.get()
            while not task.future.done():
                if self._closed.is_set():
                    task.fail(PoolClosed("the data workers were closed"))
                    break
                try:
                    self._run(task, self._workers[slot] or self._start(slot))
                except (EOFError, OSError):  # the other end is gone, and the worker with it, or none started
                    self._bury(slot)
                    if not self._closed.is_set():
                        self._blame(task, slot)
        self._bury(slot)

    def _start(self, slot: int) -> _Worker:
        """A new worker that is ready for tasks. Raises: EOFError or OSError if it died at once."""
        connection = fork_server().fork()
        pid = connection.recv()
        worker = _Worker(connection=connection, pid=pid, handle=os.pidfd_open(pid))
        with self._lock:
            self._workers[slot] = worker
            if self._closed.is_set():  # closed while it started: nobody else will end it
                worker.kill()
        connection.send((sys.path, os.getcwd()))
        connection.send_bytes(self._factory)
        return worker

    def _run(self, task: _Task, worker: _Worker) -> None:
        task.row = None
        worker.connection.send((task.method, task.arguments, task.skip))
        while True:
            kind, value = worker.connection.recv()
            if kind == "row":
                task.row = value
            elif kind == "result":
                task.future.set_result(receive_result(worker.connection, value))
                return
            else:
                task.future.set_exception(value)
                return

    def _bury(self, slot: int) -> None:
        with self._lock:
            worker, self._workers[slot] = self._workers[slot], None
        if worker is not None:
            worker.bury()

    def _blame(self, task: _Task, slot: int) -> None:
        """Decide what becomes of a task whose worker died."""
        row = task.row
        task.deaths.append(row)
        at = f"at row {row}" if row is not None else "before its first row"
        _log.warning("data worker %d died in %s, %s; another takes over", slot, task.method, at)
        if row is not None and task.deaths.count(row) >= _DEATHS_PER_ROW:
            task.skip[row] = f"it ended the process that read it, {_DEATHS_PER_ROW} times"
        if len(task.deaths) - sum(dead in task.skip for dead in task.deaths) >= _DEATHS_PER_TASK:
            way = "see what they said above" if row is None else "is memory short?"
            task.fail(RunError(f"data workers died {len(task.deaths)} times in {task.method}, last {at}; {way}"))


class _ForkServer:
    """The process that workers are forked from, see `worker.serve_forks`."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            number = theirs.fileno()
            program = f"import sys; sys.path[:] = {sys.path!r}; from omniloom.data import worker; "
            command = [sys.executable, "-c", program + f"worker.serve_forks({number})"]
            # frames and features come and go by megabytes: glibc keeps them instead of asking for fresh pages each time
            kept = {"MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 29)}
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[number], env={**os.environ, **kept}
            )
        atexit.register(self.close)

    def fork(self) -> Connection:
        """The connection of a new worker."""
        ours, theirs = Pipe()
        with theirs:
            send_handle(self._connection, theirs.fileno(), self._process.pid)
        return ours

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


@functools.cache
def fork_server() -> _ForkServer:
    """The one of this process: starting it costs the imports that its workers are spared."""
    return _ForkServer()
