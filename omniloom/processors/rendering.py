"""Conversations as text: a chat template writes them, and what trains is found in what it wrote.

Owns messages as templates take them, and the search for each turn's words in the output. The template's unmarked output
is what a model reads, to the letter; a second one, with numbers put around the words, shows where they went. Knows no
tokenizer and no media sizes. First step of every processor.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

from omniloom.options import ProcessorOptions
from omniloom.processors.chat_template import ChatTemplate, Leaf, messages_of, spell
from omniloom.types import Conversation, Part, Role, SampleError, Turn


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
        messages, leaves = messages_of(turns, self.template)
        text = self.template.write(messages, tools)
        places = self._finder.find(turns, tools, text, leaves)
        return Rendered(text=text, weights=self._weigh(turns, places, len(text)))

    def prompt(self, conversation: Conversation) -> str:
        """The conversation's text, up to where the answer to it begins. Raises: as `render`."""
        messages, _ = messages_of(self._turns(conversation), self.template)
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
        messages, leaves = messages_of(turns, self.template)
        text = self.template.write(messages)
        place = self._finder.find(turns, (), text, leaves)[1]
        assert place is not None
        return text[place.start : place.end].removesuffix(self._finder.ending)

    # ------------------------------------------------------------------------------------ weights

    def _weigh(self, turns: Sequence[Turn], places: Places, length: int) -> tuple[tuple[int, float], ...]:
        outside = 1.0 if self._options.train_on_prompt else 0.0
        last_answer = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        runs: list[tuple[int, float]] = []
        done = 0
        there = [(place, index) for index, place in enumerate(places) if place is not None]
        for place, index in sorted(there, key=lambda found: found[0].start):
            if place.start < done:
                continue
            turn = turns[index]
            of_role = 1.0 if turn.role == "assistant" else outside
            of_turn = of_role if turn.weight is None else turn.weight
            runs.append((place.start, outside))
            if self._options.last_turn_only and index != last_answer:
                runs.append((place.end, 0.0))
            else:
                own = turn.parts[0].weight if turn.parts and turn.parts[0].kind != "reasoning" else None
                weight = of_turn if own is None else own
                for cut, part in place.cuts:
                    runs.append((cut, weight))
                    own = turn.parts[part].weight
                    weight = of_turn if own is None else own
                runs.append((place.end, weight))
            done = place.end
        return (*runs, (length, outside))


def split_reasoning(answer: str) -> tuple[str, str]:
    """A generated answer as (reasoning, words); no reasoning where the model has not finished one."""
    reasoning, _, words = answer.rpartition("</think>")
    return reasoning.strip().removeprefix("<think>").strip(), words.strip()


# ---------------------------------------------------------------------------------------- where turns are

_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_TAG = re.compile(r"<|\[/?[A-Z_]+\]")
_WORD_OR_TAG = re.compile(r"<[^<>]*>|([^\W\d_]{2,})")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a turn stands in a template's output, as offsets of characters."""

    start: int  # of an answer: behind what opens it
    end: int  # past the end of the turn
    cuts: tuple[tuple[int, int], ...] = ()  # where a part of an own weight begins, and which


Places = list[Place | None]  # by turn; None where the template leaves it out


