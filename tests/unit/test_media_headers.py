"""What a header promises is what decoding gives, for every container and codec that can be written here."""

import base64
import functools
import http.server
import json
import random
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniloom.config import load_config
from omniloom.data.media_decode import decode_audio, decode_clip, decode_image, decode_video_frames, resampled_length
from omniloom.data.media_files import MediaLimits, open_container
from omniloom.data.media_headers import read_header
from omniloom.data.packets import decode_packets
from omniloom.run.opening import open_workshop
from omniloom.run.rows import open_data, open_rows
from omniloom.tools.tiny import make_tiny
from omniloom.types import ClipGeometry, ClipOptions, MediaSource, SampleError
from tests.unit.media_files import (
    AUDIO_FILES,
    VIDEO_FILES,
    add_captions,
    encode_audio,
    limits_of,
    picture,
    tone,
    truth_of_audio,
    truth_of_video,
    write_audio,
    write_streams,
    write_video,
)

REAL = Path(__file__).parents[2] / ".." / "shared" / "real" / "mllm_demo_data"
CASES = Path(__file__).parents[2] / ".." / "shared" / "cases"
LIMITS = MediaLimits()


def header_of(path, kind, **source):
    return read_header(MediaSource(path=str(path), **source), kind, LIMITS)


# ---------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize(("name", "codec"), AUDIO_FILES)
@pytest.mark.parametrize(
    ("rate", "channels", "num_samples"), [(48000, 2, 30_777), (44100, 1, 8_201), (16000, 1, 5_000)]
)
def test_audio_length_equals_what_decoding_gives(tmp_path, name, codec, rate, channels, num_samples):
    rate = 24000 if codec == "libopus" and rate == 44100 else rate  # opus knows no 44.1 kHz
    path = write_audio(tmp_path / name, codec, rate, tone(num_samples, rate, channels))
    header = header_of(path, "audio")
    raw, decoded_rate = truth_of_audio(path)
    assert header.num_audio_samples == resampled_length(raw.shape[1], decoded_rate, 16000)
    waveform = decode_audio(MediaSource(path=str(path)), LIMITS)
    assert waveform.shape == (header.num_audio_samples,)
    assert header.duration_seconds == header.num_audio_samples / 16000
    # lossy codecs add their own delay and frames, never more than a few thousand samples
    assert abs(raw.shape[1] / decoded_rate - num_samples / rate) < 0.2


@pytest.mark.parametrize("cut", [0, 1, 417, 1000, 3001])
@pytest.mark.parametrize("tail", [b"", b"TAG" + bytes(125), None])
def test_mp3_cut_from_a_longer_one_is_counted_as_decoded(tmp_path, cut, tail):
    path = write_audio(tmp_path / "a.mp3", "libmp3lame", 44100, tone(44100, 44100, 2))
    raw = path.read_bytes()[cut:]
    path.write_bytes(raw[:-333] if tail is None else raw + tail)
    assert header_of(path, "audio").num_audio_samples == len(decode_audio(MediaSource(path=str(path)), LIMITS))


def test_mp3_with_garbage_at_its_end_still_comes_out_in_its_planned_length(tmp_path):
    path = write_audio(tmp_path / "a.mp3", "libmp3lame", 44100, tone(44100, 44100, 1))
    path.write_bytes(path.read_bytes() + b"garbage" * 100)
    planned = header_of(path, "audio").num_audio_samples
    assert len(decode_audio(MediaSource(path=str(path)), LIMITS, num_samples=planned)) == planned


def test_a_wav_whose_writer_never_filled_in_its_size_is_measured(tmp_path):
    path = write_audio(tmp_path / "a.wav", "pcm_s16le", 16000, tone(5000, 16000))
    raw = bytearray(path.read_bytes())
    at = raw.index(b"data") + 4
    for claim in (0xFFFFFFFF, 0, 0x7FFFFFFF):
        raw[at : at + 4] = claim.to_bytes(4, "little")
        path.write_bytes(raw)
        assert header_of(path, "audio").num_audio_samples == len(decode_audio(MediaSource(path=str(path)), LIMITS))


@pytest.mark.parametrize("name", ["s16.wav", "f32.wav", "adpcm.wav", "a.aiff"])
def test_pcm_cut_in_half_says_that_it_is_truncated(tmp_path, name):
    path = write_audio(tmp_path / name, dict(AUDIO_FILES)[name], 16000, tone(64_000, 16000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SampleError, match="is truncated"):
        header_of(path, "audio")


def test_chunks_around_the_samples_of_a_wav_do_not_count(tmp_path):
    path = write_audio(tmp_path / "a.wav", "pcm_s16le", 16000, tone(5000, 16000))
    raw = path.read_bytes()
    at = raw.index(b"data")
    odd = b"junk" + (7).to_bytes(4, "little") + bytes(8)  # an odd chunk is followed by a pad byte
    path.write_bytes(raw[:at] + odd + raw[at:] + odd)
    assert header_of(path, "audio").num_audio_samples == 5000
    assert len(decode_audio(MediaSource(path=str(path)), LIMITS)) == 5000


# ---------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(("name", "codec", "options"), VIDEO_FILES)
@pytest.mark.parametrize(("num_frames", "fps"), [(13, 25), (7, 30000 / 1001), (1, 24)])
def test_video_frames_and_size_equal_what_decoding_gives(tmp_path, name, codec, options, num_frames, fps):
    if codec.startswith("mpeg") and codec.endswith("video"):
        fps = 25
    path = write_video(tmp_path / name, codec, num_frames, fps, options=options)
    header = header_of(path, "video")
    truth = truth_of_video(path)
    assert (header.num_frames, header.height, header.width) == truth.shape[:3]
    assert header.num_frames == num_frames
    assert header.duration_seconds == pytest.approx(header.num_frames / header.fps)
    if num_frames > 1 and codec != "gif" and name != "raw.h264":  # gif counts hundredths, raw streams hold no rate
        assert header.fps == pytest.approx(fps, rel=0.02)
    assert not header.has_audio
    frames = decode_video_frames(MediaSource(path=str(path)), range(num_frames), LIMITS)
    assert np.array_equal(frames, truth)


@pytest.mark.parametrize("hidden", [3, 10])
def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path, hidden):
    path = write_video(tmp_path / "a.mp4", num_frames=30, first_pts=-hidden, options={"bf": "2"})
    assert header_of(path, "video").num_frames == len(truth_of_video(path)) == 30 - hidden


