"""Conversations as ChatML text: which words a model reads, and which of them it learns.

Owns the chat format shared by the Qwen families, as the checkpoints' own chat templates write it, and the training
weight of every stretch of it. Knows no tokenizer and no media: a clip is a placeholder that the family's processor
fills. First step of every processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from omniloom.types import Conversation, Part, SampleError, Turn, suggest

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
MEDIA_KINDS = ("image", "video", "audio")


@dataclass(frozen=True, kw_only=True)
class TemplateStyle:
    """In what the chat templates of the families differ."""

    name: str
    thinking: bool  # the last answer always has a <think> block, an empty one if need be
    writes_reasoning: bool = True  # else reasoning is left out, and <think> inside an answer is text like any other
    default_system: str | None = None  # written where a conversation has no system turn
    opening: str = "<|im_start|>assistant\n"  # what an answer to be generated follows; thinking ones may add <think>


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of the rendered text, or the place of a clip (`clip` counts the conversation's media in order)."""

    text: str = ""
    clip: int | None = None
    weight: float = 0.0  # of the loss on these tokens; 0: context


TEMPLATES: Mapping[str, TemplateStyle] = {
    style.name: style
    for style in (
        TemplateStyle(
            name="qwen2_vl", thinking=False, writes_reasoning=False, default_system="You are a helpful assistant."
        ),
        TemplateStyle(
            name="qwen2_omni", thinking=False, writes_reasoning=False, default_system="You are a helpful assistant."
        ),
        TemplateStyle(name="qwen3_omni", thinking=True),
        TemplateStyle(name="qwen3_omni_nothink", thinking=False),
        TemplateStyle(name="qwen3_vl", thinking=True),
        TemplateStyle(name="qwen3_vl_nothink", thinking=False, writes_reasoning=False),
    )
}


def find_template(name: str) -> TemplateStyle:
    """The template of this name. Raises: ValueError with the nearest known name."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    raise ValueError(f"data.template: unknown template {name!r}{suggest(name, TEMPLATES)}")


def render(
    conversation: Conversation,
    style: TemplateStyle,
    *,
    system: str | None = None,
    enable_thinking: bool = True,
    train_on_prompt: bool = False,
    last_turn_only: bool = False,
    generation_prompt: bool = False,
) -> tuple[Span, ...]:
    """Spans whose texts, joined, are what the checkpoint's chat template writes for the conversation.

    Trained are the assistant's turns, tool calls and `<|im_end|>` included, and whatever turns have a weight of their
    own; a part's own weight stands over its turn's, and the last one's holds for `<|im_end|>`. `train_on_prompt` gives
    weight 1 to everything else; `last_turn_only` leaves only the last answer trained.
    `system` stands in for a missing system turn. An empty `<think>` block is trained only with `enable_thinking`.
    As in the published templates, reasoning before the last question is not shown.

    Tools and tool calls are printed as the conversation has them; spelling them as chat templates do is its maker's.

    Raises: SampleError for reasoning or tool calls outside an assistant's turn, and for media inside inline reasoning.
    """
    turns = _with_system(conversation, style.default_system if system is None else system)
    last_query = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=len(turns) - 1)
    last_answer = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    outside = 1.0 if train_on_prompt else 0.0
    writer = _SpanWriter()
    if conversation.tools and not (turns and turns[0].role == "system"):
        writer.write(f"<|im_start|>system\n{_tools_block(conversation.tools)}<|im_end|>\n", outside)
    for index, turn in enumerate(turns):
        role_weight = 1.0 if turn.role == "assistant" else outside
        weight = role_weight if turn.weight is None else turn.weight
        if last_turn_only and index != last_answer:
            weight, turn = 0.0, replace(turn, parts=tuple(replace(part, weight=None) for part in turn.parts))
        if turn.role == "tool":
            joins_previous = index > 0 and turns[index - 1].role == "tool"
            joins_next = index + 1 < len(turns) and turns[index + 1].role == "tool"
            writer.write("" if joins_previous else "<|im_start|>user", outside)
            writer.write("\n<tool_response>\n", weight)
            writer.write_pieces(_pieces(turn.parts), weight)
            writer.write("\n</tool_response>", weight)
            if joins_next:
                continue
        else:
            writer.write(f"<|im_start|>{turn.role}\n", outside)
            if turn.role == "assistant":
                empty_think = style.thinking and index == len(turns) - 1 and index > last_query
                think_weight = weight if enable_thinking else outside
                show = style.writes_reasoning and index > last_query
                weight = _write_answer(writer, turn, weight, style, show, think_weight if empty_think else None)
            else:
                writer.write_pieces(_pieces(turn.parts), weight)
        if index == 0 and turn.role == "system" and conversation.tools:
            writer.write("\n\n" + _tools_block(conversation.tools), weight)
        writer.write("<|im_end|>", weight)
        writer.write("\n", outside)
    writer.write(style.opening if generation_prompt else "", outside)
    return tuple(writer.spans)


def _with_system(conversation: Conversation, system: str | None) -> tuple[Turn, ...]:
    turns = conversation.turns
    if system is None or (turns and turns[0].role == "system"):
        return turns
    return (Turn(role="system", parts=(Part(kind="text", text=system),)), *turns)


class _SpanWriter:
    """Collects spans, numbering clips as they come and joining neighbours of equal weight."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._num_clips = 0

    def write(self, text: str, weight: float) -> None:
        if not text:
            return
        if self.spans and self.spans[-1].clip is None and self.spans[-1].weight == weight:
            text = self.spans.pop().text + text
        self.spans.append(Span(text=text, weight=weight))

    def write_pieces(self, pieces: list[str | None], weight: float) -> None:
        for piece in pieces:
            if piece is None:
                self.spans.append(Span(clip=self._num_clips, weight=weight))
                self._num_clips += 1
            else:
                self.write(piece, weight)


