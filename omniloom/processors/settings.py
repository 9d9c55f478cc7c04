"""What a run and a checkpoint's files say about processing: options, tokenizer, feature extractors.

Reads the small files of a checkpoint directory; the only module of `processors/` that needs transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from omniloom.dims import AudioTowerConfig, VisionTowerConfig
from omniloom.options import ProcessorOptions

TokenizerKind = Literal["Qwen2Tokenizer", "Qwen3_5Tokenizer"]  # transformers' classes
BICUBIC = 3  # PIL's number of it


def load_tokenizer(checkpoint_dir: str | Path, vocab_size: int, kind: TokenizerKind) -> Any:
    """The checkpoint's tokenizer as transformers loads it for a family whose own class is `kind`.

    Raises: ValueError where its files are missing or no JSON, and where it has tokens beyond the `vocab_size` rows of
    the model's embedding.
    """
    directory = Path(checkpoint_dir)
    is_whole = (directory / "tokenizer.json").is_file()
    if is_whole:
        read_json(directory / "tokenizer.json")
    elif lacking := [name for name in ("vocab.json", "merges.txt") if not (directory / name).is_file()]:
        raise ValueError(
            f"{directory}: no tokenizer: expected tokenizer.json, or vocab.json and merges.txt, but there is no "
            f"{' and no '.join(['tokenizer.json', *lacking])}; download the missing files"
        )
    of_class = directory / "tokenizer_config.json"
    named = read_json(of_class).get("tokenizer_class") if of_class.is_file() else None
    loader = _tokenizer_class(kind, named if is_whole else None)
    tokenizer = loader.from_pretrained(directory, chat_template=None)  # `chat_template` reads that itself
    backend = tokenizer.backend_tokenizer
    ids = {*backend.get_added_tokens_decoder(), *range(vocab_size, backend.get_vocab_size(with_added_tokens=False))}
    if beyond := sorted(token_id for token_id in ids if token_id >= vocab_size):
        named = ", ".join(f"{backend.id_to_token(token_id)} (id {token_id})" for token_id in beyond[:3])
        raise ValueError(
            f"{directory}: the tokenizer has {len(beyond)} tokens beyond the {vocab_size} rows of the model's "
            f"embedding: {named}{', ...' if len(beyond) > 3 else ''}; resize the embedding to the tokenizer and save "
            "the model (transformers: resize_token_embeddings), or take the tokenizer that it was published with"
        )
    return tokenizer


def _tokenizer_class(kind: TokenizerKind, named: str | None) -> Any:
    """What AutoTokenizer takes where tokenizer_config.json names a class: importing that takes a second.

    Classes of a family have its rule for splitting words, any other has tokenizer.json's. Published files of Qwen3.5
    name Qwen2's, which transformers corrects.
    """
    import transformers

    own = kind if named is None or kind == "Qwen3_5Tokenizer" else named.removesuffix("Fast")
    return getattr(transformers, own if own in get_args(TokenizerKind) else "PreTrainedTokenizerFast")


def token_id_of(tokenizer: Any, field: str, token_id: int, word: str) -> int:
    """The id of a token that config.json names, too. Raises: ValueError unless it is `word` to the tokenizer."""
    found = tokenizer.convert_ids_to_tokens(token_id)
    if found != word:
        raise ValueError(
            f"{tokenizer.name_or_path}: {field} of config.json is {token_id}, expected the token {word}, but the "
            f"tokenizer has {found!r} there; take tokenizer and config.json from the same checkpoint"
        )
    return token_id


@dataclass(frozen=True, kw_only=True)
class Section:
    """The settings of one feature extractor, and the file that they stand in. Empty where a checkpoint has none."""

    values: Mapping[str, Any]
    where: str

    def number(self, name: str, default: float | None = None) -> float:
        """Raises: ValueError where it is no number, or is missing and has no default."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.where}: {name}: expected a number, got {value!r}")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """Raises: ValueError where it is no whole number above 0, or is missing and has no default."""
        value = self.number(name, default)
        if value != int(value) or value < 1:
            raise ValueError(f"{self.where}: {name}: expected a whole number above 0, got {value!r}")
        return int(value)

    def of_channels(self, name: str) -> tuple[float, float, float]:
        """Three numbers, one for each colour. Raises: ValueError."""
        value = self.values.get(name)
        numbers = [value] * 3 if isinstance(value, int | float) else value
        if not isinstance(numbers, list) or len(numbers) != 3 or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError(f"{self.where}: {name}: expected three numbers, one for each colour, got {value!r}")
        return float(numbers[0]), float(numbers[1]), float(numbers[2])

    def pixels(self, default: tuple[int | None, int | None] = (None, None)) -> tuple[int, int]:
        """Least and most pixels; min_pixels and max_pixels stand over the edges of `size`. Raises: ValueError."""
        size = self.section("size")
        low, high = (
            self.whole(name) if self.values.get(name) is not None else size.whole(edge, usual)
            for name, edge, usual in zip(
                ("min_pixels", "max_pixels"), ("shortest_edge", "longest_edge"), default, strict=True
            )
        )
        return low, high

    def section(self, name: str) -> Section:
        """Raises: ValueError where it is no JSON object."""
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{self.where}: {name}: expected a JSON object, got {value!r}")
        return Section(values=value, where=f"{self.where}: {name}")

    def demand(self, **expected: Any) -> None:
        """Raises: ValueError where a setting has another value than the only one that is computed here."""
        for name, value in expected.items():
            if (got := self.values.get(name)) is not None and got != value:
                raise ValueError(
                    f"{self.where}: {name} is {json.dumps(got)}; only {json.dumps(value)} is computed here, so that "
                    "training would see other inputs than whoever serves the model"
                )


