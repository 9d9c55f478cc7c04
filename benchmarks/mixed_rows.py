"""Rows of mixed length and media for benchmarks: real files, the same bytes for the same arguments.

Lengths follow no model: text is log-normal, pictures, sounds and clips take sizes that people fine-tune with, scaled
to what two CPU cores can train on. Videos have no sound track, since transformers takes one `use_audio_in_video` for
a whole batch and could not mix them with others.
"""

from __future__ import annotations

import json
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"text": 0.45, "image": 0.28, "audio": 0.17, "video": 0.10}  # share of the rows
TEXT = (
    "the picture shows a small brown dog that runs after red ball on grass near water and woman in blue coat walks "
    "through city while it is raining what do you see hear say first we read question then think about answer"
)
WORDS = tuple(TEXT.split())
SAMPLE_RATE = 16_000
VIDEO_FPS = 4


def write_rows(directory: Path, *, num_rows: int, seed: int = 0, audio: bool = True) -> Path:
    """Write `rows.jsonl` in the messages format and its media under `directory`; return the file.

    Without `audio`, for models that do not hear, the other kinds share its rows.
    """
    (directory / "media").mkdir(parents=True, exist_ok=True)
    path = directory / "rows.jsonl"
    rng = np.random.default_rng(seed)
    shares = {kind: share for kind, share in KINDS.items() if audio or kind != "audio"}
    total = sum(shares.values())
    kinds = rng.choice(list(shares), size=num_rows, p=[share / total for share in shares.values()])
    path.write_text("".join(json.dumps(_row(directory, n, str(k), rng)) + "\n" for n, k in enumerate(kinds)), "utf-8")
    return path


def _row(directory: Path, number: int, kind: str, rng: np.random.Generator) -> dict[str, Any]:
    long = kind == "text"
    question = _words(rng, median=90 if long else 15, spread=1.0 if long else 0.5, most=1400)
    answer = _words(rng, median=80 if long else 35, spread=0.9 if long else 0.7, most=900)
    row: dict[str, Any] = {"id": f"{kind}_{number:04d}"}
    if long:
        row["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return row
    name = f"media/{number:04d}." + {"image": "jpg", "audio": "wav", "video": "mp4"}[kind]
    {"image": _write_image, "audio": _write_audio, "video": _write_video}[kind](directory / name, rng)
    row["messages"] = [{"role": "user", "content": f"<{kind}>{question}"}, {"role": "assistant", "content": answer}]
    row[f"{kind}s"] = [name]
    return row


def _words(rng: np.random.Generator, *, median: float, spread: float, most: int) -> str:
    count = int(np.clip(rng.lognormal(np.log(median), spread), 3, most))
    return " ".join(rng.choice(WORDS, size=count))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], smooth enough for a codec."""
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return coarse.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]


def _write_image(path: Path, rng: np.random.Generator) -> None:
    from PIL import Image

    height, width = rng.integers(160, 640, 2)
    Image.fromarray(_texture(rng, int(height), int(width))).save(path, quality=90)


def _write_audio(path: Path, rng: np.random.Generator) -> None:
    num_samples = int(np.clip(rng.lognormal(np.log(6), 0.7), 1, 28) * SAMPLE_RATE)
    samples = (rng.normal(0, 3000, num_samples)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())


def _write_video(path: Path, rng: np.random.Generator) -> None:
    import av

    height, width = (int(side) * 2 for side in rng.integers(60, 120, 2))
    num_frames = int(rng.integers(2, 9)) * VIDEO_FPS
    scene = _texture(rng, height, width + num_frames * 4)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=VIDEO_FPS, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.time_base = Fraction(1, VIDEO_FPS)
        for index in range(num_frames):  # the camera pans over one scene
            pixels = np.ascontiguousarray(scene[:, index * 4 : index * 4 + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
