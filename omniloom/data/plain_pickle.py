"""Pickles of lists of bytes, as tar shards hold their media: read without ever running what a pickle can run."""

from __future__ import annotations

import pickle
import pickletools
from typing import Any

# What plain lists, tuples, bytes, text and numbers are written with. Nothing here names a class or calls anything.
_ALLOWED = frozenset(
    [
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "FLOAT", "BINFLOAT"),
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"),
        *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    ]
)
_FAULTS = (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, OverflowError, MemoryError)


def read_plain_pickle(data: bytes) -> Any:
    """Raises: ValueError for what is no pickle, or holds more than plain lists, bytes, text and numbers."""
    num_opcodes = 0
    try:
        for opcode, argument, position in pickletools.genops(data):
            num_opcodes += 1
            if opcode.name not in _ALLOWED:
                raise ValueError(f"{opcode.name} at byte {position}: expected lists of bytes, text and numbers alone")
            if opcode.name.endswith("PUT") and not 0 <= int(argument or 0) < num_opcodes:
                raise ValueError(f"{opcode.name} {argument} at byte {position} is not what a list is written with")
        return pickle.loads(data)
    except ValueError:
        raise
    except _FAULTS as error:
        raise ValueError(f"not a pickle that can be read: {error}") from None


def as_media(value: Any) -> list[Any]:
    """The items of a sample's list: bytes of a file, or lists of bytes, the frames of a video. Raises: ValueError."""
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        frames = item if isinstance(item, list | tuple) else [item]
        if not frames or not all(isinstance(frame, bytes | bytearray) and frame for frame in frames):
            raise ValueError(f"expected the bytes of files or lists of them, got {str(item)[:60]!r}")
    return [list(item) if isinstance(item, tuple) else item for item in items]
