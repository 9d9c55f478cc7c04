"""One row of a data file becomes one `Conversation`, whichever of the eight known formats it is written in.

Owns the spellings of formats, roles and content. It knows no tokenizer and no template, and opens no media; what a
row says is kept whole: text beside tool calls, the order of parallel calls, reasoning, weights per turn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, Literal, get_args

from omniloom.config import DataConfig
from omniloom.data.row_media import KINDS, PARTS, RowMedia, as_clips, join_sound, names_clip
from omniloom.data.row_objects import RowObjects
from omniloom.data.speech import read_speech
from omniloom.data.tool_calls import parse_tool_calls, parse_tools, tool_call_part, write_json
from omniloom.options import FieldNames, Format
from omniloom.types import Conversation, MediaKind, Part, Role, SampleError, Speech, Turn

FORMATS: tuple[str, ...] = get_args(Format)[1:]
_TurnKind = Literal["system", "user", "assistant", "tool", "tool_call"]
_ROLES: dict[str, _TurnKind] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_call": "tool_call",
    "function_call": "tool_call",
}
_MEDIA_BLOCKS: dict[str, MediaKind] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
_PAIRED = ("alpaca", "query_response")
_DIALOGUE_KEYS = ("messages", "conversations", "conversation")
_MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios", "use_audio_in_video")
_ROW_KEYS = {*_MEDIA_KEYS, "objects", "tools", "system", "id", "weight"}  # of every format
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_CALL_KEYS = ("tool_calls", "function_call")
_WEIGHT_KEYS = ("loss", "loss_scale", "weight")
_SAID_KEYS = ("role", "from", "content", "value", "tool_call_id", "speech", "speaker", "recording")
_TURN_KEYS = {*_REASONING_KEYS, *_CALL_KEYS, *_WEIGHT_KEYS, *_SAID_KEYS}
_LARGEST_WEIGHT = 1e30  # sums of them stay within float32


# ---------------------------------------------------------------------------------------- detection


def detect_format(row: Mapping[str, Any], names: FieldNames | None = None) -> str:
    """The name of the format that a row is written in, by its keys. Raises: SampleError for none."""
    names = names or FieldNames()
    turns = _dialogue(row, names)
    if turns is not None:
        return _detect_dialogue(row, turns, names)
    pairs = {name: [row.get(key) for key in _pair_keys(row, name, names)] for name in _PAIRED}
    asked = [name for name, (question, _) in pairs.items() if question is not None]
    if not asked and any(_clips_beside(row, getattr(names, f"{kind}s"), kind) for kind in KINDS):  # are asked about
        asked = [name for name, (_, answer) in pairs.items() if answer is not None]
    if asked:  # whoever has an answer too first: an Alpaca row may have a `query`, and the other way round
        return next((name for name in asked if pairs[name][1] is not None), asked[0])
    wanted = {
        name: getattr(names, name) for name in ("messages", "prompt", "query", "response", "images", "videos", "audios")
    }
    lacking = [f"{name}={key}" for name, key in wanted.items() if key is not None and row.get(key) is None]
    hint = f"data.attr says {', '.join(lacking)}, of which this row has nothing" if lacking else ""
    raise SampleError(
        "row",
        f"no known format has the keys {', '.join(map(str, row)) or '(none)'}; expected messages, conversations, "
        f"instruction and output, or query and response; {hint or 'data.attr maps other names to these'}",
    )


def describe_format(row: Mapping[str, Any], options: DataConfig) -> str:
    """One line for the log: a row's format, the keys it is read from and those that nothing reads.

    Raises: SampleError where no format fits.
    """
    set_by_hand = _format_of(options)
    name = detect_format(row, options.attr) if set_by_hand is None else set_by_hand
    renamed = {value for item in fields(FieldNames) if (value := getattr(options.attr, item.name)) is not None}
    present = [str(key) for key, value in row.items() if value is not None and key != PARTS]
    known = _ROW_KEYS | _keys_of_format(row, name, options.attr)
    read = [key for key in present if key in known or key in renamed]
    ignored = [key for key in present if key not in read]
    turns = _dialogue(row, options.attr)
    messages = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list | tuple) else []
    if of_turns := sorted({key for message in messages for key in _unread(message, options.attr)}):
        ignored.append(f"{'and ' * bool(ignored)}of turns {', '.join(of_turns)}")
    line = f"format {name} ({'detected' if set_by_hand is None else 'set by data.format'}), read from {', '.join(read)}"
    return line + (f"; not read: {', '.join(ignored)}" if ignored else "")


def _keys_of_format(row: Mapping[str, Any], name: str, names: FieldNames) -> set[str]:
    """Where a row of a format has what is said."""
    if name not in _PAIRED:
        return {_key(row, names.messages, *_DIALOGUE_KEYS)}
    more = {_key(row, names.query, "input")} if name == "alpaca" else set()
    return {*_pair_keys(row, name, names), _key(row, names.history, "history"), *more}


def _dialogue(row: Mapping[str, Any], names: FieldNames) -> Any:
    """What a row has in place of its turns; ms-swift's `{"human": ..., "assistant": ...}` are two of them."""
    turns = _of_json(_find(row, names.messages, *_DIALOGUE_KEYS))
    if not isinstance(turns, list | tuple):
        return turns
    said: list[Any] = []
    for turn in turns:
        by_role = isinstance(turn, Mapping) and turn and turn.keys() <= _ROLES.keys()
        said += [{"role": role, "content": content} for role, content in turn.items()] if by_role else [turn]
    return said


