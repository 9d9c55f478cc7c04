"""What a row asks of a clip: which frames, what size, which span of the file.

The words and their meanings are those of qwen-vl-utils 0.0.14 and qwen-omni-utils 0.0.8; any other is refused, since an
option that is dropped in silence trains on something else than was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from omniloom.types import ClipOptions, MediaKind, SampleError, suggest

_PIXELS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_SPAN = {"start": "start_seconds", "end": "end_seconds"}
_FIELDS: dict[MediaKind, dict[str, str]] = {  # of `ClipOptions`, by the words of rows
    "image": {name: name for name in _PIXELS},
    "video": {
        **{name: name for name in (*_PIXELS, "total_pixels", "fps", "min_frames", "max_frames")},
        "sample_fps": "fps",
        "nframes": "num_frames",
        **{word: name for key, name in _SPAN.items() for word in (f"video_{key}", key)},
    },
    "audio": {word: name for key, name in _SPAN.items() for word in (f"audio_{key}", key)},
}
_EVEN: dict[str, Callable[[float], int]] = {
    "num_frames": round,
    "min_frames": math.ceil,
    "max_frames": math.floor,
}  # frames come in pairs
_FRACTIONS = ("fps", "start_seconds", "end_seconds")
SAYS_NOTHING = frozenset(  # keys of other formats that ask for nothing
    ("type", "id", "name", "filename", "format", "mime_type", "media_type", "detail", "cache_control")
) | {"sampling_rate"}


def clip_options(kind: MediaKind, asked: Mapping[str, Any], field: str) -> ClipOptions:
    """What a row asks of a clip, by the words beside its path. Raises: SampleError, also for words unknown."""
    known = _FIELDS[kind]
    values: dict[str, Any] = {}
    for word, value in asked.items():
        if word in SAYS_NOTHING:
            continue
        if word not in known:
            raise SampleError(f"{field}.{word}", f"no option of a clip of this kind ({kind})" + suggest(word, known))
        name = known[word]
        if name in values:
            words = " and ".join(other for other in asked if known.get(other) == name)
            raise SampleError(field, f"{words} are the same option; keep one")
        values[name] = _number(value, f"{field}.{word}", name)
    options = ClipOptions(**values)
    _check_options(options, field)
    return options


def option_words(kind: MediaKind, options: ClipOptions) -> dict[str, Any]:
    """The words that ask for these options; `clip_options` reads them back."""
    words = {name: word for word, name in reversed(_FIELDS[kind].items())}
    return {words[item.name]: value for item in fields(options) if (value := getattr(options, item.name)) is not None}


def _number(value: Any, field: str, name: str) -> float | int:
    least = "0 or more" if name == "start_seconds" else "more than 0"
    shown = repr(value)[:60]
    fits = not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < 1e18
    if not fits or (not value and name != "start_seconds"):
        raise SampleError(field, f"expected a number, {least}, got {shown}")
    if name in _FRACTIONS:
        return float(value)
    count = _EVEN[name](value / 2) * 2 if name in _EVEN else int(value)
    if not count:
        raise SampleError(field, f"expected at least {2 if name in _EVEN else 1}, got {shown}")
    return count


def _check_options(options: ClipOptions, field: str) -> None:
    """Raises: SampleError for options that contradict each other."""
    if options.min_pixels and options.max_pixels and options.min_pixels > options.max_pixels:
        raise SampleError(field, f"min_pixels {options.min_pixels} is more than max_pixels {options.max_pixels}")
    if options.fps and options.num_frames:
        raise SampleError(field, "fps and nframes both say how many frames to take; keep one")
    if (options.resized_height is None) != (options.resized_width is None):
        raise SampleError(field, "resized_height and resized_width go together; give both or neither")
    start, end = options.start_seconds or 0.0, options.end_seconds
    if end is not None and end <= start:
        raise SampleError(field, f"the clip ends at {end:g} s, before it begins at {start:g} s")
