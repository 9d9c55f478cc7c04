"""What a clip will decode to, found without decoding it wherever that is exact.

Owns the choice, per container, between header, packet scan and decode; the tests hold each choice against a decode.
Sizes are those that `media_decode` will give: orientation applied, sound at the feature extractor's rate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, Any

from omniloom.data.media_decode import quarter_turns, resampled_length, sound_of, sound_span
from omniloom.data.media_files import (
    MediaLimits,
    check_pixels,
    clip_file,
    find_stream,
    name_of,
    open_container,
    open_image,
    read_bytes,
    size_of,
)
from omniloom.data.packets import SampleCounter, decode_packets, full_table, packets_to_end, pcm_frame_bytes
from omniloom.data.plain_sound import find_plain_sound
from omniloom.types import ClipOptions, MediaHeader, MediaKind, MediaSource, SampleError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from omniloom.data.packets import Packet

# Containers whose packets are exactly the frames that decoding gives. In all others frames are counted by decoding:
# streams cut off before a key frame (ts), packed B-frames (avi), raw streams.
_PACKET_IS_FRAME = {"mov", "matroska", "gif", "flv", "avi"}
_PACKED_CODECS = {"mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3"}  # avi may hold two frames in one packet
_PCM_CONTAINERS = {"wav", "aiff", "au"}
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def read_header(source: MediaSource, kind: MediaKind, limits: MediaLimits) -> MediaHeader:
    """Size of a clip as it will decode. Raises: SampleError for a clip that is missing, broken or over the limits."""
    if kind == "image":
        width, height = _image_size(clip_file(source, kind), kind, limits)
        return MediaHeader(kind="image", width=width, height=height)
    if kind == "audio":
        num_samples = _sound_length(source, kind, limits)
        seconds = num_samples / limits.sampling_rate
        return MediaHeader(kind="audio", num_audio_samples=num_samples, duration_seconds=seconds, has_audio=True)
    return _video_header(source, limits)


# ---------------------------------------------------------------------------------------- images


def _image_size(file: str | bytes, kind: MediaKind, limits: MediaLimits) -> tuple[int, int]:
    """Width and height as displayed."""
    from PIL import Image

    with open_image(file, kind, limits) as image:
        width, height = image.size
        if image.format == "TIFF":
            return width, height  # pillow gives it upright
        opened: Any = image  # with its file, which pillow's types do not tell of
        if image.format == "PNG" and not _png_hides_orientation(opened.fp):
            exif = Image.Image.getexif(image)  # PngImageFile's own would decode the picture first
        else:
            exif = image.getexif()
        return (height, width) if exif.get(0x0112) in _SIDEWAYS else (width, height)


def _png_hides_orientation(file: Any) -> bool:
    """Whether a PNG has metadata after its pixels, which only decoding brings up."""
    position = file.tell()
    file.seek(8)
    after_pixels = False
    while len(head := file.read(8)) == 8:
        if head[4:] == b"IDAT":
            after_pixels = True
        elif after_pixels and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            break
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    else:
        head = b""
    file.seek(position)
    return bool(head)


# ---------------------------------------------------------------------------------------- videos


def _video_header(source: MediaSource, limits: MediaLimits) -> MediaHeader:
    if source.frames is not None:
        name, fps = "the list of frames", source.options.fps or 0.0
        width, height = _image_size(source.frames[0], "video", limits)
        video = MediaHeader(kind="video", width=width, height=height, num_frames=len(source.frames), fps=fps)
    else:
        file = clip_file(source, "video")
        name, video = name_of(file), _measure_video(read_bytes(file, "video"), limits)
    first, num_frames = frame_span(source.options, video.num_frames, video.fps)
    seconds = num_frames / video.fps if video.fps else 0.0
    _check_seconds("video", name, seconds, limits.data.video.limit_seconds)
    video = replace(video, first_frame=first, num_frames=num_frames, duration_seconds=seconds)
    if not source.use_audio:
        return video
    heard = source.sound is not None or video.has_audio
    num_samples = _sound_length(source, "video", limits) if heard else 0
    return replace(video, num_audio_samples=num_samples, has_audio=num_samples > 0)


def frame_span(options: ClipOptions, num_frames: int, fps: float) -> tuple[int, int]:
    """First frame and number of frames of the span that is used.

    Raises: SampleError for a span of fewer than two frames.
    Source: qwen-vl-utils, calculate_video_frame_range.
    """
    start, end = options.start_seconds, options.end_seconds
    if start is None and end is None:
        return 0, num_frames
    if not fps:
        raise SampleError("video", "a span of time is asked for, but the frames have no rate; give sample_fps")
    seconds = num_frames / fps
    first = math.ceil(min(start or 0.0, seconds) * fps)
    last = num_frames - 1 if end is None else min(math.floor(min(end, seconds) * fps), num_frames - 1)
    if first >= last:
        until = "its end" if end is None else f"{end:g} s"
        raise SampleError("video", f"{start or 0:g} s to {until} holds under two frames of its {seconds:.2f} s")
    return first, last - first + 1


def _measure_video(file: str | bytes, limits: MediaLimits) -> MediaHeader:
    """Of all frames. They are counted; the first is decoded, since headers miss what is cropped or rotated."""
    with open_container(file, "video") as container:
        stream = find_stream(container, "video", "video", file)
        check_pixels(file, "video", stream.codec_context.width, stream.codec_context.height, limits)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        num_frames, measured, frame = _count_frames(container, stream, file, fps, limits)
        if frame is None or not num_frames:
            raise SampleError("video", f"{name_of(file)} has no frame that can be decoded")
        check_pixels(file, "video", frame.width, frame.height, limits)
        if measured and not 0.95 < fps / measured < 1.05:
            fps = measured  # containers without a rate have av guess from the first packets
        if not 0 < fps < float("inf"):
            raise SampleError("video", f"{name_of(file)} states no frame rate")
        width, height = (frame.height, frame.width) if quarter_turns(frame) % 2 else (frame.width, frame.height)
        has_audio = bool(container.streams.audio)
    return MediaHeader(kind="video", width=width, height=height, num_frames=num_frames, fps=fps, has_audio=has_audio)


def _count_frames(
    container: InputContainer, stream: VideoStream, file: str | bytes, fps: float, limits: MediaLimits
) -> tuple[int, float, VideoFrame | None]:
    """Number of frames, their rate by timestamps (0 where there are none), the first one."""
    times: list[int | None] = []

    def add(packet: Packet) -> None:
        if not packet.is_discard:
            times.append(packet.pts)

    table = full_table(container, stream, "video", file)
    packets = packets_to_end(container, stream, "video", file, add, indexed=table is not None)
    frames = decode_packets(packets, stream, "video", file)
    first = next(frames, None)
    if table is not None:
        return len(table), _mean_rate(table, stream.time_base), first
    name = container.format.name.split(",")[0]
    if name in _PACKET_IS_FRAME and not (name == "avi" and stream.codec_context.name in _PACKED_CODECS):
        for _ in packets:
            pass
        return len(times), _mean_rate(times, stream.time_base), first
    shown: list[int | None] = []
    for time in _times_shown(chain(() if first is None else (first,), frames)):
        shown.append(time)
        seconds = float(time * stream.time_base) if time and stream.time_base else len(shown) / fps if fps else 0.0
        _check_seconds("video", name_of(file), seconds, limits.data.video.limit_seconds)
    return len(shown), _mean_rate(shown, stream.time_base), first


def _times_shown(frames: Iterable[VideoFrame]) -> Iterator[int | None]:
    """When each frame is shown, counted from the first; a step back, as where streams were joined, takes no time."""
    elapsed, last = 0, None
    for frame in frames:
        if frame.pts is not None:
            elapsed += 0 if last is None else max(0, frame.pts - last)
            last = frame.pts
        yield None if frame.pts is None else elapsed


def _mean_rate(times: list[int | None], time_base: Fraction | None) -> float:
    """Frames per second by the times of frames; 0 where there are none."""
    known = [time for time in times if time is not None]
    if time_base is None or len(known) < 2 or max(known) == min(known):
        return 0.0
    return float((len(times) - 1) / ((max(known) - min(known)) * time_base))


# ---------------------------------------------------------------------------------------- sound


def _sound_length(source: MediaSource, kind: MediaKind, limits: MediaLimits) -> int:
    """Samples of the sound that is used of a clip, at the limits' rate; 0 for an empty stream."""
    file, kind, options = sound_of(source, kind)
    data = read_bytes(file, kind)
    if (plain := find_plain_sound(data, kind)) is not None:
        num_samples, rate = plain.num_samples, plain.rate
    else:
        num_samples, rate = _measure_sound(data, kind, file, limits)
    if rate <= 0:
        raise SampleError(kind, f"{name_of(file)} states a sampling rate of {rate} Hz")
    if not num_samples:
        return 0
    begin, length = sound_span(options, rate)
    if begin >= num_samples:
        reason = f"{name_of(file)} has {num_samples / rate:.2f} s of sound, none from {begin / rate:g} s on"
        raise SampleError(kind, reason)
    num_samples = min(length, num_samples - begin)
    _check_seconds("audio", name_of(file), num_samples / rate, limits.data.audio.limit_seconds)
    return resampled_length(num_samples, rate, limits.sampling_rate)