def _pieces(parts: Iterable[Part]) -> list[str | None]:
    """Texts and media in order: texts, joined where they touch, and None for a clip."""
    pieces: list[str | None] = []
    for part in parts:
        if part.kind in MEDIA_KINDS:
            pieces.append(None)
        elif part.kind != "text":
            raise SampleError("messages", f"only an assistant's turn may hold a {part.kind}")
        elif pieces and pieces[-1] is not None:
            pieces[-1] += part.text
        elif part.text:
            pieces.append(part.text)
    return pieces


def _write_answer(
    writer: _SpanWriter,
    turn: Turn,
    weight: float,
    style: TemplateStyle,
    show_reasoning: bool,
    empty_think_weight: float | None,
) -> float:
    """An assistant's turn: reasoning if shown, content, tool calls. No empty block where its weight is None.

    Returns the weight of the last part.
    """
    first_call = next((i for i, part in enumerate(turn.parts) if part.kind == "tool_call"), len(turn.parts))
    reasoning = "\n".join(part.text for part in turn.parts if part.kind == "reasoning")
    content = _pieces(part for part in turn.parts[:first_call] if part.kind != "reasoning")
    if not reasoning and style.writes_reasoning:
        reasoning, content = _split_inline_reasoning(content)
    separator = "\n" if content else ""
    if show_reasoning and (reasoning or empty_think_weight is not None):
        text = reasoning.strip("\n")
        writer.write(f"<think>\n{text}\n</think>\n\n", weight if text else empty_think_weight or 0.0)
        if content and content[0] is not None:
            content[0] = content[0].lstrip("\n")
    writer.write_pieces(content, weight)
    of_turn = weight
    for part in turn.parts[first_call:]:
        weight = of_turn if part.weight is None else part.weight
        if part.kind == "tool_call":
            writer.write(f"{separator}<tool_call>\n{part.text}\n</tool_call>", weight)
            separator = "\n"
        elif part.kind != "reasoning":
            pieces = _pieces([part])
            touches = not pieces or (pieces[0] is not None and pieces[0].startswith("\n"))
            writer.write("" if touches else "\n", weight)
            writer.write_pieces(pieces, weight)
    return weight


def _split_inline_reasoning(content: list[str | None]) -> tuple[str, list[str | None]]:
    """Take `<think>…</think>` out of an answer that carries its reasoning in its text."""
    last = max((i for i, piece in enumerate(content) if piece is not None and "</think>" in piece), default=None)
    if last is None:
        return "", content
    if last > 0:
        raise SampleError("messages", "media inside <think>…</think>; put them into the question or the answer")
    text = content[0] or ""
    reasoning = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    answer = text.split("</think>")[-1].lstrip("\n")
    return reasoning, [piece for piece in (answer, *content[1:]) if piece != ""]


def split_reasoning(answer: str) -> tuple[str, str]:
    """A generated answer as (reasoning, words); no reasoning where the model has not finished one."""
    reasoning, _, words = answer.rpartition("</think>")
    return reasoning.strip().removeprefix("<think>").strip(), words.strip()


def _tools_block(tools: tuple[str, ...]) -> str:
    return _TOOLS_HEAD + "".join(f"\n{tool}" for tool in tools) + _TOOLS_TAIL
