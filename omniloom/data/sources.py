"""The data sources of a run: files that are opened by what they hold, chained into one range of row numbers.

Owns what `data.train` names and in which order; how rows lie in a file is `text_rows`' and `columnar`'s, what a row
means `formats`', who reads which row when the planner's. A source holds no rows and no offsets: it is cheap to send to
a worker process.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from functools import lru_cache
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

    def split(self, num_held_out: int, seed: int) -> tuple[Sources, Sources]:
        """Rows to train on, and rows held out of all sources together: the same on every rank and at every start."""
        starts = [0, *self._ends]
        sides = (
            [
                _Side(part, start, len(self), num_held_out, seed, held_out)
                for part, start in zip(self.parts, starts, strict=False)
            ]
            for held_out in (False, True)
        )
        kept, held = (Sources(side, self.entries) for side in sides)
        return kept, held


class _Side:
    """The rows of a source that are held out, or the others. Which these are is computed anew in every process."""

    def __init__(self, source: Source, start: int, total: int, num_held_out: int, seed: int, held_out: bool) -> None:
        self._source = source
        self._drawn = (start, total, num_held_out, seed, held_out)
        self._cached: NDArray[int64] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    @property
    def _rows(self) -> NDArray[int64]:
        if self._cached is None:
            start, total, num_held_out, seed, held_out = self._drawn
            own = _draw_held_out(total, num_held_out, seed)[start : start + len(self._source)]
            self._cached = np.flatnonzero(own == held_out)
        return self._cached

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        return _hash_of(self._source.fingerprint, hashlib.sha256(self._rows.tobytes()).hexdigest())

    def read_row(self, row: int) -> tuple[Row, str, int]:
        return self._source.read_row(int(self._rows[row]))

    def locate(self, row: int) -> tuple[str, int]:
        return self._source.locate(int(self._rows[row]))


@lru_cache(maxsize=1)
def _draw_held_out(total: int, num_held_out: int, seed: int) -> NDArray[bool_]:
    """Which of `total` rows are held out, bool [total]."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, total, 1])).random_raw(total)
    chosen = np.zeros(total, dtype=bool)
    chosen[np.argsort(keys, kind="stable")[:num_held_out]] = True
    return chosen


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
