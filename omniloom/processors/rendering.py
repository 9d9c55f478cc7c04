"""Conversations as text: a chat template writes them, and what trains is found in what it wrote.

Owns messages as templates take them, and the search for each turn's words in the output. The template's unmarked output
is what a model reads, to the letter; a second one, with numbers put around the words, shows where they went. How a
template was found to write one conversation is kept for later ones of the same shape, and checked against each of
their outputs, so that most need a single run. Knows no tokenizer and no media sizes. First step of every processor.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from omniloom.processors.chat_template import ChatTemplate
from omniloom.processors.messages import Leaf, collect, messages_of
from omniloom.processors.turn_places import Places, Shape, TurnFinder, shape_of
from omniloom.types import Conversation, Part, ProcessorOptions, Turn

KEPT_SHAPES = 512


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A template's output and the weight of the loss on its characters: `weights` are (end, weight), in order."""

    text: str
    weights: tuple[tuple[int, float], ...]


class Renderer:
    """Writes conversations with one template."""

    def __init__(self, template: ChatTemplate, options: ProcessorOptions, end_of_turn: str | None) -> None:
        """`end_of_turn`: the tokenizer's token for it, if it has one.

        Raises: ValueError where a question and an answer cannot be found in what the template writes.
        """
        self.template = template
        self._options = options
        self._finder = TurnFinder(template, trains_empty_think=options.enable_thinking, end_of_turn=end_of_turn)
        self._shapes: OrderedDict[tuple[Any, ...], Shape] = OrderedDict()

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation's text and what is learned of it.

        Trained are the assistant's turns, from what a generated answer would follow to the token that ends the turn,
        and whatever turns have a weight of their own; a part's own weight stands over its turn's, and the last one's
        holds for the end of the turn. `{% generation %}` blocks of the template, where it has them, say instead where
        an answer begins and ends, but for the end of the turn, which is always trained.
        Raises: SampleError where the template refuses the conversation or its turns are not found in the output.
        """
        turns = self._turns(conversation)
        tools = tuple(json.loads(tool) for tool in conversation.tools)
        leaves: list[Leaf] = []
        text = self.template.write(messages_of(turns, self.template, collect(leaves)), tools)
        key = (tools and conversation.tools, *(shape_of(turn) for turn in turns))
        shape = self._shapes.get(key)
        places = shape.places(text, leaves) if shape is not None else None
        if places is None:
            places = self._finder.find(turns, tools, text, leaves)
            if (found := Shape.of(text, places)) is not None:
                self._shapes[key] = found
                if len(self._shapes) > KEPT_SHAPES:
                    self._shapes.popitem(last=False)
        return Rendered(text=text, weights=self._weigh(turns, places, len(text)))

    def prompt(self, conversation: Conversation) -> str:
        """The conversation's text, up to where the answer to it begins. Raises: as `render`."""
        messages = messages_of(self._turns(conversation), self.template, attrgetter("text"))
        return self.template.write(messages, [json.loads(tool) for tool in conversation.tools], generation_prompt=True)

    # ------------------------------------------------------------------------------------ messages

    def _turns(self, conversation: Conversation) -> tuple[Turn, ...]:
        turns = conversation.turns
        if self._options.system is not None and not (turns and turns[0].role == "system"):
            turns = (Turn(role="system", parts=(Part(kind="text", text=self._options.system),)), *turns)
        return tuple(self._with_calls_last(turn) for turn in turns)

    def _with_calls_last(self, turn: Turn) -> Turn:
        """Messages hold calls after all text: calls before a text go into it, as the template writes them."""
        last = max((i for i, part in enumerate(turn.parts) if part.kind not in ("tool_call", "reasoning")), default=-1)
        if all(part.kind != "tool_call" for part in turn.parts[:last]):
            return turn
        parts: list[Part] = []
        for index, part in enumerate(turn.parts):
            if part.kind == "tool_call" and index < last:
                part = replace(part, kind="text", text=self._written_call(part))
                if any(earlier.kind == "text" for earlier in parts):
                    part = replace(part, text="\n" + part.text)
            elif part.kind == "text" and index and turn.parts[index - 1].kind == "tool_call":
                part = part if part.text.startswith("\n") else replace(part, text="\n" + part.text)
            parts.append(part)
        return replace(turn, parts=tuple(parts))

    def _written_call(self, call: Part) -> str:
        question = Turn(role="user", parts=(Part(kind="text", text="question"),))
        turns = (question, Turn(role="assistant", parts=(replace(call, weight=None),)))
        leaves: list[Leaf] = []
        text = self.template.write(messages_of(turns, self.template, collect(leaves)))
        place = self._finder.find(turns, (), text, leaves).turns[1]
        assert place is not None
        return text[slice(*place)].removesuffix(self._finder.ending)

    # ------------------------------------------------------------------------------------ weights

    def _weigh(self, turns: Sequence[Turn], places: Places, length: int) -> tuple[tuple[int, float], ...]:
        outside = 1.0 if self._options.train_on_prompt else 0.0
        last_answer = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        runs: list[tuple[int, float]] = []
        done = 0
        for index in sorted(range(len(turns)), key=lambda i: places.turns[i] or (0, 0)):
            turn, place = turns[index], places.turns[index]
            if place is None or place[0] < done:
                continue
            of_role = 1.0 if turn.role == "assistant" else outside
            of_turn = of_role if turn.weight is None else turn.weight
            runs.append((place[0], outside))
            if self._options.last_turn_only and index != last_answer:
                runs.append((place[1], 0.0))
            else:
                own = turn.parts[0].weight if turn.parts and turn.parts[0].kind != "reasoning" else None
                weight = of_turn if own is None else own
                for cut, part in places.cuts[index]:
                    runs.append((cut, weight))
                    own = turn.parts[part].weight
                    weight = of_turn if own is None else own
                runs.append((place[1], weight))
            done = place[1]
        return (*runs, (length, outside))


def split_reasoning(answer: str) -> tuple[str, str]:
    """A generated answer as (reasoning, words); no reasoning where the model has not finished one."""
    reasoning, _, words = answer.rpartition("</think>")
    return reasoning.strip().removeprefix("<think>").strip(), words.strip()
