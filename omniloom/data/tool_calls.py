"""Tools and tool calls in every spelling that rows use, brought to one.

A tool becomes one JSON object in the form `{"type": "function", "function": {...}}`, a call the JSON
`{"name": ..., "arguments": ...}`. Arguments that are already JSON text keep their own spacing, since chat templates
print a string as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from omniloom.types import Part, SampleError

_TAGGED_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_CALL_ENVELOPE = ("id", "type", "index")  # bookkeeping of chat protocols; templates do not print it


def parse_tools(value: Any, field: str = "tools") -> tuple[str, ...]:
    """Tools given as a JSON string, a list of JSON strings, or a list of objects. Raises: SampleError."""
    if isinstance(value, str):
        if not value.strip():
            return ()
        value = _load(value, field)
    if value is None or value == {}:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise SampleError(field, f"expected a list of tools, got {type(value).__name__}: {str(value)[:60]!r}")
    return tuple(_tool(item, f"{field}[{index}]") for index, item in enumerate(value))


def _tool(item: Any, field: str) -> str:
    if isinstance(item, str):
        item = _load(item, field)
    if not isinstance(item, Mapping):
        raise SampleError(field, f"expected a JSON object that describes a tool, got {str(item)[:60]!r}")
    if item.get("type") != "function" or not isinstance(item.get("function"), Mapping):
        function = dict(item)
        if "input_schema" in function:  # Anthropic's name for it
            function["parameters"] = function.pop("input_schema")
        item = {"type": "function", "function": function}
    if not isinstance(item["function"].get("name"), str):
        raise SampleError(field, f"expected a tool with a name, got {str(item)[:80]}")
    return write_json(item, field)


def parse_tool_calls(content: Any, field: str) -> list[Part]:
    """The parts of a turn that is meant as tool calls: the calls in their order, and any text beside them.

    `content` is one call, a list of calls, JSON text of either, or text with `<tool_call>` tags.
    Raises: SampleError.
    """
    if isinstance(content, str) and "<tool_call>" in content:
        return _tagged_calls(content, field)
    if isinstance(content, str):
        content = _load(content, field)
    calls = content if isinstance(content, list | tuple) else [content]
    if not calls:
        raise SampleError(field, "expected at least one tool call, got an empty list")
    return [tool_call_part(call, field) for call in calls]


def _tagged_calls(text: str, field: str) -> list[Part]:
    parts: list[Part] = []
    start = 0
    for match in _TAGGED_CALL.finditer(text):
        if between := text[start : match.start()].strip("\n"):
            parts.append(Part(kind="text", text=between))
        parts.append(tool_call_part(_load(match[1], field), field))
        start = match.end()
    if rest := text[start:].strip("\n"):
        if "<tool_call>" in rest:
            raise SampleError(field, f"a <tool_call> without its </tool_call>: {rest[:80]!r}")
        parts.append(Part(kind="text", text=rest))
    return parts


def tool_call_part(call: Any, field: str) -> Part:
    """One call from `{"name", "arguments"}`, `{"function": {...}}` or `{"name", "input"}`. Raises: SampleError."""
    if isinstance(call, str):
        call = _load(call, field)
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise SampleError(field, f'expected a tool call {{"name": ..., "arguments": ...}}, got {str(call)[:80]!r}')
    keys = [key for key in ("arguments", "parameters", "input") if call.get(key) is not None]
    arguments = call[keys[0]] if keys else {}
    rest = {k: v for k, v in call.items() if k not in ("name", *keys[:1], *_CALL_ENVELOPE)}
    if isinstance(arguments, str):
        _load(arguments or "{}", f"{field}.arguments")
        written = arguments.strip() or "{}"
    else:
        written = write_json(arguments, f"{field}.arguments")
    more = "".join(f", {json.dumps(key)}: {write_json(value, field)}" for key, value in rest.items())
    name = json.dumps(call["name"], ensure_ascii=False)
    return Part(kind="tool_call", text=f'{{"name": {name}, "arguments": {written}{more}}}')


def write_json(value: Any, field: str) -> str:
    """JSON text of a value of a row. Raises: SampleError where it has none, such as bytes inside a column."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SampleError(field, f"cannot be written as JSON: {error}") from None


def _load(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SampleError(field, f"not JSON: {error.msg} at column {error.colno} of {text[:80]!r}") from None
    except (RecursionError, ValueError) as error:
        raise SampleError(field, f"not JSON that can be read: {error}") from None
