"""What a clip will decode to, found without decoding it wherever that is exact.

Owns the choice, per container, between header, packet scan and decode; the tests hold each choice against a decode.
Sizes are those that `media_decode` will give: orientation applied, sound at the feature extractor's rate.
"""

from __future__ import annotations

import io
import os
import re
from typing import TYPE_CHECKING, Any

from omniloom.data.media import (
    MediaLimits,
    clip_file,
    find_stream,
    name_of,
    open_container,
    open_image,
    read_bytes,
    size_of,
)
from omniloom.data.media_decode import decode_stream, resampled_length
from omniloom.data.row_media import MediaKind
from omniloom.types import MediaHeader, MediaSource, SampleError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Containers whose index or packets count exactly the frames that decoding gives. In all others frames are counted by
# decoding: streams cut off before a key frame (ts), packed B-frames (avi), raw streams.
_PACKET_IS_FRAME = {"matroska", "gif", "flv", "avi"}
_PACKED_CODECS = {"mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3"}  # avi may hold two frames in one packet
_PCM_CONTAINERS = {"wav", "aiff", "au"}
_CLAIMS_DURATION = {"mov", "matroska", "avi", "flv", "aiff", "asf"}  # of the whole file, not an estimate
_UNFILLED_BYTES = 0x7FFFF000
_PCM = re.compile(r"pcm_[sfu](\d+)")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def read_header(source: MediaSource, kind: MediaKind, limits: MediaLimits) -> MediaHeader:
    """Size of a clip as it will decode. Raises: SampleError for a clip that is missing, broken or over the limits."""
    if kind == "image":
        width, height = _image_size(clip_file(source, kind), kind, limits)
        return MediaHeader(kind="image", width=width, height=height)
    if kind == "audio":
        num_samples = _sound_length(clip_file(source, kind), kind, limits)
        assert num_samples is not None
        seconds = num_samples / limits.sampling_rate
        return MediaHeader(kind="audio", num_audio_samples=num_samples, duration_seconds=seconds, has_audio=True)
    return _video_header(source, limits)


# ---------------------------------------------------------------------------------------- images


def _image_size(file: str | bytes, kind: MediaKind, limits: MediaLimits) -> tuple[int, int]:
    """Width and height as displayed."""
    with open_image(file, kind, limits) as image:
        width, height = image.size
        if image.format == "TIFF":
            return width, height  # pillow gives it upright
        if image.format == "PNG" and not _png_hides_orientation(image.fp):
            exif = super(type(image), image).getexif()  # PngImageFile's own would decode the picture first
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
        file: str | bytes = "the list of frames"
        width, height = _image_size(source.frames[0], "video", limits)
        num_frames, fps, has_audio = len(source.frames), source.fps or 0.0, False
    else:
        file = read_bytes(clip_file(source, "video"), "video")
        num_frames, fps, has_audio = _measure_video(file, limits)
        width, height = _frame_size(file, limits)
    seconds = num_frames / fps if fps else 0.0
    if seconds > limits.max_video_seconds:
        raise _too_long("video", file, seconds, limits.max_video_seconds)
    num_samples: int | None = None
    if source.use_audio and source.audio_path is not None:
        num_samples = _sound_length(source.audio_path, "audio", limits)
    elif source.use_audio and has_audio:
        num_samples = _sound_length(file, "video", limits, optional=True)
    return MediaHeader(
        kind="video",
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        duration_seconds=seconds,
        num_audio_samples=num_samples or 0,
        has_audio=bool(num_samples) if source.use_audio else has_audio,
    )


