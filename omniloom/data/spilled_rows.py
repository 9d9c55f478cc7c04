"""Rows of a stream in blocks on disk, so that planner, loader and resumption read them in any order, from any process.

A block is a file of up to `BLOCK_ROWS` rows behind a line that says where they lie, with a hash of all that its reader
has read so far. Each reader is one rank's; blocks lie beside the run, where all ranks see them, until no checkpoint
needs them. Rows are numbered as if every block were full: blocks of all readers in turns. What a stream's end leaves
out of a block is not there, which all ranks tell each other as a window is read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

from omniloom.data.row_streams import FAULTS, RowStream
from omniloom.data.shared_index import write_file
from omniloom.types import Row, SampleError, Source

BLOCK_ROWS = 64
STREAM_ROWS = 1 << 40  # of a stream whose length is not known

Block = tuple[int, int, int]  # source, reader, number


class StreamRows:
    """Rows of a stream of which the blocks in `folder` are there."""

    def __init__(self, stream: RowStream, folder: Path, num_rows: int = STREAM_ROWS) -> None:
        self.stream = stream
        self.folder = folder
        self._num_rows = num_rows

    @property
    def fingerprint(self) -> str:
        return f"a stream in {self.stream.num_readers} x {BLOCK_ROWS} rows"  # what it holds, its blocks' hashes tell

    def __len__(self) -> int:
        return self._num_rows

    def place(self, row: int) -> tuple[int, int, int]:
        """Reader, its block, and the row's number in there."""
        assert 0 <= row < self._num_rows, f"row {row} of {self._num_rows}"
        block, offset = divmod(row, BLOCK_ROWS)
        return block % self.stream.num_readers, block // self.stream.num_readers, offset

    def block_file(self, reader: int, block: int) -> Path:
        return self.folder / f"{reader}_{block}.rows"

    def locate(self, row: int) -> tuple[str, int]:
        reader, block, offset = self.place(row)
        path = self.stream.path if self.stream.num_readers == 1 else f"{self.stream.path} (reader {reader})"
        return path, block * BLOCK_ROWS + offset + 1

    def read_row(self, row: int) -> tuple[Row, str, int]:
        reader, block, offset = self.place(row)
        try:
            with self.block_file(reader, block).open("rb") as file:
                start, end = _header_of(file)["bounds"][offset : offset + 2]
                file.seek(start, 1)
                text = file.read(end - start)
        except OSError as error:
            raise SampleError("row", f"cannot read {self.block_file(reader, block)}: {error.strerror}") from None
        return self.stream.parse(text), *self.locate(row)


def save_stream(stream: RowStream, folder: Path) -> StreamRows:
    """All rows of a stream that one reader reads, in blocks in a folder. Raises: ValueError."""
    reader = StreamReader(StreamRows(stream, folder), 0)
    sizes = [BLOCK_ROWS]
    while sizes[-1] == BLOCK_ROWS:
        sizes.append(reader.read_block(len(sizes) - 1))
    if not sum(sizes[1:]):
        raise ValueError(f"{stream.path} ended before its first row")
    return StreamRows(stream, folder, sum(sizes[1:]))


class StreamReader:
    """One of the logical readers of a stream, in the one process that reads for it."""

    def __init__(self, source: StreamRows, number: int) -> None:
        self._source = source
        self._number = number
        self._stop = Event()
        self._rows: Iterator[bytes] | None = None
        self._digest = hashlib.sha256()
        self._next = 0  # block

    def read_block(self, block: int) -> int:
        """The number of rows of a block, which is on disk afterwards. Raises: ValueError; ReadingStopped."""
        path = self._source.block_file(self._number, block)
        if (known := _read_header(path)) is not None:
            return len(known["bounds"]) - 1
        if block < self._next:
            raise ValueError(f"{path} is gone, whose rows are still needed; start the run again from its checkpoint")
        if self._rows is None:  # from its first row, also where the run goes on
            self._rows = self._source.stream.read(self._number, self._stop.is_set)
        rows: list[bytes] = []
        while self._next <= block:
            try:
                rows = list(itertools.islice(self._rows, BLOCK_ROWS))
            except FAULTS as error:
                where = f"{self._source.stream.path}: cannot be read after row {self._next * BLOCK_ROWS}"
                raise ValueError(f"{where}: {error or type(error).__name__}") from None
            for row in rows:
                self._digest.update(b"%d " % len(row) + row)
            self._compare(self._next)
            self._next += 1
        header = {"bounds": [0, *itertools.accumulate(map(len, rows))], "digest": self._digest.hexdigest()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(header).encode() + b"\n" + b"".join(rows))
        return len(rows)

    def _compare(self, block: int) -> None:
        """A block that is there from before, with what was read now. Raises: ValueError."""
        known = _read_header(self._source.block_file(self._number, block))
        if known is None or known["digest"] == self._digest.hexdigest():
            return
        raise ValueError(
            f"{self._source.stream.path} gives other rows than this run has read from it, before row "
            f"{(block + 1) * BLOCK_ROWS}; give it the same stream from its beginning, or start anew with --overwrite"
        )

    def remove_blocks(self, end: float = float("inf")) -> None:
        """Those before `end`."""
        for path in self._source.folder.glob(f"{self._number}_*.rows"):
            if int(path.stem.partition("_")[2]) < end:
                path.unlink()

    def stop(self) -> None:
        """Have a pipe that is waited for be left."""
        self._stop.set()


