"""Extents on disk, so that a run that starts again need not open every media file.

One SQLite file, shared by the workers of all ranks and of several runs. A cache is never worth a failure: a file that
is locked, full, read-only or broken costs a warning and the extents are measured anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sqlite3
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omniloom.data.dataclass_json import from_json, to_json
from omniloom.types import Conversation, Extent, MediaSource

_log = logging.getLogger(__name__)
_VERSION = 3  # raise it when the meaning of an Extent's fields changes
_BUSY_SECONDS = 10.0
_PROCESSOR_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def fingerprint_of(checkpoint_dir: str | Path, *options: object) -> str:
    """Hash of all but the row that sizes depend on: the checkpoint's small files, the options, this package's code."""
    digest = hashlib.sha256(repr(options).encode())
    package = Path(__file__).parents[1]
    code = [path for folder in ("data", "processors", "families") for path in sorted((package / folder).rglob("*.py"))]
    for path in [Path(checkpoint_dir) / name for name in _PROCESSOR_FILES] + code:
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def extent_key(conversation: Conversation, fingerprint: str) -> str | None:
    """Hash of what an extent depends on: the row's content, its media files' size and time, the processor.

    `fingerprint` stands for the processor and its options. Returns None where a media file cannot be looked at:
    measuring will say what is wrong with it.
    """
    record = dataclasses.asdict(dataclasses.replace(conversation, id="", source=""))
    text = json.dumps(record, sort_keys=True, default=hash_bytes)
    parts = (part for turn in conversation.turns for part in turn.parts)
    stamps = media_stamps([part.media for part in parts if part.media is not None])
    if stamps is None:
        return None
    return hashlib.sha256(json.dumps([_VERSION, fingerprint, text, stamps]).encode()).hexdigest()


def media_stamps(clips: Sequence[MediaSource]) -> list[tuple[str, int, int]] | None:
    """Path, size and time of all files of some clips; None where one cannot be looked at."""
    stamps = []
    for media in (*clips, *(clip.sound for clip in clips if clip.sound is not None)):
        for path in (media.path, *(media.frames or ())):
            if path is None:
                continue
            try:
                stat = os.stat(path)
            except (OSError, ValueError):
                return None
            stamps.append((path, stat.st_size, stat.st_mtime_ns))
    return stamps


class ExtentCache:
    """Extents by key. Every method is safe to call whatever has become of the file."""

    def __init__(self, directory: str | Path) -> None:
        self._path = Path(directory) / "extents.sqlite"
        self._connection: sqlite3.Connection | None = None
        self._gave_up = False

    def get(self, key: str) -> Extent | None:
        rows = self._run("SELECT value, checksum FROM extents WHERE key = ?", [(key,)])
        if not rows:
            return None
        value, checksum = rows[0]
        try:
            if zlib.crc32(value.encode()) != checksum:
                return None
            return from_json(Extent, json.loads(value))
        except (ValueError, TypeError, AttributeError):  # written by another version, or by a broken disk
            return None

    def put(self, extents: dict[str, Extent]) -> None:
        """Store all in one transaction."""
        rows = []
        for key, extent in extents.items():
            value = json.dumps(to_json(extent))
            rows.append((key, value, zlib.crc32(value.encode())))
        if rows:
            self._run("INSERT OR REPLACE INTO extents VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _run(self, statement: str, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        for may_mend in (True, False):
            if self._gave_up:
                break
            try:
                return self._execute(statement, rows)
            except sqlite3.Error as error:
                # locked for long, disk full, read-only, no such folder: else what is there is no database
                if may_mend and not isinstance(error, sqlite3.OperationalError):
                    _log.warning("extent cache %s is broken (%s): it is made anew", self._path, error)
                    self._remove()
                    continue
                _log.warning("extent cache %s is not used: %s", self._path, error)
                self.close()
                self._gave_up = True
        return []

    def _execute(self, statement: str, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        connection = self._connect()
        if statement.startswith("SELECT"):
            return connection.execute(statement, rows[0]).fetchall()
        with connection:
            connection.executemany(statement, rows)
        return []

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise sqlite3.OperationalError(str(error)) from None
            # Used under the reader's lock, from whichever thread measures.
            connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, check_same_thread=False)
            try:
                connection.execute("PRAGMA synchronous = OFF")  # a lost tail is measured again
                with connection:
                    connection.execute(
                        "CREATE TABLE IF NOT EXISTS extents (key TEXT PRIMARY KEY, value TEXT, checksum INTEGER) "
                        "WITHOUT ROWID"
                    )
            except sqlite3.Error:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _remove(self) -> None:
        self.close()
        for suffix in ("", "-journal", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)


def hash_bytes(value: object) -> str:
    """What stands for embedded media in JSON."""
    assert isinstance(value, bytes), f"{type(value).__name__} in a conversation"
    return hashlib.sha256(value).hexdigest()
