"""A trace of a few steps, for chrome://tracing and Perfetto: `log.profile=[first, last]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch


class Profile:
    """Records from the first to the last named step (counted from 1), those of them that a run takes, into one file."""

    def __init__(
        self, steps: tuple[int, int] | None, run_dir: Path, rank: int, attempt: Callable[[Callable[[], None]], object]
    ) -> None:
        self._steps, self._path, self._attempt = steps, run_dir / f"trace_rank{rank}.json", attempt
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the work of the step with this index, from 0."""
        first, last = self._steps or (0, 0)
        if self._profiler is None and first <= step + 1 <= last:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        yield
        if step + 1 == last:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if that has not been done."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            self._attempt(partial(self._write, profiler))

    def _write(self, profiler: torch.profiler.profile) -> None:
        profiler.stop()
        profiler.export_chrome_trace(str(self._path))
