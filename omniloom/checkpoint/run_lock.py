"""One run per directory: a lock that ends with the process that holds it, however that process ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from torch.distributed import ProcessGroup

from omniloom.checkpoint.agreement import agree, rank


class RunLock:
    """Held by one process (rank 0) from entering to leaving the `with` block.

    A POSIX record lock: unlike `flock` it is not shared with forked children, so that a loader worker which outlives
    its killed parent does not keep the directory locked. The same process may take it twice.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "run.lock"
        self._stream: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Raises: ValueError naming the holder if another process has the directory, or if it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stream = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"cannot write the run directory {self.path.parent}: {error.strerror}; name one that can be "
                "written as train.run_dir"
            ) from None
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
            raise ValueError(
                f"{self.path.parent} is in use by {holder}; wait for that run, stop it, or set another train.run_dir"
            ) from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        self._stream = stream
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None, "left a run lock that was not entered"
        self._stream.truncate(0)
        self._stream.close()  # the lock goes with it; the file stays, since removing it would race with the next run
        self._stream = None


@contextmanager
def hold_run_lock(run_dir: str | Path, group: ProcessGroup | None = None) -> Iterator[None]:
    """The lock of a job: rank 0 of `group` takes it. Collective. Raises: RunLock's ValueError, on every rank."""
    with ExitStack() as stack:
        fault = None
        if rank(group) == 0:
            try:
                stack.enter_context(RunLock(run_dir))
            except ValueError as error:
                fault = str(error)
        agree(fault, group)
        yield
