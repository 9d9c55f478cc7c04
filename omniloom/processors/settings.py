"""What a run and a checkpoint's files say about processing: options, tokenizer, chat template, feature extractors.

Reads the small files of a checkpoint directory; the only part of `models/` that does, and that needs transformers.
Families' `make_processor` start here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omniloom.processors.rendering import TemplateStyle, find_template, render
from omniloom.types import Conversation, Part, Turn


@dataclass(frozen=True, kw_only=True)
class ProcessorOptions:
    """What a run may change about a checkpoint's processor. None: the checkpoint's own value."""

    template: str = "auto"
    system: str | None = None  # for conversations without a system turn
    enable_thinking: bool = True
    train_on_prompt: bool = False
    last_turn_only: bool = False
    image_min_pixels: int | None = None
    image_max_pixels: int | None = None
    video_min_pixels: int | None = None  # per frame
    video_max_pixels: int | None = None
    video_fps: float = 2.0
    video_max_frames: int = 128
    no_audio: Literal["error", "video_only"] = "error"  # where a video's sound is asked for and there is none

    def __post_init__(self) -> None:
        if self.train_on_prompt and self.last_turn_only:
            raise ValueError("data.train_on_prompt and data.last_turn_only contradict each other; keep one")


def load_tokenizer(checkpoint_dir: str | Path) -> Any:
    """The checkpoint's tokenizer as transformers loads it; every family so far has Qwen2's class.

    Raises: ValueError where its files are missing or no JSON.
    """
    from transformers import Qwen2Tokenizer  # AutoTokenizer would read, and complain about, the model's config.json

    directory = Path(checkpoint_dir)
    if (directory / "tokenizer.json").is_file():
        _read_json(directory / "tokenizer.json")
    elif lacking := [name for name in ("vocab.json", "merges.txt") if not (directory / name).is_file()]:
        raise ValueError(
            f"{directory}: no tokenizer: expected tokenizer.json, or vocab.json and merges.txt, but there is no "
            f"{' and no '.join(['tokenizer.json', *lacking])}; download the missing files"
        )
    if (directory / "tokenizer_config.json").is_file():
        _read_json(directory / "tokenizer_config.json")
    return Qwen2Tokenizer.from_pretrained(directory)


def find_word(tokenizer: Any, field: str, token_id: int, word: str) -> str:
    """The tokenizer's word for a token that config.json names by id. Raises: ValueError unless it is `word`."""
    found = tokenizer.convert_ids_to_tokens(token_id)
    if found != word:
        raise ValueError(
            f"{tokenizer.name_or_path}: {field} of config.json is {token_id}, expected the token {word}, but the "
            f"tokenizer has {found!r} there; take tokenizer and config.json from the same checkpoint"
        )
    return found


def choose_template(
    checkpoint_dir: str | Path, tokenizer: Any, options: ProcessorOptions, *, plain: str, thinking: str | None = None
) -> tuple[TemplateStyle, str | None]:
    """The template to render with, and in words how the checkpoint's own chat template departs from it, if it does.

    For "auto" the family's: `thinking` if the checkpoint's own gives an answer without reasoning a <think> block, else
    `plain`. Answers are opened as the checkpoint's own opens them, since servers of the export will.
    Raises: ValueError for a name that is unknown or of another family.
    """
    names = (plain,) if thinking is None else (plain, thinking)
    if options.template != "auto" and find_template(options.template).name not in names:
        raise ValueError(
            f"data.template={options.template} is of another family; {checkpoint_dir} takes {' or '.join(names)}, "
            "and auto finds out which"
        )
    template = _read_chat_template(Path(checkpoint_dir)) or tokenizer.chat_template
    if not template:
        return find_template(plain if options.template == "auto" else options.template), None

    def write(messages: list[dict[str, Any]], **settings: Any) -> str:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **settings)

    thinks = thinking is not None and "<think>" in write(_SHORT)
    name = options.template if options.template != "auto" else thinking if thinks else plain
    asked, settings = _SHORT[:1], {"enable_thinking": options.enable_thinking}
    before, after = write(asked, **settings), write(asked, add_generation_prompt=True, **settings)
    assert name is not None
    style = find_template(name)
    if after.startswith(before):
        style = replace(style, opening=after.removeprefix(before))
    probes = [(_SHORT, None), *([(_WITH_TOOLS, [_TOOL])] if "tools" in template else [])]
    from jinja2 import TemplateError  # imported here, as transformers is: only a checkpoint's own template needs it

    for messages, tools in probes:
        try:
            theirs = write(messages, tools=tools)
        except TemplateError as error:  # templates refuse what they do not take
            return style, f"the checkpoint's own chat template takes no {'tools' if tools else 'question'}: {error}"
        ours = _render_probe(messages, tools, style)
        if theirs != ours:
            return style, _first_difference(theirs, ours, style.name)
    return style, None


_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_SHORT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
_WITH_TOOLS = [
    {"role": "system", "content": "s"},
    *_SHORT,
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "e"},
    {"role": "assistant", "content": "g"},
]


def _render_probe(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, style: TemplateStyle) -> str:
    turns = []
    for message in messages:
        calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
        parts = [Part(kind="text", text=message["content"]), *(Part(kind="tool_call", text=call) for call in calls)]
        turns.append(Turn(role=message["role"], parts=tuple(parts)))
    spelled = tuple(json.dumps(tool) for tool in tools or ())
    probe = Conversation(id="probe", source="probe", turns=tuple(turns), tools=spelled)
    return "".join(span.text for span in render(probe, style))


def _first_difference(theirs: str, ours: str, name: str) -> str:
    at = next(
        (i for i, (one, other) in enumerate(zip(theirs, ours, strict=False)) if one != other),
        min(map(len, (theirs, ours))),
    )
    start = max(at - 20, 0)
    return (
        f"the checkpoint's own chat template writes {theirs[start : at + 20]!r} where {name} writes "
        f"{ours[start : at + 20]!r}; training uses {name}, whoever serves the export the checkpoint's"
    )


def _read_chat_template(directory: Path) -> str | None:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if (directory / "chat_template.json").is_file():
        return _read_json(directory / "chat_template.json")["chat_template"]
    return None


def read_processor_config(checkpoint_dir: str | Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings of the image processor, the audio feature extractor and the video processor, whichever there are.

    Published checkpoints have the first two in preprocessor_config.json and the third, if at all, in
    video_preprocessor_config.json; transformers 5 writes them as sections of processor_config.json.
    Raises: ValueError if the checkpoint has neither file.
    """
    directory = Path(checkpoint_dir)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            settings = _read_json(directory / name)
            video = settings.get("video_processor", {})
            if not video and (directory / "video_preprocessor_config.json").is_file():
                video = _read_json(directory / "video_preprocessor_config.json")
            return settings.get("image_processor", settings), settings.get("feature_extractor", settings), video
    raise ValueError(f"{directory}: no preprocessor_config.json; expected a checkpoint in Hugging Face layout")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings
