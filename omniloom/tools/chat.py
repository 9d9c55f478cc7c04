"""`omniloom chat`: a conversation with a model that is loaded once, its words shown as they come.

A line is what one says; `/image PATH`, `/audio PATH` and `/video PATH` go with the next one, `/reset` forgets, `/quit`
or the end of the input leaves. Every answer reads the whole conversation anew, as training does.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omniloom.config import override_config
from omniloom.data.row_media import KINDS
from omniloom.processors.rendering import split_reasoning
from omniloom.run.opening import Workshop
from omniloom.run.rows import PROMPT_KEYS
from omniloom.tools.generate import Prompt, Sampling, answer, ask, load, open_asking, open_model, read_prompt
from omniloom.tools.speak import Speaker, Voice
from omniloom.tools.thumbnails import wav_file
from omniloom.tools.trained_model import by_hand, trained_model
from omniloom.types import Part, SampleError, Turn

HELP = "/image PATH, /audio PATH, /video PATH go with the next line; /reset forgets; /quit leaves"


def chat(
    model: str | Path,
    media: Mapping[str, Sequence[str | Path]],
    *,
    lines: Iterable[str] | None = None,
    write: Callable[[str], object] | None = None,
    sampling: Sampling,
    overrides: Sequence[str] = (),
    adapter: str | Path | None = None,
    voice: Voice | None = None,
) -> None:
    """Answer lines (None: those of the terminal) until they end, in pieces given to `write` (None: the terminal).

    `media`, by kind, go with the first line; with a `voice` answers are spoken into wav files of its folder, too; the
    other arguments as of `answers`. Raises: ValueError.
    """
    with trained_model(model) as (path, usual):
        config = override_config(usual, overrides, verb="chat", takes=PROMPT_KEYS).data
        workshop = open_model(path, by_hand(config), adapter, speaks=voice is not None)
        talk = Talk(workshop, media, write or _show, sampling, voice)
        for line in _typed() if lines is None else lines:
            if not talk.hear(line.strip()):
                return


class Talk:
    """One conversation."""

    def __init__(
        self,
        workshop: Workshop,
        media: Mapping[str, Sequence[str | Path]],
        write: Callable[[str], object],
        sampling: Sampling,
        voice: Voice | None = None,
    ) -> None:
        self._reader, self._write, self._voice, self._num_spoken = open_asking(workshop), write, voice, 0
        if voice is not None:
            voice.target.mkdir(parents=True, exist_ok=True)
            self._speaker = Speaker(workshop, voice, self._reader.processor.tokenizer)
        else:
            self._model = load(workshop)
        self._sampling = sampling
        self._turns: tuple[Turn, ...] = ()
        self._media: dict[str, list[str | Path]] = {kind: list(media.get(kind, ())) for kind in KINDS}

    def hear(self, line: str) -> bool:
        """Answer a line or obey it. Returns whether to go on."""
        word, _, path = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self._turns, self._media = (), {kind: [] for kind in KINDS}
        elif word[1:] in KINDS and word.startswith("/"):
            self._attach(word[1:], path.strip())
        elif word.startswith("/") and not Path(word).exists():
            self._write(f"{HELP}\n")
        elif line:
            self._answer(line)
        return True

    def _attach(self, kind: str, path: str) -> None:
        path = path if Path(path).is_file() else _as_in_a_shell(path)
        if path.startswith(("http://", "https://")) or Path(path).is_file():
            self._media[kind].append(path)
        else:
            self._write(f"{path or 'no path'}: no such file; nothing is attached\n")

    def _answer(self, line: str) -> None:
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(_self, text: str, stream_end: bool = False) -> None:
                self._write(text + ("\n" if stream_end else ""))

        try:
            conversation = ask(self._reader, line, self._media, self._turns)
            asked = read_prompt(self._reader, conversation, "chat")
        except SampleError as error:  # what was attached cannot be read: the conversation stays as it was
            self._write(f"not asked: {error}\n")
            self._media = {kind: [] for kind in KINDS}
            return
        tokenizer = self._reader.processor.tokenizer
        streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        if self._voice is not None:
            text = self._speak(asked, streamer, self._voice.target)
        else:
            (text,) = answer(self._model, tokenizer, [asked], self._sampling, streamer=streamer)
        said = Turn(role="assistant", parts=(Part(kind="text", text=split_reasoning(text)[1]),))
        self._turns, self._media = (*conversation.turns, said), {kind: [] for kind in KINDS}

    def _speak(self, asked: Prompt, streamer: Any, folder: Path) -> str:
        """The answer's words; its sound goes to the folder's next file, whose name is told."""
        spoken = self._speaker.say(asked, self._sampling, streamer=streamer)
        self._num_spoken += 1
        path = folder / f"answer_{self._num_spoken:03d}.wav"
        path.write_bytes(wav_file(spoken.waveform, spoken.rate))
        self._write(f"[{path}, {len(spoken.waveform) / spoken.rate:.1f} s]\n")
        return spoken.text


def _as_in_a_shell(path: str) -> str:
    """A path without quotes and backslashes, as terminals paste a file that is dropped there, and with its home."""
    try:
        (path,) = shlex.split(path)
    except ValueError:  # it has a blank without quotes, or half of a pair
        return path
    return os.path.expanduser(path)


def _typed() -> Iterator[str]:
    """Lines of the terminal, with a prompt, or of a pipe."""
    if sys.stdin.isatty():
        print(HELP)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _show(text: str) -> None:
    print(text, end="", flush=True)
