"""Rows that come one after another: of a pipe, of a URL, of a data set that `datasets` streams.

Owns what counts as a stream and how its rows are read, in order, by logical readers that the config fixes; whatever
reads them again does so from the blocks that `spilled_rows` keeps.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import select
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from omniloom.config import DataConfig, DataSource
from omniloom.data import fetching
from omniloom.data.columnar import as_json
from omniloom.data.source_files import expand_braces
from omniloom.data.text_rows import COMPRESSIONS, open_packed, parse_json_row
from omniloom.types import Row

_POLL_SECONDS = 0.2
_BATCH_ROWS = 64  # of `datasets`, as they are made into rows together
_BYTES = "\0bytes"  # the key under which bytes stand in JSON
FAULTS = (*fetching.FAULTS, EOFError, zlib.error)  # of reading a stream


class ReadingStopped(RuntimeError):
    """Rows were waited for when the run wanted to end."""


def is_stream(source: DataSource) -> bool:
    """Whether an entry's rows can be read in order only."""
    if source.stream or source.path == "-" or "://" in source.path:
        return True
    try:
        mode = os.stat(source.path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@dataclass(frozen=True, kw_only=True)
class RowStream:
    """One data set that is read in order by `num_readers`, each of which has its own URLs or files of it."""

    path: str
    num_readers: int
    part: str | None = None
    of_datasets: bool = False
    max_samples: int | None = None

    def read(self, reader: int, stopped: Callable[[], bool]) -> Iterator[bytes]:
        """The rows of one reader as `parse` takes them. Raises: one of FAULTS; ReadingStopped once `stopped()`."""
        most = None
        if self.max_samples is not None:
            most = len(range(reader, self.max_samples, self.num_readers))
        rows = self._rows_of_datasets(reader) if self.of_datasets else self._lines(reader, stopped)
        return itertools.islice(rows, most)

    def parse(self, text: bytes) -> Row:
        """Raises: SampleError."""
        return json.loads(text, object_hook=_with_bytes) if self.of_datasets else parse_json_row(text)

    def _lines(self, reader: int, stopped: Callable[[], bool]) -> Iterator[bytes]:
        pieces = list(expand_braces(self.path)) if "://" in self.path else [self.path]
        for piece in pieces[reader :: self.num_readers]:
            with _open(piece, stopped) as packed, _unpacked(packed) as file:
                lines = (line for line in file if line.strip())
                first = next(lines, b"")
                if first.lstrip().startswith(b"[") and not first.rstrip().endswith(b"]"):
                    raise ValueError("it begins as an array over several lines; send one object per line (JSONL)")
                yield from itertools.chain([first] if first else [], lines)

    def _rows_of_datasets(self, reader: int) -> Iterator[bytes]:
        import pyarrow

        rows = open_datasets(self.path, self.part)
        if self.num_readers > 1:
            rows = rows.shard(self.num_readers, reader)
        for table in rows.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            kind = pyarrow.struct(list(table.schema))
            for value in table.to_pylist():
                yield json.dumps(as_json(value, kind), default=_bytes_as_json).encode()


def open_stream_of(source: DataSource, data: DataConfig, part: str | None) -> RowStream:
    """How the rows of a stream are read. Raises: ValueError for what must not be fetched, or is no data set."""
    is_local = Path(source.path).exists() or source.path == "-"
    if not is_local and not data.allow_urls:
        raise ValueError(f"{source.path} is not of this machine; save it to a file, or set data.allow_urls=true")
    if source.stream and Path(source.path).is_file():
        raise ValueError(
            f"{source.path}: stream: true is for a name or folder that the package datasets opens, and this is a file; "
            "leave stream out, since a file is never read whole"
        )
    part = source.part or part
    num_pieces = 1
    if source.stream:
        num_pieces = open_datasets(source.path, part).num_shards
    elif "://" in source.path:
        num_pieces = len(list(expand_braces(source.path)))
    return RowStream(
        path=source.path,
        num_readers=min(data.stream_shards, num_pieces),
        part=part,
        of_datasets=source.stream,
        max_samples=data.max_samples,
    )


def open_datasets(path: str, part: str | None) -> Any:
    """An `IterableDataset`. Raises: ValueError."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path}: stream: true needs the package datasets; pip install datasets") from None
    try:
        return datasets.load_dataset(path, split=part or "train", streaming=True)
    except (OSError, ValueError, LookupError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"datasets cannot open {path} (part {part or 'train'}): {error}") from None


def _open(piece: str, stopped: Callable[[], bool]) -> BinaryIO:
    if "://" not in piece:
        # not blocking, so that a pipe that nobody writes to yet can be waited for in turns
        number = os.dup(0) if piece == "-" else os.open(piece, os.O_RDONLY | os.O_NONBLOCK)
        return io.BufferedReader(_Pipe(number, stopped), 1 << 20)
    if piece.startswith(("http://", "https://")):
        opened: Any = fetching.open_url(piece)
    else:
        import fsspec

        try:
            opened = fsspec.open(piece, "rb").open()
        except ImportError as error:
            raise ValueError(f"{piece}: {error}") from None
    return io.BufferedReader(opened, 1 << 20)


def _unpacked(file: BinaryIO) -> BinaryIO:
    head = file.peek(8)  # type: ignore[attr-defined]
    for magic, kind in COMPRESSIONS.items():
        if head.startswith(magic):
            return io.BufferedReader(open_packed(file, kind))  # type: ignore[type-var]
    return file


class _Pipe(io.RawIOBase):
    """A pipe or a device that is waited for in turns, so that whoever reads it can be told to stop."""

    def __init__(self, number: int, stopped: Callable[[], bool]) -> None:
        self._number = number
        self._stopped = stopped

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        waiting = select.poll()
        waiting.register(self._number, select.POLLIN)
        while not waiting.poll(1000 * _POLL_SECONDS):
            if self._stopped():
                raise ReadingStopped("the run ended while rows of a pipe were waited for")
        data = os.read(self._number, len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._number)
        super().close()


def _bytes_as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    raise TypeError(f"a row holds a {type(value).__name__}, which is no JSON")


def _with_bytes(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[_BYTES]) if value.keys() == {_BYTES} else value
