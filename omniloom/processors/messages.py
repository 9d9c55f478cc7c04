"""A conversation's turns as the messages that chat templates take, in the form that a template was found to take.

Owns where text, media, reasoning and tool calls go in a message, and tells of every piece of text that goes there, so
that it can be found again in what the template writes. Used by `rendering` and `turn_places`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from omniloom.processors.chat_template import ChatTemplate, Message
from omniloom.types import Part, SampleError, Turn

MEDIA_KINDS = ("image", "video", "audio")

_CALL = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A piece of a conversation's text as it goes into a message."""

    text: str
    turn: int
    part: int
    is_json: bool = False  # arguments of a call: the template gets the value, and writes it in a way of its own


def messages_of(turns: Sequence[Turn], template: ChatTemplate, put: Callable[[Leaf], str]) -> list[Message]:
    """The turns as templates take them, with what `put` makes of every piece of text that is not blank."""
    forms, words = template.forms, template.media_words

    def place(text: str, turn: int, part: int, *, is_json: bool = False) -> str:
        return put(Leaf(text=text, turn=turn, part=part, is_json=is_json)) if text.strip() else text

    messages: list[Message] = []
    for index, turn in enumerate(turns):
        message: Message = {"role": turn.role}
        said: list[dict[str, str]] = []
        reasoning = "\n".join(part.text for part in turn.parts if part.kind == "reasoning")
        if reasoning:
            first = next(i for i, part in enumerate(turn.parts) if part.kind == "reasoning")
            message["reasoning_content"] = message["thinking"] = place(reasoning, index, first)
        calls: list[dict[str, Any]] = []
        for number, part in enumerate(turn.parts):
            if part.kind in MEDIA_KINDS:
                typed = forms[turn.role] == "typed" and part.kind in template.typed_media
                said.append({"type": part.kind, part.kind: "clip"} if typed else _text(words[part.kind]))
            elif part.kind == "text":
                said.append(_text(place(part.text, index, number)))
            elif turn.role != "assistant":
                raise SampleError("messages", f"only an assistant's turn may hold a {part.kind}")
            elif part.kind == "tool_call":
                calls.append(_call(part, template, index, number, place))
        string = forms[turn.role] == "string"
        message["content"] = "".join(item["text"] for item in said) if string else said
        if calls:
            message["tool_calls"] = calls
        messages.append(message)
    return messages


def _call(part: Part, template: ChatTemplate, index: int, number: int, place: Callable[..., str]) -> dict[str, Any]:
    call = json.loads(part.text)
    if not isinstance(call, dict):
        raise SampleError("messages", f"expected a tool call as a JSON object, got {part.text[:60]!r}")
    arguments, spelled = call.get("arguments", {}), _spelling_of_arguments(part.text)
    name = place(str(call.get("name", "")), index, number)
    if spelled is not None and template.keeps_spelling and spelled != spell(arguments):
        arguments = place(spelled, index, number)
    else:
        arguments = json.loads(place(spell(arguments), index, number, is_json=True))
    return {"type": "function", "function": call | {"name": name, "arguments": arguments}}


def collect(leaves: list[Leaf]) -> Callable[[Leaf], str]:
    def put(leaf: Leaf) -> str:
        leaves.append(leaf)
        return leaf.text

    return put


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def spell(value: Any) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def _spelling_of_arguments(call: str) -> str | None:
    """The arguments of a call's JSON, letter by letter."""
    if (match := _CALL.match(call)) is None:
        return None
    _, end = json.JSONDecoder().raw_decode(call, match.end())
    return call[match.end() : end]
