"""The media of one row: what a path, a dict, a data URI or bytes names, and which placeholder gets which clip.

Owns the rules of where media may lie (under the media folder, no URLs, unless allowed) and the count of placeholders
against clips. Opens nothing: whether a file exists and what it
holds is `media_files`' to say.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from omniloom.config import DataConfig
from omniloom.data.clip_options import SAYS_NOTHING, clip_options
from omniloom.data.row_objects import RowObjects
from omniloom.types import MediaKind, MediaSource, Part, SampleError, Turn

KINDS: tuple[MediaKind, ...] = ("image", "video", "audio")
PARTS = "__parts__"  # of a row of a tar: its sample's files by name, which the row may name as its media
PLACEHOLDER = re.compile(r"<(image|video|audio)>")
_QUOTED_PLACE = re.compile(r'"(<(?:bbox|point)>)"')
_URL_SAFE = str.maketrans("-_", "+/")
_FILE_URI = re.compile(r"file:(//(localhost(?=/))?)?", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BASE64_HEAD = re.compile(r"[A-Za-z0-9+/_\s-]{16,64}(?==*\s*$|(?<=^.{64}))", re.DOTALL)
_MAGIC = re.compile(  # how files begin: of images, then of containers and sound
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF|BM.{4}\0{4}|II\*\0|MM\0\*|\0\0\0\x0cjP|.{4}ftyp|\x1a\x45\xdf\xa3|OggS|fLaC|ID3|"
    rb"\xff[\xe0-\xff]|FLV|\x30\x26\xb2\x75|\0\0\x01[\xb3\xba]|FORM|caff|\.snd|#!AMR|wvpk",
    re.DOTALL,
)
_PATH = re.compile("[^\0\ud800-\udfff]*")
_BYTES_KEYS = ("bytes", "base64", "data")


class RowMedia:
    """The clips of one row, handed out in the order in which the text asks for them."""

    def __init__(
        self,
        lists: Mapping[MediaKind, list[Any]],
        *,
        objects: RowObjects | None,
        file: str,
        rules: DataConfig,
        use_audio: Any,
        typed: bool,
        parts: Mapping[str, bytes],
    ) -> None:
        """`typed`: the content is a list of typed blocks, where clips have blocks of their own.

        `parts` are files that came with the row, by the names that it may call them.
        """
        self._parts = parts
        self._folder = os.path.abspath(rules.media_dir if rules.media_dir is not None else os.path.dirname(file))
        self._rules = rules
        if use_audio is not None and not isinstance(use_audio, bool):
            raise SampleError("use_audio_in_video", f"expected true or false, got {use_audio!r}")
        self._use_audio = rules.video.use_audio if use_audio is None else use_audio
        self._items = lists
        self._objects = objects
        self._num_taken = dict.fromkeys(KINDS, 0)
        # in typed content <image> is only a word, unless there is a list beside it whose clips want a place
        self._literal = {kind for kind in KINDS if typed and not self._items[kind]}

    def split_text(self, text: str) -> list[Part]:
        """The text cut at its placeholders, each replaced by the next clip of its kind."""
        parts: list[Part] = []
        start = 0
        for match in PLACEHOLDER.finditer(text):
            kind: MediaKind = match[1]  # type: ignore[assignment]
            if kind in self._literal:
                continue
            if match.start() > start:
                parts.append(self._text(text[start : match.start()]))
            parts.append(self.next_clip(kind))
            start = match.end()
        if start < len(text):
            parts.append(self._text(text[start:]))
        return parts

    def _text(self, text: str) -> Part:
        text, boxes = (text, ()) if self._objects is None else self._objects.fill(text)
        return Part(kind="text", text=text, boxes=boxes)

    def calls(self, parts: Iterable[Part]) -> list[Part]:
        """Tool calls, and text beside them, with the row's objects: a `"<bbox>"` of JSON stands for a list."""
        if self._objects is None:
            return list(parts)
        filled = []
        for part in parts:
            is_json = part.kind == "tool_call"
            text = _QUOTED_PLACE.sub(r"\1", part.text) if is_json else part.text
            text, boxes = self._objects.fill(text, in_json=is_json)
            filled.append(replace(part, text=text, boxes=boxes))
        return filled

    def next_clip(self, kind: MediaKind, asked: Mapping[str, Any] | None = None) -> Part:
        """The next clip of the row's list, with what is asked of it where it stands."""
        index = self._num_taken[kind]
        self._num_taken[kind] += 1
        if index >= len(self._items[kind]):  # `place_rest` will name both counts
            return Part(kind=kind, media=MediaSource())
        item = self._items[kind][index]
        if asked:
            item = {**asked, **(item if isinstance(item, Mapping) else {kind: item})}
        return self.clip(kind, item, f"{kind}s[{index}]")

    def place_rest(self, turns: list[Turn]) -> list[Turn]:
        """The turns, clips without any placeholder put before the first question where the rules say so.

        Raises: SampleError where the placeholders of a kind are not as many as its clips.
        """
        asked = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        front: list[Part] = []
        for kind in KINDS:
            num_taken, num_clips = self._num_taken[kind], len(self._items[kind])
            if num_taken == 0 and self._rules.unplaced_media == "front" and asked is not None:
                front += [self.next_clip(kind) for _ in range(num_clips)]
            elif num_taken != num_clips:
                way = "" if num_taken else ", or set data.unplaced_media=front to put them before the first question"
                if not num_clips:
                    way = ', or where it is only a word, give contents as blocks: [{"type": "text", "text": ...}]'
                raise SampleError(
                    f"{kind}s",
                    f"{num_taken} <{kind}> placeholder{'s' * (num_taken != 1)} in the text but {num_clips} "
                    f"{kind}{'s' * (num_clips != 1)} in the row; write one <{kind}> where each clip belongs{way}",
                )
        if not front:
            return turns
        assert asked is not None
        return [*turns[:asked], replace(turns[asked], parts=(*front, *turns[asked].parts)), *turns[asked + 1 :]]

    def clip(self, kind: MediaKind, item: Any, field: str) -> Part:
        """One clip from a path, bytes, a list of frames (video), or a dict of these with options."""
        asked: dict[str, Any] = {}
        if isinstance(item, Mapping):
            item, asked = _payload(item, kind, field)
        use_audio = asked.pop("use_audio_in_video", None) if kind == "video" else None
        options = clip_options(kind, asked, field)
        listed = isinstance(item, list | tuple)
        if "sample_fps" in asked and not listed:
            raise SampleError(f"{field}.sample_fps", "is of a video given as a list of frames, this one is a file")
        media = MediaSource(
            use_audio=kind == "video" and (self._use_audio if use_audio is None else bool(use_audio)), options=options
        )
        if not listed:
            return Part(kind=kind, media=replace(media, **self._locate(item, field)))
        if kind != "video":
            raise SampleError(field, f"expected one {kind}, got a list; only a video may be a list of frames")
        if not item:
            raise SampleError(field, "expected a list of frames, got an empty list")
        frames = tuple(self._frame(frame, f"{field}[{index}]") for index, frame in enumerate(item))
        rate = options.fps or self._rules.video.fps
        return Part(kind=kind, media=replace(media, frames=frames, options=replace(options, fps=rate)))

    def _frame(self, item: Any, field: str) -> str:
        if isinstance(item, Mapping):
            item, asked = _payload(item, "image", field)
            if words := asked.keys() - SAYS_NOTHING:
                said = ", ".join(sorted(words))
                raise SampleError(field, f"{said}: what is asked of a video stands beside its list of frames")
        located = self._locate(item, field)
        return located["path"] if "path" in located else "data:;base64," + base64.b64encode(located["data"]).decode()

    def _locate(self, item: Any, field: str) -> dict[str, Any]:
        if isinstance(item, bytes | bytearray):
            if not item:
                raise SampleError(field, "expected the bytes of a file, got none")
            return {"data": bytes(item)}
        if not isinstance(item, str) or not item:
            raise SampleError(field, f"expected a path, bytes or a data URI, got {str(item)[:60]!r}")
        if item in self._parts:
            return {"data": self._parts[item]}
        if item.startswith("data:"):
            return {"data": decode_data_uri(item, field)}
        if _looks_like_base64(item) and not os.path.exists(os.path.join(self._folder, item)):
            return {"data": decode_base64(item, field)}
        return {"path": self._resolve(item, field)}

    def _resolve(self, path: str, field: str) -> str:
        """The absolute path of a file that may be read. Raises: SampleError."""
        if uri := _FILE_URI.match(path):  # what follows is often a plain path, so # and ? are taken as part of it
            path = unquote(path[uri.end() :])
        if scheme := _SCHEME.match(path):
            if not self._rules.allow_urls:
                raise SampleError(field, f"{path[:200]} is a URL; download it, or set data.allow_urls=true")
            if scheme[0].lower() not in ("http://", "https://"):
                raise SampleError(field, f"{path[:200]}: expected an http or https URL, got {scheme[0]}")
            return path
        if not _PATH.fullmatch(path):
            raise SampleError(field, f"a path cannot hold a NUL character or half a surrogate pair: {path[:60]!r}")
        full = os.path.normpath(os.path.join(self._folder, path))
        if not self._rules.allow_outside_media_dir:
            real, folder = os.path.realpath(full), os.path.realpath(self._folder)
            if real != folder and not real.startswith(folder.rstrip(os.sep) + os.sep):
                where = real if real != full else path
                raise SampleError(
                    field,
                    f"{where[:200]} lies outside the media folder {folder}; set data.media_dir to a folder that "
                    "holds it, or data.allow_outside_media_dir=true",
                )
        return full