def _unread(message: Mapping[str, Any], names: FieldNames) -> list[str]:
    """What has something in a turn and is not read."""
    known = {*_TURN_KEYS, names.role_tag, names.content_tag}
    return [str(key) for key, value in message.items() if value is not None and key not in known]


def _format_of(options: DataConfig) -> str | None:
    """The format that the config names, in its own key or where the guides do."""
    return next((name for name in (options.format, options.attr.formatting) if name not in (None, "auto")), None)


def _detect_dialogue(row: Mapping[str, Any], turns: Any, names: FieldNames) -> str:
    if not isinstance(turns, list | tuple):
        return "messages"
    messages = [turn for turn in turns if isinstance(turn, Mapping)]
    if any("from" in message for message in messages):
        return "llava" if row.get("image") is not None else "sharegpt"
    contents = [_find(message, names.content_tag, "content", "value") for message in messages]
    blocks = [block for content in contents for block in _blocks(content)]
    if any(_type(block) in ("tool_use", "tool_result", "thinking") for block in blocks) or any(
        _find(block, "source") is not None for block in blocks
    ):
        return "anthropic"
    openai_keys = ("tool_calls", "function_call", "tool_call_id", "reasoning_content")
    if blocks or any(_find(message, *openai_keys) is not None for message in messages):
        return "openai"
    roles = [_find(message, names.role_tag, "role") for message in messages]
    return "multimodal_tool" if "tool_call" in roles or "tool_response" in roles else "messages"


# ---------------------------------------------------------------------------------------- parsing


def parse_row(
    row: Mapping[str, Any], *, file: str, line: int, options: DataConfig, needs_answer: bool = True
) -> Conversation:
    """Turn one row into a conversation. Raises: SampleError that names the field and what is wrong with it."""
    names = options.attr
    name = _format_of(options) or detect_format(row, names)
    messages = _pairs(row, name, names, needs_answer) if name in _PAIRED else _messages(row, name, names)
    objects = RowObjects(row["objects"]) if row.get("objects") else None
    media = RowMedia(
        {kind: _clips_beside(row, getattr(names, f"{kind}s"), kind) for kind in KINDS},
        objects=objects,
        file=file,
        rules=options,
        use_audio=_of_json(row.get("use_audio_in_video")),
        parts=_parts_of(row),
        typed=any(_blocks(_find(message, names.content_tag, "content", "value")) for message in messages),
    )
    turns: list[Turn] = []
    system = _find(row, names.system, "system")
    if system:
        turns.append(Turn(role="system", parts=tuple(_content(system, "system", media))))
    turns += _TurnReader(names, media).read_turns(messages)
    if system and any(turn.role == "system" for turn in turns[1:2]):
        raise SampleError("system", "the row has both a system field and a system turn; keep one")
    turns = media.place_rest(turns)
    if objects is not None:
        objects.check_placed([part.kind for turn in turns for part in turn.parts])
    if needs_answer and not any(turn.role == "assistant" and turn.parts for turn in turns):
        raise SampleError("messages", "no assistant answer in the row: there is nothing to train on")
    source = f"{file}:{line}"
    conversation = Conversation(
        id=source if row.get("id") is None else str(row["id"]),
        source=source,
        turns=tuple(turns),
        tools=parse_tools(_find(row, names.tools, "tools")),
        weight=1.0 if row.get("weight") is None else _weight_number(row["weight"], "weight"),
    )
    _refuse_half_characters(conversation)
    return conversation


def _parts_of(row: Mapping[str, Any]) -> dict[str, bytes]:
    parts = row.get(PARTS)
    return {name: part for name, part in parts.items() if isinstance(part, bytes)} if isinstance(parts, dict) else {}


