"""A trace of a few steps, for chrome://tracing and Perfetto: `log.profile=[first, last]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch


class Profile:
    """Records from the first to the last named step (counted from 1) and writes one file when they are over."""

    def __init__(
        self, steps: tuple[int, int] | None, path: Path, attempt: Callable[[Callable[[], None]], object]
    ) -> None:
        self._steps, self._path, self._attempt = steps, path, attempt
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the work of the step with this index, from 0."""
        first, last = self._steps or (0, 0)
        if step + 1 == first:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        yield
        if step + 1 == last and self._profiler is not None:
            self._profiler.stop()
            self._attempt(partial(self._profiler.export_chrome_trace, str(self._path)))
            self._profiler = None
