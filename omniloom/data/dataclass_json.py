"""Dataclasses as JSON and back, by their annotations: planned steps in a checkpoint, their hash, extents in the cache.

Fields at their defaults are left out, so that most extents are short and a field added later reads as its default.
"""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def to_json(value: Any) -> Any:
    """Dicts and lists of a dataclass, or of tuples, dicts and plain values that hold some."""
    if is_dataclass(value):
        named = ((field, getattr(value, field.name)) for field in fields(value))
        return {field.name: to_json(item) for field, item in named if not _is_default(field, item)}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(kind: type[Kind], record: Any) -> Kind:
    """What `to_json` was given. Raises: TypeError or ValueError where the record is none of a `kind`."""
    value: Kind = _read(kind, record)
    return value


def _is_default(field: Field[Any], value: Any) -> bool:
    return bool(field.default is not MISSING and value == field.default)


@cache
def _annotations(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(kind: Any, record: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # only ever with None
        return None if record is None else _read(inner[0], record)
    if origin is tuple:
        if not isinstance(record, list):
            raise TypeError(f"expected a list, got {record!r:.60}")
        kinds = inner[:1] * len(record) if inner[-1] is Ellipsis else inner
        return tuple(_read(one, item) for one, item in zip(kinds, record, strict=True))
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(record, dict):
            raise TypeError(f"expected an object, got {record!r:.60}")
        known = _annotations(kind)
        if unknown := record.keys() - known.keys():
            raise TypeError(f"unknown fields: {', '.join(sorted(unknown))}")
        return kind(**{name: _read(known[name], item) for name, item in record.items()})
    plain: Any = {float: (int, float), int: int, str: str}.get(kind, object)  # the rest is free
    if not isinstance(record, plain):
        raise TypeError(f"expected {kind.__name__}, got {record!r:.60}")
    return record
