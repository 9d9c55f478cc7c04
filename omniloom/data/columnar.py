"""Rows of Parquet and Arrow files, which hold values by column.

Owns what columns do to rows: a struct has one type for all rows, so that a row comes back with the keys of all others,
as null. Such a null cannot be told from a key that was never there, and is left out at every depth.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omniloom.data.shared_index import IndexedRows, IndexTable, SharedIndex, make_once, open_index
from omniloom.types import Row, SampleError

if TYPE_CHECKING:
    import pyarrow


_OPEN_FILES = 128  # in each process
_LARGEST_GROUP = 4096  # rows: to read one of a group is to read all of it
_BATCH_ROWS = 256


class ColumnRows(IndexedRows):
    """Rows of Parquet or Arrow files, read by row group or record batch; the last one is kept.

    Rows of the index are [end, file, group]: the number of rows up to the end of each group of each file.
    """

    def __init__(self, index: SharedIndex) -> None:
        super().__init__(index)
        self._readers: dict[int, Any] = {}  # by file
        self._group: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}, "_group": None}

    def __len__(self) -> int:
        return int(self._index.facts["num_rows"])

    def locate(self, row: int) -> tuple[str, int]:
        group, _ = self._place(row)
        file = int(self._index.table[group, 1])
        before = np.searchsorted(self._index.table[:, 1], file)
        return self._index.facts["files"][file], row + 1 - (int(self._index.table[before - 1, 0]) if before else 0)

    def _place(self, row: int) -> tuple[int, int]:
        """The group of a row, and its number in there."""
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        ends = self._index.table[:, 0]
        group = int(np.searchsorted(ends, row, side="right"))
        return group, row - (int(ends[group - 1]) if group else 0)

    def read_row(self, row: int) -> tuple[Row, str, int]:
        import pyarrow

        (path, line), (index, offset) = self.locate(row), self._place(row)
        try:
            if self._group is None or self._group[0] != index:
                self._group = (index, self._read_group(*self._index.table[index, 1:].tolist()))
            group = self._group[1]
            (value,) = group.slice(offset, 1).to_pylist()
        except (OSError, pyarrow.ArrowException, ValueError) as error:
            raise SampleError("row", f"cannot read row {line} of {path}: {error}") from None
        return as_json(value, pyarrow.struct(list(group.schema))), path, line

    def _read_group(self, file: int, group: int) -> Any:
        if file not in self._readers:
            if len(self._readers) == _OPEN_FILES:
                self._readers.clear()
            path, kind = self._index.facts["places"][file]
            self._readers[file] = _OPENERS[kind](path)
        reader = self._readers[file]
        if isinstance(reader, list):
            return reader[group]
        return reader.read_row_group(group, use_threads=False)  # threads do not survive a fork


def open_columns(files: Sequence[str], kind: str, max_samples: int | None, scratch: str | None) -> ColumnRows:
    """`kind`: parquet or arrow. Raises: ValueError for a file that is none, and where there are no rows; OSError."""
    make = partial(_index_groups, files, kind, max_samples, scratch)
    return ColumnRows(open_index(files, [kind, max_samples, *files], make, columns=3, scratch=scratch))


def _index_groups(
    files: Sequence[str], kind: str, max_samples: int | None, scratch: str | None, table: IndexTable
) -> dict[str, Any]:
    import pyarrow

    digest, num_rows, places = hashlib.sha256(), 0, []
    for number, path in enumerate(files):
        try:
            places.append((path, kind))
            sizes = _group_sizes(_OPENERS[kind](path))
            if kind == "parquet" and max(sizes, default=0) > _LARGEST_GROUP:
                places[-1] = _regroup(path, scratch), "arrow"
                sizes = _group_sizes(_open_batches(places[-1][0]))
            for group, size in enumerate(sizes):
                num_rows += size
                table.append(num_rows, number, group)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable {kind.capitalize()} file: {error}") from None
        with open(path, "rb") as handle:  # footers hold offsets and statistics of all that is written
            size = handle.seek(0, 2)
            handle.seek(max(0, size - 65536))
            digest.update(f"{size} ".encode() + handle.read())
        if max_samples is not None and num_rows >= max_samples:
            num_rows = max_samples
            break
    if not num_rows:
        raise ValueError(f"{files[0]} has no rows, expected at least one")
    facts = {"num_rows": num_rows, "files": list(files), "places": places}
    return facts | {"digest": f"{digest.hexdigest()} {num_rows}"}


def _regroup(path: str, scratch: str | None) -> str:
    """A Parquet file as Arrow in the scratch folder, a few rows to a batch. Raises: ValueError."""
    import pyarrow

    def write(place: Path) -> None:
        reader = _open_parquet(path)
        try:
            with pyarrow.OSFile(str(place), "wb") as file:
                writer = pyarrow.ipc.new_stream(file, reader.schema_arrow)
                for batch in reader.iter_batches(_BATCH_ROWS, use_threads=False):
                    writer.write_batch(batch)
                writer.close()
        except OSError as error:
            raise ValueError(
                f"cannot write the rows of {path}, whose row groups have over {_LARGEST_GROUP} rows, to {place}: "
                f"{error}; set data.scratch to a place with room, or write the file in smaller row groups"
            ) from None

    return str(make_once([path], ["arrow"], write, scratch))


def _open_parquet(path: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)


def _open_batches(path: str) -> list[Any]:
    """All record batches of an Arrow file or stream, memory-mapped: nothing is read until a row is."""
    import pyarrow

    source = pyarrow.memory_map(path, "r")
    if source.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        return [reader.get_batch(index) for index in range(reader.num_record_batches)]
    source.seek(0)
    return list(pyarrow.ipc.open_stream(source))


_OPENERS: dict[str, Callable[[str], Any]] = {"parquet": _open_parquet, "arrow": _open_batches}


def _group_sizes(reader: Any) -> list[int]:
    if isinstance(reader, list):
        return [batch.num_rows for batch in reader]
    return [reader.metadata.row_group(group).num_rows for group in range(reader.num_row_groups)]


def as_json(value: Any, kind: pyarrow.DataType) -> Any:
    """A column's value as JSON would have it; bytes stay bytes. Raises: SampleError for JSON text that is none.

    Keys of structs that are null are left out. Lists and maps name their own entries, and JSON text its own keys, so
    that their nulls are kept.
    """
    import pyarrow
    from pyarrow import types

    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):  # how `datasets` keeps objects of unlike keys
        try:
            return json.loads(value)
        except ValueError as error:
            raise SampleError("row", f"not JSON in a column of JSON: {error}") from None
    if isinstance(kind, pyarrow.BaseExtensionType):
        return as_json(str(value) if isinstance(value, uuid.UUID) else value, kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return as_json(value, kind.value_type)
    if types.is_struct(kind):
        return {field.name: as_json(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if types.is_map(kind):
        return {str(key): as_json(item, kind.item_type) for key, item in value}
    if isinstance(value, list):  # of any of the six kinds of list
        return [as_json(item, kind.value_type) for item in value]
    if isinstance(value, decimal.Decimal):
        return int(value) if kind.scale <= 0 else float(value)
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value
