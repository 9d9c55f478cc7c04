"""Chat templates: where a checkpoint keeps its own, how one is run, and in which form it takes content.

Owns the sandbox that templates run in, which gives them what transformers gives them, and the probes that find out
whether a template takes typed content or strings, and turns as the messages that it takes. What trains in a template's
output is `rendering`'s.
"""

from __future__ import annotations

import itertools
import json
import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omniloom.options import ProcessorOptions
from omniloom.processors.settings import read_json
from omniloom.types import Part, SampleError, Turn, suggest

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from omniloom.processors.clips import FamilyClips

Message = dict[str, Any]
Form = Literal["typed", "string"]

# What running somebody's template may raise; each is the row's or the template's fault, not ours.
_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_PROBES = {role: str(7_310_562 + index) for index, role in enumerate(("system", "user", "assistant", "tool"))}


@dataclass(frozen=True, kw_only=True)
class TemplateSource:
    """A template's text, or several by name (`default`, and `tool_use` for rows with tools), and where it stands."""

    texts: Mapping[str, str]
    where: str


# The families' published templates under the names that users know; `rendering` hands the words for media in strings.
NAMED_TEMPLATES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2_vl": ("qwen3_vl.jinja", {"default_system": "You are a helpful assistant."}),
    "qwen2_omni": ("qwen3_vl.jinja", {"default_system": "You are a helpful assistant."}),
    "qwen3_omni": ("qwen3_omni.jinja", {"always_thinks": True}),
    "qwen3_omni_nothink": ("qwen3_omni.jinja", {}),
    "qwen3_vl": ("qwen3_omni.jinja", {"always_thinks": True}),
    "qwen3_vl_nothink": ("qwen3_vl.jinja", {}),
    "qwen3_5": ("qwen3_5.jinja", {}),
    "qwen3_5_nothink": ("qwen3_5.jinja", {"enable_thinking": False}),
}
TEMPLATE_DIR = Path(__file__).with_name("templates")


def named_source(name: str, known: Sequence[str], directory: Path) -> tuple[TemplateSource, Mapping[str, Any]]:
    """A built-in template and its variables. `known`: the names of the family of the checkpoint in `directory`.

    Raises: ValueError for a name that is unknown or of another family.
    """
    if name not in NAMED_TEMPLATES:
        raise ValueError(f"data.template: unknown template {name!r}{suggest(name, ('auto', *NAMED_TEMPLATES))}")
    if name not in known:
        raise ValueError(
            f"data.template={name} is of another family; {directory} takes {' or '.join(known)}, or auto, its own"
        )
    file, variables = NAMED_TEMPLATES[name]
    return TemplateSource(texts={"default": (TEMPLATE_DIR / file).read_text(encoding="utf-8")}, where=name), variables


def find_source(directory: Path) -> TemplateSource:
    """A checkpoint's own template; a file of its own stands over tokenizer_config.json, as transformers has it.

    Raises: ValueError where there is none.
    """
    where = directory / "chat_template.jinja"
    found: Any = None
    if where.is_file():
        found = {"default": where.read_text(encoding="utf-8")}
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            found[path.stem] = path.read_text(encoding="utf-8")
    elif (where := directory / "chat_template.json").is_file():
        found = read_json(where).get("chat_template")
    else:
        where = directory / "tokenizer_config.json"
        found = read_json(where).get("chat_template") if where.is_file() else None
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list) and all(
        isinstance(item, dict) and {"name", "template"} <= set(item) for item in found
    ):
        found = {item["name"]: item["template"] for item in found}
    if not found:
        raise ValueError(
            f"{directory}: no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json; put "
            f"the checkpoint's there, or name one with data.template, among {', '.join(NAMED_TEMPLATES)}"
        )
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError(f"{where}: chat_template is neither a text nor a list of named texts, but {str(found)[:80]!r}")
    if "default" not in found:
        raise ValueError(f"{where}: no chat template is called default, only {', '.join(found)}; name one of them so")
    return TemplateSource(texts=found, where=str(where))


def open_template(directory: Path, options: ProcessorOptions, tokenizer: Any, media: FamilyClips) -> ChatTemplate:
    """The template that `data.template` names, or the checkpoint's own. `tokenizer`: as transformers loads it.

    Raises: ValueError for a name that does not fit, a template that cannot be used, and where there is none.
    """
    named, variables = options.template != "auto", tokenizer.special_tokens_map
    if named:
        source, own = named_source(options.template, media.templates, directory)
        variables = variables | own
    else:
        source = find_source(directory)
    variables = variables | options.template_variables
    if not options.enable_thinking:
        variables = variables | {"enable_thinking": False}
    _check_variables(options.template_variables, source)
    return ChatTemplate(source, variables, {} if named else media.pads, media.words)


