"""Process time from media file to features and tokens, against transformers' own processors, on one core.

    OMP_NUM_THREADS=1 python benchmarks/loader.py

Ours: header, sizes, decoding, features, and the row's tokens twice (measured, then encoded). Theirs: decoding, then the
image processor or the feature extractor alone, without any tokens. A first version: photographs and short recordings,
made here; no videos, no packs, no other loader.
"""

from __future__ import annotations

import json
import tempfile
import time
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from PIL import Image
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from omniloom.data.media_decode import decode_clip
from omniloom.data.media_files import MediaLimits
from omniloom.data.media_headers import read_header
from omniloom.families.registry import find_spec
from omniloom.options import ProcessorOptions
from omniloom.tools.tiny import make_tiny
from omniloom.types import Conversation, MediaKind, MediaSource, Part, Turn

REPEATS = 15
LIMITS = MediaLimits()


def best_ms(work: Callable[[], object]) -> float:
    """The least process time of several runs, in milliseconds."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def row_of(kind: MediaKind, path: Path) -> Conversation:
    asked = (Part(kind=kind, media=MediaSource(path=str(path))), Part(kind="text", text="What is this?"))
    answer = (Part(kind="text", text="An answer of a few words."),)
    turns = (Turn(role="user", parts=asked), Turn(role="assistant", parts=answer))
    return Conversation(id="i", source="s", turns=turns)


def words_alone(processor: Any) -> object:
    """What any row costs: its text, rendered and tokenised to be measured and again to be encoded."""
    row = row_of("image", Path())
    row = replace(row, turns=(replace(row.turns[0], parts=row.turns[0].parts[1:]), row.turns[1]))
    processor.measure(row, ())
    return processor.encode(row, (), ())


def ours(processor: Any, kind: MediaKind, path: Path) -> object:
    row = row_of(kind, path)
    source = MediaSource(path=str(path))
    extent = processor.measure(row, (read_header(source, kind, LIMITS),))
    return processor.encode(row, extent.clips, (decode_clip(source, extent.clips[0], LIMITS),))


def their_sound(extractor: WhisperFeatureExtractor, path: Path) -> object:
    with wave.open(str(path)) as file:
        rate, channels = file.getframerate(), file.getnchannels()
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, channels)
    mono = soxr.resample(samples.astype(np.float32).mean(axis=1) / 32768, rate, 16000, quality="HQ")
    return extractor(mono, sampling_rate=16000, return_tensors="pt", padding="longest", truncation=False)


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny("qwen3_omni", folder / "model")
        config_json = json.loads((model / "config.json").read_text())
        spec = find_spec(config_json)
        processor = spec.make_processor(model, spec.read_config(config_json), ProcessorOptions())
        vision, rules = processor.towers.vision, processor.towers.settings
        low, high = rules.image_pixels
        pictures = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            size={"shortest_edge": low, "longest_edge": high},
        )
        print(f"{'media':<24}{'ours ms':>9}{'theirs ms':>11}")
        print(f"{'words alone':<24}{best_ms(lambda: words_alone(processor)):>9.1f}{'not done':>11}")
        for width, height in ((300, 170), (640, 480), (1280, 720)):
            path = folder / f"{width}.jpg"
            coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((width, height)).save(path, quality=90)
            mine = best_ms(lambda path=path: ours(processor, "image", path))
            other = best_ms(lambda path=path: pictures(Image.open(path).convert("RGB"), return_tensors="pt"))
            print(f"{f'jpeg {width}x{height}':<24}{mine:>9.1f}{other:>11.1f}")
        extractor = WhisperFeatureExtractor(feature_size=processor.towers.audio.num_mel_bins)
        for rate, channels in ((16000, 1), (48000, 2)):
            path = folder / f"{rate}.wav"
            with wave.open(str(path), "wb") as file:
                file.setparams((channels, 2, rate, 0, "NONE", ""))
                file.writeframes(rng.integers(-3000, 3000, (rate * 5, channels), dtype=np.int16).tobytes())
            mine = best_ms(lambda path=path: ours(processor, "audio", path))
            other = best_ms(lambda path=path: their_sound(extractor, path))
            print(f"{f'wav 5 s, {rate} Hz, {channels} ch':<24}{mine:>9.1f}{other:>11.1f}")


if __name__ == "__main__":
    main()
