"""Tar shards in the layout of WebDataset, with the indexes by which megatron-energon reads them as they are.

A sample is `KEY.json`, its row, and `KEY.0.jpg`, `KEY.1.wav`, ...: the files of its media, bytes unchanged, which the
row calls `0.jpg`, `1.wav`.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sqlite3
import tarfile
import uuid
from array import array
from pathlib import Path
from typing import Any

import yaml

from omniloom.data.media_files import name_of, read_bytes
from omniloom.types import MediaKind, SampleError

_SHARD_BYTES = 1 << 30
_SHARD_SAMPLES = 10_000
_SUFFIX = re.compile(r"\.([A-Za-z0-9]{1,5})$")
_BEGINNINGS = (  # of files that come without a name
    *((rb"\xff\xd8\xff", "jpg"), (rb"\x89PNG", "png"), (rb"GIF8", "gif"), (rb"RIFF....WEBP", "webp"), (rb"BM", "bmp")),
    *((rb"RIFF....WAVE", "wav"), (rb"fLaC", "flac"), (rb"OggS", "ogg"), (rb"ID3|\xff[\xe2-\xfb]", "mp3")),
    *((rb"....ftyp", "mp4"), (rb"\x1aE\xdf\xa3", "mkv"), (rb"RIFF....AVI ", "avi"), (rb"\x93NUMPY", "npy")),
)
_TABLES = """
CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
    byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER,
    content_byte_size INTEGER);
"""  # as megatron-energon 7 has them in its index.sqlite
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full
    ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


class SampleParts:
    """The files of one sample's media, by the names that its row calls them."""

    def __init__(self) -> None:
        self.parts: dict[str, bytes] = {}
        self._names: dict[str, str] = {}

    def file(self, path: str, kind: MediaKind) -> str:
        """Raises: SampleError for a file that cannot be read."""
        if path not in self._names:
            content = read_bytes(path, kind)
            try:
                data = content if isinstance(content, bytes) else Path(content).read_bytes()
            except OSError as error:
                raise SampleError(kind, f"cannot read {name_of(path)}: {error.strerror or error}") from None
            found = None if path.startswith("data:") else _SUFFIX.search(path)
            self._names[path] = self._add(data, found[1].lower() if found else None)
        return self._names[path]

    def data(self, content: bytes, kind: MediaKind) -> str:
        return self._add(content, None)

    def recording(self, path: str) -> str:
        """Not stored: training reads the codes that were made of it."""
        return ""

    def _add(self, data: bytes, suffix: str | None) -> str:
        if suffix is None:
            known = (name for begins, name in _BEGINNINGS if re.match(begins, data, re.DOTALL))
            suffix = next(known, "bin")
        name = f"{len(self.parts)}.{suffix}"
        self.parts[name] = data
        return name


class ShardWriter:
    """Writes samples into a new folder, which is there once all of them are."""

    def __init__(self, folder: Path) -> None:
        self._target = folder
        self._folder = folder.with_name(f"{folder.name}.unfinished")
        self._shards: dict[str, int] = {}  # samples by shard
        self._num_samples = 0
        self._offsets = array("q")
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> ShardWriter:
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / ".nv-meta").mkdir(parents=True)
        self._index = sqlite3.connect(self._folder / ".nv-meta" / "index.sqlite")
        self._index.executescript(_TABLES)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end_shard()
        if kind is None and self._num_samples:
            self._index.executescript(_INDEXES)
            self._describe()
        self._index.commit()
        self._index.close()
        if kind is None and self._num_samples:
            os.rename(self._folder, self._target)
        else:
            shutil.rmtree(self._folder)

    def add(self, row: dict[str, Any], media: SampleParts) -> None:
        if self._tar is None or self._tar.offset > _SHARD_BYTES or len(self._offsets) >= _SHARD_SAMPLES:
            self._end_shard()
            name = f"{len(self._shards):06d}.tar"
            self._shards[name] = 0
            self._tar = tarfile.open(self._folder / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        key, shard, number = f"{self._num_samples:09d}", len(self._shards) - 1, len(self._offsets)
        start = self._tar.offset
        self._offsets.append(start)
        for name, data in {"json": json.dumps(row, ensure_ascii=False).encode(), **media.parts}.items():
            member = tarfile.TarInfo(f"{key}.{name}")
            member.size = len(data)
            place = (self._tar.offset + tarfile.BLOCKSIZE, len(data))
            self._tar.addfile(member, io.BytesIO(data))
            self._index.execute("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", (shard, number, name, *place))
        place = (start, self._tar.offset - start)
        self._index.execute("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", (shard, key, number, *place))
        self._num_samples += 1

    def _end_shard(self) -> None:
        if self._tar is None:
            return
        name = list(self._shards)[-1]
        self._shards[name] = len(self._offsets)
        self._offsets.append(self._tar.offset)
        with open(self._folder / f"{name}.idx", "wb") as file:
            self._offsets.tofile(file)
        self._tar.close()
        self._tar, self._offsets = None, array("q")

    def _describe(self) -> None:
        meta = self._folder / ".nv-meta"
        (meta / ".info.json").write_text(json.dumps({"shard_counts": self._shards}, indent=2))
        (meta / "index.uuid").write_text(str(uuid.uuid4()))
        split = {"split_parts": {"train": list(self._shards), "val": [], "test": []}, "exclude": []}
        (meta / "split.yaml").write_text(yaml.safe_dump(split, sort_keys=False))
        dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
        (meta / "dataset.yaml").write_text(yaml.safe_dump(dataset, sort_keys=False))
