"""Rows of JSON arrays, JSONL, CSV and TSV files, by byte offset.

A file is read once, a stretch at a time, to find where its rows lie; what was found is a `SharedIndex`. A compressed
file is unpacked once per machine into the scratch folder, since its rows are read in any order.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from omniloom.data.media_files import LFS_POINTER
from omniloom.data.shared_index import IndexedRows, IndexTable, SharedIndex, make_once, open_index
from omniloom.types import Row, SampleError

_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}  # by suffix; the one that the row of names has most of
_STRETCH_BYTES = 1 << 22
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by how files begin
_LATER_ROW = re.compile(rb"\n[ \t]*[\[{]")
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_CUT_OFF = 16  # characters before the end of a stretch within which a fault may only mean that more is to come


class _SharedLine(int):
    """A line number that reads as `1 (row 3)`, where the number alone would name several rows of an array."""

    row: int

    def __str__(self) -> str:
        return f"{int(self)} (row {self.row})"


class TextRows(IndexedRows):
    """Rows of a text file. `text` is where it lies unpacked; rows of the index are [start, end, line]."""

    def __init__(self, path: str, text: str, index: SharedIndex) -> None:
        super().__init__(index)
        self._path = path
        self._text = text

    def locate(self, row: int) -> tuple[str, int]:
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        lines = self._index.table[:, 2]
        line = int(lines[row])
        if (lines[max(0, row - 1) : row + 2] == line).sum() == 1:
            return self._path, line
        shared = _SharedLine(line)
        shared.row = row + 1
        return self._path, shared

    def read_row(self, row: int) -> tuple[Row, str, int]:
        path, line = self.locate(row)
        start, end, _ = self._index.table[row].tolist()
        text = read_stretch(self._text, start, end, path)
        header = self._index.facts.get("header")
        if header is not None:
            return _named_cells(text, header, self._index.facts["delimiter"]), path, line
        return parse_json_row(text), path, line


def parse_json_row(text: bytes) -> Row:
    """Raises: SampleError."""
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
    return as_row(value)


def as_row(value: Any) -> Row:
    """Raises: SampleError."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {"messages": value}  # a bare message list
    if not isinstance(value, dict):
        raise SampleError("row", f"expected an object with keys, got {type(value).__name__}: {str(value)[:60]!r}")
    return value


