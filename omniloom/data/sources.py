"""Random access to the rows of data files: JSON, JSONL, Parquet and Arrow.

Owns where a row lies in a file and how to read it alone; refuses to know what a row means (`formats`) or who reads
which row when (`planner`). Text files are read once to find the byte offsets of their rows and are never held in
memory; a source is cheap to send to a worker process.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from omniloom.data.columnar import open_arrow, open_parquet
from omniloom.types import Row, SampleError, Source, suggest

_ARROW_MAGIC = (b"ARROW1", b"\xff\xff\xff\xff")  # file and stream; the latter is what `datasets` writes
_BOM = b"\xef\xbb\xbf"


def open_sources(paths: tuple[str, ...], *, max_samples: int | None = None) -> Source:
    """Open data files and chain their rows; `max_samples` keeps the first rows of each file only.

    Raises: ValueError for a file that is missing, empty, a directory, broken or of no known kind.
    """
    if not paths:
        raise ValueError("no data files: expected at least one JSON, JSONL, Parquet or Arrow file, got an empty list")
    return Concatenated(tuple(_open_file(path, max_samples) for path in paths))


class Concatenated:
    """Several sources one after another."""

    def __init__(self, sources: tuple[Source, ...]) -> None:
        self._sources = sources
        self._ends = np.cumsum([len(source) for source in sources]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def fingerprint(self) -> str:
        return _hash_of(*(f"{len(source)}:{source.fingerprint}" for source in self._sources))

    def read(self, row: int) -> tuple[Row, str, int]:
        source, offset = self._find(row)
        return source.read(offset)

    def locate(self, row: int) -> tuple[str, int]:
        source, offset = self._find(row)
        return source.locate(offset)

    def first_rows(self) -> list[int]:
        return [0, *self._ends[:-1]]

    def _find(self, row: int) -> tuple[Source, int]:
        _check_row(row, len(self))
        index = bisect.bisect_right(self._ends, row)
        return self._sources[index], row - (self._ends[index - 1] if index else 0)


class Subset:
    """Chosen rows of a source, in the given order."""

    def __init__(self, source: Source, rows: np.ndarray | list[int]) -> None:
        self._source = source
        self._rows = np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        return _hash_of(self._source.fingerprint, hashlib.sha256(self._rows.tobytes()).hexdigest())

    def read(self, row: int) -> tuple[Row, str, int]:
        return self._source.read(self._map(row))

    def locate(self, row: int) -> tuple[str, int]:
        return self._source.locate(self._map(row))

    def first_rows(self) -> list[int]:
        file_of_row = np.searchsorted(self._source.first_rows(), self._rows, side="right")
        return np.unique(file_of_row, return_index=True)[1].tolist()

    def _map(self, row: int) -> int:
        _check_row(row, len(self))
        return int(self._rows[row])


class _SharedLine(int):
    """A line number that reads as `1 (row 3)`, where the number alone would name several rows of an array."""

    row: int

    def __str__(self) -> str:
        return f"{int(self)} (row {self.row})"


class TextRows:
    """Rows of a JSON array or of a JSONL file, by byte offset."""

    def __init__(self, path: str, *, starts: list[int], ends: list[int], lines: list[int], fingerprint: str) -> None:
        self._path = path
        self._starts = np.asarray(starts, dtype=np.int64)
        self._ends = np.asarray(ends, dtype=np.int64)
        self._lines = np.asarray(lines, dtype=np.int64)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._starts)

    def locate(self, row: int) -> tuple[str, int]:
        _check_row(row, len(self))
        line = int(self._lines[row])
        if (self._lines[max(0, row - 1) : row + 2] == line).sum() == 1:
            return self._path, line
        shared = _SharedLine(line)
        shared.row = row + 1
        return self._path, shared

    def first_rows(self) -> list[int]:
        return [0]

    def read(self, row: int) -> tuple[Row, str, int]:
        path, line = self.locate(row)
        try:
            with open(path, "rb") as handle:  # anew each time: a handle kept over a fork would share its position
                handle.seek(int(self._starts[row]))
                text = handle.read(int(self._ends[row] - self._starts[row]))
        except OSError as error:
            raise SampleError("row", f"cannot read {path}: {error.strerror or error}") from None
        try:
            value = json.loads(text)
        except UnicodeDecodeError as error:
            raise SampleError("row", f"not UTF-8 at byte {error.start} of the row: {error.reason}") from None
        except json.JSONDecodeError as error:
            raise SampleError("row", f"not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise SampleError("row", "nested too deeply to be read") from None
        except ValueError as error:  # an integer of thousands of digits
            raise SampleError("row", f"not JSON that can be read: {error}") from None
        return _as_row(value), path, line


# ---------------------------------------------------------------------------------------- opening


def _open_file(path: str, max_samples: int | None) -> Source:
    file = Path(path)
    if file.is_dir():
        near = sorted(p.name for p in file.iterdir() if p.suffix in (".json", ".jsonl", ".parquet", ".arrow"))[:5]
        hint = f"; it holds {', '.join(near)}" if near else ""
        raise ValueError(f"{path} is a directory, expected a data file{hint}")
    if not file.exists():
        raise ValueError(f"no such data file: {path}{_nearest(file)}")
    try:
        with file.open("rb") as handle:
            head = handle.read(4096)
        if head[:4] == b"PAR1":
            return open_parquet(path, max_samples)
        if head.startswith(_ARROW_MAGIC):
            return open_arrow(path, max_samples)
        return _open_text(path, head, max_samples)
    except OSError as error:
        raise ValueError(f"cannot read the data file {path}: {error.strerror or error}") from None


def _nearest(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; the folder {file.parent} does not exist"
    return suggest(file.name, [path.name for path in file.parent.iterdir()], among="", before=f"{file.parent}/")


def _open_text(path: str, head: bytes, max_samples: int | None) -> TextRows:
    start = head.removeprefix(_BOM).lstrip()
    if not start:
        raise ValueError(f"{path} is empty, expected JSON or JSONL with at least one row")
    if b"\x00" in head or start[:1] not in b"[{":
        raise ValueError(
            f"{path} is neither JSON, JSONL, Parquet nor Arrow (it begins with {head[:8]!r}); expected a JSON array "
            "of rows, or one JSON object per line, in UTF-8"
        )
    if start[:1] == b"[" and not _is_row_of_lists(path):
        return _index_array(path, max_samples)
    return _index_lines(path, max_samples)


def _is_row_of_lists(path: str) -> bool:
    """Whether a file that begins with `[` is JSONL whose rows are bare message lists."""
    with open(path, "rb") as handle:
        lines = [handle.readline(1 << 20) for _ in range(2)]  # an array on one line may be the whole file
    try:
        return lines[0].endswith(b"\n") and all(isinstance(json.loads(line), list) for line in lines)
    except ValueError:
        return False


def _index_lines(path: str, max_samples: int | None) -> TextRows:
    starts: list[int] = []
    ends: list[int] = []
    lines: list[int] = []
    digest = hashlib.sha256()
    position = 0
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if line.removeprefix(_BOM).strip():  # blank lines are no rows
                if len(starts) == max_samples:
                    break
                starts.append(position)
                ends.append(position + len(line))
                lines.append(number)
                digest.update(line)
            position += len(line)
    rows = TextRows(path, starts=starts, ends=ends, lines=lines, fingerprint=digest.hexdigest())
    _refuse_spread_object(rows, path)
    return rows


def _refuse_spread_object(rows: TextRows, path: str) -> None:
    """A file whose first line is the opening of one big object is not JSONL with every line broken."""
    with open(path, "rb") as handle:
        first = handle.readline().removeprefix(_BOM).strip()
    if re.fullmatch(rb'\{\s*("[^"]*"\s*:\s*[\[{]?)?', first):
        raise ValueError(
            f"{path} holds one JSON object spread over lines, expected an array of rows ([{{...}}, ...]) or one "
            "object per line; wrap it in [ ] or write it as JSONL"
        )


def _index_array(path: str, max_samples: int | None) -> TextRows:
    raw = Path(path).read_bytes()
    body = raw.removeprefix(_BOM)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; save it as UTF-8"
        ) from None
    starts, ends, lines = _scan_array(text, path, max_samples)
    if not starts:
        raise ValueError(f"{path} holds an empty array, expected at least one row")
    shift = len(raw) - len(body)
    if len(text) != len(body):  # offsets so far count characters
        starts, ends = _byte_offsets(text, starts, ends)
    fingerprint = hashlib.sha256(body[: ends[-1]]).hexdigest()
    return TextRows(
        path,
        starts=[start + shift for start in starts],
        ends=[end + shift for end in ends],
        lines=lines,
        fingerprint=fingerprint,
    )


def _scan_array(text: str, path: str, max_samples: int | None) -> tuple[list[int], list[int], list[int]]:
    """Start, end (in characters) and line of each element of a JSON array. Raises: ValueError with line and column."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")
    starts: list[int] = []
    ends: list[int] = []
    lines: list[int] = []
    line, counted = 1, 0

    def skip_space(position: int) -> int:
        match = space.match(text, position)
        assert match is not None
        return match.end()

    position = skip_space(skip_space(0) + 1)
    closed = text.startswith("]", position)
    while not closed and len(starts) != max_samples:
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _broken_array(path, text, error.pos, error.msg, len(starts)) from None
        except RecursionError:
            raise _broken_array(path, text, position, "nested too deeply", len(starts)) from None
        except ValueError as error:
            raise _broken_array(path, text, position, str(error), len(starts)) from None
        line += text.count("\n", counted, position)
        counted = position
        starts.append(position)
        ends.append(end)
        lines.append(line)
        position = skip_space(end)
        closed = text.startswith("]", position)
        if not closed:
            if not text.startswith(",", position):
                raise _broken_array(path, text, position, "expected ',' or ']'", len(starts))
            position = skip_space(position + 1)
    if closed and (rest := text[position + 1 :].strip()):
        raise _broken_array(path, text, text.index(rest, position + 1), "text after the array", len(starts))
    return starts, ends, lines


def _broken_array(path: str, text: str, position: int, problem: str, num_rows: int) -> ValueError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return ValueError(
        f"{path}, line {line}, column {column}: broken JSON after {num_rows} good rows: {problem}; "
        "repair the file, or write one row per line (JSONL) so that a broken row costs only itself"
    )


def _byte_offsets(text: str, starts: list[int], ends: list[int]) -> tuple[list[int], list[int]]:
    new_starts: list[int] = []
    new_ends: list[int] = []
    characters = num_bytes = 0
    for start, end in zip(starts, ends, strict=True):
        num_bytes += len(text[characters:start].encode("utf-8"))
        new_starts.append(num_bytes)
        num_bytes += len(text[start:end].encode("utf-8"))
        new_ends.append(num_bytes)
        characters = end
    return new_starts, new_ends


def _as_row(value: Any) -> Row:
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {"messages": value}  # a bare message list
    if not isinstance(value, dict):
        raise SampleError("row", f"expected an object with keys, got {type(value).__name__}: {str(value)[:60]!r}")
    return value


def _check_row(row: int, num_rows: int) -> None:
    assert 0 <= row < num_rows, f"row {row} of {num_rows}"


def _hash_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
