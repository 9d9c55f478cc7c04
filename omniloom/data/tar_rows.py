"""Rows of WebDataset shards: tar files whose members belong to a sample by their name up to its first dot.

Owns the layouts in which shards keep a conversation: JSON beside media, each in a part of its own or as pickled lists
(Pai-Megatron-Patch, DataJuicer), captions as text, and the fields that an Energon directory maps. Positions come from
the `.tar.idx` beside a shard, or are looked up once per machine.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from omniloom.data.plain_pickle import as_media, read_plain_pickle
from omniloom.data.row_media import PARTS
from omniloom.data.shared_index import IndexedRows, IndexTable, open_index
from omniloom.data.source_files import SourceFiles
from omniloom.data.text_rows import parse_json_row, read_stretch
from omniloom.types import Row, SampleError

_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_HEAD_BYTES = 4096
_TEMPORAL_PATCH = 2  # frames of a grid of `second_per_grid_ts`
_LISTS = {
    "images": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2"),
    "videos": ("mp4", "mkv", "webm", "avi", "mov", "ts", "m4v", "flv"),
    "audios": ("mp3", "wav", "flac", "ogg", "opus", "m4a", "aac", "aiff", "wma"),
}
_LIST_OF = {suffix: key for key, suffixes in _LISTS.items() for suffix in suffixes}
_ROW_KEYS = {  # what Energon's sample types call their fields
    "image": "images", "imgs": "images", "video": "videos", "audio": "audios", "caption": "response",
    "text": "response", "context": "query", "question": "query", "answers": "response", "answer": "response",
    "texts": "messages", "conversation": "messages",
}  # fmt: skip


class TarRows(IndexedRows):
    """Rows of the samples of some shards. Rows of the index are [shard, start, end, number of the sample in there]."""

    def locate(self, row: int) -> tuple[str, int]:
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        shard, _, _, number = self._index.table[row].tolist()
        return self._index.facts["files"][shard], number

    def read_row(self, row: int) -> tuple[Row, str, int]:
        path, line = self.locate(row)
        _, start, end, _ = self._index.table[row].tolist()
        return sample_row(read_stretch(path, start, end, path), self._index.facts["fields"]), path, line


def open_tars(shards: SourceFiles, max_samples: int | None, scratch: str | None) -> TarRows:
    """Raises: ValueError for a file that is no tar, an index that does not fit it, and where there are no samples."""
    how = ["tar", max_samples, *shards.files, *sorted(shards.excluded), *(shards.fields or {}).items()]
    make = partial(_index_shards, shards, max_samples)
    return TarRows(open_index(shards.files, how, make, columns=4, scratch=scratch))


# ---------------------------------------------------------------------------------------- the index


def _index_shards(shards: SourceFiles, max_samples: int | None, table: IndexTable) -> dict[str, Any]:
    digest = hashlib.sha256()
    for shard, path in enumerate(shards.files):
        bounds = _idx_bounds(path)
        excluded = {key for key in shards.excluded if shards.names and key.startswith(f"{shards.names[shard]}/")}
        if bounds is None or excluded:
            bounds = [
                (start, end)
                for key, start, end in _find_samples(path)
                if not excluded or f"{shards.names[shard]}/{key}" not in excluded
            ]
        for number, (start, end) in enumerate(bounds, start=1):
            if len(table) == max_samples:
                break
            table.append(shard, start, end, number)
        with open(path, "rb") as handle:
            digest.update(f"{os.path.getsize(path)} {len(table)} ".encode() + handle.read(_HEAD_BYTES))
        if len(table) == max_samples:
            break
    if not len(table):
        raise ValueError(f"{shards.files[0]} has no samples, expected members named as key.json, key.jpg")
    fields = None if shards.fields is None else dict(shards.fields)
    return {"digest": digest.hexdigest(), "files": list(shards.files), "fields": fields}


def _idx_bounds(path: str) -> list[tuple[int, int]] | None:
    """Where samples lie by the index beside a shard, or None without one. Raises: ValueError if it is stale."""
    index = f"{path}.idx"
    if not os.path.exists(index):
        return None
    offsets = np.fromfile(index, dtype="<i8")
    size = os.path.getsize(path)
    is_regular = len(offsets) > 0 and bool((np.diff(offsets) > 0).all()) and not (offsets % tarfile.BLOCKSIZE).any()
    fits = is_regular and offsets[0] >= 0 and 0 <= size - offsets[-1] <= 2 * tarfile.RECORDSIZE
    if fits:
        with open(path, "rb") as handle:  # the last sample is there, and behind it zeros up to a full record
            handle.seek(offsets[-2:][0])
            fits = len(offsets) == 1 or any(handle.read(tarfile.BLOCKSIZE))
            handle.seek(offsets[-1])
            fits = fits and not any(handle.read())
    if not fits:
        raise ValueError(f"{index} does not fit {path} of {size} bytes; remove it, or make it anew with Energon")
    bounds = offsets.tolist()
    return list(itertools.pairwise(bounds))


def _find_samples(path: str) -> Iterator[tuple[str, int, int]]:
    """Key, start and end of every sample of a shard. Raises: ValueError."""
    key, start = None, 0
    try:
        with open(path, "rb") as handle:
            end = 0
            for member, end in _members(handle):  # noqa: B007 - the last end is used
                name = _split_name(member)
                if name is None or name[0] == key:
                    continue
                if key is not None:
                    yield key, start, member.offset
                key, start = name[0], member.offset
            if key is not None:
                yield key, start, end
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        hint = "; shards must not be compressed" if _is_compressed(path) else ""
        raise ValueError(f"{path} is not a tar file that can be read: {error}{hint}") from None


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Members of a tar, and where each ends. Raises: tarfile.TarError and what else a damaged header may cause."""
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= end:  # it would go round in circles
                raise tarfile.ReadError(f"{member.name!r:.80} has {member.size} bytes")
            end = tar.offset
            yield member, end