def _check_variables(chosen: Collection[str], source: TemplateSource) -> None:
    """Raises: ValueError for a name that the template does not ask for, or that is not for users to give."""
    from jinja2 import meta

    if not chosen:
        return
    for name, text in source.texts.items():
        _compile(text, f"{source.where} ({name})")  # its faults are another matter
    environment = _environment()
    asked = {name for text in source.texts.values() for name in meta.find_undeclared_variables(environment.parse(text))}
    given = {"messages", "tools", "documents", "add_generation_prompt", "generation_marks", "enable_thinking"}
    open_ones = sorted(asked - given - set(environment.globals))
    for name in chosen:
        if name in given:
            hint = "; data.enable_thinking says it" if name == "enable_thinking" else ""
            raise ValueError(f"data.template_variables.{name}: not to be given here{hint}")
        if name not in asked:
            raise ValueError(
                f"data.template_variables.{name}: {source.where} does not ask for it"
                f"{suggest(name, open_ones, among='it asks for')}"
            )


class ChatTemplate:
    """A template that can be run, and what was found out about it by running it on a few words."""

    def __init__(
        self,
        source: TemplateSource,
        variables: Mapping[str, Any],
        media_pads: Mapping[str, str],
        media_words: Mapping[str, str],
    ) -> None:
        """`variables`: special tokens and switches, by the names that templates use. `media_pads`: the token that
        stands for a clip, by kind; `media_words`: the same in its wrappers, for templates that take strings.

        Raises: ValueError for a template that cannot be parsed, and for one that writes no words, whatever their form.
        """
        from jinja2 import TemplateError

        self.where = source.where
        self._refusal = TemplateError
        self.media_words = media_words
        self._variables = dict(variables)
        self._compiled = {name: _compile(text, f"{source.where} ({name})") for name, text in source.texts.items()}
        self.has_generation_marks = any(
            "generation" in text and "endgeneration" in text for text in source.texts.values()
        )
        self.forms = self._find_forms()
        self.typed_media = frozenset(kind for kind, pad in media_pads.items() if self._writes_media(kind, pad))
        self.keeps_spelling = '{"x":  1}' in self._probe_call('{"x":  1}')
        self.leaves_out = self._find_left_out()

    def write(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = False,
        generation_marks: tuple[str, str] | None = None,
    ) -> str:
        """What the template writes. `generation_marks` are put around its `{% generation %}` blocks.

        Raises: SampleError with the template's own words where it refuses the messages or fails on them.
        """
        compiled = self._compiled.get("tool_use", self._compiled["default"]) if tools else self._compiled["default"]
        try:
            return compiled.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=generation_prompt,
                generation_marks=generation_marks,
                **self._variables,
            )
        except (self._refusal, *_FAULTS) as error:
            lines = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"
            ]
            at = f" (line {lines[-1]} of {self.where})" if lines else ""
            raise SampleError("messages", f"the chat template refuses the conversation: {error}{at}") from None

    # ------------------------------------------------------------------------------------ what it takes

    def _try(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        try:
            return self.write(messages, tools)
        except SampleError:
            return ""

    def _find_forms(self) -> dict[str, Form]:
        """The form in which each role's content is written out whole: typed wherever that works."""
        forms: dict[str, Form] = dict.fromkeys(_PROBES, "typed")
        for before in ((), ("system",)):  # some demand a system turn
            roles = ("user", "assistant", *before)
            both: tuple[Form, ...] = ("typed", "string")
            for chosen in itertools.product(both, repeat=len(roles)):
                found = forms | dict(zip(roles, chosen, strict=True))
                if self._writes(found, (*before, "user", "assistant")):
                    return self._find_other_forms(found)
        plain = [{"role": role, "content": word} for role, word in _PROBES.items() if role in ("user", "assistant")]
        try:
            got = f"it writes {self.write(plain)[:200]!r}"
        except SampleError as error:
            got = error.reason
        raise ValueError(
            f"{self.where}: the chat template does not write the words of a question and an answer, neither as typed "
            f"content nor as strings: {got}"
        )

    def _find_other_forms(self, forms: dict[str, Form]) -> dict[str, Form]:
        for role, turns in (
            ("system", ("system", "user", "assistant")),
            ("tool", ("user", "call", "tool", "assistant")),
        ):
            text: dict[str, Form] = {role: "string"}
            if not self._writes(forms, turns) and self._writes(forms | text, turns):
                forms = forms | text
        return forms

    def _writes(self, forms: Mapping[str, Form], roles: Sequence[str]) -> bool:
        messages = [
            probe_call({"x": 1}) if role == "call" else {"role": role, "content": content(forms[role], _PROBES[role])}
            for role in roles
        ]
        text = self._try(messages)
        return all(_PROBES[role] in text for role in roles if role != "call") and "'type':" not in text

    def _writes_media(self, kind: str, pad: str) -> bool:
        """Whether a typed item of this kind becomes its pad token; else the words for it go in as text."""
        items = [{"type": kind, kind: "clip"}, *content("typed", _PROBES["user"])]
        messages = [{"role": "user", "content": items}, self._message("assistant")]
        return self.forms["user"] == "typed" and self._try(messages).count(pad) == 1

    def _message(self, role: str) -> Message:
        return {"role": role, "content": content(self.forms[role], _PROBES[role])}

    def _probe_call(self, arguments: Any) -> str:
        return self._try(
            [self._message("user"), probe_call(arguments), self._message("tool"), self._message("assistant")]
        )

    def _find_left_out(self) -> tuple[str, ...]:
        """What the template never writes, in words for the log."""
        asked, answer = self._message("user"), self._message("assistant")
        reasoned = answer | {"reasoning_content": "8201947", "thinking": "8201947"}
        tool = {
            "type": "function",
            "function": {"name": "f8201947", "description": "d", "parameters": {"type": "object"}},
        }
        written = {
            "tools": "f8201947" in self._try([asked, answer], [tool]),
            "tool calls": "f8201947" in self._probe_call({"x": 1}),
            "reasoning": "8201947" in self._try([asked, reasoned]),
        }
        return tuple(name for name, there in written.items() if not there)


def content(form: Form, text: str) -> Any:
    return text if form == "string" else [{"type": "text", "text": text}]


def probe_call(arguments: Any) -> Message:
    call = {"type": "function", "function": {"name": "f8201947", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


# ---------------------------------------------------------------------------------------- the sandbox


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox. Source: transformers, chat_template_utils._cached_compile_jinja_template."""
    from jinja2 import TemplateError, nodes  # here as with all that a model does without
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}...{% endgeneration %}`: what the model says. Put between marks where some are given."""

        tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_between", [nodes.Name("generation_marks", "load")])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _between(self, marks: tuple[str, str] | None, caller: Callable[[], str]) -> str:
            return f"{marks[0]}{caller()}{marks[1]}" if marks else caller()

    class Sandbox(ImmutableSandboxedEnvironment):
        """Looks fields of messages up at once, where jinja2 first tries for an attribute and catches its absence."""

        def getattr(self, obj: Any, attribute: str) -> Any:
            if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
            return super().getattr(obj, attribute)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_DICT_ATTRIBUTES = frozenset(dir(dict))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compile(text: str, where: str) -> Template:
    from jinja2 import TemplateSyntaxError

    try:
        template = _environment().from_string(text)
    except TemplateSyntaxError as error:
        line = text.splitlines()[error.lineno - 1 : error.lineno]
        raise ValueError(
            f"{where}: the chat template cannot be parsed: {error.message}, line {error.lineno}: "
            f"{line[0].strip()[:120] if line else ''!r}"
        ) from None
    template.globals = dict(template.globals)  # each rendering copies it: of jinja2's own chain key by key
    return template


# ---------------------------------------------------------------------------------------- messages

MEDIA_KINDS = ("image", "video", "audio")

_CALL = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A piece of a conversation's text as it goes into a message."""

    number: int  # counts all of a conversation
    text: str
    turn: int
    part: int
    is_json: bool = False  # arguments of a call: the template gets the value, and writes it in a way of its own


def messages_of(
    turns: Sequence[Turn], template: ChatTemplate, mark: Callable[[Leaf], str] = attrgetter("text")
) -> tuple[list[Message], list[Leaf]]:
    """The turns as templates take them, with what `mark` makes of every piece of text that is not blank; the pieces."""
    forms, words = template.forms, template.media_words
    leaves: list[Leaf] = []

    def place(text: str, turn: int, part: int, *, is_json: bool = False) -> str:
        if not text.strip():
            return text
        leaves.append(Leaf(number=len(leaves), text=text, turn=turn, part=part, is_json=is_json))
        return mark(leaves[-1])

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
    return messages, leaves


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