def _messages(row: Mapping[str, Any], name: str, names: FieldNames) -> list[Mapping[str, Any]]:
    turns = _dialogue(row, names)
    key = names.messages or ("conversations" if name in ("sharegpt", "llava") else "messages")
    if turns is None:
        raise SampleError(key, f"the {name} format needs it, the row has only {', '.join(map(str, row)) or 'nothing'}")
    if not isinstance(turns, list | tuple) or not turns:
        raise SampleError(key, f"expected a list of turns, got {str(turns)[:60]!r}")
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise SampleError(f"{key}[{index}]", f"expected an object with a role and content, got {str(turn)[:60]!r}")
    return list(turns)


def _clips_beside(row: Mapping[str, Any], renamed: str | None, kind: MediaKind) -> list[Any]:
    """The clips of a kind beside the dialogue, under the singular and the plural key in the order of the row."""
    if renamed is not None and not _is_empty(row.get(renamed)):
        return as_clips(kind, row[renamed])
    return [clip for key in row if key in (kind, f"{kind}s") for clip in as_clips(kind, row[key])]


def _pairs(row: Mapping[str, Any], name: str, names: FieldNames, needs_answer: bool) -> list[Mapping[str, Any]]:
    """The instruction and query/response formats written as messages, history first."""
    question, answer = _pair_keys(row, name, names)
    clips = {kind: len(_clips_beside(row, getattr(names, f"{kind}s"), kind)) for kind in KINDS}
    is_asked = row.get(question) is not None or not any(clips.values())
    # clips alone, as in a table of recordings and their words, are what is asked about
    prompt = _words(row, question) if is_asked else "".join(f"<{kind}>" * clips[kind] for kind in KINDS)
    more = _key(row, names.query, "input")
    extra = row.get(more) if name == "alpaca" and more not in (question, answer) else None  # `attr` may name it so
    if extra is not None and not isinstance(extra, str):
        raise SampleError("input", f"expected text, got {type(extra).__name__}: {str(extra)[:60]!r}")
    if extra:
        prompt = f"{prompt}\n{extra}" if prompt else extra
    history = _find(row, names.history, "history") or []
    messages: list[Mapping[str, Any]] = []
    for index, pair in enumerate(history if isinstance(history, list | tuple) else [history]):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise SampleError(f"history[{index}]", f"expected a pair [question, answer], got {str(pair)[:60]!r}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": prompt})
    if row.get(answer) is not None:
        messages.append({"role": "assistant", "content": _words(row, answer)})
    elif needs_answer:
        has = ", ".join(map(str, row))
        raise SampleError(answer, f"no answer to train on, the row has only {has}; data.attr.response maps other names")
    return messages


def _pair_keys(row: Mapping[str, Any], name: str, names: FieldNames) -> tuple[str, str]:
    """Where a row of the instruction or query/response format has its question and its answer."""
    if name == "query_response":
        return _key(row, names.query, "query"), _key(row, names.response, "response")
    return _key(row, names.prompt, "instruction", "prompt"), _key(row, names.response, "output")


def _key(row: Mapping[str, Any], *keys: str | None) -> str:
    """The first of the keys that has something in it, else the first that is there, else the first."""
    known = [key for key in keys if key is not None]
    there = [key for key in known if row.get(key) is not None]
    return next((key for key in there if not _is_empty(row[key])), (there or known)[0])


