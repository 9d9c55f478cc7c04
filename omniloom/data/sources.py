"""The data sources of a run: files that are opened by what they hold, chained into one range of row numbers.

Owns what `data.train` names and in which order; how rows lie in a file is `text_rows`' and `columnar`'s, what a row
means `formats`', who reads which row when the planner's. A source holds no rows and no offsets: it is cheap to send to
a worker process.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy import bool_, int64
from numpy.typing import NDArray

from omniloom.config import DataSource
from omniloom.data.columnar import open_arrow, open_parquet
from omniloom.data.text_rows import open_text
from omniloom.types import Row, Source, suggest

_ARROW_MAGIC = (b"ARROW1", b"\xff\xff\xff\xff")  # file and stream; the latter is what `datasets` writes


class Sources:
    """Sources one after another. Rows are numbered through all of them.

    `entries` are what the config says of each: a path, or a record with options of its own.
    """

    def __init__(self, parts: Sequence[Source], entries: Sequence[str | DataSource]) -> None:
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

    def first_rows(self) -> list[int]:
        """The first row of each source that has any."""
        return [end - len(part) for part, end in zip(self.parts, self._ends, strict=True) if len(part)]

    def origin(self, row: int) -> tuple[str, int]:
        """The data file that a row is of, as the config names it, and the row's number in it, from 1."""
        part, own_row = self.find(row)
        source, entry = self.parts[part], self.entries[part]
        while isinstance(source, _Chosen):
            own_row, source = int(source.rows[own_row]), source.source
        return entry if isinstance(entry, str) else entry.path, own_row + 1

    def without(self, excludes: str) -> Sources:
        """All rows but those that a file of excludes names. Raises: ValueError for rows that are not there."""
        named, parts = read_excludes(excludes), []
        for part, entry in zip(self.parts, self.entries, strict=True):
            path = entry if isinstance(entry, str) else entry.path
            rows = named.get(os.path.realpath(path), [0])
            if max(rows) > len(part):
                reason = f"{excludes} names row {max(rows)} of {path}, which has {len(part)}"
                raise ValueError(f"data.exclude: {reason}; write it anew by omniloom check --write-excludes")
            parts.append(_Chosen(part, partial(_choose_others, excludes, path, len(part))) if max(rows) else part)
        return Sources(parts, self.entries)

    def split(self, num_held_out: int, seed: int) -> tuple[Sources, Sources]:
        """Rows to train on, and rows held out of all sources together: the same on every rank and at every start."""
        starts = [0, *self._ends]
        sides = (
            [
                _Chosen(part, partial(_choose_side, start, len(part), len(self), num_held_out, seed, held_out))
                for part, start in zip(self.parts, starts, strict=False)
            ]
            for held_out in (False, True)
        )
        kept, held = (Sources(side, self.entries) for side in sides)
        return kept, held


class _Chosen:
    """Some rows of a source. Which these are is computed anew in every process."""

    def __init__(self, source: Source, choose: Callable[[], NDArray[bool_]]) -> None:
        """`choose` pickles, and says of each row of the source whether it is one of these: bool [rows]."""
        self.source = source
        self._choose = choose
        self._cached: NDArray[int64] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    @property
    def rows(self) -> NDArray[int64]:
        """Their numbers in the source, int64."""
        if self._cached is None:
            self._cached = np.flatnonzero(self._choose())
        return self._cached

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        return _hash_of(self.source.fingerprint, hashlib.sha256(self.rows.tobytes()).hexdigest())

    def read_row(self, row: int) -> tuple[Row, str, int]:
        return self.source.read_row(int(self.rows[row]))

    def locate(self, row: int) -> tuple[str, int]:
        return self.source.locate(int(self.rows[row]))


def _choose_side(start: int, num_rows: int, total: int, num_held_out: int, seed: int, held_out: bool) -> NDArray[bool_]:
    """Of the `num_rows` rows from `start` on, which are on one side of a split of all `total` rows."""
    side: NDArray[bool_] = _draw_held_out(total, num_held_out, seed)[start : start + num_rows] == held_out
    return side


@lru_cache(maxsize=1)
def _draw_held_out(total: int, num_held_out: int, seed: int) -> NDArray[bool_]:
    """Which of `total` rows are held out, bool [total]."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, total, 1])).random_raw(total)
    chosen = np.zeros(total, dtype=bool)
    chosen[np.argsort(keys, kind="stable")[:num_held_out]] = True
    return chosen


def _choose_others(excludes: str, path: str, num_rows: int) -> NDArray[bool_]:
    """Of the rows of a data file, those that the file of excludes does not name."""
    kept = np.ones(num_rows, dtype=bool)
    kept[[row - 1 for row in read_excludes(excludes).get(os.path.realpath(path), ())]] = False
    return kept


@lru_cache(maxsize=1)
def read_excludes(path: str) -> dict[str, list[int]]:
    """The rows, from 1, that a file of excludes names of each data file. Raises: ValueError."""
    excluded: dict[str, list[int]] = {}
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
        excluded.setdefault(os.path.realpath(source), []).append(row)
    return excluded


# ---------------------------------------------------------------------------------------- opening


def open_sources(entries: Sequence[str | DataSource], *, max_samples: int | None = None) -> Sources:
    """Open data files and chain their rows; `max_samples` keeps the first rows of each file that says nothing itself.

    Raises: ValueError for a file that is missing, empty, a directory, broken or of no known kind.
    """
    if not entries:
        raise ValueError("no data files: expected at least one JSON, JSONL, Parquet or Arrow file, got an empty list")
    parts = []
    for entry in entries:
        path, most = (entry, None) if isinstance(entry, str) else (entry.path, entry.max_samples)
        parts.append(_open_file(path, max_samples if most is None else most))
    return Sources(parts, entries)


def _open_file(path: str, max_samples: int | None) -> Source:
    file = Path(path)
    if file.is_dir():
        near = sorted(p.name for p in file.iterdir() if p.suffix in (".json", ".jsonl", ".parquet", ".arrow"))[:5]
        hint = f"; it holds {', '.join(near)}" if near else ""
        raise ValueError(f"{path} is a directory, expected a data file{hint}")
    if not file.exists():
        raise ValueError(f"no such data file: {path}{_nearest(file)}")
    if not file.is_file():
        raise ValueError(
            f"{path} is a pipe or a device, expected a file, since rows are read in any order; save it first"
        )
    try:
        with file.open("rb") as handle:
            head = handle.read(4096)
        if head[:4] == b"PAR1":
            return open_parquet(path, max_samples)
        if head.startswith(_ARROW_MAGIC):
            return open_arrow(path, max_samples)
        return open_text(path, head, max_samples)
    except OSError as error:
        raise ValueError(f"cannot read the data file {path}: {error.strerror or error}") from None


def _nearest(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; the folder {file.parent} does not exist"
    return suggest(file.name, [path.name for path in file.parent.iterdir()], among="", before=f"{file.parent}/")


def _hash_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
