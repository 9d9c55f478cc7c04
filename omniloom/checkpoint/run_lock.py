"""One run per directory, and one directory per run: a lock, and the proof that all ranks see the same place.

The lock ends with the process that holds it, however that process ends. Where a run's directory lies is known by what
each rank sees of a file that the first one wrote: neither paths nor host names tell.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from omniloom.checkpoint.agreement import Group, gather, on_first, rank

_log = logging.getLogger(__name__)
SIGHT_SECONDS = 3.0  # that a network file system is given to show a new file on another node
LOCK = "run.lock"
_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL))


@contextmanager
def run_lock(run_dir: str | Path) -> Iterator[None]:
    """The lock of a run directory, for one process (rank 0).

    A POSIX record lock: unlike `flock` it is not shared with forked children, so that a loader worker which outlives
    its killed parent does not keep the directory locked. The same process may take it twice. A file system that offers
    no locks (Lustre without its flock option) is warned of, and the run goes on without.

    Raises: ValueError naming the holder if another process has the directory, or if it cannot be written.
    """
    path = Path(run_dir) / LOCK
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(path.open("a+", encoding="utf-8"))
            _take(stream, path)
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
        except OSError as error:
            raise ValueError(
                f"cannot write the run directory {path.parent}: {error.strerror}; name one that can be written as "
                "train.run_dir"
            ) from None
        try:
            yield
        finally:  # the lock goes with the stream; the file stays, since removing it would race with the next run
            stream.truncate(0)


def is_held(run_dir: str | Path) -> bool | None:
    """Whether another process has the lock of a run directory; None where that cannot be known.

    Not to be asked by the process that holds it, whose lock ends when any of its files on it is closed.
    """
    try:
        with (Path(run_dir) / LOCK).open(encoding="utf-8") as stream:
            fcntl.lockf(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        return True if error.filename is None else None  # a file that cannot be opened has its name in the error
    except OSError:
        return None
    return False


def _take(stream: IO[str], path: Path) -> None:
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        raise ValueError(
            f"{path.parent} is in use by {holder}; wait for that run, stop it, or set another train.run_dir"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning(
            "warning: the file system of %s offers no locks (%s): nothing keeps a second run out of it, and two "
            "would damage each other's files; start one at a time",
            *(path.parent, error.strerror),
        )


@contextmanager
def hold_run_lock(run_dir: str | Path, group: Group = None) -> Iterator[None]:
    """The lock of a job: rank 0 of `group` takes it. Collective.

    Raises: `run_lock`'s ValueError, on every rank; ValueError where a rank does not see rank 0's directory.
    """
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(run_lock(run_dir)), "take the run's lock", group=group)
        check_shared(Path(run_dir), group)
        yield


def check_shared(run_dir: Path, group: Group = None) -> None:
    """That all ranks see one run directory. Collective. Raises: ValueError on every rank, naming those that do not."""
    name = gather(f".seen_by_all_ranks.{secrets.token_hex(8)}", group)[0]  # new, so that no node remembers its absence
    on_first((run_dir / name).touch, f"write the run directory {run_dir}", group=group)
    deadline = time.monotonic() + SIGHT_SECONDS
    while not (seen := (run_dir / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    views = gather((seen, socket.gethostname(), str(run_dir.absolute())), group)
    if rank(group) == 0:
        (run_dir / name).unlink(missing_ok=True)
    blind: dict[str, list[str]] = {}
    for number, (seen, host, path) in enumerate(views):
        if not seen:
            blind.setdefault(f"on {host} in {path}", []).append(str(number))
    if blind:
        _, host, path = views[0]
        ranks = "; ".join(f"rank {', '.join(numbers)} {where}" for where, numbers in blind.items())
        raise ValueError(
            f"train.run_dir={run_dir} is not one directory for all ranks: what rank 0 on {host} wrote in {path} is not "
            f"seen by {ranks}. Name a directory that all nodes share, by its absolute path"
        )
