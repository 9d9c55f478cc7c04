"""Measures rows and loads packs, in worker processes or (`workers=0`) in the calling thread.

Owns how work is cut into tasks and which goes first. What a task does is `rows`, who survives it is `worker_pool`,
which packs there are is the planner's, and in which order they are consumed is `stream`'s.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from omniloom.data.worker_pool import PoolClosed, WorkerPool
from omniloom.types import LoadedPack, PackPlan

_ROWS_PER_TASK = 16  # small, so that a pack never waits long behind the measuring of the next window
_LOAD_FIRST, _MEASURE_AFTER = 0, 1


class Pending(Protocol):
    """A pack, or the extents of some rows, on the way."""

    def result(self) -> Any: ...


class Reader(Protocol):
    """What reads rows in a worker: a `rows.RowReader`, or what measures them in its place."""

    def measure(self, rows: Sequence[int], skip: Mapping[int, str], report: Callable[[int], None]) -> list[Any]: ...


class Loader:
    """Rows to extents and packs to tensors. `open_rows` is picklable; it is called once in every worker."""

    def __init__(self, open_rows: Callable[[], Reader], *, workers: int) -> None:
        self._pool = WorkerPool(open_rows, workers) if workers > 0 else _CallingThread(open_rows())

    def measure(self, rows: Sequence[int], on_measured: Callable[[int, int], None] | None = None) -> list[Any]:
        """What the reader says of rows, in their order: extents and bad samples. The planner's thread calls it.

        `on_measured` is told, on the way, how many of how many rows are done.
        """
        parts = [list(rows[start : start + _ROWS_PER_TASK]) for start in range(0, len(rows), _ROWS_PER_TASK)]
        pending = [self._pool.submit("measure", part, priority=_MEASURE_AFTER) for part in parts]
        found: list[Any] = []
        for part in pending:
            found += part.result()
            if on_measured is not None:
                on_measured(len(found), len(rows))
        return found

    def submit(self, plan: PackPlan, decode_clips: frozenset[tuple[int, int]] | None = None) -> Pending:
        """Start loading a pack; packs are served in the order of their submission, before any measuring.

        `decode_clips` names the (sample, clip) pairs that this rank decodes; None is all of them.
        """
        return self._pool.submit("load", plan, decode_clips, priority=_LOAD_FIRST)

    def load_in_order(
        self,
        plans: Sequence[PackPlan],
        *,
        clips_of: Callable[[PackPlan], frozenset[tuple[int, int]] | None] = lambda _: None,
        prefetch_packs: int = 4,
    ) -> Iterator[LoadedPack]:
        """Packs one after another, a few ahead; for evaluation and scoring. `clips_of` as `submit`'s decode_clips."""
        ahead: deque[Pending] = deque()
        for plan in plans:
            ahead.append(self.submit(plan, clips_of(plan)))
            if len(ahead) > prefetch_packs:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    @property
    def pids(self) -> Sequence[int]:
        """Worker processes."""
        return self._pool.pids

    def close(self) -> None:
        """End the workers; whoever still waits for a result gets a PoolClosed."""
        self._pool.close()


class _CallingThread:
    """In place of a pool: a task is run when its result is asked for, one at a time, as tokenizers need it."""

    pids: Sequence[int] = ()

    def __init__(self, target: Reader) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def submit(self, method: str, *arguments: Any, priority: int) -> Pending:
        return _Later(lambda: self._run(method, arguments))

    def _run(self, method: str, arguments: tuple[Any, ...]) -> Any:
        with self._lock:
            if self._closed.is_set():
                raise PoolClosed("the loader was closed")
            return getattr(self._target, method)(*arguments, {}, lambda row: None)

    def close(self) -> None:
        self._closed.set()


class _Later:
    def __init__(self, run: Callable[[], Any]) -> None:
        self.result = run
