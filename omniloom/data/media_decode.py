"""Decoded media as arrays: images and frames as uint8 RGB, sound as float32 mono.

Owns decoding and the promise that a clip comes out in its planned size: padded or trimmed by at most 100 ms, else the
sample is bad. Sizes of pictures stay the file's own; resizing is the processor's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omniloom.data.media_files import (
    MediaLimits,
    clip_file,
    find_stream,
    name_of,
    open_container,
    open_image,
    read_bytes,
)
from omniloom.data.packets import decode_packets, demux
from omniloom.data.plain_sound import PlainSound, find_plain_sound
from omniloom.data.seeking import CannotSeek, sought_frames, worth_seeking
from omniloom.types import ClipGeometry, ClipOptions, DecodedClip, MediaKind, MediaSource, SampleError

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.video.frame import VideoFrame
    from PIL.Image import Image

TOLERANCE_SECONDS = 0.1  # by which a clip may miss its planned length
FRAME_PLANES = 8  # of a frame's own, further ones lie elsewhere
CHUNK_SAMPLES = 1 << 16  # decoded together before they are mixed and resampled
PLAIN_SAMPLES = 1 << 20  # the same of what needs no decoder


def decode_clip(source: MediaSource, clip: ClipGeometry, limits: MediaLimits) -> DecodedClip:
    """Decode what the planned geometry asks for.

    Raises: SampleError for a file that cannot be decoded or is not what its header said.
    """
    pixels = waveform = None
    if clip.kind == "image":
        pixels = decode_image(source, limits)
    elif clip.kind == "video":
        pixels = decode_video_frames(source, clip.frame_indices, limits)
    if clip.num_audio_samples:
        waveform = decode_audio(source, limits, num_samples=clip.num_audio_samples)
    return DecodedClip(pixels=pixels, waveform=waveform)


# ---------------------------------------------------------------------------------------- images


def decode_image(source: MediaSource, limits: MediaLimits) -> np.ndarray:
    """uint8 [height, width, 3], orientation applied, transparency over white. Raises: SampleError."""
    return _decode_picture(clip_file(source, "image"), "image", limits)


def _decode_picture(file: str | bytes, kind: MediaKind, limits: MediaLimits) -> np.ndarray:
    from PIL import ImageOps

    with open_image(file, kind, limits) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(_to_rgb(image))


def _to_rgb(image: Image) -> Image:
    """RGB of any mode, as transformers' convert_to_rgb, and 16-bit grey by its upper byte rather than clipped."""
    from PIL import Image as images

    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        image = images.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise SampleError("image", "pictures of floating point pixels have no defined brightness; save as 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# ---------------------------------------------------------------------------------------- videos


def decode_video_frames(source: MediaSource, frame_indices: Sequence[int], limits: MediaLimits) -> np.ndarray:
    """uint8 [N, height, width, 3]: the frames of the given indices (not decreasing), decoded in one pass.

    Only these frames are converted and kept. Raises: SampleError where one lies over 100 ms beyond the last frame.
    """
    assert list(frame_indices) == sorted(frame_indices), "frames are decoded in one pass"
    pictures = _listed_frames(source, frame_indices, limits) if source.frames else _file_frames(source, frame_indices)
    frames: np.ndarray | None = None
    for slot, picture in enumerate(pictures):
        if frames is None:
            frames = np.empty((len(frame_indices), *picture.shape), dtype=np.uint8)
        if picture.shape != frames.shape[1:]:
            raise SampleError("video", f"frames of unlike sizes: {frames.shape[1:3]} and {picture.shape[:2]}")
        frames[slot] = picture
    assert frames is not None, "no frames were asked for"
    return frames


def _listed_frames(source: MediaSource, frame_indices: Sequence[int], limits: MediaLimits) -> Iterator[np.ndarray]:
    assert source.frames is not None
    for index in frame_indices:
        yield _decode_picture(source.frames[index], "video", limits)


def _file_frames(source: MediaSource, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Each wanted frame in order: by seeking where that passes over some, else from the beginning to the last."""
    file, done = clip_file(source, "video"), 0
    with open_container(file, "video") as container:
        if worth_seeking(container, frame_indices):
            stream = find_stream(container, "video", "video", file)
            size = stream.codec_context.width, stream.codec_context.height
            with suppress(CannotSeek):
                for frame in sought_frames(container, stream, frame_indices, file):
                    yield _frame_pixels(frame, size)
                    done += 1
    if done < len(frame_indices):
        yield from _frames_in_turn(file, frame_indices[done:])


def _frames_in_turn(file: str | bytes, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """Each wanted frame in order; the last one again for indices up to 100 ms beyond it."""
    with open_container(file, "video") as container:
        stream = find_stream(container, "video", "video", file)
        slot, count, size, last = 0, 0, None, None
        for frame in decode_packets(demux(container, stream), stream, "video", file):
            size = size or (frame.width, frame.height)
            last = frame
            while slot < len(wanted) and wanted[slot] == count:
                yield _frame_pixels(frame, size)
                slot += 1
            count += 1
            if slot == len(wanted):
                return
        fps = float(stream.average_rate or stream.guessed_rate or 1)
        missing = wanted[-1] + 1 - count
        if last is None or size is None or missing / fps > TOLERANCE_SECONDS:
            raise SampleError(
                "video", f"{name_of(file)}: frame {wanted[-1]} was planned by its header, only {count} can be decoded"
            )
        for _ in range(slot, len(wanted)):
            yield _frame_pixels(last, size)


def _frame_pixels(frame: VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3] upright, in the first frame's size where a stream changes it midway."""
    pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    turns = quarter_turns(frame)
    return np.rot90(pixels, turns) if turns else pixels


def quarter_turns(frame: VideoFrame) -> int:
    """By how many a frame is turned to stand upright, counter-clockwise, as rot90 counts; the nearest of odd angles."""
    return round(frame.rotation / 90) % 4


# ---------------------------------------------------------------------------------------- sound


def resampled_length(num_samples: int, rate: int, new_rate: int) -> int:
    """Length after resampling, rounded up as librosa rounds."""
    return -(-num_samples * new_rate // rate)


def sound_of(source: MediaSource, kind: MediaKind) -> tuple[str | bytes, MediaKind, ClipOptions]:
    """The file that a clip's sound lies in, what kind of clip that is, and which options hold for it.

    Sound beside a video is used for the video's span unless it has a span of its own.
    """
    if source.sound is None:
        return clip_file(source, kind), kind, source.options
    own = source.sound.options
    asked = own.start_seconds is not None or own.end_seconds is not None
    return clip_file(source.sound, "audio"), "audio", own if asked else source.options


def sound_span(options: ClipOptions, rate: int) -> tuple[int, int]:
    """First sample and number of samples, at the file's own rate, of the span that is used, if the file is so long.

    Source: qwen-omni-utils, process_audio_info, by way of librosa.load.
    """
    start, end = options.start_seconds or 0.0, options.end_seconds
    return int(start * rate), sys.maxsize // 2 if end is None else int((end - start) * rate)


def decode_audio(source: MediaSource, limits: MediaLimits, *, num_samples: int | None = None) -> np.ndarray:
    """float32 [n] mono at the limits' rate: the clip's sound, or a video's, or that of the file given beside it.

    Channels are averaged, soxr resamples. With `num_samples` the result is padded with silence or trimmed to it by at
    most 100 ms. Raises: SampleError, also for samples that are not finite.
    """
    file, kind, options = sound_of(source, "video" if source.use_audio else "audio")
    try:
        waveform = _resample(_used_chunks(kind, file, options, limits), limits.sampling_rate)
    except SampleError:
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # soxr's are of the last two kinds
        raise SampleError(kind, f"cannot decode {name_of(file)}: {error}") from None
    if not len(waveform):
        raise SampleError(kind, f"{name_of(file)} has no sound that can be decoded")
    if num_samples is None or len(waveform) == num_samples:
        return waveform
    if abs(len(waveform) - num_samples) > TOLERANCE_SECONDS * limits.sampling_rate:
        raise SampleError(
            kind,
            f"{name_of(file)}: {num_samples} samples were planned by its header, {len(waveform)} can be decoded",
        )
    return _fit(waveform, num_samples)


def _used_chunks(
    kind: MediaKind, file: str | bytes, options: ClipOptions, limits: MediaLimits
) -> Iterator[tuple[int, np.ndarray]]:
    """Of `_mono_chunks`, what lies in the span that is used. Raises: SampleError where that is over the limit."""
    position = used = 0
    data = read_bytes(file, kind)
    plain = find_plain_sound(data, kind)
    for rate, chunk in _mono_chunks(data, kind) if plain is None else _plain_chunks(plain, data, kind):
        begin, length = sound_span(options, rate)
        samples = chunk[max(0, begin - position) : max(0, begin + length - position)]
        position += len(chunk)
        used += len(samples)
        if used > limits.data.audio.limit_seconds * rate:
            reason = f"has over {limits.data.audio.limit_seconds:g} s of sound at {rate} Hz (data.audio.limit_seconds)"
            raise SampleError(kind, f"{name_of(file)} {reason}")
        if len(samples):
            yield rate, samples
        if position >= begin + length:
            return


def _plain_chunks(plain: PlainSound, data: str | bytes, kind: MediaKind) -> Iterator[tuple[int, np.ndarray]]:
    """As `_mono_chunks`, without a decoder."""
    for first in range(0, plain.num_samples, PLAIN_SAMPLES):
        samples = plain.read(data, first, min(PLAIN_SAMPLES, plain.num_samples - first))
        yield plain.rate, _mix(samples.T, kind, data)


def _mono_chunks(file: str | bytes, kind: MediaKind) -> Iterator[tuple[int, np.ndarray]]:
    """Rate and mono float32 samples, about CHUNK_SAMPLES at a time: numpy is not called for each small frame."""
    import av

    with open_container(file, kind) as container:
        stream = find_stream(container, "audio", kind, file)
        rate, shape, fifo = 0, ("", ""), av.AudioFifo()
        for frame in decode_packets(demux(container, stream), stream, kind, file):
            if frame.sample_rate <= 0 or frame.sample_rate != (rate or frame.sample_rate):
                reason = f"{name_of(file)} changes its rate from {rate} to {frame.sample_rate} Hz midway"
                raise SampleError(kind, reason)
            rate = frame.sample_rate
            if frame.format.is_planar and frame.layout.nb_channels >= FRAME_PLANES:
                frame = _interleave(frame)
            if shape != (frame.format.name, frame.layout.name) or fifo.samples >= CHUNK_SAMPLES:
                if held := fifo.read():
                    yield rate, _mix(_channels_of(held), kind, file)
                shape, fifo = (frame.format.name, frame.layout.name), av.AudioFifo()
            frame.pts = None  # a gap in the times is no gap in the samples
            fifo.write(frame)
        if held := fifo.read():
            yield rate, _mix(_channels_of(held), kind, file)


def _channels_of(frame: AudioFrame) -> np.ndarray:
    raw = frame.to_ndarray()
    return raw if frame.format.is_planar else raw.reshape(-1, frame.layout.nb_channels).T


def _interleave(frame: AudioFrame) -> AudioFrame:
    """The same samples in one plane: av reads past the planes of a frame with eight channels and crashes."""
    import av

    resampler = av.AudioResampler(format=frame.format.packed.name, layout=frame.layout, rate=frame.sample_rate)
    frame.pts = None
    (packed,) = resampler.resample(frame)
    return packed


def _mix(channels: np.ndarray, kind: MediaKind, file: str | bytes) -> np.ndarray:
    """Channels [C, n] as mono float32 [n] in [-1, 1], by the scale that soundfile uses."""
    num_channels, dtype = len(channels), channels.dtype
    total: NDArray[np.float32] = channels[0].astype(np.float32)
    for channel in channels[1:]:
        np.add(total, channel, out=total, dtype=np.float32, casting="same_kind")
    if dtype.kind == "f":
        total /= num_channels
        if not np.isfinite(total).all():
            raise SampleError(kind, f"{name_of(file)} has samples that are not finite (NaN or infinite)")
    elif dtype == np.uint8:
        total -= 128 * num_channels
        total /= 128 * num_channels
    else:
        total /= np.float32(num_channels * 2.0 ** (8 * dtype.itemsize - 1))
    return total


def _resample(chunks: Iterator[tuple[int, np.ndarray]], new_rate: int) -> np.ndarray:
    """The chunks at the new rate in one array; resampled as they come, so that only the result is held."""
    import soxr

    out: list[np.ndarray] = []
    stream: Any = None
    count = rate = 0
    for rate, samples in chunks:
        count += len(samples)
        if rate == new_rate:
            out.append(samples)
            continue
        if stream is None:
            stream = soxr.ResampleStream(rate, new_rate, 1, dtype="float32", quality="HQ")
        out.append(stream.resample_chunk(samples))
    if not count:
        return np.zeros(0, np.float32)
    if stream is not None:
        out.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    waveform = np.concatenate(out)
    return _fit(waveform, resampled_length(count, rate, new_rate))


def _fit(waveform: np.ndarray, length: int) -> np.ndarray:
    """The first `length` samples, silence where there are fewer."""
    missing = length - len(waveform)
    return np.pad(waveform, (0, missing)) if missing > 0 else waveform[:length]
