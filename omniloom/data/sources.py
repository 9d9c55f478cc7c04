"""The data sets of a run: what each entry of `data.train` names, opened by what it holds and chained into one range.

Owns which files a data set is made of (a file, a pattern, a folder of shards) and in which order they come; how rows
lie in a file is `text_rows`', `columnar`'s and `tar_rows`', what a row means `formats`', who reads which row when the
planner's. A source holds no rows and no offsets: it is cheap to send to a worker process.
"""

from __future__ import annotations

import atexit
import bisect
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from omniloom.config import DataConfig, DataSource, as_source, options_of
from omniloom.data.columnar import open_columns
from omniloom.data.row_streams import is_stream, open_stream_of
from omniloom.data.shared_index import scratch_folder
from omniloom.data.source_files import find_files
from omniloom.data.spilled_rows import StreamRows, save_stream
from omniloom.data.tar_rows import open_tars
from omniloom.data.text_rows import open_text
from omniloom.types import Row, Source

_MAGIC = {b"PAR1": "parquet", b"ARRO": "arrow", b"\xff\xff\xff\xff": "arrow"}  # the last is a stream of `datasets`
_TAR_MAGIC = slice(257, 262)


class Sources:
    """Sources one after another. Rows are numbered through all of them.

    `entries` are what the config says of each: a path, or a record with options of its own.
    """

    def __init__(self, parts: Sequence[Source], entries: Sequence[DataSource]) -> None:
        assert len(parts) == len(entries), (len(parts), len(entries))
        self.parts = tuple(parts)
        self.entries = tuple(entries)
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each source."""
        return tuple(map(len, self.parts))

    @property
    def names(self) -> tuple[str, ...]:
        """Of each source, no two alike: what the config calls it, or its path does."""
        found: list[str] = []
        for entry in self.entries:
            name = entry.name or Path(entry.path).name or entry.path
            found.append(name if name not in found else f"{name}.{len(found)}")
        return tuple(found)

    @property
    def streams(self) -> list[StreamRows]:
        """The parts whose number of rows is not known."""
        return [part for part in self.parts if isinstance(part, StreamRows)]

    @property
    def described_size(self) -> str:
        """How many rows there are, for the log."""
        streams = self.streams
        others = len(self) - sum(map(len, streams))
        said = [f"{others:,} rows"] if others or not streams else []
        if streams:
            said.append(f"{len(streams)} stream{'s'[: len(streams) - 1]}")
        return " and ".join(said)

    @property
    def fingerprint(self) -> str:
        return _hash_of(*(f"{len(part)}:{part.fingerprint}" for part in self.parts))

    def read_row(self, row: int) -> tuple[Row, str, int]:
        part, own_row = self.find(row)
        return self.parts[part].read_row(own_row)

    def locate(self, row: int) -> tuple[str, int]:
        part, own_row = self.find(row)
        return self.parts[part].locate(own_row)

    def find(self, row: int) -> tuple[int, int]:
        """Which source a row is of, and its number in there."""
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        part = bisect.bisect_right(self._ends, row)
        return part, row - (self._ends[part - 1] if part else 0)

    def count(self, rows: Iterable[int]) -> dict[str, int] | None:
        """Of some rows, how many are of each source by its name; None where there is one source alone."""
        if len(self.parts) == 1:
            return None
        found = Counter(self.find(row)[0] for row in rows)
        return {name: found[part] for part, name in enumerate(self.names)}

    def first_rows(self) -> list[int]:
        """The first row of each source."""
        return [end - len(part) for part, end in zip(self.parts, self._ends, strict=True)]

    def origin(self, row: int) -> tuple[str, int]:
        """The data set that a row is of, as the config names it, and the row's number in it, from 1."""
        part, own_row = self.find(row)
        source = self.parts[part]
        while isinstance(source, _Chosen):
            own_row, source = source.choice.row(own_row), source.source
        return self.entries[part].path, own_row + 1

    def without(self, excludes: str) -> Sources:
        """All rows but those that a file of excludes names. Raises: ValueError for rows that are not there."""
        named, parts = read_excludes(excludes), []
        for part, entry in zip(self.parts, self.entries, strict=True):
            rows = named.get(os.path.realpath(entry.path), [0])
            if isinstance(part, StreamRows) and max(rows):
                raise ValueError(
                    f"data.exclude: {excludes} names rows of the stream {entry.path}; filter what it sends"
                )
            if max(rows) > len(part):
                reason = f"{excludes} names row {max(rows)} of {entry.path}, which has {len(part)}"
                raise ValueError(f"data.exclude: {reason}; write it anew by omniloom check --write-excludes")
            parts.append(_Chosen(part, _Others(excludes, entry.path, len(part))) if max(rows) else part)
        return Sources(parts, self.entries)

    def split(self, shares: Sequence[float], seed: int) -> tuple[Sources, Sources]:
        """Rows to train on, and the share held out of each source: the same on every rank and at every start.

        Sources that have no row on a side are left out there.
        """
        sides: tuple[list[tuple[Source, DataSource]], list[tuple[Source, DataSource]]] = ([], [])
        for number, (part, entry, share) in enumerate(zip(self.parts, self.entries, shares, strict=True)):
            num_held_out = round(share * len(part))
            split = _Split(len(part), num_held_out, (seed, number))
            if num_held_out:
                sides[1].append((_Chosen(part, replace(split, held_out=True)), entry))
            if num_held_out < len(part):
                sides[0].append((_Chosen(part, split) if num_held_out else part, entry))
        kept, held = (Sources([part for part, _ in side], [entry for _, entry in side]) for side in sides)
        return kept, held


