"""Indexes of data files: made once per machine for all ranks, workers and later runs, mapped by each, sent to none.

An index is a table of whole numbers with a row of its own for each data row, and a few facts beside it. It is written
as it grows, so that memory does not grow with the data, and counts once its facts are there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy import int64
from numpy.typing import NDArray

_VERSION = 3  # of the files
_BUFFERED = 1 << 16  # whole numbers
_SETTLED_SECONDS = 2.0  # a file changed later than this before may change again without another time stamp


class SharedIndex:
    """An index on this machine, opened at its first use in each process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.path.with_suffix(".json").read_bytes())
        return facts

    @cached_property
    def table(self) -> NDArray[int64]:
        """int64 [rows, columns]"""
        columns = self.facts["columns"]
        if not os.path.getsize(self.path):
            return np.empty((0, columns), dtype=np.int64)
        return np.memmap(self.path, dtype=np.int64, mode="r").reshape(-1, columns)


class IndexedRows:
    """What sources whose index has a row for each of theirs have in common."""

    def __init__(self, index: SharedIndex) -> None:
        self._index = index

    @property
    def fingerprint(self) -> str:
        return str(self._index.facts["digest"])

    def __len__(self) -> int:
        return len(self._index.table)


class IndexTable:
    """The table of an index while it is made."""

    def __init__(self, file: BinaryIO, columns: int) -> None:
        self._file = file
        self._columns = columns
        self._buffer = array("q")
        self._num_flushed = 0

    def __len__(self) -> int:
        return (self._num_flushed + len(self._buffer)) // self._columns

    def append(self, *values: int) -> None:
        assert len(values) == self._columns, values
        self._buffer.extend(values)
        if len(self._buffer) >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        try:
            self._buffer.tofile(self._file)
            self._file.flush()
        except OSError as error:
            raise ValueError(f"cannot write {self._file.name}: {error}; set data.scratch to another place") from None
        self._num_flushed += len(self._buffer)
        self._buffer = array("q")


def open_index(
    files: Sequence[str],
    how: Sequence[Any],
    make: Callable[[IndexTable], Mapping[str, Any]],
    *,
    columns: int,
    scratch: str | None = None,
) -> SharedIndex:
    """The index of some files, read as `how` says: the one that is there, or what `make` fills in and returns as facts.

    `scratch` is the folder (null: one of this user in the temporary folder). Raises: what `make` raises; OSError.
    """

    def write(path: Path) -> None:
        with path.open("wb") as file:
            table = IndexTable(file, columns)
            facts = {**make(table), "columns": columns}
            table.flush()
        write_file(path.with_suffix(".json"), json.dumps(facts).encode())

    return SharedIndex(make_once(files, ["index", *how], write, scratch))


def make_once(files: Sequence[str], how: Sequence[Any], write: Callable[[Path], None], scratch: str | None) -> Path:
    """A file of the scratch folder that this machine makes of others once: what is there, or what `write` writes."""
    stats = [(os.path.realpath(file), os.stat(file)) for file in files]
    key = [_VERSION, *how, *((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats)]
    place = scratch_folder(scratch) / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    is_settled = all(time.time() - stat.st_mtime >= _SETTLED_SECONDS for _, stat in stats)
    with open(f"{place}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first process of this machine makes it, the others wait
        if not (place.exists() and is_settled):
            unfinished = place.with_suffix(".new")
            try:
                write(unfinished)
                os.replace(unfinished, place)
            finally:
                unfinished.unlink(missing_ok=True)
    return place


def write_file(path: Path, content: bytes) -> None:
    """All of it or nothing."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def scratch_folder(scratch: str | None) -> Path:
    """Raises: ValueError where it cannot be had."""
    folder = Path(scratch) if scratch is not None else Path(tempfile.gettempdir()) / f"omniloom-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=scratch is not None, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.scratch: cannot make {folder}: {error.strerror or error}") from None
    if folder.stat().st_uid != os.getuid():
        raise ValueError(
            f"{folder} belongs to another user, expected a folder of this one; set data.scratch to another place"
        )
    return folder