class TurnFinder:
    """Finds turns in the outputs of one template."""

    def __init__(self, template: ChatTemplate, *, trains_empty_think: bool, end_of_turn: str | None) -> None:
        """`trains_empty_think`: else an empty <think> block that the template writes is no part of an answer.

        `end_of_turn`: the tokenizer's token for it, if it has one.
        """
        self.template = template
        self._trains_empty_think = trains_empty_think
        self._end_of_turn = end_of_turn
        self._openings, self.ending = self._find_frame()

    def _find_frame(self) -> tuple[list[str], str]:
        """What an answer follows, with its own first lines, and what ends it, as written around words of ours."""
        question, answer = "7310561", "7310569"
        roles: tuple[Role, ...] = ("system", "user", "assistant")
        turns = tuple(
            Turn(role=role, parts=(Part(kind="text", text=text),))
            for role, text in zip(roles, ("7310560", question, answer), strict=True)
        )
        try:
            turns, written = turns[1:], self._write(turns[1:])
        except SampleError:  # some demand a system turn
            written = self._write(turns)
        before, after = written.partition(question)[2].split(answer, 1)
        try:
            asked, opened = self._write(turns[:-1]), self._write(turns[:-1], generation_prompt=True)
        except SampleError:
            asked = opened = ""
        opening = opened[len(asked) :] if opened.startswith(asked) else ""
        if not opening.strip():  # the template has none: what stands before an answer, but for what ends a turn
            opening = before.removeprefix(after) if after.strip() else before
        end = self._end_of_turn
        ending = after[: after.index(end) + len(end)] if end and end in after else after.rstrip()
        lines = {opening, *(opening[: match.end()] for match in re.finditer(r"\n|(?=<think>)", opening))}
        return [line for line in lines if line.strip() and (line == opening or line not in asked)], ending

    def _write(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> str:
        messages, _ = messages_of(turns, self.template)
        return self.template.write(messages, generation_prompt=generation_prompt)

    def find(self, turns: Sequence[Turn], tools: Sequence[Any], text: str, leaves: Sequence[Leaf]) -> Places:
        """Where each turn is in `text`; None for one that is not written.

        Words that stand in `text` once, in order, are there; others are found by marks that change nothing else of it.
        """
        if not self.template.has_generation_marks and (extents := _plain_extents(turns, text, leaves)) is not None:
            return self._place_turns(turns, tools, text, leaves, extents)
        marks = self._mark(turns, tools, text, leaves)
        places = self._place_turns(turns, tools, text, leaves, [marks.extent(leaf, text) for leaf in leaves])
        return _within(places, turns, marks.generated) if self.template.has_generation_marks else places

    def _mark(self, turns: Sequence[Turn], tools: Sequence[Any], text: str, leaves: Sequence[Leaf]) -> _Marks:
        """Marks that were found. Raises: SampleError for an answer that the template leaves out."""
        marks = _Marks(text, len(leaves))

        def stays(mark: Callable[[Leaf], str], only_turn: int | None = None) -> bool:
            def mark_some(leaf: Leaf) -> str:
                return mark(leaf) if only_turn in (None, leaf.turn) else leaf.text

            marks.placed.clear()
            messages, _ = messages_of(turns, self.template, mark_some)
            try:
                return marks.find(self.template.write(messages, tools, generation_marks=marks.of_generation))
            except SampleError:  # a template may refuse what the marks make of the words
                return False

        if not stays(marks.around):  # something looks at the words, so turn by turn
            for number in range(len(turns)):
                if not stays(marks.around, number):
                    stays(marks.inside, number)
            if not stays(attrgetter("text")):
                raise SampleError(
                    "messages",
                    "what trains cannot be found in what the chat template writes: its generation blocks do not come "
                    f"out as they are written ({self.template.where}): {text[-200:]!r}",
                )
        for index, turn in enumerate(turns):
            own = [leaf for leaf in leaves if leaf.turn == index and not leaf.is_json]  # arguments may have no words
            words = any(part.kind != "reasoning" and part.text.strip() for part in turn.parts)
            lost = [turn.parts[leaf.part].kind for leaf in own if leaf.number in marks.left_out]
            if turn.role == "assistant" and words and (len(lost) == len(own) or "tool_call" in lost):
                call = "'s tool call; data.template names one that writes it" * ("tool_call" in lost)
                reason = f"the chat template ({self.template.where}) leaves out this answer{call}"
                raise SampleError(f"messages[{index}]", reason)
        return marks

    def _place_turns(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Any],
        text: str,
        leaves: Sequence[Leaf],
        extents: Sequence[tuple[int, int] | None],
    ) -> Places:
        of_turn = [_hull(extents[leaf.number] for leaf in leaves if leaf.turn == i) for i in range(len(turns))]
        found: Places = []
        done = 0
        for index, turn in enumerate(turns):
            words = of_turn[index]
            later = [there[0] for there in of_turn[index + 1 :] if there is not None and there[0] >= done]
            following = min(later, default=len(text))
            place = None
            if turn.role == "assistant":
                start = self._start_of_answer(turn, index, text, done, words, following)
                last = max(words[1] if words else start, start)
                end = last + self._length_of_ending(text[last:following], turns[: index + 1], tools)
                place = Place(start=start, end=end, cuts=self._cuts(turn, index, text, leaves, extents))
            elif words is not None:
                end = words[1] + (len(self.ending) if text.startswith(self.ending, words[1]) else 0)
                place = Place(start=words[0], end=end, cuts=self._cuts(turn, index, text, leaves, extents))
            found.append(place)
            done = max(done, place.end) if place else done
        return found

    def _start_of_answer(
        self, turn: Turn, index: int, text: str, done: int, words: tuple[int, int] | None, following: int
    ) -> int:
        start = self._opened(text, done, words[0] if words else following)
        if start is None and words is not None:
            start = words[0]
        if start is None:
            raise SampleError(
                f"messages[{index}]",
                f"this answer is not found in what the chat template writes ({self.template.where}): "
                f"{text[done : done + 200]!r}",
            )
        has_reasoning = any(part.kind == "reasoning" for part in turn.parts)
        if not self._trains_empty_think and not has_reasoning and (empty := _EMPTY_THINK.match(text, start)):
            start = empty.end()
        return start

    def _opened(self, text: str, start: int, end: int) -> int | None:
        """Where the first answer between two places begins: past its opening, or past the lines of it that are there.

        An answer without words ends nowhere that is known, so there may be others before `end`.
        """
        found = [(at, -len(opening)) for opening in self._openings if (at := text.find(opening, start, end)) >= 0]
        return min(found)[0] - min(found)[1] if found else None

    def _length_of_ending(self, rest: str, turns: Sequence[Turn], tools: Sequence[Any]) -> int:
        """How much of what follows an answer's last word, up to the next turn's first, still belongs to the answer."""
        end, ending = self._end_of_turn, self.ending
        if end and end in rest:
            return rest.index(end) + len(end)
        if ending and rest.startswith(ending):
            return len(ending)
        marks = _Marks(rest, 1 << 10)
        messages, _ = messages_of(turns, self.template, marks.around)
        try:  # were the conversation over here, all that follows would be the answer's
            alone = self.template.write(messages, tools)
        except SampleError:
            alone = ""
        length = _length_in_common(rest, marks.after_last(alone).rstrip())
        return length or (rest.index(ending) + len(ending) if ending and ending in rest else 0)

    def _cuts(
        self,
        turn: Turn,
        index: int,
        text: str,
        leaves: Sequence[Leaf],
        extents: Sequence[tuple[int, int] | None],
    ) -> tuple[tuple[int, int], ...]:
        """Where parts of an own weight begin: (place, part), for each part but the first."""
        if all(part.weight is None for part in turn.parts):
            return ()
        ordered = sorted(
            (place, leaf.part) for leaf, place in zip(leaves, extents, strict=True) if place and leaf.turn == index
        )
        cuts = []
        for (before, part), (after, next_part) in itertools.pairwise(ordered):
            if part != next_part:
                opens = turn.parts[next_part].kind == "tool_call" and text[before[1] : after[0]].endswith(
                    self._call_opening
                )
                cuts.append((after[0] - (len(self._call_opening) if opens else 0), next_part))
        return tuple(cuts)

    @cached_property
    def _call_opening(self) -> str:
        """What the template writes between an answer's words and the name of the function that it calls."""
        call = Part(kind="tool_call", text='{"name": "f8201947", "arguments": {}}')
        question = Turn(role="user", parts=(Part(kind="text", text="7310561"),))
        answer = Turn(role="assistant", parts=(Part(kind="text", text="7310569"), call))
        return self._write((question, answer)).partition("7310569")[2].partition("f8201947")[0]