def _words(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise SampleError(key, f"expected text, got {type(value).__name__}: {str(value)[:60]!r}")
    return value


class _TurnReader:
    """Reads messages into turns with the row's names and media."""

    def __init__(self, names: FieldNames, media: RowMedia) -> None:
        self._names = names
        self._media = media
        tags: tuple[tuple[str | None, _TurnKind], ...] = (
            (names.user_tag, "user"),
            (names.assistant_tag, "assistant"),
            (names.observation_tag, "tool"),
            (names.function_tag, "tool_call"),
            (names.system_tag, "system"),
        )
        self._roles = _ROLES | {tag: kind for tag, kind in tags if tag}

    def read_turns(self, messages: list[Mapping[str, Any]]) -> list[Turn]:
        turns: list[Turn] = []
        previous: _TurnKind | None = None
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            kind = self._kind(message, where)
            weight = _turn_weight(message, where)
            content = self._content(message, where)
            speech = self._speech(message, kind, where)
            if kind == "user" or kind == "system":
                turns += self._said(kind, content, where, weight)
            elif kind == "tool_call" and previous in ("assistant", "tool_call"):  # calls beside text, or parallel
                calls = tuple(self._parts(kind, message, content, where))
                own = 1.0 if weight is None else weight
                if turns[-1].weight not in (weight, own):
                    calls = tuple(replace(part, weight=own) for part in calls)
                turns[-1] = replace(turns[-1], parts=turns[-1].parts + calls)
            else:
                role: Role = "tool" if kind == "tool" else "assistant"
                parts = tuple(self._parts(kind, message, content, where))
                turns.append(Turn(role=role, parts=parts, weight=weight, speech=speech))
            previous = kind
        return turns

    def _content(self, message: Mapping[str, Any], where: str) -> Any:
        """Raises: SampleError where what is said stands under a name that nothing reads."""
        content = _find(message, self._names.content_tag, "content", "value")
        if content is not None or _find(message, *_REASONING_KEYS, *_CALL_KEYS) is not None:
            return content
        if unread := ", ".join(_unread(message, self._names)):
            reason = f"nothing there, but under {unread}; data.attr.content_tag names the key of what is said"
            raise SampleError(f"{where}.content", reason)
        return None

    def _speech(self, message: Mapping[str, Any], kind: _TurnKind, where: str) -> Speech | None:
        renamed = (self._names.role_tag, self._names.content_tag)  # who speaks may be called `speaker`
        message = {key: value for key, value in message.items() if key not in renamed}
        if message.get("speech") is None and message.get("speaker") is None:
            return None
        if kind != "assistant":
            raise SampleError(f"{where}.speech", f"only an answer is spoken, this turn is of role {kind}")
        return read_speech(message, where, self._media)

    def _parts(self, kind: _TurnKind, message: Mapping[str, Any], content: Any, where: str) -> list[Part]:
        if kind == "tool":
            return _tool_content(content, where, self._media)
        if kind == "tool_call":
            return self._media.calls(parse_tool_calls(content, where))
        return self._assistant(message, content, where)

    def _kind(self, message: Mapping[str, Any], where: str) -> _TurnKind:
        role = _find(message, self._names.role_tag, "role", "from")
        if not isinstance(role, str) or role not in self._roles:
            known = ", ".join(sorted(self._roles))
            hint = "data.attr.user_tag, assistant_tag and so on name others"
            raise SampleError(f"{where}.role", f"unknown role {role!r}; known roles: {known}; {hint}")
        return self._roles[role]

    def _said(self, role: Role, content: Any, where: str, weight: float | None) -> list[Turn]:
        """A user or system message; Anthropic's tool results inside it become turns of their own, in order."""
        turns: list[Turn] = []
        run: list[Any] = []
        for block in content if isinstance(content, list | tuple) else []:
            if isinstance(block, Mapping) and _type(block) == "tool_result":
                if run:
                    turns.append(Turn(role=role, parts=tuple(_content(run, where, self._media)), weight=weight))
                    run = []
                parts = _tool_content(block.get("content"), where, self._media)
                turns.append(Turn(role="tool", parts=tuple(parts), weight=weight))
            else:
                run.append(block)
        if turns and not run:
            return turns
        return [
            *turns,
            Turn(role=role, parts=tuple(_content(run if turns else content, where, self._media)), weight=weight),
        ]

    def _assistant(self, message: Mapping[str, Any], content: Any, where: str) -> list[Part]:
        parts: list[Part] = []
        reasoning = _find(message, *_REASONING_KEYS)
        if reasoning is not None:
            if not isinstance(reasoning, str):
                key = _key(message, *_REASONING_KEYS)
                raise SampleError(f"{where}.{key}", f"expected text, got {str(reasoning)[:60]!r}")
            parts.append(Part(kind="reasoning", text=reasoning))
        parts += _content(content, where, self._media)
        calls = _find(message, *_CALL_KEYS)
        if calls is not None and calls != []:
            parts += self._media.calls(parse_tool_calls(calls, f"{where}.tool_calls"))
        return parts


# ---------------------------------------------------------------------------------------- content


def _content(content: Any, where: str, media: RowMedia) -> list[Part]:
    """Text with placeholders, or a list of typed blocks, as parts."""
    if content is None:
        return []
    if isinstance(content, str):
        return join_sound(media.split_text(content))
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list | tuple):
        raise SampleError(f"{where}.content", f"expected text or a list of blocks, got {type(content).__name__}")
    parts: list[Part] = []
    for index, block in enumerate(content):
        parts += _block(block, f"{where}.content[{index}]", media)
    return join_sound(parts)


