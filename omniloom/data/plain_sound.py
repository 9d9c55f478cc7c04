"""Plain PCM in RIFF files (wav), read without a decoder: to open a short recording by av takes longer than to read it.

What is not plain, and whatever does not fit its own sizes, is left to av, which says what is wrong with it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from omniloom.data.media_files import head_of, size_of
from omniloom.types import MediaKind

_EXTENSIBLE = 0xFFFE  # a format tag to which the sound's own, further on, is added here
_DTYPES = {  # by format tag and bits
    (1, 16): "<i2",
    (3, 32): "<f4",
    (_EXTENSIBLE + 1, 16): "<i2",
    (_EXTENSIBLE + 3, 32): "<f4",
    (_EXTENSIBLE + 1, 32): "<i4",  # of which 24 may be used, at the top: av takes them for a float of its own
}


@dataclass(frozen=True, kw_only=True)
class PlainSound:
    """Where the samples of a file lie."""

    rate: int
    num_channels: int
    num_samples: int  # of each channel
    start: int  # in bytes
    dtype: str

    def read(self, file: str | bytes, first: int, count: int) -> np.ndarray:
        """Samples [count, num_channels] from number `first` on, of the file in which they were found."""
        kind = np.dtype(self.dtype)
        start = self.start + first * self.num_channels * kind.itemsize
        count *= self.num_channels
        if isinstance(file, bytes):
            return np.frombuffer(file, dtype=kind, count=count, offset=start).reshape(-1, self.num_channels)
        return np.fromfile(file, dtype=kind, count=count, offset=start).reshape(-1, self.num_channels)


def find_plain_sound(file: str | bytes, kind: MediaKind) -> PlainSound | None:
    """None for what is left to av. Raises: SampleError for a file that is missing, empty or no file."""
    size, head = size_of(file, kind), head_of(file, kind)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE" or 8 + int.from_bytes(head[4:8], "little") > size:
        return None
    at, found = 12, []
    while at + 24 <= len(head):
        name, length = struct.unpack_from("<4sI", head, at)
        if name == b"fmt ":
            tag, *found = struct.unpack_from("<HHIIHH", head, at + 8)
            tag += int.from_bytes(head[at + 32 : at + 34], "little") if tag == _EXTENSIBLE else 0
        elif name == b"data":
            break
        at += 8 + length + length % 2
    else:
        return None
    if not found:
        return None
    num_channels, rate, _, frame_bytes, bits = found
    dtype = _DTYPES.get((tag, bits))
    if dtype is None or not (rate and length and num_channels) or frame_bytes != num_channels * bits // 8:
        return None
    if length % frame_bytes or at + 8 + length > size:
        return None
    return PlainSound(
        rate=rate, num_channels=num_channels, num_samples=length // frame_bytes, start=at + 8, dtype=dtype
    )
