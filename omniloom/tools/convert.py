"""`omniloom convert`: rows of another format written in the messages form, as a file or as tar shards.

Training reads every format as it is; nothing has to be converted first. What is written reads back as the same
conversation: clips stand in the content with their options, so that `<image>` in a text is only a word.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from omniloom.config import Config, DataConfig, override_config
from omniloom.data.clip_options import option_words
from omniloom.data.formats import FORMATS, parse_row
from omniloom.data.sources import open_sources
from omniloom.options import Format, VideoConfig
from omniloom.run.rows import ROW_KEYS
from omniloom.tools.write_shards import SampleParts, ShardWriter
from omniloom.types import Conversation, MediaKind, MediaSource, Part, SampleError, Speech, Turn, suggest

SHARDS = "webdataset"
TAKES = (*ROW_KEYS, "data.allow_urls")


def convert_file(kind: str, source: Path, target: Path, overrides: Sequence[str] = ()) -> tuple[int, list[str], int]:
    """Write `source`, rows of format `kind`, as JSON lines of messages to `target`, their media staying where they are.

    Paths of media are written as seen from the target's folder where they lie below it, else in full; embedded media
    are written as data URIs. For the kind `webdataset` the target is a folder of tar shards that hold the media, too,
    bytes unchanged, and the source may have any format.
    Returns the number of rows written, a line for each that was left out (a missing file among the reasons), and how
    many files lie outside of the target's folder, which training reads under `data.allow_outside_media_dir` alone.
    Raises: ValueError for an unknown format, for a target that exists, and where no row can be written.
    """
    if kind not in ("auto", SHARDS, *FORMATS):
        known = (SHARDS, *FORMATS)
        raise ValueError(f"unknown format {kind!r}{suggest(kind, known, among='expected auto or one of')}")
    if target.exists():
        raise ValueError(f"{target} exists and nothing is overwritten; name another place")
    usual = Config(data=DataConfig(allow_urls=True, allow_outside_media_dir=True))
    options = override_config(usual, overrides, verb="convert", takes=TAKES).data
    if kind == SHARDS:
        with ShardWriter(target) as shards:
            return *_convert_rows(source, options, SampleParts, shards.add), 0
    options = replace(options, format=cast(Format, kind))
    folder = InFolder(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("x", encoding="utf-8") as file:
        done = _convert_rows(
            source,
            options,
            lambda: folder,
            lambda written, _: file.write(json.dumps(written, ensure_ascii=False) + "\n"),
        )
    if not done[0]:
        target.unlink()  # which would refuse the next attempt
        raise ValueError(f"none of the {len(done[1])} rows can be written: {done[1][0]}")
    return *done, len(folder.outside)


def _convert_rows(
    source: Path, options: DataConfig, open_place: Callable[[], Any], write: Callable[[dict[str, Any], Any], object]
) -> tuple[int, list[str]]:
    rows = open_sources((str(source),), options)
    problems: list[str] = []
    for index in range(len(rows)):
        place = open_place()
        try:
            row, name, line = rows.read_row(index)
            written = convert_row(row, name, line, options, place)
        except SampleError as error:
            problems.append("{}:{}: {}".format(*rows.locate(index), error))
            continue
        write(written, place)
    return len(rows) - len(problems), problems


def convert_row(row: dict[str, Any], file: str, line: int, options: DataConfig, place: Place) -> dict[str, Any]:
    """A row as one of the messages form, with its media where `place` says. Raises: SampleError."""
    # what a row leaves to the config of a run is what reads otherwise under another
    asked = replace(options, video=VideoConfig(use_audio=True, fps=options.video.fps + 1))
    usual, other = (parse_row(row, file=file, line=line, options=config) for config in (options, asked))
    writer = _TurnWriter(place, _clips(other, "video"), os.path.dirname(file))
    found: dict[str, Any] = {"id": usual.id}
    found["messages"] = [message for turn in usual.turns for message in writer.messages(turn)]
    if boxes := [box for turn in usual.turns for part in turn.parts for box in part.boxes]:
        found["objects"] = [
            {"bbox": list(box.points), "bbox_type": box.unit} | ({box.kind: box.clip} if box.kind else {})
            for box in boxes
        ]
    if usual.tools:
        found["tools"] = list(usual.tools)
    return found if usual.weight == 1.0 else {**found, "weight": usual.weight}


class InFolder:
    """Media that stay where they are, as seen from a file in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.abspath(folder)
        self.outside: set[str] = set()

    def file(self, path: str, kind: MediaKind) -> str:
        if not path.startswith(("data:", "http://", "https://")) and not os.path.isfile(path):
            raise SampleError(kind, f"{path} does not exist")
        found = self.recording(path)
        if os.path.isabs(found):
            self.outside.add(found)
        return found

    def data(self, content: bytes, kind: MediaKind) -> str:
        return "data:;base64," + base64.b64encode(content).decode()

    def recording(self, path: str) -> str:
        """The name of a file that training does not read, whether it is there or not."""
        is_below = path.startswith(self._folder.rstrip(os.sep) + os.sep)
        return os.path.relpath(path, self._folder) if is_below else path


Place = InFolder | SampleParts  # where a written row finds its media, and what it calls them


class _TurnWriter:
    """Writes turns; `others` are the row's videos in order, as another config reads them, `folder` that of the row."""

    def __init__(self, place: Place, others: Iterator[MediaSource], folder: str) -> None:
        self._place = place
        self._others = others
        self._folder = folder

    def messages(self, turn: Turn) -> Iterator[dict[str, Any]]:
        """A turn as one message, and further ones of calls from the first on that has a weight of its own."""
        weighted = next((at for at, part in enumerate(turn.parts) if part.weight is not None), len(turn.parts))
        message = {"role": turn.role, **self._fields(turn, turn.parts[:weighted]), **self._speech(turn.speech)}
        yield message if turn.weight is None else {**message, "loss_scale": turn.weight}
        runs: list[list[Part]] = []
        for part in turn.parts[weighted:]:
            last = runs[-1][-1] if runs else None
            if last is None or last.weight != part.weight or last.kind == part.kind == "text":
                runs.append([])
            runs[-1].append(part)
        for run in runs:
            weight = turn.weight if run[0].weight is None else run[0].weight
            call = {"role": "tool_call", "content": "".join(map(_tagged, run))}
            yield call if weight is None else {**call, "loss_scale": weight}

    def _fields(self, turn: Turn, parts: Sequence[Part]) -> dict[str, Any]:
        """Reasoning, content and calls in fields of their own where they come in this order, else all as content."""
        num_thoughts = int(bool(parts) and parts[0].kind == "reasoning")
        num_calls = next((n for n, part in enumerate(reversed(parts)) if part.kind != "tool_call"), len(parts))
        said = parts[num_thoughts : len(parts) - num_calls]
        in_order = turn.role == "assistant" and all(part.kind not in ("reasoning", "tool_call") for part in said)
        if not in_order:
            return {"content": self._content(parts)}
        found: dict[str, Any] = {"reasoning_content": parts[0].text} if num_thoughts else {}
        found["content"] = self._content(said)
        if num_calls:
            calls = [_call(part.text) for part in parts[-num_calls:]]
            found["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return found

    def _speech(self, speech: Speech | None) -> dict[str, Any]:
        if speech is None:
            return {}
        codes = list(map(list, speech.codes)) if speech.source is None else self._file(speech.source, "audio")
        found = {"speech": codes, "speaker": speech.speaker}
        if speech.recording:
            found["recording"] = self._place.recording(os.path.join(self._folder, speech.recording))
        return {name: value for name, value in found.items() if value}

    def _content(self, parts: Sequence[Part]) -> str | list[dict[str, Any]]:
        texts = [part.text for part in parts if part.kind == "text"]
        if len(parts) == len(texts) < 2 and "<" not in "".join(texts):  # else a tag might be read as one
            return "".join(texts)
        return [block for part in parts for block in self._blocks(part)]

    def _blocks(self, part: Part) -> list[dict[str, Any]]:
        if part.kind == "tool_call":
            return [{"type": "tool_call", "tool_call": _call(part.text)}]
        if part.media is None:
            name = "thinking" if part.kind == "reasoning" else "text"
            return [{"type": name, name: part.text}]
        clip, kind = part.media, cast(MediaKind, part.kind)
        options = option_words(kind, clip.options)
        if part.kind == "video":
            other = next(self._others)
            if clip.use_audio == other.use_audio:
                options["use_audio_in_video"] = clip.use_audio
            if clip.options.fps != other.options.fps:
                del options["fps"]
        block = {"type": part.kind, part.kind: self._file(clip, kind), **options}
        return [block] if clip.sound is None else [block, *self._blocks(Part(kind="audio", media=clip.sound))]

    def _file(self, clip: MediaSource, kind: MediaKind) -> str | list[str]:
        if clip.data is not None:
            return self._place.data(clip.data, kind)
        if clip.frames is not None:
            return [self._place.file(frame, "image") for frame in clip.frames]
        assert clip.path is not None
        return self._place.file(clip.path, kind)


def _tagged(part: Part) -> str:
    if part.kind == "text":
        return part.text
    return f"<tool_call>\n{json.dumps(_call(part.text), ensure_ascii=False)}\n</tool_call>"


def _call(text: str) -> dict[str, Any]:
    """A call whose arguments stay JSON text, since their spacing is trained."""
    call: dict[str, Any] = json.loads(text)
    start = len(f'{{"name": {json.dumps(call["name"], ensure_ascii=False)}, "arguments": ')
    _, end = json.JSONDecoder().raw_decode(text, start)
    return {**call, "arguments": text[start:end]}


def _clips(conversation: Conversation, kind: str) -> Iterator[MediaSource]:
    parts = (part for turn in conversation.turns for part in turn.parts if kind == part.kind)
    return (part.media for part in parts if part.media is not None)
