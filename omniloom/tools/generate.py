"""Answers from a published, exported or trained checkpoint: transformers' generation, fed by our processor.

Owns the batching of prompts (left padding) and the choice of transformers' class. What the model reads is prepared
as in training; its forward is transformers', so that an answer also proves the export.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from omniloom.checkpoint.adapters import adapter_values, name_in_memory
from omniloom.config import Config, DataConfig, ModelConfig, keys_of, override_config
from omniloom.data.row_media import KINDS
from omniloom.data.rows import RowReader, SourceReader, clips_of
from omniloom.data.sources import Sources, open_sources
from omniloom.processors.rendering import split_reasoning
from omniloom.run.opening import Workshop, open_workshop
from omniloom.run.rows import PROMPT_KEYS, ROW_KEYS, open_rows
from omniloom.tools.trained_model import by_hand, trained_model
from omniloom.training.lora import merging
from omniloom.types import Conversation, Part, SampleError, Speech, Turn

# transformers' class that answers in text, where it is not the one that config.json names
TEXT_CLASSES = {
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen2_5OmniModel": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration": "Qwen2_5OmniThinkerForConditionalGeneration",
}
BATCH_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation up to its last answer, ready for `generate`."""

    id: str
    file: str  # the data file that it comes from
    inputs: Mapping[str, Any]  # a batch of one, tensors by transformers' names
    question: str  # the words of the turn that is answered
    expected: str  # the words of the answer that the row gives, "" if it gives none
    speech: Speech | None = None  # how that sounds


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn; the default takes the likeliest tokens. Raises: ValueError for what cannot be drawn by."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # share of the likeliest tokens to draw from
    top_k: int = 0  # number of the likeliest tokens to draw from; 0 is all
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                "expected --temperature of at least 0, --top-p above 0 and at most 1, --top-k of at least 0, got "
                f"{self.temperature:g}, {self.top_p:g}, {self.top_k}"
            )
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError("--top-p and --top-k choose among drawn tokens; set --temperature, too, e.g. to 0.7")

    def arguments(self) -> dict[str, Any]:
        """transformers' `generate` arguments; seeds the generators."""
        if self.temperature == 0:
            return {"do_sample": False}
        torch.manual_seed(self.seed)
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


GREEDY = Sampling()


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be asked: its id, or its file and line, and why, with both."""

    id: str
    error: str


def open_reader(model: str | Path, data: DataConfig, source: Sources) -> RowReader:
    """The row reader of a checkpoint; `data` as it was in training. Rows need no answer.

    Raises: ValueError for no known checkpoint.
    """
    return open_rows_to_ask(open_model(model, data), source)


def open_model(
    model: str | Path, data: DataConfig, adapter: str | Path | None = None, *, speaks: bool = False
) -> Workshop:
    """What is needed to ask a model; with `speaks` its talker, too, where it has one. Raises: ValueError."""
    named = ModelConfig(path=str(model), adapter=None if adapter is None else str(adapter))
    return open_workshop(Config(model=named, data=data), adapter_decides=True, speaks=speaks)


def open_rows_to_ask(workshop: Workshop, source: Sources) -> RowReader:
    return replace(open_rows(workshop, source, cache=False), needs_answer=False)()


def read_prompts(reader: RowReader) -> list[Prompt]:
    """Every row of the reader's source, its media decoded. Raises: ValueError naming file and line of a bad row."""
    found = read_rows(reader, range(len(reader.source)))
    if bad := next((one for one in found if isinstance(one, BadRow)), None):
        raise ValueError(bad.error)
    return [one for one in found if isinstance(one, Prompt)]


def read_rows(reader: RowReader, rows: Iterable[int]) -> list[Prompt | BadRow]:
    """Some rows of the reader's source, their media decoded, or what is wrong with them."""
    with one_thread():
        return [_read_row(reader, index) for index in rows]


