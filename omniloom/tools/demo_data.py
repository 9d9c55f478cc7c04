"""A small data set of real media files whose questions can only be answered by perceiving them.

Owns what the demo's pictures, tones and clips look like, their questions, and the controls that take the evidence
away: blank media, a frozen first frame, a muted sound track. Knows nothing of models or training; writes ordinary
files and rows in the messages format, as a user would have them. First station of `omniloom demo`.

Nothing but the medium tells the answer: every answer of a question is equally frequent, a shape's place is jitter, and
where a moving square starts is drawn before its direction is, so that a single frame says nothing about the way.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

COLOURS = {"red": (224, 62, 62), "green": (70, 196, 92), "blue": (72, 118, 240), "yellow": (236, 204, 70)}
SHAPES = ("circle", "square", "triangle")
PITCHES_HERTZ = {"low": (190.0, 260.0), "middle": (520.0, 700.0), "high": (1400.0, 1900.0)}
CONTOURS = ("rising", "falling", "steady")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MODALITIES = ("image", "audio", "video", "joint")

NUM_PIXELS = 64  # height and width of every picture
BACKGROUND = (22, 24, 30)
FRAMES_PER_SECOND = 4
NUM_FRAMES = 6
STEP_PIXELS = 4.0  # that a square moves from one frame to the next
START_PIXELS = 10.0  # a square starts anywhere up to this far from the middle, whatever its direction
SAMPLE_RATE = 16_000
VIDEO_SECONDS = NUM_FRAMES / FRAMES_PER_SECOND
SOUND_CODECS: dict[str, tuple[str, dict[str, str]]] = {
    ".wav": ("pcm_s16le", {}),
    ".mp3": ("libmp3lame", {}),
    ".flac": ("flac", {}),
    ".mp4": ("aac", {"aac_coder": "fast", "b": "48k"}),
}


class Question(NamedTuple):
    """One question, all its answers (each equally frequent), and the modality it belongs to."""

    modality: str
    text: str
    answers: tuple[str, ...]


QUESTIONS = (
    Question("image", "Which colour?", tuple(COLOURS)),
    Question("image", "Which shape?", SHAPES),
    Question("image", "Which colour and shape?", tuple(map(" ".join, product(COLOURS, SHAPES)))),
    Question("audio", "Which pitch?", tuple(PITCHES_HERTZ)),
    Question("audio", "Rising or falling?", CONTOURS),
    Question("video", "Which way?", tuple(DIRECTIONS)),
    Question("joint", "Which way and pitch?", tuple(map(" ".join, product(DIRECTIONS, PITCHES_HERTZ)))),
)


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """Where the rows are. Each held-out file of a control has the rows of its modality with other media.

    `controls` maps a control's name (`blank`, `frozen`, `muted`) to a file per modality it applies to; `chance` is
    the share of right answers that somebody who perceives nothing can get at best.
    """

    train: Path
    held_out: dict[str, Path]
    controls: dict[str, dict[str, Path]]
    chance: dict[str, float]


def write_demo_data(directory: Path, *, num_train: int, num_held_out: int, seed: int = 0) -> DemoData:
    """Write media files and rows under `directory`: the same bytes for the same arguments.

    `num_train` rows in all, image : audio : video : joint as 2 : 2 : 2 : 1; `num_held_out` rows per modality, of files
    that no training row uses.
    """
    shares = {"image": 2, "audio": 2, "video": 2, "joint": 1}
    drawn: list[_Scene] = []
    for modality in MODALITIES:
        rng = np.random.default_rng([seed, MODALITIES.index(modality)])
        drawn += _draw_scenes(rng, modality, "train", num_train * shares[modality] // sum(shares.values()))
    order = np.random.default_rng([seed, len(MODALITIES)]).permutation(len(drawn))
    files = {directory / "train.jsonl": [(drawn[index], "real") for index in order]}
    held_out: dict[str, Path] = {}
    controls: dict[str, dict[str, Path]] = {"blank": {}, "frozen": {}, "muted": {}}
    for modality in MODALITIES:
        rng = np.random.default_rng([seed, 100 + MODALITIES.index(modality)])
        tested = _draw_scenes(rng, modality, "held_out", num_held_out)
        held_out[modality] = directory / f"held_out_{modality}.jsonl"
        files[held_out[modality]] = [(scene, "real") for scene in tested]
        for control, modalities in (("blank", MODALITIES), ("frozen", ("video", "joint")), ("muted", ("joint",))):
            if modality in modalities:
                controls[control][modality] = directory / f"held_out_{modality}_{control}.jsonl"
                files[controls[control][modality]] = [(scene, control) for scene in tested]

    (directory / "media").mkdir(parents=True, exist_ok=True)
    for path, contents in files.items():
        path.write_text("".join(json.dumps(scene.row(variant)) + "\n" for scene, variant in contents), "utf-8")
    _write_media(directory, [content for contents in files.values() for content in contents])
    train = directory / "train.jsonl"
    return DemoData(train=train, held_out=held_out, controls=controls, chance=chance_levels())


def chance_levels() -> dict[str, float]:
    """Per modality, the best expected accuracy of an answer given without looking: one in the number of answers."""
    return {
        modality: float(np.mean([1 / len(q.answers) for q in QUESTIONS if q.modality == modality]))
        for modality in MODALITIES
    }


# ---------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """One row before its files exist: what is asked and everything that the media will show."""

    id: str
    modality: str
    question: Question
    answer: str
    colour: str
    shape: str
    direction: str
    pitch: str
    contour: str
    centre: tuple[float, float]
    radius_pixels: float
    container: str
    seed: int

    def media_name(self, variant: str) -> str:
        return f"media/{self.id}{'' if variant == 'real' else '_' + variant}.{self.container}"

    def row(self, variant: str) -> dict[str, Any]:
        """The row of the data file for this scene as `variant` (real, blank, frozen, muted) shows it."""
        kind = "video" if self.modality == "joint" else self.modality
        messages = [
            {"role": "user", "content": f"<{kind}>{self.question.text}"},
            {"role": "assistant", "content": self.answer},
        ]
        row: dict[str, Any] = {"id": self.id, "messages": messages, f"{kind}s": [self.media_name(variant)]}
        if self.modality == "joint":
            row["use_audio_in_video"] = True
        return row

    def write_media(self, directory: Path, variant: str) -> None:
        path = directory / self.media_name(variant)
        if self.modality == "image":
            _write_image(path, self._picture(variant))
        else:
            _write_clip(path, self._frames(variant) if self.modality != "audio" else [], self._tone(variant))

    def _picture(self, variant: str) -> NDArray[np.uint8]:
        if variant == "blank":
            return _blank_picture()
        return _draw(self.shape, COLOURS[self.colour], self.centre, self.radius_pixels)

    def _frames(self, variant: str) -> list[NDArray[np.uint8]]:
        if variant == "blank":
            return [_blank_picture()] * NUM_FRAMES
        dx, dy = DIRECTIONS[self.direction]
        frames = []
        for index in range(NUM_FRAMES):
            travelled = 0.0 if variant == "frozen" else STEP_PIXELS * index
            centre = (self.centre[0] + dx * travelled, self.centre[1] + dy * travelled)
            frames.append(_draw("square", COLOURS[self.colour], centre, self.radius_pixels))
        return frames

    def _tone(self, variant: str) -> NDArray[np.float32]:
        """float32 [samples] at 16 kHz in [-1, 1]."""
        rng = np.random.default_rng(self.seed)
        seconds = VIDEO_SECONDS if self.modality in ("video", "joint") else rng.uniform(0.5, 0.8)
        num_samples = round(seconds * SAMPLE_RATE)
        if variant in ("blank", "muted"):
            return np.zeros(num_samples, dtype=np.float32)
        low, high = PITCHES_HERTZ[self.pitch]
        ratio = {"rising": 2.0, "falling": 0.5, "steady": 1.0}[self.contour]
        time = np.linspace(-0.5, 0.5, num_samples)
        hertz = math.exp(rng.uniform(math.log(low), math.log(high))) * ratio**time
        phase = 2 * math.pi * np.cumsum(hertz) / SAMPLE_RATE + rng.uniform(0, 2 * math.pi)
        tone = np.sin(phase) + rng.uniform(0.0, 0.4) * np.sin(2 * phase) + rng.uniform(0.0, 0.2) * np.sin(3 * phase)
        fade = np.minimum(1.0, np.minimum(np.arange(num_samples), np.arange(num_samples)[::-1]) / (0.02 * SAMPLE_RATE))
        noise = rng.normal(0.0, 0.003, num_samples)
        return (tone * fade * rng.uniform(0.25, 0.5) + noise).clip(-1, 1).astype(np.float32)


def _draw_scenes(rng: np.random.Generator, modality: str, split: str, number: int) -> list[_Scene]:
    """`number` scenes of one modality; questions in turn, and the answers of each question in turn."""
    questions = [question for question in QUESTIONS if question.modality == modality]
    containers = {"image": ("png", "jpg"), "audio": ("wav", "mp3", "flac")}.get(modality, ("mp4",))
    scenes = []
    for index in range(number):
        question = questions[index % len(questions)]
        answer = question.answers[(index // len(questions)) % len(question.answers)]
        words = answer.split()

        def pick(values: Sequence[str], words: Sequence[str] = words) -> str:
            return next((word for word in words if word in values), str(rng.choice(list(values))))

        moving = modality in ("video", "joint")
        spread = START_PIXELS if moving else 3.0
        centre = NUM_PIXELS / 2 + rng.uniform(-spread, spread, 2)
        scenes.append(
            _Scene(
                id=f"{split}_{modality}_{index:05d}",
                modality=modality,
                question=question,
                answer=answer,
                colour=pick(tuple(COLOURS)),
                shape=pick(SHAPES),
                direction=pick(tuple(DIRECTIONS)),
                pitch=pick(tuple(PITCHES_HERTZ)),
                contour="steady" if moving else pick(CONTOURS),
                centre=(float(centre[0]), float(centre[1])),
                radius_pixels=float(rng.uniform(8, 10) if moving else rng.uniform(16, 19)),
                container=str(rng.choice(containers)),
                seed=int(rng.integers(2**31)),
            )
        )
    return scenes


def _write_media(directory: Path, contents: Sequence[tuple[_Scene, str]]) -> None:
    """Encode every file, on all cores: spawned, since forking a process that has threads may hang."""
    num_workers = min(8, len(os.sched_getaffinity(0)), len(contents) // 200)
    if num_workers < 2:
        _write_share(directory, contents)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        shares = [pool.submit(_write_share, directory, contents[first::num_workers]) for first in range(num_workers)]
        for share in shares:
            share.result()


def _write_share(directory: Path, contents: Sequence[tuple[_Scene, str]]) -> None:
    for scene, variant in contents:
        scene.write_media(directory, variant)


# ---------------------------------------------------------------------------------------- pictures


def _blank_picture() -> NDArray[np.uint8]:
    return np.broadcast_to(np.array(BACKGROUND, dtype=np.uint8), (NUM_PIXELS, NUM_PIXELS, 3)).copy()


def _draw(shape: str, colour: tuple[int, int, int], centre: tuple[float, float], radius: float) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]: one filled shape with soft edges on the background; shapes have like areas."""
    axis = np.arange(NUM_PIXELS, dtype=np.float32) + 0.5
    x, y = axis[None, :] - centre[0], axis[:, None] - centre[1]
    if shape == "circle":
        outside = np.hypot(x, y) - radius
    elif shape == "square":
        outside = np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    else:
        slope = math.sqrt(3) / 2
        outside = np.maximum(y, np.abs(x) * slope - y / 2) - 0.74 * radius
    cover = np.clip(0.5 - outside, 0.0, 1.0)[..., None]
    pixels: NDArray[np.uint8] = (np.array(BACKGROUND) * (1 - cover) + np.array(colour) * cover).round().astype(np.uint8)
    return pixels