def _is_compressed(path: str) -> bool:
    with open(path, "rb") as handle:
        return handle.read(3)[:2] in (b"\x1f\x8b", b"\x28\xb5", b"BZ")


def _split_name(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Key and part name of a member that belongs to a sample."""
    found = _NAME.fullmatch(member.name)
    is_file = (member.isreg() and not member.issparse()) or member.islnk() or member.issym()
    if not is_file or found is None or _META.match(member.name):
        return None
    return found[1], found[2]


# ---------------------------------------------------------------------------------------- a sample


def sample_row(data: bytes, fields: Mapping[str, str] | None = None) -> Row:
    """The row of one sample, from its stretch of a tar. Raises: SampleError."""
    key, parts = _read_parts(data)
    if fields is not None:
        row = _mapped_row(parts, fields)
    else:
        row = _json_row(parts)
        _add_lists(row, parts, key)
        if "txt" in parts:
            row.setdefault("response", _text(parts["txt"], "txt"))
    _add_rates(row)
    row.setdefault("id", key)
    row[PARTS] = {spelling: part for name, part in parts.items() for spelling in _spellings(key, name)}
    return row


def _read_parts(data: bytes) -> tuple[str, dict[str, bytes]]:
    key: str | None = None
    parts: dict[str, bytes] = {}
    try:
        for member, _ in _members(io.BytesIO(data)):
            name = _split_name(member)
            if name is None:
                continue
            if key not in (None, name[0]):
                raise SampleError("row", f"holds {key} and {name[0]}; the index of the shard is not of this file")
            key, part = name
            if not member.isreg():
                reason = f"is a link to {member.linkname}; pack the files themselves (tar -h --hard-dereference)"
                raise SampleError(part, reason)
            if part in parts:
                raise SampleError(part, f"is there twice in the sample {key}; pack the shard anew")
            parts[part] = data[member.offset_data : member.offset_data + member.size]
            if len(parts[part]) < member.size:
                raise SampleError(part, f"{member.size - len(parts[part])} of its {member.size} bytes are missing")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError("row", f"not a sample of a tar file: {error}") from None
    if key is None:
        raise SampleError("row", "not a sample of a tar file: no member has a name such as key.json")
    return key, parts


def _json_row(parts: Mapping[str, bytes]) -> Row:
    found = [name for name in parts if name.rpartition(".")[2].lower() == "json"]
    name = next((name for name in found if "." not in name), next(iter(found), None))
    return {} if name is None else parse_json_row(parts[name])


def _add_lists(row: Row, parts: Mapping[str, bytes], key: str) -> None:
    """Media of the sample in the order of the tar, under the keys of their kinds.

    Those that content calls by name are left to it, and a list of the row that calls any by name stands as it is.
    """
    said = set(_strings(row))
    called = set(_strings([value for value in row.values() if isinstance(value, list)]))  # not by a `file_name`, say
    media: dict[str, list[str]] = {}
    for name in parts:
        suffix = name.rpartition(".")[2].lower()
        if kind := _LIST_OF.get(suffix) or _LIST_OF.get(suffix.removesuffix("s")):
            media.setdefault(kind, []).append(name)
    for kind, names in media.items():
        own = set(_strings([row.get(kind), row.get(kind[:-1])]))
        if not own.isdisjoint(spelling for name in names for spelling in _spellings(key, name)):
            continue
        left = [name for name in names if name not in said and called.isdisjoint(_spellings(key, name))]
        if clips := [clip for name in left for clip in _clips_of(name, parts[name])]:
            row.pop(kind[:-1], None)  # of what is not in the tar
            row[kind] = clips


def _spellings(key: str, name: str) -> tuple[str, str, str]:
    """How a row may call a part of its sample."""
    return name, f"{key}.{name}", f"{key.rpartition('/')[2]}.{name}"


def _clips_of(name: str, content: bytes) -> list[Any]:
    return [content] if name.rpartition(".")[2].lower() in _LIST_OF else _unpickled(name, content)


def _add_rates(row: Row) -> None:
    """The rate of videos that are lists of frames, where the sample has the seconds of a grid of them."""
    seconds, videos = row.pop("second_per_grid_ts", None), row.get("videos")
    if isinstance(seconds, list) and isinstance(videos, list) and len(seconds) == len(videos):
        row["videos"] = [
            {"video": clip, "sample_fps": _TEMPORAL_PATCH / rate}
            if isinstance(clip, list) and isinstance(rate, int | float) and rate > 0
            else clip
            for clip, rate in zip(videos, seconds, strict=True)
        ]


def _unpickled(name: str, content: bytes) -> list[Any]:
    try:
        return as_media(read_plain_pickle(content))
    except ValueError as error:
        raise SampleError(name, str(error)) from None


def _strings(value: Any) -> Iterator[str]:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _mapped_row(parts: Mapping[str, bytes], fields: Mapping[str, str]) -> Row:
    """The fields of an Energon sample by the keys that rows have here."""
    row: Row = {}
    for field, words in fields.items():
        value = _field(parts, words)
        key = _ROW_KEYS.get(field, field)
        if key == "response" and isinstance(value, list):  # answers of which any is right
            value = next(iter(value), None)
        row |= value if key == "messages" and isinstance(value, dict) else {key: value}
    return row


def _field(parts: Mapping[str, bytes], words: str) -> Any:
    """What `json[a][b]` or `jpg,png` names, the first that is there. Raises: SampleError."""
    for option in words.split(","):
        name, *keys = re.split(r"\]?\[|\]$", option.strip().removesuffix("]"))
        if name not in parts:
            continue
        suffix = name.rpartition(".")[2].lower()
        if suffix in _LIST_OF:
            return parts[name]
        if suffix.removesuffix("s") in _LIST_OF:
            return _unpickled(name, parts[name])
        if suffix != "json":
            return _text(parts[name], name)
        try:
            value = json.loads(parts[name])
            for key in keys:
                value = value[int(key)] if isinstance(value, list) else value[key]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise SampleError(name, f"has no {option}: {type(error).__name__}: {error}") from None
        return value
    raise SampleError("row", f"the sample has no {words}, only {', '.join(parts)}")


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(name, f"not UTF-8 at byte {error.start}: {error.reason}") from None
