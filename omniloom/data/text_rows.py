"""Rows of JSON arrays and JSONL files, by byte offset.

A file is read once to find where its rows lie; what was found is a file of its own in a folder of this machine, which
all processes map: made once for all ranks and workers of a node and for later runs, and sent to none of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy import int64
from numpy.typing import NDArray

from omniloom.types import Row, SampleError

_BOM = b"\xef\xbb\xbf"
_VERSION = 1  # of the index files
_DIGEST_WORDS = 4  # int64 that a SHA-256 takes
_SETTLED_SECONDS = 2.0  # a file changed later than this before may change again without another time stamp


class _SharedLine(int):
    """A line number that reads as `1 (row 3)`, where the number alone would name several rows of an array."""

    row: int

    def __str__(self) -> str:
        return f"{int(self)} (row {self.row})"


class TextRows:
    """Rows of a JSON array or of a JSONL file. `index` is a file made by `_write_index`."""

    def __init__(self, path: str, index: Path) -> None:
        self._path = path
        self._index = index

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_index": self._index}

    @cached_property
    def _words(self) -> NDArray[int64]:
        return np.memmap(self._index, dtype=np.int64, mode="r")

    @cached_property
    def _bounds(self) -> NDArray[int64]:
        """int64 [3, rows]: where each row starts, where it ends, and its line."""
        return self._words[_DIGEST_WORDS:].reshape(3, -1)

    @property
    def fingerprint(self) -> str:
        return self._words[:_DIGEST_WORDS].tobytes().hex()

    def __len__(self) -> int:
        return int(self._bounds.shape[1])

    def locate(self, row: int) -> tuple[str, int]:
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        line = int(self._bounds[2, row])
        if (self._bounds[2, max(0, row - 1) : row + 2] == line).sum() == 1:
            return self._path, line
        shared = _SharedLine(line)
        shared.row = row + 1
        return self._path, shared

    def read_row(self, row: int) -> tuple[Row, str, int]:
        path, line = self.locate(row)
        try:
            with open(path, "rb") as handle:  # anew each time: a handle kept over a fork would share its position
                start, end, _ = self._bounds[:, row].tolist()
                handle.seek(start)
                text = handle.read(end - start)
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


# ---------------------------------------------------------------------------------------- the index


def open_text(path: str, head: bytes, max_samples: int | None) -> TextRows:
    """`head`: the first bytes of the file. Raises: ValueError for what is neither JSON nor JSONL; OSError."""
    start = head.removeprefix(_BOM).lstrip()
    if not start:
        raise ValueError(f"{path} is empty, expected JSON or JSONL with at least one row")
    if b"\x00" in head or start[:1] not in b"[{":
        raise ValueError(
            f"{path} is neither JSON, JSONL, Parquet nor Arrow (it begins with {head[:8]!r}); expected a JSON array "
            "of rows, or one JSON object per line, in UTF-8"
        )
    is_array = start[:1] == b"[" and not _is_row_of_lists(path)
    stat = os.stat(path)
    version = [_VERSION, os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, max_samples]
    index = _index_folder() / hashlib.sha256(json.dumps(version).encode()).hexdigest()[:32]
    with open(f"{index}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first process of this machine makes it, the others wait
        if not index.exists() or time.time() - stat.st_mtime < _SETTLED_SECONDS:
            digest, bounds = (_index_array if is_array else _index_lines)(path, max_samples)
            _write_index(index, digest, bounds)
    rows = TextRows(path, index)
    if not is_array:
        _refuse_spread_object(path)
    return rows


def _index_folder() -> Path:
    """A folder of this user on this machine. Raises: ValueError where it cannot be had."""
    folder = Path(tempfile.gettempdir()) / f"omniloom-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ValueError(
            f"{folder} belongs to another user, expected a folder of this one; set TMPDIR to another place"
        )
    return folder


def _write_index(index: Path, digest: bytes, bounds: list[list[int]]) -> None:
    words = np.concatenate([np.frombuffer(digest, dtype=np.int64), np.array(bounds, dtype=np.int64).ravel()])
    unfinished = index.with_suffix(".new")
    try:
        words.tofile(unfinished)
        os.replace(unfinished, index)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write {words.nbytes} bytes to {index.parent}: {error}; set TMPDIR to another place"
        ) from None


def _is_row_of_lists(path: str) -> bool:
    """Whether a file that begins with `[` is JSONL whose rows are bare message lists."""
    with open(path, "rb") as handle:
        lines = [handle.readline(1 << 20) for _ in range(2)]  # an array on one line may be the whole file
    try:
        return lines[0].endswith(b"\n") and all(isinstance(json.loads(line), list) for line in lines)
    except ValueError:
        return False


def _index_lines(path: str, max_samples: int | None) -> tuple[bytes, list[list[int]]]:
    """Digest of the rows, and [starts, ends, lines]."""
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
    return digest.digest(), [starts, ends, lines]


def _refuse_spread_object(path: str) -> None:
    """A file whose first line is the opening of one big object is not JSONL with every line broken."""
    with open(path, "rb") as handle:
        first = handle.readline().removeprefix(_BOM).strip()
    if re.fullmatch(rb'\{\s*("[^"]*"\s*:\s*[\[{]?)?', first):
        raise ValueError(
            f"{path} holds one JSON object spread over lines, expected an array of rows ([{{...}}, ...]) or one "
            "object per line; wrap it in [ ] or write it as JSONL"
        )


def _index_array(path: str, max_samples: int | None) -> tuple[bytes, list[list[int]]]:
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
    digest = hashlib.sha256(body[: ends[-1]]).digest()
    return digest, [[start + shift for start in starts], [end + shift for end in ends], lines]


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