def _measure_video(file: str | bytes, limits: MediaLimits) -> tuple[int, float, bool]:
    """Frames, frames per second, and whether there is sound."""
    with open_container(file, "video") as container:
        stream = find_stream(container, "video", "video", file)
        _check_frame_size(file, stream.codec_context.width, stream.codec_context.height, limits)
        claimed = _claimed_seconds(container, stream)
        if claimed is not None and claimed > limits.max_video_seconds:
            raise _too_long("video", file, claimed, limits.max_video_seconds)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        num_frames = _count_indexed_frames(container, stream, size_of(file, "video"), file)
        if num_frames is None and _packets_are_frames(container, stream):
            num_frames, measured = _scan_frames(container, stream)
            if measured and not 0.95 < fps / measured < 1.05:
                fps = measured  # containers without a rate have av guess from the first packets
        elif num_frames is None:
            num_frames = 0
            for _ in decode_stream(container, stream, "video", file):
                num_frames += 1
                if fps and num_frames / fps > limits.max_video_seconds:
                    raise _too_long("video", file, num_frames / fps, limits.max_video_seconds)
        if not num_frames:
            raise SampleError("video", f"{name_of(file)} has no frame that can be decoded")
        if not 0 < fps < float("inf"):
            raise SampleError("video", f"{name_of(file)} states no frame rate")
        _refuse_truncated("video", file, claimed, num_frames / fps)
        return num_frames, fps, bool(container.streams.audio)


def _frame_size(file: str | bytes, limits: MediaLimits) -> tuple[int, int]:
    """Width and height of the first frame, upright; the decoder knows of cropping and rotation that headers miss."""
    with open_container(file, "video") as container:
        stream = find_stream(container, "video", "video", file)
        frame = next(decode_stream(container, stream, "video", file), None)
        if frame is None:
            raise SampleError("video", f"{name_of(file)} has no frame that can be decoded")
        _check_frame_size(file, frame.width, frame.height, limits)
        return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)


def _check_frame_size(file: str | bytes, width: int, height: int, limits: MediaLimits) -> None:
    if width * height > limits.max_pixels:
        raise SampleError(
            "video",
            f"{name_of(file)} has frames of {width}x{height} pixels, more than the limit of {limits.max_pixels} "
            "(data.image.limit_pixels)",
        )


def _count_indexed_frames(
    container: InputContainer, stream: VideoStream, size_bytes: int, file: str | bytes
) -> int | None:
    """Frames by the sample table of an mp4 or mov, without those that its edit list leaves out."""
    if not container.format.name.startswith("mov") or not stream.frames:
        return None  # a fragmented file has no full table
    entries = list(stream.index_entries)
    if len(entries) != stream.frames:
        return None
    end = max(entry.pos + entry.size for entry in entries)
    if end > size_bytes:
        raise SampleError(
            "video", f"{name_of(file)} is truncated: its frames need {end} bytes, the file has {size_bytes}"
        )
    return sum(not entry.is_discard for entry in entries)


def _packets_are_frames(container: InputContainer, stream: VideoStream) -> bool:
    name = container.format.name.split(",")[0]
    if name == "mov":
        return True
    return name in _PACKET_IS_FRAME and not (name == "avi" and stream.codec_context.name in _PACKED_CODECS)


def _scan_frames(container: InputContainer, stream: VideoStream) -> tuple[int, float]:
    """Number of frames by packets, and their rate by timestamps (0 where there are none)."""
    count, times = 0, []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            count += 1
            if packet.pts is not None:
                times.append(packet.pts)
    if len(times) < 2 or max(times) == min(times) or stream.time_base is None:
        return count, 0.0
    return count, float((len(times) - 1) / ((max(times) - min(times)) * stream.time_base))


# ---------------------------------------------------------------------------------------- sound


def _sound_length(file: str | bytes, kind: MediaKind, limits: MediaLimits, *, optional: bool = False) -> int | None:
    """Samples of a file's sound at the limits' rate; None where there are none and that is allowed."""
    data = read_bytes(file, kind)
    with open_container(data, kind) as container:
        stream, size_bytes = find_stream(container, "audio", kind, file), size_of(data, kind)
        if container.format.name == "wav":
            _check_wav(data, size_bytes, kind, file)
        num_samples, rate = _measure_sound(container, stream, size_bytes, file, kind, limits)
    if not num_samples and optional:
        return None
    length = resampled_length(num_samples, rate, limits.sampling_rate)
    shortest = limits.sampling_rate // 100
    if length < shortest:
        raise SampleError(kind, f"{name_of(file)} has only {length} samples of sound, expected at least {shortest}")
    return length