def read_stretch(file: str, start: int, end: int, path: str) -> bytes:
    """Bytes of a file that holds the rows of `path`. Raises: SampleError."""
    try:
        with open(file, "rb") as handle:  # anew each time: a handle kept over a fork would share its position
            handle.seek(start)
            return handle.read(end - start)
    except OSError as error:
        raise SampleError("row", f"cannot read {path}: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------- opening


def open_text(path: str, max_samples: int | None, scratch: str | None) -> TextRows:
    """Raises: ValueError for what is no text of rows; OSError."""
    text, name, head = path, path, _head_of(path)
    compression = next((kind for magic, kind in COMPRESSIONS.items() if head.startswith(magic)), None)
    if compression is not None:
        name, text = str(Path(path).with_suffix("")), _unpack(path, compression, scratch)
        head = _head_of(text)
    start = head.removeprefix(_BOM).lstrip()
    if not start:
        raise ValueError(f"{path} is empty, expected rows, got none")
    if head.startswith(_UTF_16):
        raise ValueError(f"{path} is UTF-16 text, expected UTF-8; save it as UTF-8 (of a table: CSV UTF-8)")
    if head.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself; run git lfs pull where it came from")
    delimiters = _DELIMITERS.get(Path(name).suffix.lower())
    is_json = start[:1] in b"[{" and b"\x00" not in start[:4]  # further on they are a line that a crash left empty
    is_json = is_json or (b"\x00" not in head and _LATER_ROW.search(head) is not None)  # only its first line is broken
    if not is_json and (delimiters is None or b"\x00" in head):
        raise ValueError(
            f"{path} is neither JSON, JSONL, Parquet, Arrow nor tar (it begins with {head[:8]!r}) and is not named "
            ".csv or .tsv; expected a JSON array of rows, or one JSON object per line, in UTF-8"
        )
    if delimiters is not None:
        make, kind = partial(_index_cells, text, delimiters, max_samples), "cells"
    elif start[:1] == b"[" and not _is_row_of_lists(text):
        make, kind = partial(_index_array, path, text, max_samples), "array"
    else:
        make, kind = partial(_index_lines, text, max_samples), "lines"
    rows = TextRows(path, text, open_index([text], [kind, max_samples], make, columns=3, scratch=scratch))
    if kind == "lines":
        _refuse_spread_object(path, text)
    if not len(rows):
        raise ValueError(f"{path} holds a header and no rows, expected at least one")
    return rows


def _head_of(path: str) -> bytes:
    with open(path, "rb") as handle:
        return handle.read(4096)


def _unpack(path: str, compression: str, scratch: str | None) -> str:
    """A compressed file's text in the scratch folder."""
    import pyarrow

    def write(place: Path) -> None:
        try:
            with open_packed(path, compression) as packed, place.open("wb") as file:
                shutil.copyfileobj(packed, file, _STRETCH_BYTES)
        except (OSError, pyarrow.ArrowException, EOFError) as error:
            raise ValueError(
                f"cannot unpack {path} to {place}: {error}; repair it, or set data.scratch to a place with room"
            ) from None

    return str(make_once([path], [compression], write, scratch))


def open_packed(file: str | BinaryIO, compression: str) -> BinaryIO:
    """A compressed file as a stream of its content."""
    if compression == "gzip":
        import gzip

        return gzip.open(file, "rb")  # type: ignore[return-value]
    import pyarrow

    stream: BinaryIO = pyarrow.input_stream(file, compression=compression)
    return stream


def _is_row_of_lists(path: str) -> bool:
    """Whether a file that begins with `[` is JSONL whose rows are bare message lists."""
    with open(path, "rb") as handle:
        lines = [handle.readline(1 << 20) for _ in range(2)]  # an array on one line may be the whole file
    try:
        return lines[0].endswith(b"\n") and all(isinstance(json.loads(line), list) for line in lines)
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------- lines and cells


def _index_lines(path: str, max_samples: int | None, table: IndexTable) -> Mapping[str, Any]:
    digest = hashlib.sha256()
    position = 0
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if line.removeprefix(_BOM).strip():  # blank lines are no rows
                if len(table) == max_samples:
                    break
                table.append(position, position + len(line), number)
                digest.update(line)
            position += len(line)
    return {"digest": digest.hexdigest()}


def _refuse_spread_object(path: str, text: str) -> None:
    """A file whose first line is the opening of one big object is not JSONL with every line broken."""
    with open(text, "rb") as handle:
        first = handle.readline().removeprefix(_BOM).strip()
    if re.fullmatch(rb'\{\s*("[^"]*"\s*:\s*[\[{]?)?', first):
        raise ValueError(
            f"{path} holds one JSON object spread over lines, expected an array of rows ([{{...}}, ...]) or one "
            "object per line; wrap it in [ ] or write it as JSONL"
        )


def _index_cells(path: str, delimiters: str, max_samples: int | None, table: IndexTable) -> Mapping[str, Any]:
    """Rows of cells; the first names the columns, and tells the delimiter. A quoted cell may hold line breaks."""
    digest = hashlib.sha256()
    header: list[str] = []
    delimiter = delimiters[0]
    position = 0
    with open(path, "rb") as handle:
        lines = enumerate(handle, start=1)
        for number, record in lines:
            if not header:
                delimiter = max(delimiters, key=lambda one: record.count(one.encode()))
            quoted = _ends_quoted(record.removeprefix(_BOM), delimiter, within=False)
            pieces = [record]
            while quoted and (more := next(lines, None)) is not None:
                pieces.append(more[1])
                quoted = _ends_quoted(more[1], delimiter, within=True)
            record = b"".join(pieces)
            if record.removeprefix(_BOM).strip():
                if len(table) == max_samples:
                    break
                digest.update(record)
                if header:
                    table.append(position, position + len(record), number)
                else:
                    header = _column_names(record, delimiter, path)
            position += len(record)
    return {"digest": digest.hexdigest(), "header": header, "delimiter": delimiter}


def _ends_quoted(line: bytes, delimiter: str, *, within: bool) -> bool:
    """Whether a quoted cell goes on past the line. A quote opens a cell only where one begins."""
    before, *pieces = line.split(b'"')
    begins = True  # at the line's start; and after a quote that ended a cell, of which a second one goes on
    for piece in pieces:
        is_open = not within and (before.endswith(delimiter.encode()) or (begins and not before))
        begins = within
        within, before = is_open, piece
    return within


def _column_names(record: bytes, delimiter: str, path: str) -> list[str]:
    try:
        names = _cells(record.removeprefix(_BOM), delimiter)
    except SampleError as error:
        raise ValueError(f"{path}: its first row names the columns and cannot be read: {error.reason}") from None
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"{path}: two columns are named {twice}; rename one")
    return names