def join_sound(parts: list[Part]) -> list[Part]:
    """Let an audio that directly follows a video whose sound is used become that video's sound."""
    joined: list[Part] = []
    for part in parts:
        video = joined[-1].media if joined and joined[-1].kind == "video" else None
        if part.kind != "audio" or video is None or not video.use_audio or video.sound is not None:
            joined.append(part)
        else:
            joined[-1] = replace(joined[-1], media=replace(video, sound=part.media))
    return joined


def decode_data_uri(text: str, field: str) -> bytes:
    """The bytes of a `data:...;base64,...` URI. Raises: SampleError."""
    head, comma, body = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise SampleError(field, f"expected data:<type>;base64,<bytes>, got {text[:40]!r}...")
    return decode_base64(body, field)


def _looks_like_base64(text: str) -> bool:
    """Whether a string that could be a path begins like a media file in base64."""
    head = _BASE64_HEAD.match(text)
    return head is not None and _MAGIC.match(base64.b64decode(_plain_base64(head[0])[:16])) is not None


def _plain_base64(text: str) -> str:
    """Without line breaks, in the alphabet of `+` and `/`, padded."""
    text = "".join(text.split()).translate(_URL_SAFE)
    return text + "=" * (-len(text) % 4)


def decode_base64(text: str, field: str) -> bytes:
    """Raises: SampleError for what is not base64, or nothing."""
    try:
        data = base64.b64decode(_plain_base64(text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError(field, f"not base64: {error}") from None
    if not data:
        raise SampleError(field, "expected the bytes of a file in base64, got none")
    return data


def _payload_keys(kind: MediaKind) -> tuple[str, ...]:
    """Content comes before a path, since data sets store both and the path is then only a name."""
    return (*_BYTES_KEYS, *(("array",) if kind == "audio" else ()), kind, "path", "url", f"{kind}_url")


def names_clip(item: Mapping[str, Any], kind: MediaKind) -> bool:
    """Whether a media dict says which clip it is, rather than only mark a place."""
    return any(item.get(key) for key in _payload_keys(kind))


def _payload(item: Mapping[str, Any], kind: MediaKind, field: str) -> tuple[Any, dict[str, Any]]:
    """What a media dict holds, and what stands beside it without being null."""
    keys = _payload_keys(kind)
    beside = {str(key): value for key, value in item.items() if value is not None and key not in keys}
    for key in keys:
        value = item.get(key)
        if isinstance(value, Mapping):
            value, inner = _payload(value, kind, field)
            return value, {**beside, **inner}
        if value and key == "array":
            return _wav_of(value, item.get("sampling_rate"), field), beside
        if value:
            is_text = key in _BYTES_KEYS and isinstance(value, str) and not value.startswith("data:")
            return decode_base64(value, field) if is_text else value, beside
    known = f"one of {', '.join((kind, 'path', 'url', *_BYTES_KEYS))}"
    raise SampleError(field, f"expected a file under {known}; got none under {', '.join(map(str, item)) or '{}'}")


def _wav_of(samples: Any, rate: Any, field: str) -> bytes:
    """Samples of one channel in [-1, 1], as `datasets` decodes sound, as a file. Raises: SampleError."""
    if not isinstance(rate, int) or not 0 < rate < 1 << 30:
        raise SampleError(f"{field}.sampling_rate", f"expected the rate of the array in Hz, got {str(rate)[:60]!r}")
    try:
        data = struct.pack(f"<{len(samples)}f", *samples)
    except (struct.error, OverflowError, TypeError) as error:
        raise SampleError(f"{field}.array", f"expected a list of numbers, of one channel: {error}") from None
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVE" + form + b"data" + struct.pack("<I", len(data)) + data


def as_clips(kind: MediaKind, value: Any) -> list[Any]:
    """What a row has under the key of a kind, as a list. Raises: SampleError."""
    if value is None:
        return []
    if isinstance(value, str) and value.startswith("["):  # as tables and some columns hold lists
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, Mapping):  # a column of clips has the keys of one even where a row has none
        return [value] if any(item is not None for item in value.values()) else []
    if isinstance(value, bytes):
        return [value]
    if not isinstance(value, list | tuple):
        raise SampleError(f"{kind}s", f"expected a list of {kind}s, got {type(value).__name__}: {str(value)[:60]!r}")
    return list(value)
