"""Rows of every kind of media that families take, written on the spot, for tests that train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.unit.media_files import tone, write_audio, write_video


def write_media_rows(folder: Path, hears: bool) -> Path:
    """Text, two pictures, two videos of unlike rates in one row; for omni models sound alone, in and beside a video."""
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 255, (60 + 20 * index, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    write_video(folder / "fast.mp4", num_frames=30, fps=10, sound=tone(48_000, 16_000), sound_rate=16_000)
    write_video(folder / "slow.mp4", num_frames=12, fps=3)
    write_audio(folder / "sound.wav", "pcm_s16le", 16_000, tone(30_000, 16_000))
    rows = [
        ("what is it?", {}),
        ("<image>this<image>", {"images": ["0.png", "1.png"]}),
        ("<video>or<video>", {"videos": ["fast.mp4", "slow.mp4"]}),
    ]
    if hears:
        rows += [
            ("<audio>hear", {"audios": ["sound.wav"]}),
            ("<video>and<audio>", {"videos": ["slow.mp4"], "audios": ["sound.wav"]}),
            ("<image><video>with sound", {"images": ["0.png"], "videos": ["fast.mp4"], "use_audio_in_video": True}),
        ]
    answer = {"role": "assistant", "content": "It is a test."}
    lines = [{"messages": [{"role": "user", "content": text}, answer], **media} for text, media in rows]
    (folder / "rows.json").write_text(json.dumps(lines))
    return folder / "rows.json"
