"""Options as annotated dataclasses: how a key says its type, its range and what it does, and how values are read by it.

Here are also the sections that parts below the config take as they are: what a row's fields are called, and what may be
changed about a checkpoint's processor. `config.py` puts the whole tree together. Imports nothing slow.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml

from omniloom.types import suggest


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a key of the config allows, for `Annotated`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def broken_by(self, value: float) -> str | None:
        """What is expected where a number is outside, in words; NaN is outside of each range, and so is infinity."""
        if abs(value) == math.inf:  # of whole numbers of any size, too
            return "a finite number"
        for words, is_inside, limit in (
            ("at least", operator.ge, self.ge),
            ("more than", operator.gt, self.gt),
            ("at most", operator.le, self.le),
            ("less than", operator.lt, self.lt),
        ):
            if limit is not None and not is_inside(value, limit):
                return f"{words} {limit:g}"
        return None


Count = Annotated[int, Range(ge=1)]
CountOrZero = Annotated[int, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]
NotNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]
Decay = Annotated[float, Range(ge=0, lt=1)]
Format = Literal[
    "auto", "sharegpt", "messages", "openai", "anthropic", "alpaca", "llava", "multimodal_tool", "query_response"
]


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    min_pixels: Annotated[Count | None, "smaller images are enlarged; null is the checkpoint's value"] = None
    max_pixels: Annotated[Count | None, "larger ones are scaled down: fewer tokens; null is the checkpoint's"] = None
    limit_pixels: Annotated[Count, "a larger file is refused before it is decoded"] = 178_956_970  # pillow's bound


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    min_pixels: Annotated[Count | None, "per frame; null is the checkpoint's value"] = None
    max_pixels: Annotated[Count | None, "per frame; null is the checkpoint's value"] = None
    fps: Annotated[Positive, "frames taken per second; more for quick motion, fewer for long videos"] = 2.0
    max_frames: Annotated[int, Range(ge=2), "frames taken at most; those of a longer video lie further apart"] = 128
    use_audio: Annotated[bool, "interleave the sound of videos whose rows do not say; where answers need it"] = False
    no_audio: Annotated[Literal["error", "video_only"], "where sound is asked for and there is none"] = "error"
    limit_seconds: Annotated[Positive, "a longer file is refused before it is decoded"] = 7200.0


@dataclass(frozen=True, kw_only=True)
class ProcessorOptions:
    """What a run may change about a checkpoint's processor: part of the config's section `data`."""

    template: Annotated[str, "chat template; auto is the checkpoint's"] = "auto"
    system: Annotated[str | None, "system prompt of rows that have no system turn"] = None
    train_on_prompt: Annotated[bool, "train every turn, as of texts that are no dialogues"] = False
    last_turn_only: Annotated[bool, "train the last answer only, where earlier ones are not to be learnt"] = False
    enable_thinking: Annotated[bool, "thinking templates: train the empty block of answers without reasoning"] = True
    template_variables: Annotated[
        dict[str, bool | str], "switches that the chat template asks for, as preserve_thinking or reasoning_effort"
    ] = field(default_factory=dict)
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)


@dataclass(frozen=True, kw_only=True)
class FieldNames:
    """Names of a row's fields and roles where they differ from the formats' own; the guides' `attr`."""

    messages: Annotated[str | None, "the list of turns"] = None
    role_tag: Annotated[str | None, "a turn's role"] = None
    content_tag: Annotated[str | None, "a turn's content"] = None
    user_tag: Annotated[str | None, "the role of the user"] = None
    assistant_tag: Annotated[str | None, "the role of the assistant"] = None
    observation_tag: Annotated[str | None, "the role of a tool's answer"] = None
    function_tag: Annotated[str | None, "the role of a tool call"] = None
    system_tag: Annotated[str | None, "the role of the system prompt"] = None
    system: Annotated[str | None, "the system prompt beside the turns"] = None
    tools: Annotated[str | None, "the tools"] = None
    images: Annotated[str | None, "the images"] = None
    videos: Annotated[str | None, "the videos"] = None
    audios: Annotated[str | None, "the sounds"] = None
    prompt: Annotated[str | None, "the instruction of an alpaca row"] = None
    query: Annotated[str | None, "the question, or the input of an alpaca row"] = None
    response: Annotated[str | None, "the answer"] = None
    history: Annotated[str | None, "earlier questions and answers"] = None
    formatting: Annotated[Format | None, "the format, where the guides name it"] = None
    ranking: Annotated[bool | str | None, "of preference data, which are not trained here"] = None
    chosen: Annotated[bool | str | None, "of preference data, which are not trained here"] = None
    rejected: Annotated[bool | str | None, "of preference data, which are not trained here"] = None
    kto_tag: Annotated[bool | str | None, "of preference data, which are not trained here"] = None


# ---------------------------------------------------------------------------------------- reading by annotation