@contextmanager
def one_thread() -> Iterator[None]:
    """As in a loader's worker: on small tensors threads wait for each other, and cost five times the work."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _read_row(reader: RowReader, index: int) -> Prompt | BadRow:
    name = place = "{}:{}".format(*reader.source.locate(index))
    try:
        row, file, line = reader.source.read_row(index)
        name = place if row.get("id") is None else str(row["id"])
        return read_prompt(reader.reader_of(index), reader.reader_of(index).parse(row, file, line), file)
    except SampleError as error:
        return BadRow(id=name, error=f"{place}: {str(error) or type(error).__name__}")


def read_prompt(reader: SourceReader, conversation: Conversation, file: str) -> Prompt:
    """One conversation up to its last answer, its media decoded. Raises: SampleError."""
    asked, expected = _split_answer(conversation)
    media = clips_of(asked)
    headers = [reader.read_header(source, kind) for source, kind in media]
    processor: Any = reader.processor
    clips = processor.geometry(asked, headers)
    decoded = [reader.decode(source, clip) for (source, _), clip in zip(media, clips, strict=True)]
    inputs = processor.prompt(asked, headers, decoded)
    question = "".join(part.text for turn in asked.turns[-1:] for part in turn.parts)
    speech = conversation.turns[-1].speech
    return Prompt(id=conversation.id, file=file, inputs=inputs, question=question, expected=expected, speech=speech)


def load_model(model_dir: Path, *, speaks: bool = False) -> Any:
    """transformers' model in evaluation mode, on the accelerator if there is one, else in float32.

    It answers in text, or with `speaks` is the whole of what config.json names.
    """
    import transformers

    from omniloom.checkpoint.files import read_json

    architectures = read_json(Path(model_dir) / "config.json").get("architectures") or [""]
    name = architectures[0] if speaks else TEXT_CLASSES.get(architectures[0], architectures[0])
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"{model_dir}/config.json: transformers knows no architecture {name!r}; upgrade transformers")
    device = torch.accelerator.current_accelerator(check_available=True)
    dtype = torch.float32 if device is None else torch.bfloat16
    return model_class.from_pretrained(model_dir, dtype=dtype).to(device or "cpu").eval()


def add_adapter(model: Any, workshop: Workshop) -> None:
    """Add the adapter of `model.adapter` into transformers' weights, in place, and those that were trained beside it.

    Raises: ValueError for an adapter that does not fit.
    """
    assert workshop.adapter is not None
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in workshop.build().named_parameters()}
    tied = workshop.key_map.tied
    values = dict(adapter_values(workshop.adapter, shapes, workshop.assemblies, workshop.adapters, tied))
    held = dict(model.named_parameters())

    def find(name: str) -> torch.nn.Parameter:
        end = name_in_memory(workshop.assemblies[name])
        found: torch.nn.Parameter
        (found,) = (weight for theirs, weight in held.items() if theirs == end or theirs.endswith(f".{end}"))
        return found

    merged = merging(lambda name: values[name] if name in values else find(name).cpu(), workshop.adapters)
    changed = {adapter.base for adapter in workshop.adapters} | (values.keys() & workshop.assemblies.keys())
    with torch.no_grad():
        for name in changed:
            weight = find(name)
            weight.copy_(merged(name).reshape(weight.shape))


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling = GREEDY,
    *,
    streamer: Any = None,
) -> list[str]:
    """The answer to every prompt, in order, without special tokens and surrounding space.

    `streamer` is one of transformers', for a single prompt.
    """
    drawn = sampling.arguments()
    answers = [""] * len(prompts)
    pad_id = model.generation_config.pad_token_id or 0
    for indexes in _batches(prompts):
        inputs = join_inputs([prompts[index].inputs for index in indexes], pad_id=pad_id)
        inputs = {key: on_device(value, model) for key, value in inputs.items()}
        with torch.inference_mode():
            tokens = model.generate(**inputs, **drawn, max_new_tokens=sampling.max_new_tokens, streamer=streamer)
        for index, row in zip(indexes, tokens[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answers[index] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def join_inputs(batch: Sequence[Mapping[str, Any]], *, pad_id: int) -> dict[str, Any]:
    """Several batches of one as one: tokens padded on the left, log-mel frames on the right, other tensors joined.

    Values that are no tensors must agree.
    """
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for inputs in batch for key in inputs):
        values = [inputs[key] for inputs in batch if key in inputs]
        if key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            joined[key] = _pad(values, left=True, value=pad_id if key == "input_ids" else 0)
        elif key in ("input_features", "feature_attention_mask"):
            joined[key] = _pad(values, left=False, value=0)
        elif isinstance(values[0], torch.Tensor):
            joined[key] = torch.cat(values)
        else:
            assert all(value == values[0] for value in values), key
            joined[key] = values[0]
    return joined


def split_words(words: Sequence[str], *, has_data: bool) -> tuple[str | None, Sequence[str]]:
    """The prompt and the overrides of a command line, where the prompt comes first unless there is a file of rows.

    Raises: ValueError where the prompt was left out: the first word would be asked that sets a key.
    """
    if has_data or not words:
        return None, words
    if words[0].partition("=")[0] in {path for path, *_ in keys_of()}:
        raise ValueError(f"no prompt: expected it before the overrides, got {words[0]!r} there")
    return words[0], words[1:]


def print_answers(lines: Iterable[Mapping[str, Any]], *, as_json: bool) -> None:
    """The answer to one prompt, or a JSON line per row. Raises: as `answers`, and ValueError where all rows are bad."""
    num_rows, errors = 0, []
    for line in lines:
        print(json.dumps(line, ensure_ascii=False) if as_json else line["answer"], flush=True)
        if "speech" in line and not as_json:
            heard = f", heard as {line['heard']!r}" if "heard" in line else ""
            print(f"wrote {line['speech']}, {line['num_code_frames']} frames{heard}", file=sys.stderr)
        num_rows += 1
        errors += [line["error"]] if "error" in line else []
    if errors and len(errors) == num_rows:
        raise ValueError(f"none of the {num_rows} rows can be answered; the first: {errors[0]}")
    if errors:
        print(f"{len(errors)} of {num_rows} rows are bad; their lines hold the reason as error", file=sys.stderr)


def answers(
    model: str | Path,
    prompt: str | None = None,
    media: Mapping[str, Sequence[str | Path]] | None = None,
    *,
    data: str | Path | None = None,
    sampling: Sampling = GREEDY,
    overrides: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> Iterator[dict[str, str]]:
    """The answer to one prompt about media (by kind), or to each row of a file as soon as it is there.

    `model` is a directory, a hub id or a run, `adapter` a PEFT adapter of it; `overrides` say how rows and media are
    read (`data.video.fps=4`) where that is not as in training. A row that cannot be asked has an `error` in place of
    its answer.
    Raises: ValueError unless exactly one of `prompt` and `data` is given, for a prompt that cannot be asked, and for
    overrides that are of no use here.
    """
    takes = keys_taken(prompt, data)
    with trained_model(model) as (path, usual):
        config = override_config(usual, overrides, verb="generate", takes=takes).data
        if data is not None:
            source = open_sources((str(data),), config)
            workshop = open_model(path, config, adapter)
            yield from _answer_rows(workshop, open_rows_to_ask(workshop, source), sampling)
        elif prompt is not None:
            workshop = open_model(path, by_hand(config), adapter)
            reader = open_asking(workshop)
            asked = read_prompt(reader, ask(reader, prompt, media or {}), "command line")
            (text,) = answer(load(workshop), reader.processor.tokenizer, [asked], sampling)
            yield {"id": asked.id, "answer": text}


def keys_taken(prompt: str | None, data: str | Path | None) -> tuple[str, ...]:
    """The keys that say how a prompt or rows are read. Raises: ValueError unless exactly one of the two is given."""
    if (prompt is None) == (data is None):
        raise ValueError("expected either a prompt or --data FILE; give one of the two")
    return PROMPT_KEYS if data is None else (*PROMPT_KEYS, *ROW_KEYS)


def open_asking(workshop: Workshop) -> SourceReader:
    """What reads single prompts."""
    (reader,) = open_rows_to_ask(workshop, Sources((), ())).readers
    return reader


def load(workshop: Workshop, *, speaks: bool = False) -> Any:
    """transformers' model, the adapter on it. Raises: ValueError for an adapter that does not fit."""
    model = load_model(workshop.checkpoint.directory, speaks=speaks)
    if workshop.adapter is not None:
        add_adapter(model, workshop)
    return model