def _plain_extents(turns: Sequence[Turn], text: str, leaves: Sequence[Leaf]) -> list[tuple[int, int]] | None:
    """Where pieces of a conversation are that are plain words, each of which `text` has once, and in order, or None.

    A second rendering says nothing else of them, unless the template leaves them out and has the same words once
    between the turns itself. Not plain are calls, reasoning, which templates leave out, and words with tags (`<think>`,
    `[THINK]`), which templates may take for what opens or ends an answer.
    """
    extents: list[tuple[int, int]] = []
    done = 0
    for leaf in leaves:
        words = leaf.text.strip()
        start = text.find(words, done)
        if start < 0 or text.find(words) != start or text.find(words, start + 1) >= 0:
            return None
        if turns[leaf.turn].parts[leaf.part].kind != "text" or _TAG.search(words):
            return None
        done = start + len(words)
        extents.append((start, done))
    return extents


def _length_in_common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _hull(extents: Iterable[tuple[int, int] | None]) -> tuple[int, int] | None:
    there = [extent for extent in extents if extent is not None]
    return (min(start for start, _ in there), max(end for _, end in there)) if there else None


def _within(places: Places, turns: Sequence[Turn], generated: Sequence[tuple[int, int]]) -> Places:
    """Answers as the template's generation blocks bound them; their ends of turn are trained in any case."""
    found = list(places)
    before = 0
    for index, (turn, place) in enumerate(zip(turns, places, strict=True)):
        if turn.role == "assistant" and place is not None:
            inside = _hull(span for span in generated if span[0] < place.end and span[1] > before)
            found[index] = inside and replace(place, start=inside[0], end=max(inside[1], place.end))
        before = before if place is None else place.end
    return found


