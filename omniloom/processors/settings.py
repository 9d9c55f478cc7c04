"""What a run and a checkpoint's files say about processing: options, tokenizer, feature extractors.

Reads the small files of a checkpoint directory; the only module of `processors/` that needs transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load_tokenizer(checkpoint_dir: str | Path) -> Any:
    """The checkpoint's tokenizer as transformers loads it; every family so far has Qwen2's class.

    Raises: ValueError where its files are missing or no JSON.
    """
    from transformers import Qwen2Tokenizer  # AutoTokenizer would read, and complain about, the model's config.json

    directory = Path(checkpoint_dir)
    if (directory / "tokenizer.json").is_file():
        read_json(directory / "tokenizer.json")
    elif lacking := [name for name in ("vocab.json", "merges.txt") if not (directory / name).is_file()]:
        raise ValueError(
            f"{directory}: no tokenizer: expected tokenizer.json, or vocab.json and merges.txt, but there is no "
            f"{' and no '.join(['tokenizer.json', *lacking])}; download the missing files"
        )
    if (directory / "tokenizer_config.json").is_file():
        read_json(directory / "tokenizer_config.json")
    return Qwen2Tokenizer.from_pretrained(directory, chat_template=None)  # `chat_template` reads that itself


def find_word(tokenizer: Any, field: str, token_id: int, word: str) -> str:
    """The tokenizer's word for a token that config.json names by id. Raises: ValueError unless it is `word`."""
    found = tokenizer.convert_ids_to_tokens(token_id)
    if found != word:
        raise ValueError(
            f"{tokenizer.name_or_path}: {field} of config.json is {token_id}, expected the token {word}, but the "
            f"tokenizer has {found!r} there; take tokenizer and config.json from the same checkpoint"
        )
    return found


def read_processor_config(checkpoint_dir: str | Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings of the image processor, the audio feature extractor and the video processor, whichever there are.

    Published checkpoints have the first two in preprocessor_config.json and the third, if at all, in
    video_preprocessor_config.json; transformers 5 writes them as sections of processor_config.json.
    Raises: ValueError if the checkpoint has neither file.
    """
    directory = Path(checkpoint_dir)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            settings = read_json(directory / name)
            video = settings.get("video_processor", {})
            if not video and (directory / "video_preprocessor_config.json").is_file():
                video = read_json(directory / "video_preprocessor_config.json")
            return settings.get("image_processor", settings), settings.get("feature_extractor", settings), video
    raise ValueError(f"{directory}: no preprocessor_config.json; expected a checkpoint in Hugging Face layout")


def read_json(path: Path) -> dict[str, Any]:
    """Raises: ValueError where the file holds no JSON object."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings
