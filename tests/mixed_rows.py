"""A small data set of text, pictures and sounds, written on the spot, for tests that train."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
from PIL import Image


def write_rows(folder: Path) -> Path:
    """Text, images of several sizes, sounds of several lengths, and one row whose image is missing."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(24):
        question, media = f"Row {n}: what is this? " + "so " * (n % 7), {}
        if n % 3 == 1:
            size = (40 + 16 * (n % 5), 48 + 8 * (n % 4))
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{n}.png")
            question, media = "<image>" + question, {"images": [f"{n}.png"]}
        elif n % 3 == 2:
            with wave.open(str(folder / f"{n}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(16000)
                file.writeframes(rng.integers(-9000, 9000, 4000 + 2500 * (n % 6), dtype=np.int16).tobytes())
            question, media = "<audio>" + question, {"audios": [f"{n}.wav"]}
        answer = {"role": "assistant", "content": f"It is number {n}, " + "yes " * (n % 5)}
        rows.append({"messages": [{"role": "user", "content": question}, answer], **media})
    rows[4]["images"] = ["missing.png"]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"
