"""What a run did to media, remembered while it trains and written into an export's processor files.

Whoever serves the export reads sizes there, not in the run's config. Where several limits held (rows and data
sets may set their own) the widest is written. Knows the fields of transformers' processors, which vLLM reads, too;
reads no media.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omniloom.checkpoint.files import read_json
from omniloom.config import DataConfig
from omniloom.types import ClipGeometry, StepPlan

PREPROCESSOR, VIDEO, PROCESSOR = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
WIDEST = {"min_pixels": min, "max_pixels": max, "fps": max, "min_frames": min, "max_frames": max}
TOTAL_PIXELS_CLASS = "Qwen3VLVideoProcessor"  # whose `size` bounds the pixels of all frames together
MIN_FRAMES = 4  # of transformers' video processors, where a file says nothing
FRAME_TOKENS = (128, 768)  # the same, in merged patches of a frame
CAP_FLOOR = 1.05  # a frame's cap stays above the least pixels by this factor, as published

Record = dict[str, dict[str, list[float | None]]]


@dataclass(kw_only=True)
class TrainedMedia:
    """The limits that held for the clips of a run's samples: for each kind and option, None where the checkpoint's own
    did, and the widest that a row, its data set or the run set. A checkpoint holds it as JSON, by `asdict`."""

    limits: Record = field(default_factory=dict)
    longest_sound: int = 0  # samples
    has_sound_in_video: bool = False

    def add(self, plan: StepPlan, options: Callable[[int], DataConfig]) -> None:
        """Note the clips of a step. `options`: what holds for a row's data set, by the row's number."""
        samples = (sample for pack in plan.packs for sample in pack.samples if sample.extent.clips)
        for clip, data in ((clip, options(sample.row)) for sample in samples for clip in sample.extent.clips):
            self.longest_sound = max(self.longest_sound, clip.num_audio_samples)
            if clip.kind == "audio":
                continue
            self.has_sound_in_video |= clip.num_audio_samples > 0
            held = self.limits.setdefault(clip.kind, {name: [] for name in WIDEST})
            for name, widest in WIDEST.items():
                value = _asked(clip, name, data)
                numbers = [number for number in held[name] if number is not None]
                if value is None and None not in held[name]:
                    held[name] = [None, *numbers]
                elif value is not None and numbers != [widest([*numbers, value])]:
                    held[name] = [*held[name][: len(held[name]) - len(numbers)], widest([*numbers, value])]

    def held(self, kind: str) -> bool:
        return kind in self.limits

    def own(self, kind: str, name: str) -> bool:
        """Whether some clip had the checkpoint's own limit."""
        return None in self.limits[kind][name]

    def widest(self, kind: str, name: str, own: float | None) -> Any:
        """The widest of the checkpoint's `own` limit, if it held for any clip, and the others. None: none is known."""
        values = [own if value is None else value for value in self.limits[kind][name]]
        numbers = [value for value in values if value is not None]
        return WIDEST[name](numbers) if numbers else None


def _asked(clip: ClipGeometry, name: str, data: DataConfig) -> float | None:
    options = clip.asked
    if name in ("min_pixels", "max_pixels") and options.resized_height and options.resized_width:
        return options.resized_height * options.resized_width
    if name in ("min_frames", "max_frames") and options.num_frames is not None:
        return options.num_frames
    value: float | None = getattr(options, name)
    return value if value is not None else getattr(getattr(data, clip.kind), name, None)