def _answer_rows(workshop: Workshop, reader: RowReader, sampling: Sampling) -> Iterator[dict[str, str]]:
    """A line for every row; a bad one costs only itself."""
    model: Any = None
    num_rows = len(reader.source)
    for start in range(0, num_rows, BATCH_ROWS):
        found = read_rows(reader, range(start, min(start + BATCH_ROWS, num_rows)))
        prompts = [one for one in found if isinstance(one, Prompt)]
        if prompts and model is None:
            model = load(workshop)
        texts = iter(answer(model, reader.processor.tokenizer, prompts, sampling) if prompts else ())
        for one in found:
            yield asdict(one) if isinstance(one, BadRow) else _answer_line(one, next(texts))


def _answer_line(prompt: Prompt, text: str) -> dict[str, str]:
    reasoning, said = split_reasoning(text)
    thought = {"reasoning": reasoning} if reasoning else {}
    return {"id": prompt.id, "answer": said, **thought, "expected": prompt.expected}


def ask(
    reader: SourceReader, prompt: str, media: Mapping[str, Sequence[str | Path]], before: Sequence[Turn] = ()
) -> Conversation:
    """A prompt and its media, behind earlier turns, as the conversation that a row of them would be.

    Raises: SampleError.
    """
    blocks = [{"type": kind, kind: str(path)} for kind in KINDS for path in media.get(kind, ())]
    row = {"id": "prompt", "messages": [{"role": "user", "content": blocks}]}
    conversation = reader.parse(row, "command line", 1)
    *system, turn = conversation.turns
    parts = (*turn.parts, Part(kind="text", text=prompt))  # not in the row: `<image>` in a prompt is only a word
    return replace(conversation, turns=(*(before or system), replace(turn, parts=parts)))


