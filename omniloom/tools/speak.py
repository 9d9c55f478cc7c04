"""Answers that are spoken: transformers' generation of the whole model, fed by our processor.

Thinker, talker and vocoder are transformers', so that what is heard proves the export. Owns the arguments of that
generation, the codes behind a sound, its wav file, and what a command of the user's hears in it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omniloom.checkpoint.files import write_text
from omniloom.config import override_config
from omniloom.data.rows import RowReader
from omniloom.data.sources import open_sources
from omniloom.processors.rendering import split_reasoning
from omniloom.run.answer_metrics import error_rates
from omniloom.run.opening import Workshop
from omniloom.tools.generate import (
    BadRow,
    Prompt,
    Sampling,
    ask,
    keys_taken,
    load,
    on_device,
    open_asking,
    open_model,
    open_rows_to_ask,
    read_prompt,
    read_rows,
)
from omniloom.tools.run_files import SPOKEN_ROWS
from omniloom.tools.thumbnails import wav_file
from omniloom.tools.trained_model import by_hand, trained_model
from omniloom.types import SampleError

FRAMES_PER_SECOND = 12.5  # of Qwen3-Omni's codes, as published; a vocoder's config has only the samples of a frame


@dataclass(frozen=True, kw_only=True)
class Voice:
    """How answers are spoken. Raises: ValueError for what cannot be drawn by."""

    target: Path  # the wav file of a prompt; the folder of those of rows
    speaker: str = ""  # empty: that of the row, or the usual one
    temperature: float = 0.9  # of codes; 0 takes the likeliest. Else as in transformers
    seconds: float = 120.0  # of an answer at most
    listen: str | None = None  # a command that prints the words of a wav file, named as its last argument

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not self.seconds * FRAMES_PER_SECOND >= 1:
            raise ValueError(
                "expected --speech-temperature of at least 0 and --speech-seconds of at least 0.08, got "
                f"{self.temperature:g}, {self.seconds:g}"
            )

    def arguments(self) -> dict[str, Any]:
        """Of the talker, in transformers' `generate`."""
        # the last token is the end, or what is not drawn any more: it has no frame. Transformers fails without a frame
        limits = {
            "talker_max_new_tokens": int(self.seconds * FRAMES_PER_SECOND) + 1,
            "talker_min_new_tokens": 1,
        }
        if self.temperature:
            return {**limits, "talker_temperature": self.temperature}
        unused: dict[str, Any] = dict.fromkeys(("talker_temperature", "talker_top_k", "talker_top_p"))
        return {**limits, **unused, "talker_do_sample": False, "talker_repetition_penalty": 1.0}


@dataclass(frozen=True, kw_only=True)
class Spoken:
    text: str
    codes: np.ndarray  # int64 [groups, frames]
    waveform: np.ndarray  # float32 [samples]
    rate: int  # samples a second


class Speaker:
    """A checkpoint that answers aloud, its weights read once."""

    def __init__(self, workshop: Workshop, voice: Voice, tokenizer: Any) -> None:
        """Raises: ValueError for a checkpoint without a talker, and for a voice that it does not have."""
        if workshop.family.talker is None:
            raise ValueError("--speech: there is no talker to speak, the checkpoint holds none; leave --speech out")
        self._tokens = tokens = workshop.family.talker.tokens
        if tokens.num_code_groups == 1:
            raise ValueError(
                f"--speech: that of {workshop.spec.name} is not run here, since transformers 5's generation leaves out "
                "what opens its codes; leave --speech out, or name a Qwen3-Omni"
            )
        # as transformers does by itself where the codebook is followed by 1,024 ids, as published
        others = range(tokens.num_codes, workshop.family.talker.decoder.vocab_size)
        self._suppressed = [number for number in others if number != tokens.codec_eos]
        if voice.speaker:
            self._tokens.voice(voice.speaker, "--speaker")
        self._workshop, self._voice, self._tokenizer = workshop, voice, tokenizer
        self._model: Any = None

    def say(self, prompt: Prompt, sampling: Sampling, *, streamer: Any = None) -> Spoken:
        """The answer to one prompt. Raises: SampleError for a voice that the checkpoint does not have."""
        name = self._voice.speaker or (prompt.speech and prompt.speech.speaker) or self._tokens.usual_speaker
        self._tokens.voice(name, "speaker")
        model = self._model = self._model or self._load()
        inputs = {key: on_device(value, model) for key, value in prompt.inputs.items()}
        frames: list[torch.Tensor] = []

        def keep_frame(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            if (frame := named.get("residual_codes")) is not None:
                frames.append(frame[0].cpu())

        torch.manual_seed(sampling.seed)  # codes may be drawn where words are not
        hook = model.talker.register_forward_pre_hook(keep_frame, with_kwargs=True)
        try:
            tokens, (waveform, *_) = model.generate(
                **inputs,
                speaker=name,
                thinker_eos_token_id=model.config.im_end_token_id,
                # the last token drawn is not spoken, and one must be
                thinker_max_new_tokens=max(2, sampling.max_new_tokens),
                thinker_min_new_tokens=1,
                thinker_streamer=streamer,
                **{f"thinker_{key}": value for key, value in sampling.arguments().items()},
                talker_suppress_tokens=self._suppressed,
                **self._voice.arguments(),
            )
        finally:
            hook.remove()
        said = self._tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :].tolist(), skip_special_tokens=True)
        return Spoken(
            text=said.strip(),
            codes=torch.stack(frames, dim=1).numpy(),
            waveform=waveform.flatten().cpu().numpy(),
            rate=int(FRAMES_PER_SECOND * int(model.code2wav.total_upsample)),
        )

    def write(self, prompt: Prompt, path: Path, sampling: Sampling) -> dict[str, Any]:
        """Speak the answer into a wav file. Returns a line about it: words, frames, what was expected and was heard."""
        spoken = self.say(prompt, sampling)
        path.write_bytes(wav_file(spoken.waveform, spoken.rate))
        answer = split_reasoning(spoken.text)[1]
        line: dict[str, Any] = {"id": prompt.id, "answer": answer, "expected": prompt.expected, "speech": str(path)}
        line["num_code_frames"] = spoken.codes.shape[1]
        if prompt.speech is not None:
            expected = np.array(prompt.speech.codes)
            line |= {"expected_frames": expected.shape[1], "code_match": code_match(spoken.codes, expected)}
        if self._voice.listen is not None:
            heard = _listen(self._voice.listen, path)
            rates = error_rates([{"expected": answer, "answer": heard}])
            line |= {"heard": heard, **({"cer": rates["eval_cer"]} if rates else {})}
        return line

    def _load(self) -> Any:
        model = load(self._workshop, speaks=True)
        # without it transformers' positions fail where sound stands beside pictures
        model.talker.config.audio_config = model.config.thinker_config.audio_config
        return model