@pytest.mark.parametrize("rotation", [90, 180, -90, 30, 45, 100])
def test_rotated_videos_are_measured_and_decoded_upright(tmp_path, rotation):
    path = write_video(tmp_path / "a.mp4", num_frames=3, rotation=rotation)
    header = header_of(path, "video")
    turns = {30: 0, 45: 0, 100: 1}.get(rotation, rotation // 90)  # odd angles to the nearest side
    assert (header.width, header.height) == ((48, 64) if turns % 2 else (64, 48))
    frames = decode_video_frames(MediaSource(path=str(path)), range(3), LIMITS)
    assert frames.shape == (3, header.height, header.width, 3)
    upright = np.rot90(picture(0, 64, 48), turns)  # a display matrix turns counter-clockwise
    assert np.abs(frames[0].astype(int) - upright).mean() < 20  # lossy chroma at the edge between the halves


@pytest.mark.parametrize(("name", "codec"), [(f"a.{suffix}", "libx264") for suffix in ("mkv", "mp4", "ts")]
                         + [("a.wmv", "wmv2"), ("a.nut", "mpeg4")])  # fmt: skip
def test_a_variable_rate_is_the_mean_rate(tmp_path, name, codec):
    import av

    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=60, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index, pts in enumerate([0, 1, 2, 60, 120, 121, 300]):
            frame = av.VideoFrame.from_ndarray(picture(index, 64, 48), format="rgb24")
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    header = header_of(path, "video")
    assert header.num_frames == 7
    assert header.fps == pytest.approx(6 / 5, rel=0.01)  # seven frames, six gaps, five seconds


def test_streams_that_were_joined_keep_their_rate(tmp_path):
    path = write_video(tmp_path / "a.ts", num_frames=20, fps=10)
    path.write_bytes(2 * path.read_bytes())
    header = header_of(path, "video")
    assert (header.num_frames, round(header.fps, 1)) == (40, 10)


def test_a_list_of_frames_has_the_rate_it_is_given(tmp_path):
    paths = []
    for index in range(5):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(picture(index, 30, 20)).save(paths[-1])
    source = MediaSource(frames=tuple(paths), options=ClipOptions(fps=2.5))
    header = read_header(source, "video", LIMITS)
    assert (header.num_frames, header.fps, header.duration_seconds) == (5, 2.5, 2.0)
    assert (header.width, header.height) == (30, 20)
    frames = decode_video_frames(source, [0, 2, 2, 4], LIMITS)
    assert np.array_equal(frames, np.stack([picture(index, 30, 20) for index in (0, 2, 2, 4)]))
    uri = "data:;base64," + base64.b64encode(Path(paths[2]).read_bytes()).decode()
    embedded = MediaSource(frames=(uri, paths[0]), options=ClipOptions(fps=1.0))
    assert read_header(embedded, "video", LIMITS).width == 30
    assert np.array_equal(decode_video_frames(embedded, [0, 1], LIMITS), frames[[1, 0]])
    Image.fromarray(picture(4, 31, 20)).save(paths[4])
    with pytest.raises(SampleError, match="unlike sizes"):
        decode_video_frames(source, [0, 4], LIMITS)


def test_the_sound_of_a_video_is_its_own_or_the_file_beside_it(tmp_path):
    video = write_video(tmp_path / "a.mp4", num_frames=25, sound=tone(44100, 44100, 2))
    silent = write_video(tmp_path / "silent.mp4", num_frames=25)
    beside = write_audio(tmp_path / "a.flac", "flac", 48000, tone(12_000, 48000))
    assert header_of(video, "video").has_audio
    assert header_of(video, "video").num_audio_samples == 0  # nobody asked for it
    own = header_of(video, "video", use_audio=True)
    assert own.num_audio_samples == len(decode_audio(MediaSource(path=str(video), use_audio=True), LIMITS))
    assert own.num_audio_samples == pytest.approx(16000, abs=1500)
    for path in (video, silent):
        header = header_of(path, "video", use_audio=True, sound=MediaSource(path=str(beside)))
        assert (header.num_audio_samples, header.has_audio) == (4000, True)
    header = header_of(silent, "video", use_audio=True)
    assert (header.num_audio_samples, header.has_audio) == (0, False)
    with pytest.raises(SampleError, match="no audio stream"):
        header_of(silent, "audio")
    with pytest.raises(SampleError, match="no video stream"):
        header_of(beside, "video")


def test_cover_art_is_no_video(tmp_path):
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=16000)
        audio.codec_context.layout = "mono"
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(picture(0, 64, 48), format="rgb24")))
        container.mux(cover.encode(None))
        encode_audio(container, audio, 16000, "mono", tone(8000, 16000))
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic
    with pytest.raises(SampleError, match="no video stream"):
        header_of(path, "video")
    assert header_of(path, "audio").num_audio_samples > 7000


STREAMS = [
    ("a.mkv", "libx264", "aac"),
    ("a.mkv", "libx264", "ac3"),
    ("a.webm", "libvpx", "libopus"),
    ("a.flv", "flv", "aac"),
    ("a.avi", "mjpeg", "mp2"),
    ("a.avi", "mpeg4", "pcm_s16le"),
    ("a.wmv", "wmv2", "wmav2"),
    ("a.mp4", "libx264", "aac"),
    ("a.mov", "libx264", "alac"),
]


