"""Decoded media on disk in the size that towers see, so that a second epoch reads arrays and decodes nothing.

A file for each clip, named by the hash of all that its content follows from: the media's path, size and time (or
bytes), the planned geometry, the processor. Shared by the workers of all ranks and of several runs: a file appears
whole or not at all. As the cache of extents it is never worth a failure: what cannot be read is decoded anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import time
import zlib
from pathlib import Path

import numpy as np

from omniloom.data.dataclass_json import to_json
from omniloom.data.extent_cache import hash_bytes, media_stamps
from omniloom.types import ClipGeometry, DecodedClip, MediaSource

_log = logging.getLogger(__name__)
_VERSION = 1
_HEADER_BYTES = 256
_PUTS_BETWEEN_SWEEPS = 64
_SWEPT_SHARE = 0.9  # of the limit, to which a sweep brings the cache
_STALE_SECONDS = 3600.0  # after which an unfinished file is nobody's


class MediaCache:
    """Clips by key, bounded in size: the least recently used go first. Every method is safe to call at any time."""

    def __init__(self, directory: str | Path, limit_bytes: float) -> None:
        self._directory = Path(directory)
        self._limit_bytes = limit_bytes
        self._num_puts = 0
        self._gave_up = False

    def key(self, source: MediaSource, clip: ClipGeometry, fingerprint: str) -> str | None:
        """None where a media file cannot be looked at: decoding will say what is wrong with it."""
        stamps = media_stamps([source])
        if stamps is None or self._gave_up:
            return None
        record = [_VERSION, fingerprint, dataclasses.asdict(source), to_json(clip), stamps]
        return hashlib.sha256(json.dumps(record, sort_keys=True, default=hash_bytes).encode()).hexdigest()

    def get(self, key: str) -> DecodedClip | None:
        path = self._path(key)
        try:
            raw = np.fromfile(path, dtype=np.uint8)
            header = json.loads(raw[:_HEADER_BYTES].tobytes())
            body = raw[_HEADER_BYTES:]
            if len(body) != header["bytes"] or zlib.crc32(body.data) != header["checksum"]:
                return None
            os.utime(path)  # it was used now
            shape = header["pixels"]
            num_pixel_bytes = int(np.prod(shape)) if shape is not None else 0
            return DecodedClip(
                pixels=None if shape is None else body[:num_pixel_bytes].reshape(shape),
                waveform=body[num_pixel_bytes:].copy().view(np.float32) if header["samples"] else None,
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, clip: DecodedClip) -> None:
        arrays = [array for array in (clip.pixels, clip.waveform) if array is not None]
        body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        header = {
            "pixels": None if clip.pixels is None else list(clip.pixels.shape),
            "samples": None if clip.waveform is None else len(clip.waveform),
            "bytes": len(body),
            "checksum": zlib.crc32(body),
        }
        path = self._path(key)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(json.dumps(header).encode().ljust(_HEADER_BYTES) + body)
            unfinished.replace(path)
            self._num_puts += 1
            if self._num_puts % _PUTS_BETWEEN_SWEEPS == 1:
                self._sweep()
        except OSError as error:  # disk full, read-only, not a folder
            _log.warning("data.cache %s is not used: %s", self._directory, error)
            self._gave_up = True
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def _path(self, key: str) -> Path:
        return self._directory / key[:2] / key[2:]

    def _sweep(self) -> None:
        """Remove what was not used for longest where the cache is over its limit; one process at a time."""
        with open(self._directory / ".lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another is at it
            found = []
            for path in self._directory.glob("??/*"):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    if not path.name.startswith("."):
                        found.append((stat.st_mtime, stat.st_size, path))
                    elif time.time() - stat.st_mtime > _STALE_SECONDS:
                        path.unlink()
            held = sum(size for _, size, _ in found)
            if held <= self._limit_bytes:
                return
            for _, size, path in sorted(found):
                path.unlink(missing_ok=True)
                held -= size
                if held <= _SWEPT_SHARE * self._limit_bytes:
                    return