def code_match(codes: np.ndarray, expected: np.ndarray) -> float:
    """Share of codes [groups, frames] that are as expected; a frame too many or too few has none."""
    shared = min(codes.shape[1], expected.shape[1])
    equal = codes[:, :shared] == expected[:, :shared]
    return float(equal.sum() / (len(codes) * max(codes.shape[1], expected.shape[1])))


def spoken_answers(
    model: str | Path,
    prompt: str | None,
    media: Mapping[str, Sequence[str | Path]],
    voice: Voice,
    *,
    data: str | Path | None = None,
    sampling: Sampling,
    overrides: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> Iterator[dict[str, Any]]:
    """As `generate.answers`, each answer spoken into a wav file, `speech` in its line.

    Lines about rows are left in the directory of the run that `model` may be, for its report. Raises: ValueError.
    """
    takes = keys_taken(prompt, data)
    if data is None and (voice.target.is_dir() or not voice.target.parent.is_dir()):
        raise ValueError(f"--speech: {voice.target}: expected a wav file, new or not, in a folder that there is")
    with trained_model(model) as (path, usual):
        config = override_config(usual, overrides, verb="generate", takes=takes).data
        workshop = open_model(path, config if data else by_hand(config), adapter, speaks=True)
        asking = open_asking(workshop)
        speaker = Speaker(workshop, voice, asking.processor.tokenizer)
        if data is None:
            asked = read_prompt(asking, ask(asking, prompt or "", media), "command line")
            yield speaker.write(asked, voice.target, sampling)
            return
        kept: list[dict[str, Any]] = []
        reader = open_rows_to_ask(workshop, open_sources((str(data),), config))
        yield from _speak_rows(speaker, reader, voice.target, kept, sampling)
        if (Path(model) / "config.yaml").is_file():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            write_text(Path(model) / SPOKEN_ROWS, text)


def _speak_rows(
    speaker: Speaker, reader: RowReader, folder: Path, kept: list[dict[str, Any]], sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """A line about each row, its sound in the folder; those with sound go to `kept`, with question and whole path."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(len(reader.source)):
        (found,) = read_rows(reader, [row])
        line = _row_line(speaker, found, folder / f"{row:06d}.wav", sampling)
        if isinstance(found, Prompt) and "speech" in line:
            kept.append({**line, "question": found.question, "speech": str(Path(line["speech"]).resolve())})
        yield line


def _row_line(speaker: Speaker, row: Prompt | BadRow, path: Path, sampling: Sampling) -> dict[str, Any]:
    """A bad row costs only itself."""
    if isinstance(row, BadRow):
        return {"id": row.id, "error": row.error}
    try:
        return speaker.write(row, path, sampling)
    except SampleError as error:
        return {"id": row.id, "error": f"{row.file}: {error}"}


def _listen(command: str, path: Path) -> str:
    """What a command hears in a wav file. Raises: ValueError where it cannot be run or fails."""
    words = [*shlex.split(command), str(path)]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=True)
    except OSError as error:
        raise ValueError(f"--listen: {words[0]} cannot be run: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"--listen: {shlex.join(words)} ended with code {error.returncode}: {last}") from None
    return found.stdout.strip()