@pytest.mark.parametrize(("name", "codec", "sound_codec"), STREAMS)
@pytest.mark.parametrize(("video_seconds", "sound_seconds"), [(2, 6), (6, 2)])
def test_each_stream_is_as_long_as_itself_not_as_its_file(
    tmp_path, name, codec, sound_codec, video_seconds, sound_seconds
):
    path = write_streams(
        tmp_path / name, codec, video_seconds=video_seconds, sound_seconds=sound_seconds, sound_codec=sound_codec
    )
    header = read_header(MediaSource(path=str(path), use_audio=True), "video", LIMITS)
    assert (header.num_frames, round(header.fps, 2)) == (video_seconds * 10, 10)
    assert header.num_audio_samples / 16000 == pytest.approx(sound_seconds, abs=0.1)
    assert len(decode_audio(MediaSource(path=str(path)), LIMITS)) == header.num_audio_samples
    bound = limits_of(video=video_seconds + 0.1, audio=sound_seconds + 0.1)
    assert read_header(MediaSource(path=str(path), use_audio=True), "video", bound) == header
    short = limits_of(video=video_seconds - 0.5)
    with pytest.raises(SampleError, match=r"data\.video\.limit_seconds"):
        read_header(MediaSource(path=str(path)), "video", short)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.mp4", "a.wmv", "a.flv"])
def test_times_are_counted_from_the_first_frame(tmp_path, name):
    codec = {"a.webm": "libvpx", "a.wmv": "wmv2", "a.flv": "flv"}.get(name, "libx264")
    path = write_streams(tmp_path / name, codec, video_seconds=4, sound_seconds=0, first_seconds=10)
    header = header_of(path, "video")
    assert (header.num_frames, header.fps, header.duration_seconds) == (40, 10, 4)


def test_a_subtitle_long_after_the_last_frame_is_no_missing_picture(tmp_path):
    path = write_streams(tmp_path / "a.mkv", "libx264", video_seconds=2, sound_seconds=2, subtitle_until=30)
    header = header_of(path, "video", use_audio=True)
    assert (header.num_frames, header.duration_seconds) == (20, 2)


@pytest.mark.parametrize(("name", "codec", "sound_codec"), STREAMS)
def test_a_file_cut_in_half_is_truncated_in_every_container(tmp_path, name, codec, sound_codec):
    path = write_streams(tmp_path / name, codec, video_seconds=8, sound_seconds=8, sound_codec=sound_codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for kind in ("video", "audio"):
        with pytest.raises(SampleError, match=r"truncated|cannot decode|broken"):
            header_of(path, kind)


CUT_FILES = ["a.mp3", "a.opus", "flac.ogg", "a.au", "a.aiff", "a.w64", "opus.webm", "aac.mka", "fragmented.m4a"]


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        *((name, b"") for name in (*CUT_FILES, "fragmented.mp4", "h264.mkv")),
        ("a.mp3", b"ID3\x04\0\0\0\0\x27\x10" + bytes(5008)),
    ],
)
def test_whatever_states_its_size_is_told_to_have_lost_its_end(tmp_path, name, tags):
    kind = "audio" if name in CUT_FILES else "video"
    if kind == "audio":
        path = write_audio(tmp_path / name, dict(AUDIO_FILES)[name], 48000, tone(200_000, 48000))
    else:
        path = write_video(tmp_path / name, num_frames=100, size=(256, 192), options={"g": "4"})
    whole = tags + path.read_bytes()
    path.write_bytes(whole)
    found = header_of(path, kind)
    for cut in (0.2, 0.5, 0.9, 0.95):
        path.write_bytes(whole[: int(len(whole) * cut)])
        with pytest.raises(SampleError, match=r"is truncated: \d+ of its \d+ bytes are missing"):
            header_of(path, kind)
    if name not in ("a.mp3", "a.au"):  # in which more samples may follow
        path.write_bytes(whole + b"appended" * 1000)
        assert header_of(path, kind) == found