def processor_files(
    directory: Path, media: TrainedMedia, data: DataConfig
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """The processor files of a checkpoint that change, by name, and the limits in them in words for the log.

    `data` is the run's. A kind of media that no sample had stays as it is.
    Raises: ValueError for a file that is no JSON.
    """
    before = {
        name: read_json(directory / name) for name in (PREPROCESSOR, VIDEO, PROCESSOR) if (directory / name).is_file()
    }
    files = copy.deepcopy(before)
    nested = files.get(PROCESSOR, {})
    words: list[str] = []
    if media.held("image"):
        sections = [files.get(PREPROCESSOR), nested.get("image_processor")]
        words += {_write_image(section, media, data) for section in sections if section}
    if PREPROCESSOR in files and VIDEO not in files and "video_processor" not in nested:
        if media.held("video"):
            files[VIDEO] = _as_video_section(before[PREPROCESSOR])
        elif files[PREPROCESSOR] != before[PREPROCESSOR]:
            files[VIDEO] = before[PREPROCESSOR]  # which transformers reads for videos, too
    if media.held("video"):
        sections = [files.get(VIDEO), nested.get("video_processor")]
        words += {_write_video(section, media, data) for section in sections if section}
        if media.has_sound_in_video:
            words.append("videos with their sound: ask for it where they are served (use_audio_in_video)")
    for section in (files.get(PREPROCESSOR), nested.get("feature_extractor")):
        if section and media.longest_sound > section.get("n_samples", media.longest_sound):
            words.append(_write_sound(section, media.longest_sound))
    return {name: content for name, content in files.items() if content != before.get(name)}, tuple(words)


def _write_image(section: dict[str, Any], media: TrainedMedia, data: DataConfig) -> str:
    low, high = _bounds_of(section)
    low = media.widest("image", "min_pixels", data.image.min_pixels or low)
    high = media.widest("image", "max_pixels", data.image.max_pixels or high)
    return f"images of {_write_bounds(section, low, high)}"


def _write_video(section: dict[str, Any], media: TrainedMedia, data: DataConfig) -> str:
    section["fps"] = media.widest("video", "fps", data.video.fps)
    section["max_frames"] = media.widest("video", "max_frames", data.video.max_frames)
    least_frames = media.widest("video", "min_frames", section.get("min_frames"))
    if least_frames is not None:
        section["min_frames"] = least_frames
    frames = f"{section['fps']:g} frames a second, {section['max_frames']} at most"
    if section.get("video_processor_type") == TOTAL_PIXELS_CLASS:
        return f"videos of {frames}, {_write_total(section, media, data)}"
    low, high = _bounds_of(section)
    low = media.widest("video", "min_pixels", data.video.min_pixels or low)
    high = media.widest("video", "max_pixels", data.video.max_pixels or high)
    return f"videos of {frames}, each of {_write_bounds(section, low, high)}"


def _write_total(section: dict[str, Any], media: TrainedMedia, data: DataConfig) -> str:
    """Ours are bounds of each frame; the file has bounds of all frames together and, since transformers 5, a cap."""
    size = dict(section.get("size") or {})
    factor = section.get("patch_size", 16) * section.get("merge_size", 2)
    low = media.widest("video", "min_pixels", data.video.min_pixels)
    high = media.widest("video", "max_pixels", data.video.max_pixels)
    own_total = data.video.max_pixels is None and media.own("video", "max_pixels")  # the file's own held
    own_least = data.video.min_pixels is None and media.own("video", "min_pixels")
    if high is not None:
        most = high * section["max_frames"]
        size["longest_edge"] = max(most, size["longest_edge"]) if own_total and "longest_edge" in size else most
        if not own_total or section.get("cap_pixels_per_frame"):
            cap = section.get("max_video_tokens", FRAME_TOKENS[1]) if own_total else 0
            section["cap_pixels_per_frame"], section["max_video_tokens"] = True, max(high // factor**2, cap)
    if low is not None:
        least = low * section.get("min_frames", MIN_FRAMES)
        size["shortest_edge"] = min(least, size["shortest_edge"]) if own_least and "shortest_edge" in size else least
    if high is not None and section.get("cap_pixels_per_frame"):
        size["shortest_edge"] = min(size.get("shortest_edge", high), int(high / CAP_FLOOR))
    if size:
        section["size"] = size
    return f"{size.get('shortest_edge')} to {size.get('longest_edge')} pixels together"


def _as_video_section(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A video processor's file from the one it would be read from, with the bounds of a frame that trained."""
    section = {name: value for name, value in settings.items() if name not in ("min_pixels", "max_pixels")}
    factor = section.get("patch_size", 14) * section.get("merge_size", 2)
    least, most = (num_tokens * factor**2 for num_tokens in FRAME_TOKENS)
    return {**section, "size": {"shortest_edge": least, "longest_edge": most}}


def _write_bounds(section: dict[str, Any], low: int, high: int) -> str:
    low = min(low, high)
    section["size"] = {"shortest_edge": low, "longest_edge": high}
    section["min_pixels"], section["max_pixels"] = low, high  # older versions read these
    return f"{low} to {high} pixels"


def _write_sound(section: dict[str, Any], longest: int) -> str:
    """Raise the length at which the feature extractor cuts a clip, in whole seconds."""
    rate = section["sampling_rate"]
    section["chunk_length"] = -(-longest // rate)
    section["n_samples"] = section["chunk_length"] * rate
    section["nb_max_frames"] = section["n_samples"] // section["hop_length"]
    return f"sound of up to {section['chunk_length']} s"


def _bounds_of(section: Mapping[str, Any]) -> tuple[Any, Any]:
    size = section.get("size") or {}
    return size.get("shortest_edge", section.get("min_pixels")), size.get("longest_edge", section.get("max_pixels"))