def _measure_sound(
    container: InputContainer,
    stream: AudioStream,
    size_bytes: int,
    file: str | bytes,
    kind: MediaKind,
    limits: MediaLimits,
) -> tuple[int, int]:
    """Samples per channel, and their rate."""
    rate = stream.codec_context.sample_rate
    exact = _header_length(container, stream, size_bytes)
    claimed = _claimed_seconds(container, stream) if exact is None else exact / rate
    if claimed is not None and claimed > limits.max_audio_seconds:
        raise _too_long(kind, file, claimed, limits.max_audio_seconds)
    if exact is not None:
        return exact, rate
    if container.format.name == "mp3":
        num_samples = _scan_mp3(container, stream)
    else:
        num_samples = 0
        for frame in decode_stream(container, stream, kind, file):
            num_samples += frame.samples
            rate = frame.sample_rate
            if num_samples > limits.max_audio_seconds * rate:
                break
    if rate <= 0:
        raise SampleError(kind, f"{name_of(file)} states a sampling rate of {rate} Hz")
    if num_samples > limits.max_audio_seconds * rate:
        raise _too_long(kind, file, num_samples / rate, limits.max_audio_seconds)
    _refuse_truncated(kind, file, claimed, num_samples / rate)
    return num_samples, rate


def _header_length(container: InputContainer, stream: AudioStream, size_bytes: int) -> int | None:
    """Samples by the header, where it can be believed: PCM that fits the file, FLAC."""
    name, rate = container.format.name, stream.codec_context.sample_rate
    if stream.duration is None or stream.duration <= 0 or rate <= 0 or stream.time_base != _one_over(rate):
        return None
    if name == "flac":
        return stream.duration
    frame_bytes = _pcm_frame_bytes(stream)
    if name in _PCM_CONTAINERS and frame_bytes and stream.duration * frame_bytes <= size_bytes:
        return stream.duration
    return None


def _pcm_frame_bytes(stream: AudioStream) -> int:
    """Bytes of one sample of all channels; 0 for what is not PCM."""
    codec = stream.codec_context.name
    match = _PCM.match(codec)
    bits = int(match[1]) if match else 8 if codec in ("pcm_alaw", "pcm_mulaw") else 0
    return bits // 8 * stream.codec_context.channels


def _check_wav(data: str | bytes, size_bytes: int, kind: MediaKind, file: str | bytes) -> None:
    """Refuse a wav whose data end before its header says; av would take what is there for the whole.

    Sizes that a writer fills in at the end and never did (0, 2 GiB and more) are no claim.
    """
    with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as handle:
        if handle.read(12)[:4] != b"RIFF":
            return
        while len(head := handle.read(8)) == 8:
            length = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                missing = handle.tell() + length - size_bytes
                if missing > 0 and length < _UNFILLED_BYTES:
                    raise SampleError(kind, f"{name_of(file)} is truncated: {missing} of {length} bytes are missing")
                return
            handle.seek(length + length % 2, os.SEEK_CUR)


def _scan_mp3(container: InputContainer, stream: AudioStream) -> int:
    """Samples by packets, less what the encoder's delay and padding have the decoder skip."""
    ticks = skipped = 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        ticks += packet.duration or 0
        if packet.has_sidedata("skip_samples"):  # two little-endian uint32: at the start, at the end
            side = bytes(packet.get_sidedata("skip_samples"))
            skipped += int.from_bytes(side[:4], "little") + int.from_bytes(side[4:8], "little")
    assert stream.time_base is not None
    return max(0, round(ticks * stream.time_base * stream.codec_context.sample_rate) - skipped)


# ---------------------------------------------------------------------------------------- claims


def _one_over(rate: int) -> Any:
    from fractions import Fraction

    return Fraction(1, rate)


def _claimed_seconds(container: InputContainer, stream: Any) -> float | None:
    """Duration by the header, of containers that write it rather than have it estimated."""
    if container.format.name.split(",")[0] not in _CLAIMS_DURATION:
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1e6


def _refuse_truncated(kind: MediaKind, file: str | bytes, claimed: float | None, found: float) -> None:
    if claimed is not None and found < claimed - max(1.0, 0.05 * claimed):
        raise SampleError(
            kind, f"{name_of(file)} is truncated: its header claims {claimed:.1f} s, {found:.1f} s can be decoded"
        )


def _too_long(kind: MediaKind, file: str | bytes, seconds: float, limit: float) -> SampleError:
    return SampleError(
        kind, f"{name_of(file)} lasts {seconds:.0f} s, more than the limit of {limit:g} s (data.{kind}.limit_seconds)"
    )