def _write_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    from PIL import Image

    # compression effort is time, and these files are tiny anyway
    options: dict[str, Any] = {"compress_level": 1} if path.suffix == ".png" else {"quality": 92}
    Image.fromarray(pixels).save(path, **options)


# ---------------------------------------------------------------------------------------- sound and video


def _write_clip(path: Path, frames: Sequence[NDArray[np.uint8]], samples: NDArray[np.float32]) -> None:
    """Write frames, if any, and sound as one container, put together in memory so that the disk sees a single write."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=path.suffix[1:]) as container:
        if frames:
            options = {"preset": "ultrafast", "crf": "16"}
            video: Any = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
            video.width = video.height = NUM_PIXELS
            video.pix_fmt = "yuv420p"
            video.codec_context.thread_count = 1
        codec, options = SOUND_CODECS[path.suffix]
        sound: Any = container.add_stream(codec, rate=SAMPLE_RATE, layout="mono", options=options)
        sound.codec_context.thread_count = 1
        for index, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, FRAMES_PER_SECOND)
            container.mux(video.encode(picture))
        if frames:
            container.mux(video.encode(None))
        levels = (samples * 32767).round().astype(np.int16)
        wave = av.AudioFrame.from_ndarray(levels[None], format="s16", layout="mono")
        wave.sample_rate, wave.pts, wave.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(sound.encode(wave))
        container.mux(sound.encode(None))
    path.write_bytes(buffer.getvalue())