@pytest.mark.parametrize(("name", "codec", "sound_codec"), STREAMS)
@pytest.mark.parametrize("late", ["video", "sound"])
def test_a_stream_that_begins_late_leaves_nothing_missing(tmp_path, name, codec, sound_codec, late):
    first = {f"{late}_first": 4.0}
    path = write_streams(tmp_path / name, codec, video_seconds=3, sound_seconds=3, sound_codec=sound_codec, **first)
    header = read_header(MediaSource(path=str(path), use_audio=True), "video", LIMITS)
    assert header.num_frames == 30
    assert round(header.fps, 2) == 10 or (name, late) == ("a.avi", "video")  # whose first frame is shown from 0 on
    assert header.num_audio_samples / 16000 == pytest.approx(3, abs=0.1)


def test_a_stream_that_begins_within_the_file_is_passed_over(tmp_path, caplog):
    path = write_streams(tmp_path / "a.flv", "flv", video_seconds=8, sound_seconds=8)
    source = MediaSource(path=str(path), use_audio=True)
    header, sound = read_header(source, "video", LIMITS), decode_audio(source, LIMITS)
    add_captions(path)
    assert read_header(source, "video", LIMITS) == header
    assert np.array_equal(decode_audio(source, LIMITS), sound)
    assert len(decode_video_frames(source, range(header.num_frames), LIMITS)) == 80
    assert not caplog.records  # nothing is broken


def test_sound_is_counted_without_decoding_it(tmp_path, monkeypatch):
    """Whatever the container; one frame is decoded, to see whether the codec's header told the truth."""
    from omniloom.data import media_headers

    decoded = []

    def watched(packets, *arguments):
        for frame in decode_packets(packets, *arguments):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(media_headers, "decode_packets", watched)
    counted = ("alac.m4a", "flac.mp4", "flac.mkv", "flac.ogg", "pcm.mov", "pcm.avi")
    for name, codec in AUDIO_FILES:
        if codec in ("aac", "libopus", "libmp3lame", "mp2") or name in counted:
            decoded.clear()
            header_of(write_audio(tmp_path / name, codec, 48000, tone(48000 * 3, 48000, 1)), "audio")
            assert len(decoded) == 1, name


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder of failing inputs is absent")
def test_the_cases_from_other_hands(tmp_path):
    header = header_of(CASES / "al.mkv", "video", use_audio=True)
    assert (header.num_frames, header.duration_seconds) == (40, 4.0)
    assert header.num_audio_samples / 16000 == pytest.approx(9, abs=0.05)
    header = header_of(CASES / "off10.webm", "video")
    assert (header.num_frames, header.duration_seconds) == (40, 4.0)


# ---------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("suffix", "orientation"),
    [(suffix, orientation) for suffix in ("png", "jpg", "webp", "tiff", "avif") for orientation in (None, 1, 3, 6, 8)]
    + [("gif", None), ("bmp", None)],  # these hold no orientation
)
def test_image_size_equals_what_decoding_gives(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(picture(0, 60, 40)).save(path, exif=exif)
    header = header_of(path, "image")
    pixels = decode_image(MediaSource(path=str(path)), LIMITS)
    assert pixels.shape == (header.height, header.width, 3)
    assert (header.width, header.height) == ((40, 60) if orientation in (6, 8) else (60, 40))
    turns = {3: 2, 6: 3, 8: 1}.get(orientation, 0)
    assert np.abs(pixels.astype(int) - np.rot90(picture(0, 60, 40), turns)).mean() < 20  # lossy formats


def test_a_picture_is_neither_video_nor_sound(tmp_path):
    Image.fromarray(picture(0, 64, 48)).save(tmp_path / "a.jpg")
    for kind in ("video", "audio"):
        with pytest.raises(SampleError, match=r"a\.jpg is of no format of video or sound that is opened here"):
            header_of(tmp_path / "a.jpg", kind)


def test_what_fails_within_a_file_that_was_opened_is_not_said_of_its_format(tmp_path):
    import av

    path = str(write_video(tmp_path / "a.mp4"))
    with pytest.raises(SampleError, match=r"cannot decode \S*a\.mp4: invalid argument"), open_container(path, "video"):
        raise av.error.ArgumentError(22, "Invalid argument")


def test_an_avif_without_its_pictures_is_a_bad_sample(tmp_path):
    path = tmp_path / "a.avif"
    Image.fromarray(picture(0, 64, 48)).save(path)
    for word in (b"iloc", b"mdat"):
        path.write_bytes(path.read_bytes().replace(word, b"none"))
        with pytest.raises(SampleError, match="cannot decode"):
            decode_image(MediaSource(path=str(path)), LIMITS)


def test_an_orientation_after_the_pixels_of_a_png_is_found(tmp_path):
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(0, 60, 40)).save(path, exif=exif)
    raw = path.read_bytes()
    at = raw.index(b"eXIf") - 4
    length = int.from_bytes(raw[at : at + 4], "big") + 12
    chunk, end = raw[at : at + length], raw.index(b"IEND") - 4
    path.write_bytes(raw[:at] + raw[at + length : end] + chunk + raw[end:])
    header = header_of(path, "image")
    assert (header.width, header.height) == (40, 60)
    assert decode_image(MediaSource(path=str(path)), LIMITS).shape == (60, 40, 3)


def test_a_png_header_is_read_without_decoding(tmp_path):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (200, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])  # most of the pixels are gone
    assert header_of(path, "image").height == 200
    with pytest.raises(SampleError, match="truncated"):
        decode_image(MediaSource(path=str(path)), LIMITS)


# ---------------------------------------------------------------------------------------- limits and lies


def test_sound_is_counted_at_the_rate_of_the_checkpoint_that_hears_it(tmp_path):
    """The readers that a run opens take the rate from the checkpoint's files; 16 kHz is nobody's constant."""
    model = make_tiny("qwen3_omni", tmp_path / "model")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps({**settings, "sampling_rate": 8000}))
    path = write_audio(tmp_path / "a.wav", "pcm_s16le", 48000, tone(48000, 48000))
    turns = [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns, "audios": [str(path)]}]))
    config = load_config(None, [f"model.path={model}", f"data.train={tmp_path / 'rows.json'}"])
    reader = open_rows(open_workshop(config), open_data(config.data, 0)[0], cache=False)()
    (extent,) = reader.measure([0], {}, lambda row: None)
    assert (extent.clips[0].num_audio_samples, extent.clips[0].sound_seconds) == (8000, 1.0)


def test_clips_over_a_limit_are_refused_by_their_headers(tmp_path):
    limits = limits_of(1000, video=0.5, audio=0.5)
    Image.fromarray(picture(0, 60, 40)).save(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4", num_frames=25)
    small = limits_of(video=0.5)
    for name, kind, bound, words in [
        ("a.png", "image", limits, r"60x40 pixels, more than the limit of 1000 \(data.image.limit_pixels\)"),
        ("a.mp4", "video", limits, "has 64x48 pixels"),
        ("a.mp4", "video", small, r"lasts 1 s, more than the limit of 0.5 s \(data.video.limit_seconds\)"),
    ]:
        with pytest.raises(SampleError, match=words):
            read_header(MediaSource(path=str(tmp_path / name)), kind, bound)
    for name, codec in [("a.wav", "pcm_s16le"), ("a.flac", "flac"), ("a.mp3", "libmp3lame"), ("a.opus", "libopus")]:
        path = write_audio(tmp_path / name, codec, 48000, tone(48000, 48000))
        with pytest.raises(SampleError, match=r"more than the limit of 0.5 s \(data.audio.limit_seconds\)"):
            read_header(MediaSource(path=str(path)), "audio", limits)
        with pytest.raises(SampleError, match=r"over 0\.5 s of sound"):
            decode_audio(MediaSource(path=str(path)), limits)


def test_a_flac_that_claims_a_hundred_hours_is_refused(tmp_path):
    path = write_audio(tmp_path / "a.flac", "flac", 16000, tone(5000, 16000))
    raw = bytearray(path.read_bytes())
    claim = 100 * 3600 * 16000
    word = int.from_bytes(raw[18:26], "big")  # 20 bits rate, 3 channels, 5 depth, 36 samples
    raw[18:26] = (word >> 36 << 36 | claim).to_bytes(8, "big")
    path.write_bytes(raw)
    with pytest.raises(SampleError, match="lasts 360000 s"):
        header_of(path, "audio")


def test_a_header_that_lies_makes_the_sample_bad_when_it_is_decoded(tmp_path):
    path = write_audio(tmp_path / "a.flac", "flac", 16000, tone(8000, 16000))
    raw = bytearray(path.read_bytes())
    word = int.from_bytes(raw[18:26], "big")
    raw[18:26] = (word >> 36 << 36 | 16000).to_bytes(8, "big")
    path.write_bytes(raw)
    clip = ClipGeometry(kind="audio", num_tokens=1, num_audio_samples=header_of(path, "audio").num_audio_samples)
    with pytest.raises(SampleError, match="16000 samples were planned by its header, 8000 can be decoded"):
        decode_clip(MediaSource(path=str(path)), clip, LIMITS)


def test_a_png_that_claims_a_huge_size_is_refused_undecoded(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(0, 60, 40)).save(path)
    raw = bytearray(path.read_bytes())
    for side in (15_000, 100_000):  # the second is beyond pillow's own bound too
        raw[16:24] = side.to_bytes(4, "big") * 2
        raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
        path.write_bytes(raw)
        with pytest.raises(SampleError, match="limit"):
            header_of(path, "image")


def test_a_rate_of_zero_is_refused(tmp_path):
    path = write_audio(tmp_path / "a.wav", "pcm_s16le", 16000, tone(5000, 16000))
    raw = bytearray(path.read_bytes())
    raw[24:28] = bytes(4)
    path.write_bytes(raw)
    with pytest.raises(SampleError):
        header_of(path, "audio")


def test_a_path_of_windows_is_told_how_to_be_written(tmp_path):
    with pytest.raises(SampleError, match=r"a\\b\.png does not exist; write its folders with /"):
        header_of(tmp_path / "a\\b.png", "image")


def test_a_missing_file_that_is_in_the_working_directory_is_told_how_to_be_found(tmp_path, monkeypatch):
    (tmp_path / "demo/images").mkdir(parents=True)
    (tmp_path / "demo/images/a.png").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SampleError, match=r"demo/demo/images/a\.png does not exist; demo/images/a\.png is in the working"
    ):
        header_of(tmp_path / "demo/demo/images/a.png", "image")


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "a.wav", "a.png", "a.jpg"])
def test_missing_empty_and_garbage_files_are_bad_samples_that_name_the_file(tmp_path, name):
    kind = "video" if name.startswith("h264") else "audio" if name.endswith("wav") else "image"
    path = tmp_path / name
    with pytest.raises(SampleError, match=f"{name} does not exist"):
        header_of(path, kind)
    path.write_bytes(b"")
    with pytest.raises(SampleError, match=f"{name} is empty"):
        header_of(path, kind)
    path.write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(SampleError, match=name):
        header_of(path, kind)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(SampleError, match=f"{name} is a pointer of Git LFS, not the file itself; run git lfs pull"):
        header_of(path, kind)
    with pytest.raises(SampleError, match="is a directory"):
        header_of(tmp_path, kind)
    with pytest.raises(SampleError, match="7 embedded bytes"):
        read_header(MediaSource(data=b"garbage"), kind, LIMITS)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "vp8.webm", "mpeg4.avi", "h264.ts", "a.gif"])