def read_processor_config(checkpoint_dir: str | Path) -> tuple[Section, Section, Section]:
    """Settings of the image processor, the audio feature extractor and the video processor, whichever there are.

    Published checkpoints have the first two in preprocessor_config.json and the third, if at all, in
    video_preprocessor_config.json; transformers 5 writes them as sections of processor_config.json, and reads each from
    there first. Raises: ValueError if the checkpoint has none of the image processor.
    """
    directory = Path(checkpoint_dir)
    names = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    nested, both, of_video = (
        Section(values=read_json(path) if (path := directory / name).is_file() else {}, where=str(path))
        for name in names
    )
    parts = {"image_processor": both, "feature_extractor": both, "video_processor": of_video}
    image, audio, video = (found if (found := nested.section(part)).values else own for part, own in parts.items())
    if not image.values:
        raise ValueError(f"{directory}: no preprocessor_config.json; expected a checkpoint in Hugging Face layout")
    return image, audio, video


def read_json(path: Path) -> dict[str, Any]:
    """Raises: ValueError where the file holds no JSON object."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


# ---------------------------------------------------------------------------------------- feature extractors


@dataclass(frozen=True, kw_only=True)
class PixelRules:
    """What becomes of the pixels of a picture of its final size."""

    resample: int  # PIL's number of the filter with which it was resized
    rescale: float | None
    mean: tuple[float, float, float] | None  # None, as `std`: not normalised
    std: tuple[float, float, float] | None


@dataclass(frozen=True, kw_only=True)
class ExtractorSettings:
    """What the checkpoint's feature extractors do, and the bounds in force."""

    image_pixels: tuple[int, int]  # least and most
    image: PixelRules
    frames: PixelRules  # of a video
    video: Section  # the video processor's own settings, empty where a checkpoint has none
    sampling_rate: int = 0  # 0: the checkpoint hears nothing
    hop_length: int = 0
    n_fft: int = 0


def read_extractors(
    checkpoint_dir: str | Path, options: ProcessorOptions, vision: VisionTowerConfig, audio: AudioTowerConfig | None
) -> ExtractorSettings:
    """Raises: ValueError where the checkpoint lacks a file or a field, or asks for what is not computed here."""
    of_image, of_sound, of_video = read_processor_config(checkpoint_dir)
    for section in (of_image, of_video):
        section.demand(do_resize=True, do_convert_rgb=True)
        section.demand(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )
    hears = audio is not None
    if audio is not None:
        of_sound.demand(feature_size=audio.num_mel_bins, dither=0.0)
    return ExtractorSettings(
        image_pixels=bounds(options.image.min_pixels, options.image.max_pixels, of_image.pixels()),
        image=_pixel_rules(of_image),
        frames=_pixel_rules(Section(values={**of_image.values, **of_video.values}, where=of_video.where)),
        video=of_video,
        sampling_rate=of_sound.whole("sampling_rate") if hears else 0,
        hop_length=of_sound.whole("hop_length") if hears else 0,
        n_fft=of_sound.whole("n_fft") if hears else 0,
    )


def _pixel_rules(section: Section) -> PixelRules:
    normalised, rescaled = (section.values.get(name, True) is not False for name in ("do_normalize", "do_rescale"))
    resample = section.number("resample", BICUBIC)
    if resample not in range(6):
        raise ValueError(
            f"{section.where}: resample: expected the number of one of PIL's filters, 0 to 5, got {resample!r}"
        )
    return PixelRules(
        resample=int(resample),
        rescale=section.number("rescale_factor", 1 / 255) if rescaled else None,
        mean=section.of_channels("image_mean") if normalised else None,
        std=section.of_channels("image_std") if normalised else None,
    )


def bounds(low: int | None, high: int | None, default: tuple[int, int]) -> tuple[int, int]:
    """Least and most, each the given one or else the default's; what is most wins."""
    high = default[1] if high is None else high
    return min(default[0] if low is None else low, high), high
