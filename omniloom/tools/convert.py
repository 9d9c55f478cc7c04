"""`omniloom convert`: rows of another format written in the messages form, for those who want the file.

Training reads every format as it is; nothing has to be converted first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omniloom.config import DataConfig
from omniloom.data.formats import FORMATS, parse_row, row_options
from omniloom.data.sources import open_sources
from omniloom.types import Conversation, SampleError, Turn


def convert_file(kind: str, source: Path, target: Path, *, media_dir: Path | None = None) -> tuple[int, list[str]]:
    """Write `source`, rows of format `kind`, as JSON lines of messages to `target`.

    Media stay where they are: their paths are written as the rows give them, relative to `media_dir` (the source's
    folder). Returns the number of rows written and a line for each that was left out, a missing file among the reasons.
    Raises: ValueError for an unknown format and for a target that exists.
    """
    if kind not in FORMATS:
        raise ValueError(f"unknown format {kind!r}; expected one of {', '.join(FORMATS)}")
    if target.exists():
        raise ValueError(f"{target} exists and nothing is overwritten; name another file")
    root = (media_dir or source.parent).resolve()
    options = row_options(DataConfig(format=kind, media_dir=str(root)))
    rows = open_sources((str(source),))
    problems: list[str] = []
    num_written = 0
    with target.open("x", encoding="utf-8") as file:
        for index in range(len(rows)):
            where = "{}:{}".format(*rows.locate(index))
            try:
                row, name, line = rows.read(index)
                conversation = parse_row(row, file=name, line=line, options=options)
                _require_files(conversation)
            except SampleError as error:
                problems.append(f"{where}: {error}")
                continue
            file.write(json.dumps(messages_row(conversation, root), ensure_ascii=False) + "\n")
            num_written += 1
    return num_written, problems


def messages_row(conversation: Conversation, root: Path) -> dict[str, Any]:
    """A conversation as a row of the messages format; media paths relative to `root` where they lie below it."""
    row: dict[str, Any] = {"id": conversation.id, "messages": [_message(turn) for turn in conversation.turns]}
    for media, kind in _media(conversation):
        path = Path(media.path).resolve()
        row.setdefault(f"{kind}s", []).append(str(path.relative_to(root) if path.is_relative_to(root) else path))
    if conversation.tools:
        row["tools"] = list(conversation.tools)
    return row


def _message(turn: Turn) -> dict[str, Any]:
    text = ""
    for part in turn.parts:
        if part.media is not None:
            text += f"<{part.kind}>"
        elif part.kind == "tool_call":
            text += f"<tool_call>\n{part.text}\n</tool_call>"
        elif part.kind == "reasoning":
            text += f"<think>\n{part.text}\n</think>\n\n"
        else:
            text += part.text
    message: dict[str, Any] = {"role": turn.role, "content": text}
    return message if turn.weight is None else {**message, "loss_scale": turn.weight}


def _media(conversation: Conversation) -> Iterator[tuple[Any, str]]:
    for turn in conversation.turns:
        for part in turn.parts:
            if part.media is not None:
                yield part.media, part.kind


def _require_files(conversation: Conversation) -> None:
    for media, kind in _media(conversation):
        if media.path is None:
            raise SampleError(f"{kind}s", "embedded media cannot be written as a path")
        if not Path(media.path).is_file():
            raise SampleError(f"{kind}s", f"{media.path} does not exist")