def _measure_sound(data: str | bytes, kind: MediaKind, file: str | bytes, limits: MediaLimits) -> tuple[int, int]:
    """Samples per channel, and their rate."""
    with open_container(data, kind) as container:
        stream = find_stream(container, "audio", kind, file)
        num_samples = _header_length(container, stream, size_of(data, kind))
        if num_samples is None:
            return _count_samples(container, stream, file, kind, limits)
        return num_samples, stream.codec_context.sample_rate


def _count_samples(
    container: InputContainer, stream: AudioStream, file: str | bytes, kind: MediaKind, limits: MediaLimits
) -> tuple[int, int]:
    """Samples per channel, and their rate: by packets where they tell, else by decoding."""
    context, counter = stream.codec_context, SampleCounter(container, stream)
    rate, frame_size = context.sample_rate, context.frame_size
    indexed = full_table(container, stream, kind, file) is not None
    packets = packets_to_end(container, stream, kind, file, counter.add, indexed=indexed)
    frames = decode_packets(packets, stream, kind, file)
    first = next(frames, None)
    if first is None:
        return 0, rate
    if counter.exact and (first.sample_rate, context.frame_size) == (rate, frame_size):  # else the header knew little
        for _ in packets:
            pass
        return counter.num_samples, rate
    num_samples = 0
    for frame in chain((first,), frames):
        num_samples, rate = num_samples + frame.samples, frame.sample_rate
        _check_seconds("audio", name_of(file), num_samples / rate, limits.data.audio.limit_seconds)
    return num_samples, rate


def _header_length(container: InputContainer, stream: AudioStream, size_bytes: int) -> int | None:
    """Samples by the header, where it can be believed: PCM that fits the file, FLAC."""
    name, rate = container.format.name, stream.codec_context.sample_rate
    if stream.duration is None or stream.duration <= 0 or rate <= 0 or stream.time_base != Fraction(1, rate):
        return None
    if name == "flac":
        return stream.duration
    frame_bytes = pcm_frame_bytes(stream)
    if name in _PCM_CONTAINERS and frame_bytes and stream.duration * frame_bytes <= size_bytes:
        return stream.duration
    return None


def _check_seconds(kind: MediaKind, name: str, seconds: float, limit: float) -> None:
    if seconds > limit:
        reason = f"{name} lasts {seconds:.0f} s, more than the limit of {limit:g} s (data.{kind}.limit_seconds)"
        raise SampleError(kind, reason)
