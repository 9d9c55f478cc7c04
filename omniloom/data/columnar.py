"""Rows of Parquet and Arrow files, which hold values by column.

Owns what columns do to rows: a struct has one type for all rows, so that a row comes back with the keys of all others,
as null. Such a null cannot be told from a key that was never there, and is left out at every depth.
"""

from __future__ import annotations

import bisect
import datetime
import decimal
import hashlib
import json
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np

from omniloom.types import Row, SampleError

if TYPE_CHECKING:
    import pyarrow


class ArrowRows:
    """Rows of a Parquet or Arrow file, read by row group or record batch; the last one is kept."""

    def __init__(self, path: str, *, kind: str, ends: list[int], num_rows: int, fingerprint: str) -> None:
        self._path = path
        self._kind = kind
        self._ends = ends  # cumulative rows of the row groups or batches
        self._num_rows = num_rows
        self._reader: Any = None
        self._group: tuple[int, Any] | None = None
        self.fingerprint = fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_group": None}

    def __len__(self) -> int:
        return self._num_rows

    def locate(self, row: int) -> tuple[str, int]:
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        return self._path, row + 1

    def read_row(self, row: int) -> tuple[Row, str, int]:
        import pyarrow

        path, line = self.locate(row)
        index = bisect.bisect_right(self._ends, row)
        try:
            if self._group is None or self._group[0] != index:
                self._group = (index, self._read_group(index))
            offset = row - (self._ends[index - 1] if index else 0)
            group = self._group[1]
            (value,) = group.slice(offset, 1).to_pylist()
        except (OSError, pyarrow.ArrowException, ValueError) as error:
            raise SampleError("row", f"cannot read row {row} of {path}: {error}") from None
        return as_json(value, pyarrow.struct(list(group.schema))), path, line

    def _read_group(self, index: int) -> Any:
        if self._kind == "parquet":
            if self._reader is None:
                import pyarrow.parquet

                self._reader = pyarrow.parquet.ParquetFile(self._path)
            return self._reader.read_row_group(index, use_threads=False)  # threads do not survive a fork
        if self._reader is None:
            self._reader = _open_batches(self._path)
        return self._reader[index]


def open_parquet(path: str, max_samples: int | None) -> ArrowRows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
    return _arrow_rows(path, "parquet", groups, max_samples)


def open_arrow(path: str, max_samples: int | None) -> ArrowRows:
    import pyarrow

    try:
        groups = [batch.num_rows for batch in _open_batches(path)]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Arrow file: {error}") from None
    return _arrow_rows(path, "arrow", groups, max_samples)


def _open_batches(path: str) -> list[Any]:
    """All record batches of an Arrow file or stream, memory-mapped: nothing is read until a row is."""
    import pyarrow

    source = pyarrow.memory_map(path, "r")
    if source.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        return [reader.get_batch(index) for index in range(reader.num_record_batches)]
    source.seek(0)
    return list(pyarrow.ipc.open_stream(source))


def _arrow_rows(path: str, kind: str, groups: list[int], max_samples: int | None) -> ArrowRows:
    ends = np.cumsum(groups).tolist() if groups else [0]
    num_rows = ends[-1] if max_samples is None else min(ends[-1], max_samples)
    if not num_rows:
        raise ValueError(f"{path} has no rows, expected at least one")
    with open(path, "rb") as handle:  # footers hold offsets and statistics of all that is written
        size = handle.seek(0, 2)
        handle.seek(max(0, size - 65536))
        fingerprint = hashlib.sha256(f"{size} {num_rows} ".encode() + handle.read()).hexdigest()
    return ArrowRows(path, kind=kind, ends=ends, num_rows=num_rows, fingerprint=fingerprint)


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