@dataclass(frozen=True)
class _Split:
    """Rows that are held out, one somewhere in each of as many equal stretches, or the others."""

    num_rows: int
    num_held_out: int
    key: tuple[int, int]
    held_out: bool = False

    @property
    def fingerprint(self) -> str:
        return repr(self)

    def __len__(self) -> int:
        return self.num_held_out if self.held_out else self.num_rows - self.num_held_out

    def row(self, number: int) -> int:
        if self.held_out:
            return self._held_row(number)
        stretch = bisect.bisect_right(range(self.num_held_out), number, key=lambda at: self._start(at) - at) - 1
        own = number + stretch  # so many are held out before it
        return own + (own >= self._held_row(stretch))

    def _start(self, stretch: int) -> int:
        return stretch * self.num_rows // self.num_held_out

    def _held_row(self, stretch: int) -> int:
        start, end = self._start(stretch), self._start(stretch + 1)
        drawn = hashlib.blake2b(repr((self.key, stretch)).encode(), digest_size=8).digest()
        return start + int.from_bytes(drawn, "little") % (end - start)


@dataclass(frozen=True)
class _Others:
    """Rows that a file of excludes does not name."""

    excludes: str
    path: str
    num_rows: int

    @property
    def _left_out(self) -> list[int]:
        return read_excludes(self.excludes)[os.path.realpath(self.path)]

    @property
    def fingerprint(self) -> str:
        return repr(self._left_out)

    def __len__(self) -> int:
        return self.num_rows - len(self._left_out)

    def row(self, number: int) -> int:
        left_out = self._left_out
        return number + bisect.bisect_right(range(len(left_out)), number, key=lambda at: left_out[at] - 1 - at)


class _Chosen:
    """Some rows of a source."""

    def __init__(self, source: Source, choice: _Split | _Others) -> None:
        self.source = source
        self.choice = choice

    def __len__(self) -> int:
        return len(self.choice)

    @property
    def fingerprint(self) -> str:
        return _hash_of(self.source.fingerprint, self.choice.fingerprint)

    def read_row(self, row: int) -> tuple[Row, str, int]:
        return self.source.read_row(self.choice.row(row))

    def locate(self, row: int) -> tuple[str, int]:
        return self.source.locate(self.choice.row(row))


@lru_cache(maxsize=1)
def read_excludes(path: str) -> dict[str, list[int]]:
    """The rows, from 1, in order, that a file of excludes names of each data set. Raises: ValueError."""
    excluded: dict[str, set[int]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.exclude: cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            source, row = str(record["source"]), record["row"]
        except (ValueError, KeyError, TypeError):
            source, row = "", None
        if not isinstance(row, int) or row < 1:
            raise ValueError(
                f'data.exclude: {path}:{number}: expected {{"source": FILE, "row": N}}, rows of a file counted from 1, '
                f"got {line[:80]!r}; omniloom check --write-excludes writes such lines"
            )
        excluded.setdefault(os.path.realpath(source), set()).add(row)
    return {source: sorted(rows) for source, rows in excluded.items()}


# ---------------------------------------------------------------------------------------- opening


def open_sources(
    entries: Sequence[str | DataSource],
    options: DataConfig | None = None,
    *,
    part: str | None = "train",
    spill: Path | None = None,
) -> Sources:
    """Open data sets and chain their rows. `options` is the config's section, without which its defaults hold.

    `part` is taken of directories that have several parts where the entry names none; None is none of them. Streams
    are read as they are needed and kept in the folder `spill`; without it they are read whole, here and now.
    Raises: ValueError for what is missing, empty, broken or of no known kind.
    """
    if not entries:
        raise ValueError("no data files: expected at least one JSON, JSONL, Parquet or Arrow file, got an empty list")
    data = options or DataConfig()
    sources = [as_source(entry) for entry in entries]
    parts = []
    for number, source in enumerate(sources):
        own = options_of(data, source)
        if not is_stream(source):
            parts.append(_open_set(source, own, part))
        elif spill is not None:
            parts.append(StreamRows(open_stream_of(source, own, part), spill / str(number)))
        else:
            stream = open_stream_of(source, replace(own, stream_shards=1), part)
            folder = tempfile.mkdtemp(dir=scratch_folder(data.scratch))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            parts.append(save_stream(stream, Path(folder)))
    return Sources(parts, sources)


def _open_set(source: DataSource, data: DataConfig, part: str | None) -> Source:
    """The rows of one entry, the first `data.max_samples` of them."""
    try:
        found = find_files(source.path, source.part or part)
        kinds = {_kind_of(file): file for file in found.files}
        if len(kinds) > 1:
            names = ", ".join(kinds.values())
            raise ValueError(f"{source.path} names files of several kinds ({names}); name them one by one")
        (kind,) = kinds
        if kind == "tar":
            return open_tars(found, data.max_samples, data.scratch)
        if kind != "text":
            return open_columns(found.files, kind, data.max_samples, data.scratch)
        parts: list[Source] = []
        most = data.max_samples
        for file in found.files:
            parts.append(open_text(file, most, data.scratch))
            most = None if most is None else most - len(parts[-1])
            if most == 0:
                break
    except OSError as error:
        name = error.filename or source.path
        raise ValueError(f"cannot read the data file {name}: {error.strerror or error}") from None
    return parts[0] if len(parts) == 1 else Sources(parts, [source] * len(parts))


def _kind_of(path: str) -> str:
    """By what the file holds."""
    with open(path, "rb") as handle:
        head = handle.read(512)
    return "tar" if head[_TAR_MAGIC] == b"ustar" or path.endswith(".tar") else _MAGIC.get(head[:4], "text")


def _hash_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