class OptionReader:
    """Reads values, as YAML gives them, by annotation; what is wrong with any is noted with its path in `faults`."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def section(self, kind: Any, value: Mapping[Any, Any], path: str) -> Any:
        """A dataclass from its keys, which lie below `path`."""
        raise NotImplementedError

    def read(self, kind: Any, value: Any, path: str) -> Any:
        """`value` as the annotated type; None and a fault where it is another."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is Annotated:
            found = self.read(arguments[0], value, path)
            for limits in arguments[1:]:
                if isinstance(limits, Range) and found is not None and (words := limits.broken_by(found)):
                    self.faults.append(f"{path}: expected {words}, got {found!r}")
            return found
        if isinstance(value, os.PathLike):  # a comma in it divides nothing
            value = [os.fspath(value)] if origin is tuple else os.fspath(value)
        elif hasattr(value, "tolist"):  # NumPy's numbers and arrays
            value = value.tolist()
        if origin in (typing.Union, types.UnionType):
            return self._read_union(kind, value, path)
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            return self.section(kind, value, f"{path}.")
        if dataclasses.is_dataclass(kind) and value is None:
            names = ", ".join(item.name for item in dataclasses.fields(kind))
            self.faults.append(f"{path}: empty; give it keys ({names}) or remove it")
        elif dataclasses.is_dataclass(kind):
            self.faults.append(f"{path}: expected a section with keys, got {value!r}")
        elif origin is dict and isinstance(value, Mapping):  # a component's rule that says nothing is no rule
            items = {str(key): None if item == {} else item for key, item in value.items()}
            return {key: self.read(arguments[1], item, f"{path}.{key}") for key, item in items.items()}
        elif origin is tuple and isinstance(value, str | list | tuple):
            return self._read_tuple(arguments, split_list(value) if isinstance(value, str) else value, path)
        elif (found := _read_plain(kind, value)) is not None:
            return found
        else:
            hint = "; put it in quotes" if kind is str and value is not None else ""
            if origin is Literal and isinstance(value, str):
                hint = suggest(value, map(str, arguments), among="")
            got = "null" if value is None else repr(value)
            self.faults.append(f"{path}: expected {describe_type(kind)}, got {got}{hint}")
        return None

    def _read_union(self, kind: Any, value: Any, path: str) -> Any:
        arguments = typing.get_args(kind)
        sections = [member for member in arguments if dataclasses.is_dataclass(member)]
        if value is None and type(None) in arguments and not sections:
            return None
        if sections and isinstance(value, str):
            value = _as_record(value)
        if sections and isinstance(value, Mapping):
            return self.read(sections[0], value, path)
        members = [member for member in arguments if member is not type(None)]
        before = list(self.faults)
        for member in members:
            found = self.read(member, value, path)
            if self.faults == before or len(members) == 1:
                return found
            self.faults[:] = before
        self.faults.append(f"{path}: expected {describe_type(kind)}, got {value!r}")
        return None

    def _read_tuple(self, arguments: tuple[Any, ...], items: Sequence[Any], path: str) -> tuple[Any, ...]:
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(items):
            self.faults.append(f"{path}: expected {len(kinds)} values, got {len(items)}: {list(items)!r}")
        found = zip(kinds, items, strict=False)
        return tuple(self.read(kind, item, f"{path}.{index}") for index, (kind, item) in enumerate(found))


def _read_plain(kind: Any, value: Any) -> Any:
    """A value that is no section, list or union, or None. Numbers may come as text: YAML takes 1e-5 for a word."""
    if typing.get_origin(kind) is Literal:
        return value if value in typing.get_args(kind) else None
    if kind is str and isinstance(value, str) and value.startswith("~/"):  # no shell has seen it behind a.b=
        return os.path.expanduser(value)
    if kind in (int, float) and isinstance(value, str):
        try:
            value = float(value) if kind is float or not value.lstrip("+-").isdecimal() else int(value)
        except ValueError:
            return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is kind else None


class _OnceLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a key may be said once: of two the last would count, and the other be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, (key, _) in enumerate(node.value):
            if key.value in names[:number]:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value} is there twice", key.start_mark)
        return node


def load_yaml(text: str) -> Any:
    """Raises: yaml.YAMLError, also for a key that is there twice."""
    return yaml.load(text, _OnceLoader)


def as_yaml(value: Any) -> str:
    """A value as a config file has it, on one line."""
    listed = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(listed, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def members_of(kind: Any) -> list[Any]:
    """The types that an annotation allows, without None, ranges and words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return members_of(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [member for argument in arguments for member in members_of(argument)]
    return [] if kind in (None, type(None)) else [kind]


def describe_type(kind: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(member) for member in arguments)
    if origin is Annotated:
        limits = [words for limit in arguments[1:] if isinstance(limit, Range) and (words := limit.broken_by(math.nan))]
        return " of ".join([describe_type(arguments[0]), *limits])
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return "a list"
    if origin is dict:
        return "names with values"
    if dataclasses.is_dataclass(kind):
        return "a section"
    return {type(None): "null", int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def split_list(text: str) -> list[str]:
    """`[a, b]` or `a,b` as items, without quotes; a comma within quotes, brackets or braces does not split."""
    if text.strip().startswith("[") and text.strip().endswith("]"):
        text = text.strip()[1:-1]
    items, depth, quote = [""], 0, ""
    for mark in text:
        if quote:
            quote = "" if mark == quote else quote
        elif mark in "'\"" and not items[-1].strip():
            quote = mark
        elif mark == "," and depth == 0:
            items.append("")
            continue
        depth = max(depth + (mark in "([{") - (mark in ")]}"), 0) if not quote else depth
        items[-1] += mark
    return [_unquote(item.strip()) for item in items if item.strip()]


def _as_record(item: str) -> Any:
    """What `{path: a.jsonl, weight: 2}`, an item of an override's list, stands for; other text as it is."""
    if not (item.startswith("{") and item.endswith("}") and ": " in item):
        return item
    try:
        return yaml.safe_load(item)
    except yaml.YAMLError:
        return item


def _unquote(item: str) -> str:
    if len(item) < 2 or item[0] != item[-1] or item[0] not in "'\"":
        return item
    try:
        return str(yaml.safe_load(item))
    except yaml.YAMLError:
        return item[1:-1]