def _named_cells(text: bytes, header: list[str], delimiter: str) -> Row:
    """A row by the names of its columns, empty cells left out. Raises: SampleError."""
    cells = _cells(text, delimiter)
    if len(cells) != len(header):
        raise SampleError("row", f"has {len(cells)} cells, expected {len(header)} ({', '.join(header)})")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def _cells(text: bytes, delimiter: str) -> list[str]:
    """The cells of a row. Not by `csv`, which limits their size for the whole process. Raises: SampleError."""
    try:
        line = text.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise SampleError("row", f"not UTF-8 at byte {error.start} of the row: {error.reason}") from None
    found, position = [], 0
    end = re.escape(delimiter)
    cell = re.compile(rf'"((?:[^"]|"")*)"(?={end}|\Z)|([^{end}]*)', re.DOTALL)
    while position <= len(line):
        match = cell.match(line, position)
        assert match is not None
        found.append(match[2] if match[1] is None else match[1].replace('""', '"'))
        position = match.end() + 1
    return found


# ---------------------------------------------------------------------------------------- arrays


class NotText(ValueError):
    """A file that is not UTF-8."""


class _ArrayText:
    """The text of a JSON array a stretch at a time, and where its characters lie in the file."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._path = path
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._num_read = 0
        self.text = ""
        self.position = 0  # in `text`
        self.byte = 0  # of the file at `position`
        self.line, self._line_start = 1, 0  # at `position`; in characters, from the beginning of `text`
        self.is_whole = False  # whether `text` reaches the end of the file

    def advance(self, position: int) -> None:
        if position == self.position:
            return
        passed = self.text[self.position : position]
        self.byte += len(passed) if passed.isascii() else len(passed.encode("utf-8"))
        if breaks := passed.count("\n"):
            self.line += breaks
            self._line_start = self.position + passed.rindex("\n") + 1
        self.position = position

    def read_more(self) -> None:
        """Twice as much of what is not yet passed. Raises: ValueError for what is not UTF-8."""
        left = self.text[self.position :]
        raw = self._file.read(max(_STRETCH_BYTES, len(left)))
        try:
            self.text = left + self._decode.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            at = self._num_read - len(self._decode.getstate()[0]) + error.start
            raise NotText(
                f"{self._path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {at}; save it as UTF-8"
            ) from None
        self._num_read += len(raw)
        self._line_start -= self.position
        self.position = 0
        self.is_whole = not raw

    def skip_space(self) -> str:
        """Past white space; the character that follows, or nothing at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.advance(match.end())
            if self.position < len(self.text) or self.is_whole:
                return self.text[self.position : self.position + 1]
            self.read_more()

    def skip_value(self) -> str:
        """Past a JSON value; its text. Raises: json.JSONDecodeError, RecursionError, ValueError."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self.text, self.position)
                if end < len(self.text) or self.is_whole:
                    break
            except json.JSONDecodeError as error:
                is_cut_off = error.pos >= len(self.text) - _CUT_OFF or error.msg.startswith("Unterminated string")
                if self.is_whole or not is_cut_off:
                    raise
            self.read_more()
        value = self.text[self.position : end]
        self.advance(end)
        return value

    def broken(self, problem: str, num_rows: int, position: int | None = None) -> ValueError:
        if position is not None:
            self.advance(position)
        return ValueError(
            f"{self._path}, line {self.line}, column {self.position - self._line_start + 1}: broken JSON after "
            f"{num_rows} good rows: {problem}; repair the file, or write one row per line (JSONL) so that a broken row "
            "costs only itself"
        )


def _index_array(path: str, text: str, max_samples: int | None, table: IndexTable) -> Mapping[str, Any]:
    """Raises: ValueError with line and column of what is broken."""
    digest = hashlib.sha256()
    with open(text, "rb") as handle:
        array = _ArrayText(handle, path)
        if array.skip_space() == "\ufeff":
            array.advance(1)
            array.skip_space()
        array.advance(array.position + 1)  # the bracket
        following = array.skip_space()
        while following != "]" and len(table) != max_samples:
            start, line = array.byte, array.line
            digest.update(_element(array, len(table)).encode("utf-8"))
            table.append(start, array.byte, line)
            following = array.skip_space()
            if following == ",":
                array.advance(array.position + 1)
                array.skip_space()
            elif following != "]":
                raise array.broken("expected ',' or ']'", len(table))
        if following == "]":
            array.advance(array.position + 1)
            if array.skip_space():
                raise array.broken("text after the array", len(table))
    if not len(table):
        raise ValueError(f"{path} holds an empty array, expected at least one row")
    return {"digest": digest.hexdigest()}


def _element(array: _ArrayText, num_rows: int) -> str:
    try:
        return array.skip_value()
    except json.JSONDecodeError as error:
        raise array.broken(error.msg, num_rows, error.pos) from None
    except RecursionError:
        raise array.broken("nested too deeply", num_rows) from None
    except NotText:
        raise
    except ValueError as error:
        raise array.broken(str(error), num_rows) from None