def _split_answer(conversation: Conversation) -> tuple[Conversation, str]:
    """The turns before the last answer, and that answer's words."""
    turns = conversation.turns
    words = ""
    while turns and turns[-1].role == "assistant":
        words = "".join(part.text for part in turns[-1].parts if part.kind == "text") + words
        turns = turns[:-1]
    return replace(conversation, turns=turns), words.strip()


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Indexes of prompts that can share a call, alike in length, since padding is computed too."""
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        # arguments that hold for a whole call, such as whether videos sound
        whole = tuple(sorted((key, value) for key, value in prompt.inputs.items() if not hasattr(value, "shape")))
        groups.setdefault(whole, []).append(index)
    for indexes in groups.values():
        indexes.sort(key=lambda index: prompts[index].inputs["input_ids"].shape[1])
        for start in range(0, len(indexes), BATCH_ROWS):
            yield indexes[start : start + BATCH_ROWS]


def _pad(values: Sequence[Any], *, left: bool, value: int) -> Any:
    longest = max(tensor.shape[-1] for tensor in values)
    pad = torch.nn.functional.pad
    missing = [longest - tensor.shape[-1] for tensor in values]
    return torch.cat([pad(x, (n, 0) if left else (0, n), value=value) for x, n in zip(values, missing, strict=True)])


def on_device(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() and value.dim() > 1 else value.dtype)
