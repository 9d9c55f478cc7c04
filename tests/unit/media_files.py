"""Small media files of many containers and codecs, written with av, for the tests of headers and decoders."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from omniloom.config import DataConfig
from omniloom.data.media_files import MediaLimits

# file name, audio codec; names tell the container
AUDIO_FILES = [
    ("s16.wav", "pcm_s16le"),
    ("s24.wav", "pcm_s24le"),
    ("f32.wav", "pcm_f32le"),
    ("u8.wav", "pcm_u8"),
    ("alaw.wav", "pcm_alaw"),
    ("adpcm.wav", "adpcm_ms"),
    ("a.w64", "pcm_s16le"),
    ("a.aiff", "pcm_s16be"),
    ("a.au", "pcm_s16be"),
    ("a.caf", "pcm_s16le"),
    ("a.flac", "flac"),
    ("flac.ogg", "flac"),
    ("flac.mkv", "flac"),
    ("a.mp3", "libmp3lame"),
    ("mp3.mkv", "libmp3lame"),
    ("mp3.avi", "libmp3lame"),
    ("a.m4a", "aac"),
    ("a.aac", "aac"),
    ("aac.mkv", "aac"),
    ("aac.ts", "aac"),
    ("aac.flv", "aac"),
    ("alac.m4a", "alac"),
    ("a.opus", "libopus"),
    ("opus.webm", "libopus"),
    ("opus.mp4", "libopus"),
    ("pcm.avi", "pcm_s16le"),
    ("pcm.mov", "pcm_s16le"),
    ("mp2.ts", "mp2"),
    ("aac.mp4", "aac"),
    ("aac.mov", "aac"),
    ("aac.mka", "aac"),
    ("aac.avi", "aac"),
    ("fragmented.m4a", "aac"),
    ("mp3.mp4", "libmp3lame"),
    ("flac.mp4", "flac"),
    ("alac.mkv", "alac"),
    ("pcm.mkv", "pcm_s16le"),
    ("opus.ts", "libopus"),
    ("a.mp2", "mp2"),
    ("a.wv", "wavpack"),
    ("a.tta", "tta"),
]
# file name, video codec, codec options
VIDEO_FILES = [
    ("h264.mp4", "libx264", {"bf": "2"}),
    ("h264.mov", "libx264", {"bf": "0"}),
    ("h264.mkv", "libx264", {"bf": "2"}),
    ("h264.ts", "libx264", {"bf": "2"}),
    ("h264.flv", "libx264", {"bf": "2"}),
    ("h264.avi", "libx264", {"bf": "0"}),
    ("fragmented.mp4", "libx264", {"g": "4"}),
    ("raw.h264", "libx264", {}),
    ("mpeg4.mp4", "mpeg4", {"bf": "2"}),
    ("mpeg4.avi", "mpeg4", {"bf": "2"}),
    ("mjpeg.avi", "mjpeg", {}),
    ("mpeg2.ts", "mpeg2video", {"bf": "2"}),
    ("mpeg1.mpg", "mpeg1video", {"bf": "2"}),
    ("vp8.webm", "libvpx", {"lag-in-frames": "5", "auto-alt-ref": "1"}),
    ("vp9.webm", "libvpx-vp9", {"lag-in-frames": "8", "auto-alt-ref": "1", "cpu-used": "8"}),
    ("prores.mov", "prores_ks", {}),
    ("a.gif", "gif", {}),
    ("wmv2.wmv", "wmv2", {}),
]
_PIXEL_FORMATS = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le", "gif": "rgb8"}
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def limits_of(pixels: int = 10**9, *, video: float = 1e9, audio: float = 1e9) -> MediaLimits:
    """Limits of pixels, and of seconds of videos and of sound."""
    data = DataConfig()
    return MediaLimits(
        data=replace(
            data,
            image=replace(data.image, limit_pixels=pixels),
            video=replace(data.video, limit_seconds=video),
            audio=replace(data.audio, limit_seconds=audio),
        )
    )


def tone(num_samples: int, rate: int, channels: int = 1) -> np.ndarray:
    """float32 [channels, num_samples]: a sine of 440 Hz, softer on each further channel."""
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / rate)
    return np.stack([wave / (channel + 1) for channel in range(channels)]).astype(np.float32)


def write_audio(path: Path, codec: str, rate: int, samples: np.ndarray) -> Path:
    import av

    layout = _LAYOUTS[len(samples)]
    fragments = {"movflags": "frag_keyframe+empty_moov"} if path.name.startswith("fragmented") else {}
    with av.open(str(path), "w", options=fragments) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.codec_context.layout = layout
        encode_audio(container, stream, rate, layout, samples)
    return path


def encode_audio(container, stream, rate: int, layout: str, samples: np.ndarray, first: int = 0) -> None:
    import av

    context = stream.codec_context
    if not context.is_open:  # the container opens its streams when the first packet is written
        context.open()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    fifo = av.AudioFifo()
    for part in av.AudioResampler(format=context.format.name, layout=layout, rate=rate).resample(frame):
        part.pts = None
        fifo.write(part)
    pts, size = first, context.frame_size or 1024
    while (part := fifo.read(size) or fifo.read(0, True)) is not None and part.samples:
        part.pts, part.time_base = pts, Fraction(1, rate)
        pts += part.samples
        container.mux(stream.encode(part))
    container.mux(stream.encode(None))


def picture(index: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: brightness tells the frame's number, the left half is redder."""
    pixels = np.full((height, width, 3), 40 + 5 * index % 200, np.uint8)
    pixels[:, : width // 2, 0] = 250
    return pixels


def write_video(
    path: Path,
    codec: str = "libx264",
    num_frames: int = 12,
    fps: float = 25,
    *,
    size: tuple[int, int] = (64, 48),
    options: dict[str, str] | None = None,
    rotation: int = 0,
    first_pts: int = 0,
    sound: np.ndarray | None = None,
    sound_rate: int = 44100,
) -> Path:
    """A video of `picture`s, `size` being width and height; `first_pts` below 0 makes an edit list hide frames."""
    import av

    container_options = {"avoid_negative_ts": "disabled"} if first_pts else {}
    if path.name.startswith("fragmented"):
        container_options["movflags"] = "frag_keyframe+empty_moov"
    with av.open(str(path), "w", options=container_options) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = _PIXEL_FORMATS.get(codec, "yuv420p")
        if rotation:
            stream.set_display_rotation(rotation)
        audio = None
        if sound is not None:
            audio = container.add_stream("aac", rate=sound_rate)
            audio.codec_context.layout = _LAYOUTS[len(sound)]
        packets = []
        for index in range(num_frames):
            packets += stream.encode(av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24"))
        packets += stream.encode(None)
        for packet in packets:
            shift = round(first_pts / rate / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            container.mux(packet)
        if audio is not None:
            encode_audio(container, audio, sound_rate, _LAYOUTS[len(sound)], sound)
    return path


def truth_of_audio(path: Path) -> tuple[np.ndarray, int]:
    """Everything that av decodes, float32 [channels, n] at the file's rate."""
    import av

    parts = []
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            raw = frame.to_ndarray()
            if not frame.format.is_planar:
                raw = raw.reshape(-1, frame.layout.nb_channels).T
            scale = {"u": 128.0, "i": 2.0 ** (8 * raw.dtype.itemsize - 1), "f": 1.0}[raw.dtype.kind]
            parts.append((raw.astype(np.float64) - (128 if raw.dtype.kind == "u" else 0)) / scale)
            rate = frame.sample_rate
    return np.concatenate(parts, axis=1), rate


def truth_of_video(path: Path) -> np.ndarray:
    """All frames that av decodes, uint8 [N, H, W, 3], rotation not applied."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_streams(
    path: Path,
    codec: str,
    *,
    video_seconds: float,
    sound_seconds: float,
    sound_codec: str = "aac",
    first_seconds: float = 0.0,
    video_first: float = 0.0,
    sound_first: float = 0.0,
    subtitle_until: int | None = None,
) -> Path:
    """A video at 10 fps and its sound, of different lengths, both with timestamps from `first_seconds` on.

    By `video_first` or `sound_first` one of them begins later.
    """
    import av

    is_late = first_seconds or video_first or sound_first
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"} if is_late else {}) as container:
        video = container.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, _PIXEL_FORMATS.get(codec, "yuv420p")
        sound, words = None, []
        if sound_seconds:
            sound = container.add_stream(sound_codec, rate=48000)
            sound.codec_context.layout, sound.codec_context.bit_rate = "mono", 96_000
        if subtitle_until is not None:
            words = _subtitle(path.with_suffix(".srt"), container, subtitle_until)
        for index in range(round(video_seconds * 10)):
            frame = av.VideoFrame.from_ndarray(picture(index, 64, 48), format="rgb24")
            frame.pts, frame.time_base = index + round(10 * (first_seconds + video_first)), Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound is not None:
            samples = tone(round(sound_seconds * 48000), 48000)
            encode_audio(container, sound, 48000, "mono", samples, first=round(48000 * (first_seconds + sound_first)))
        container.mux(words)
    return path


def _subtitle(path: Path, container, until: int) -> list:
    """Packets of a subtitle stream, added to the container, whose only words end at `until` seconds."""
    import av

    path.write_text(f"1\n00:00:{until - 1:02},000 --> 00:00:{until:02},000\nwords\n")
    with av.open(str(path)) as source:
        stream = container.add_stream_from_template(source.streams.subtitles[0])
        packets = [packet for packet in source.demux() if packet.dts is not None]
    for packet in packets:
        packet.stream = stream
    return packets


def add_captions(path: Path) -> None:
    """Give an FLV a stream of words that begins in its last quarter."""
    raw, at = path.read_bytes(), 13
    while at < len(raw) * 3 // 4:  # a tag of one of the streams after another
        times = raw[at + 4 : at + 8]
        at += 15 + int.from_bytes(raw[at + 1 : at + 4], "big")
    words = b"\x02\0\x0aonTextData\x08\0\0\0\1\0\4text\x02\0\2hi\0\0\x09"
    tag = b"\x12" + len(words).to_bytes(3, "big") + times + bytes(3) + words
    path.write_bytes(raw[:at] + tag + len(tag).to_bytes(4, "big") + raw[at:])
