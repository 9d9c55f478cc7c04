"""Media files as small pictures in data URIs: what a page shows of an image, a clip, a sound.

Decodes only as much as a thumbnail needs and refuses nothing: a file that cannot be read becomes None, since a report
must not fail because a file has moved.
"""

from __future__ import annotations

import base64
import io
import itertools
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omniloom.data.media_files import MediaLimits, open_image
from omniloom.data.packets import demux

NUM_STRIP_FRAMES = 4
MAX_PIXELS = 192  # of a thumbnail's height and width
MAX_PLAYABLE_BYTES = 160_000
MAX_SOUND_SECONDS = 30.0
MAX_WAV_SECONDS = 10.0
MIME_TYPES = {
    ".wav": "audio/wav",
    ".mp3": "audio/mpeg",
    ".flac": "audio/flac",
    ".ogg": "audio/ogg",
    ".mp4": "video/mp4",
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """Data URIs: `picture` is the image or a strip of frames, `sound` a spectrogram, `player` the file itself."""

    kind: str  # image, video, audio
    picture: str | None = None
    sound: str | None = None
    player: str | None = None


def make_thumbnail(path: Path, max_bytes: int = MAX_PLAYABLE_BYTES) -> Thumbnail | None:
    """The thumbnail of one media file, with a player up to `max_bytes`; None where it cannot be read."""
    import av
    from PIL import ImageOps

    try:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            with open_image(str(path), "image", MediaLimits()) as image:
                image.draft("RGB", (MAX_PIXELS, MAX_PIXELS))
                image.thumbnail((MAX_PIXELS, MAX_PIXELS))
                ImageOps.exif_transpose(image, in_place=True)  # as it is trained on
                return Thumbnail(kind="image", picture=_encode(image.convert("RGB")))
        with av.open(str(path)) as container:
            frames = _spread_frames(container) if container.streams.video else []
        with av.open(str(path)) as container:
            sound = _mono(container) if container.streams.audio else None
    except (av.FFmpegError, OSError, ValueError):
        return None
    return Thumbnail(
        kind="video" if frames else "audio",
        picture=_encode(_strip(frames)) if frames else None,
        sound=None if sound is None else spectrogram_of(sound),
        player=file_player(path, max_bytes),
    )


def file_player(path: Path, max_bytes: int = MAX_PLAYABLE_BYTES) -> str | None:
    """The file itself, where a browser plays it and it is small."""
    kind = MIME_TYPES.get(path.suffix.lower())
    if kind is None or not path.is_file() or path.stat().st_size > max_bytes:
        return None
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def picture_of(frames: Sequence[NDArray[np.uint8]]) -> str:
    """Frames uint8 [H, W, 3] as one picture: the only one, or a strip of a few, evenly over all."""
    from PIL import Image

    last, count = len(frames) - 1, min(len(frames), 2 * NUM_STRIP_FRAMES)
    shown = [Image.fromarray(frames[round(index * last / max(1, count - 1))]) for index in range(count)]
    if count > 1:
        return _encode(_strip(shown))
    shown[0].thumbnail((2 * MAX_PIXELS, 2 * MAX_PIXELS))
    return _encode(shown[0])


def sound_player(samples: NDArray[np.float32], rate: int) -> str:
    """Mono sound float32 [n] in [-1, 1] as a WAV file, its first MAX_WAV_SECONDS."""
    file = wav_file(samples[: int(MAX_WAV_SECONDS * rate)], rate)
    return f"data:audio/wav;base64,{base64.b64encode(file).decode('ascii')}"


def wav_file(samples: NDArray[np.float32], rate: int) -> bytes:
    """Mono sound float32 [n] in [-1, 1] as a WAV file of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def spectrogram_of(samples: NDArray[np.float32]) -> str | None:
    """A picture of mono sound float32 [n] at 16 kHz; None of no sound."""
    return _encode(_spectrogram(samples)) if len(samples) else None


def _spread_frames(container: Any) -> list[Any]:
    """Up to NUM_STRIP_FRAMES pictures, evenly over what is decoded: a short clip whole, a long one by seeking."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    seconds = float(container.duration or 0) / 1e6
    frames: list[Any] = []
    if seconds <= 8:
        decoded = [frame.to_image() for frame in _decoded(container, stream)]
        last = len(decoded) - 1
        count = min(NUM_STRIP_FRAMES, len(decoded))
        frames = [decoded[round(index * last / max(1, count - 1))] for index in range(count)]
    else:
        for index in range(NUM_STRIP_FRAMES):
            container.seek(int(1e6 * seconds * (index + 0.5) / NUM_STRIP_FRAMES))
            frames += [frame.to_image() for frame in itertools.islice(_decoded(container, stream), 1)]
    return frames


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    return (frame for packet in demux(container, stream) for frame in packet.decode())


def _strip(frames: list[Any]) -> Any:
    from PIL import Image

    height = min(96, max(frame.height for frame in frames))
    scaled = [frame.resize((max(1, round(frame.width * height / frame.height)), height)) for frame in frames]
    gap = 2
    strip = Image.new("RGB", (sum(frame.width + gap for frame in scaled) - gap, height), (96, 100, 110))
    left = 0
    for frame in scaled:
        strip.paste(frame, (left, 0))
        left += frame.width + gap
    return strip


def _mono(container: Any) -> np.ndarray:
    """float32 [samples] at 16 kHz, at most MAX_SOUND_SECONDS of the first sound track."""
    import av

    resampler = av.AudioResampler(format="flt", layout="mono", rate=16_000)
    chunks: list[np.ndarray] = []
    num_samples = 0
    for frame in _decoded(container, container.streams.audio[0]):
        for part in resampler.resample(frame):
            chunks.append(part.to_ndarray()[0])
            num_samples += len(chunks[-1])
        if num_samples > MAX_SOUND_SECONDS * 16_000:
            break
    return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.float32)


def _spectrogram(samples: np.ndarray) -> Any:
    """Loudness over time (across) and log frequency (up, 80 Hz to 8 kHz) as a picture, dark to warm."""
    from PIL import Image

    length, num_columns, num_rows = 800, 180, 40
    padded = np.pad(samples, (0, max(0, length - len(samples))))
    starts = np.linspace(0, len(padded) - length, num_columns).astype(int)
    power = np.abs(np.fft.rfft(padded[starts[:, None] + np.arange(length)] * np.hanning(length), axis=1)) ** 2
    edges = (np.geomspace(80, 7900, num_rows + 1) * length / 16_000).astype(int)
    loudest = [power[:, low : max(low + 1, high)].max(1) for low, high in itertools.pairwise(edges)]
    decibels = 10 * np.log10(np.stack(loudest) + 1e-6)
    level = np.clip((decibels - 5) / 40, 0, 1)[::-1, :, None]  # 5 dB: below it lies the codecs' and dither's noise
    dark, middle, bright = np.array([22, 24, 30]), np.array([178, 70, 100]), np.array([255, 230, 160])
    colours = np.where(
        level < 0.5, dark + (middle - dark) * 2 * level, middle + (bright - middle) * (2 * level - 1).clip(0)
    )
    return Image.fromarray(colours.round().astype(np.uint8))


def _encode(image: Any) -> str:
    """PNG where that is small (flat pictures), else JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    kind = "png"
    if buffer.tell() > 12_000:
        kind, buffer = "jpeg", io.BytesIO()
        image.save(buffer, "JPEG", quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