def _block(block: Any, where: str, media: RowMedia) -> list[Part]:
    if isinstance(block, str):
        return media.split_text(block)
    if not isinstance(block, Mapping):
        raise SampleError(where, f"expected a block with a type, got {str(block)[:60]!r}")
    kind = _type(block)
    is_text = kind in ("text", "input_text", "output_text")
    others = tuple(_MEDIA_BLOCKS) if is_text else ("text",) if kind in _MEDIA_BLOCKS else ()
    if beside := [key for key in others if _holds(block.get(key))]:
        raise SampleError(where, f"a block of type {kind} with {beside[0]} beside it; give each a block of its own")
    if is_text:
        text = block.get("text")
        if not isinstance(text, str):
            raise SampleError(where, f"expected a text block with its text, got {str(text)[:60]!r}")
        return media.split_text(text)
    if kind == "thinking":
        return [Part(kind="reasoning", text=str(block.get("thinking") or "").strip("\n"))]
    if kind == "tool_use":
        return media.calls([tool_call_part({"name": block.get("name"), "arguments": block.get("input")}, where)])
    if kind == "tool_call":
        return media.calls([tool_call_part(block.get("tool_call"), where)])
    if kind in _MEDIA_BLOCKS:
        clip_kind, item = _MEDIA_BLOCKS[kind], _block_item(block, kind)
        return [media.clip(clip_kind, item, where) if names_clip(item, clip_kind) else media.next_clip(clip_kind, item)]
    known = sorted({"text", "thinking", "tool_call", "tool_use", "tool_result", *_MEDIA_BLOCKS})
    raise SampleError(where, f"unknown block type {kind!r}; known types: {', '.join(known)}")


def _block_item(block: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A media block as a dict of its clip, if it names one, and the options beside it."""
    inner = block["source"] if isinstance(block.get("source"), Mapping) else block.get(kind)  # the first is Anthropic's
    rest = {key: item for key, item in block.items() if item is not None and key not in ("text", "source", kind)}
    return rest if inner is None else {**rest, _MEDIA_BLOCKS[kind]: inner}


def _holds(value: Any) -> bool:
    return any(value.values()) if isinstance(value, Mapping) else not _is_empty(value)


def _blocks(content: Any) -> list[Mapping[str, Any]]:
    return [block for block in content if isinstance(block, Mapping)] if isinstance(content, list | tuple) else []


def _type(block: Mapping[str, Any]) -> str:
    """The type of a block, or what its keys say where it has none; always text, whatever the row holds there."""
    kind = block.get("type")
    if kind is None:
        kind = next((key for key in ("text", *_MEDIA_BLOCKS) if block.get(key) is not None), None)
    return str(kind)


def _tool_content(content: Any, where: str, media: RowMedia) -> list[Part]:
    """A tool's answer: text, blocks, or any JSON value, which is written out."""
    is_blocks = isinstance(content, list | tuple) and all(
        isinstance(block, Mapping) and _type(block) in ("text", *_MEDIA_BLOCKS) for block in content
    )
    if content is not None and not isinstance(content, str) and not is_blocks:
        content = write_json(content, where)
    return _content(content, where, media)


def _refuse_half_characters(conversation: Conversation) -> None:
    """Halves of surrogate pairs, which JSON can spell and UTF-8 cannot. Raises: SampleError."""
    named = [("id", conversation.id), *(("tools", tool) for tool in conversation.tools)]
    named += [(f"turn {index}", part.text) for index, turn in enumerate(conversation.turns) for part in turn.parts]
    for where, text in named:
        try:
            text.isascii() or text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"half a surrogate pair at character {error.start}: {text[error.start]!r}"
            raise SampleError(where, found) from None


# ---------------------------------------------------------------------------------------- weights and names


def _turn_weight(message: Mapping[str, Any], where: str) -> float | None:
    given = [_weight_number(message[key], f"{where}.{key}") for key in _WEIGHT_KEYS if message.get(key) is not None]
    return math.prod(given) if given else None


def _weight_number(value: Any, where: str) -> float:
    number = _of_json(value) if isinstance(value, str) else value  # tables hold text alone
    if not isinstance(number, int | float) or not (0 <= number <= _LARGEST_WEIGHT):
        raise SampleError(
            where, f"expected true, false or a number from 0 to {_LARGEST_WEIGHT:g}, got {str(value)[:60]}"
        )
    return float(number)


def _of_json(value: Any) -> Any:
    """What text says where it is JSON of more than text, as tables and some columns hold lists; else the value."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            return value if isinstance(found, str) else found
    return value


def _find(mapping: Mapping[str, Any], *keys: str | None) -> Any:
    """The value of the first key that has something in it, else of the first that is there."""
    return mapping.get(_key(mapping, *keys))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | tuple | Mapping) and not value)