def test_a_truncated_video_is_never_longer_than_planned(tmp_path, name):
    codec, options = next((codec, options) for file, codec, options in VIDEO_FILES if file == name)
    path = write_video(tmp_path / name, codec, 60, 25, options=options)
    raw = path.read_bytes()
    for share in (0.05, 0.3, 0.6, 0.9, 0.99):
        path.write_bytes(raw[: int(len(raw) * share)])
        try:
            header = header_of(path, "video")
            frames = decode_video_frames(MediaSource(path=str(path)), range(header.num_frames), LIMITS)
        except SampleError:
            continue
        assert frames.shape == (header.num_frames, header.height, header.width, 3)
        assert header.num_frames < 60 or share > 0.9


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv"])
def test_a_video_cut_in_half_says_that_it_is_truncated(tmp_path, name):
    path = write_video(tmp_path / name, num_frames=150, options={"movflags": "faststart"})
    import av

    fast = tmp_path / ("fast_" + name)
    with av.open(str(path)) as old, av.open(str(fast), "w", options={"movflags": "+faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    raw = fast.read_bytes()
    fast.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(SampleError, match="is truncated"):
        header_of(fast, "video")


@pytest.mark.parametrize("name", ["h264.mp4", "vp8.webm", "mpeg4.avi", "a.mp3", "a.flac", "s16.wav", "a.m4a", "a.opus"])
def test_flipped_bytes_raise_nothing_but_sample_errors(tmp_path, name):
    video = {file: (codec, options) for file, codec, options in VIDEO_FILES}
    kind = "video" if name in video else "audio"
    path = tmp_path / name
    if name in video:
        write_video(path, video[name][0], 8, 25, options=video[name][1])
    else:
        write_audio(path, dict(AUDIO_FILES)[name], 16000, tone(4000, 16000))
    raw = path.read_bytes()
    draw = random.Random(0)
    for _ in range(40):
        broken = bytearray(raw)
        for _ in range(draw.choice([1, 5, 50])):
            broken[draw.randrange(min(len(raw), draw.choice([200, len(raw)])))] = draw.randrange(256)
        source = MediaSource(data=bytes(broken))
        limits = limits_of(10_000, video=100, audio=100)
        try:
            header = read_header(source, kind, limits)
            if kind == "audio":
                planned = header.num_audio_samples
                assert len(decode_audio(source, limits, num_samples=planned)) == planned
            else:
                last = header.num_frames - 1
                assert decode_video_frames(source, [0, last], limits).shape[0] == 2
        except SampleError:
            continue


# ---------------------------------------------------------------------------------------- what is never opened


def test_a_relative_path_is_never_taken_for_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_audio(tmp_path / "a.wav", "pcm_s16le", 16000, tone(5000, 16000)).rename("concat:a.wav")
    assert header_of("concat:a.wav", "audio").num_audio_samples == 5000


def test_files_that_name_other_files_or_run_programs_are_not_opened(tmp_path):
    secret = write_audio(tmp_path / "secret.wav", "pcm_s16le", 16000, tone(5000, 16000))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.m3u8").write_text(playlist)
    (tmp_path / "a.txt").write_text("ffconcat version 1.0\nfile 'secret.wav'\n")
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n")
    for name, kind in (("a.m3u8", "audio"), ("a.txt", "audio"), ("a.eps", "image")):
        with pytest.raises(SampleError):
            header_of(tmp_path / name, kind)
    for name in (f"concat:{secret}", f"file:{secret}", "pipe:0"):
        with pytest.raises(SampleError, match="does not exist"):
            header_of(name, "audio")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_a_url_is_fetched_and_its_faults_are_sample_errors(tmp_path):
    write_audio(tmp_path / "a.wav", "pcm_s16le", 16000, tone(5000, 16000))
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert header_of(f"{address}/a.wav", "audio").num_audio_samples == 5000
        with pytest.raises(SampleError, match=r"cannot fetch .*404"):
            header_of(f"{address}/b.wav", "audio")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    with pytest.raises(SampleError, match="cannot fetch"):
        header_of(f"{address}/a.wav", "audio")


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real demo data is absent")
def test_the_real_demo_media_decode_to_what_their_headers_say():
    for path in sorted(REAL.iterdir()):
        kind = {".jpg": "image", ".mp4": "video", ".avi": "video"}.get(path.suffix, "audio")
        header = header_of(path, kind)
        source = MediaSource(path=str(path))
        if kind == "image":
            assert decode_image(source, LIMITS).shape == (header.height, header.width, 3)
        elif kind == "audio":
            assert len(decode_audio(source, LIMITS)) == header.num_audio_samples
        else:
            assert truth_of_video(path).shape[:3] == (header.num_frames, header.height, header.width)