class _Marks:
    """Numbers put around pieces of text, by which these are found again in what a template makes of them.

    A mark is digits, which no template changes; it begins with a 9 and has no other before its number, so that digits
    around it cannot be taken for a part of it.
    """

    def __init__(self, text: str, count: int) -> None:
        """`text`: what a template makes of `count` pieces without marks."""
        self._text, self._count = text, count
        self._prefix = next(p for n in itertools.count(0o12345670) if (p := f"9{n:o}") not in text)
        self._pattern = re.compile(self._prefix + r"(\d{5})")
        self.of_generation = (self._mark(2 * count), self._mark(2 * count + 1))
        self.found: dict[int, tuple[int, int]] = {}  # where a leaf's marks were, in `text`
        self.left_out: set[int] = set()  # leaves whose marks did not come out, though all else stayed
        self.generated: list[tuple[int, int]] = []
        self._offsets: dict[int, tuple[int, int]] = {}  # of a leaf's two marks in its own text
        self.placed: dict[int, tuple[int, int]] = {}  # the same, of those that are looked for next
        self._several: set[int] = set()  # leaves with a pair of marks for each of their strings

    def _mark(self, number: int) -> str:
        return f"{self._prefix}{number:05d}"

    # ---- writing

    def around(self, leaf: Leaf) -> str:
        """Around all but blanks at the ends, which a template may trim."""
        text = leaf.text
        return self._mark_leaf(leaf, len(text) - len(text.lstrip()), len(text.rstrip()))

    def inside(self, leaf: Leaf) -> str:
        """Inside the first and the last word, so that what a template looks for (a tag, a beginning) stays whole."""
        words = [match.span() for match in _WORD_OR_TAG.finditer(leaf.text) if match[1]]
        return self._mark_leaf(leaf, words[0][0] + 1, words[-1][1] - 1) if words else leaf.text

    def _mark_leaf(self, leaf: Leaf, first: int, last: int) -> str:
        begin, end = self._mark(2 * leaf.number), self._mark(2 * leaf.number + 1)
        self.placed[leaf.number] = first, last
        if leaf.is_json:
            self._several.add(leaf.number)
            return spell(_mark_strings(json.loads(leaf.text), begin, end))
        return f"{leaf.text[:first]}{begin}{leaf.text[first:last]}{end}{leaf.text[last:]}"

    # ---- reading

    def find(self, marked: str) -> bool:
        """Whether the text is the same but for its marks; if so, where they are is noted."""
        pieces = self._pattern.split(marked)
        if "".join(pieces[::2]) != self._text:
            return False
        self.generated = []
        position, begun = 0, 0
        found: dict[int, tuple[int, int]] = {}
        open_leaves: set[int] = set()  # a template may write a piece twice: its first place is taken
        for piece, number in zip(pieces[::2], map(int, pieces[1::2]), strict=False):
            position += len(piece)
            leaf, is_end = divmod(number, 2)
            if leaf == self._count:
                begun = begun if is_end else position
                self.generated += [(begun, position)] if is_end else []
            elif leaf not in found or leaf in self._several or leaf in open_leaves:
                found[leaf] = found.get(leaf, (position, position))[0], position
                (open_leaves.discard if is_end else open_leaves.add)(leaf)
        self.found |= found
        self._offsets |= self.placed
        self.left_out |= self.placed.keys() - found.keys() - self._several
        return True

    def after_last(self, marked: str) -> str:
        return self._pattern.split(marked)[-1]

    def extent(self, leaf: Leaf, text: str) -> tuple[int, int] | None:
        """Where a leaf's words are, without blanks at the ends; None where no mark of it was seen."""
        if leaf.number not in self.found:
            return None
        first, last = self.found[leaf.number]
        words = leaf.text.strip()
        start = first - (self._offsets[leaf.number][0] - (len(leaf.text) - len(leaf.text.lstrip())))
        if not leaf.is_json and start >= 0 and text.startswith(words, start):
            return start, start + len(words)
        return first, last


def _mark_strings(value: Any, begin: str, end: str) -> Any:
    if isinstance(value, str) and value.strip():
        return begin + value + end
    if isinstance(value, list):
        return [_mark_strings(item, begin, end) for item in value]
    if isinstance(value, dict):
        return {key: _mark_strings(item, begin, end) for key, item in value.items()}
    return value