class StreamFeed:
    """The readers of one rank, and which rows of a window are there. Sources that are no streams are passed over.

    `kept_checkpoints`: blocks go once so many checkpoints and one more were written that do not need them.
    """

    def __init__(
        self, parts: Sequence[Source], *, rank: int = 0, world_size: int = 1, kept_checkpoints: int = 1
    ) -> None:
        self._starts = [0, *itertools.accumulate(map(len, parts))]
        self._streams = {
            number: part
            for number, part in enumerate(parts)
            if isinstance(part, StreamRows) and len(part) == STREAM_ROWS
        }
        names = [(number, reader) for number, part in self._streams.items() for reader in range(_num_readers(part))]
        self._own = {name: StreamReader(self._streams[name[0]], name[1]) for name in names[rank::world_size]}
        self._needed: deque[dict[tuple[int, int], int]] = deque(maxlen=kept_checkpoints + 1)

    def __bool__(self) -> bool:
        return bool(self._streams)

    def spill(self, rows: Iterable[int], cursors: Sequence[int], *, anew: bool = False) -> dict[Block, int]:
        """Have this rank's share of some rows on disk: the sizes of their blocks. Raises: ValueError, ReadingStopped.

        With the sources' `cursors` after the rows, those too that tell of a stream's end. `anew` drops what was left.
        """
        if anew:
            for reader in self._own.values():
                reader.remove_blocks()
        wanted = {block for block, _ in self._places(rows).values()} | set(self._last_blocks(cursors))
        return {block: self._own[block[:2]].read_block(block[2]) for block in sorted(wanted) if block[:2] in self._own}

    def those_there(
        self, rows: Sequence[int], cursors: Sequence[int], spilled: Iterable[Mapping[Block, int]]
    ) -> tuple[list[int], bool]:
        """Of some rows those that the streams had, by what all ranks spilled; whether every stream is at its end."""
        sizes = {block: size for own in spilled for block, size in own.items()}
        places = self._places(rows)
        found = [row for row in rows if row not in places or places[row][1] < sizes[places[row][0]]]
        last = self._last_blocks(cursors)
        all_begun = len(last) == sum(map(_num_readers, self._streams.values()))
        return found, all_begun and all(sizes[block] < BLOCK_ROWS for block in last)

    def release(self, rows: Iterable[int], cursors: Sequence[int]) -> None:
        """A checkpoint was written that needs these rows and what follows the cursors: blocks that none needs go."""
        needed = {(number, reader): block for number, reader, block in self._last_blocks(cursors)}
        for (number, reader, block), _ in self._places(rows).values():
            needed[number, reader] = min(block, needed.get((number, reader), block))
        self._needed.append(needed)
        if len(self._needed) == self._needed.maxlen:
            for name, own in self._own.items():
                own.remove_blocks(min(needed.get(name, 0) for needed in self._needed))

    def stop(self) -> None:
        for reader in self._own.values():
            reader.stop()

    def _places(self, rows: Iterable[int]) -> dict[int, tuple[Block, int]]:
        """Of rows of streams the block, and their number in there."""
        found = {}
        for row in rows:
            for number, part in self._streams.items():
                if self._starts[number] <= row < self._starts[number + 1]:
                    reader, block, offset = part.place(row - self._starts[number])
                    found[row] = (number, reader, block), offset
        return found

    def _last_blocks(self, cursors: Sequence[int]) -> list[Block]:
        """Of each reader the last block before the cursor of its stream, where that is past one of each reader."""
        rounds = {
            number: cursors[number] // (BLOCK_ROWS * _num_readers(part)) if cursors else 0
            for number, part in self._streams.items()
        }
        return [
            (number, reader, rounds[number] - 1)
            for number, part in self._streams.items()
            for reader in range(_num_readers(part))
            if rounds[number]
        ]


def _num_readers(part: StreamRows) -> int:
    return part.stream.num_readers


def _read_header(path: Path) -> dict[str, Any] | None:
    """None of a block that is not there, or goes now."""
    try:
        with path.open("rb") as file:
            return _header_of(file)
    except FileNotFoundError:
        return None


def _header_of(file: BinaryIO) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(file.readline())
    return header
