"""What a row asks of a clip is done as qwen-vl-utils and qwen-omni-utils do it, or refused by name."""

import math
from dataclasses import replace

import numpy as np
import pytest

from omniloom.config import DataConfig
from omniloom.data.clip_options import clip_options
from omniloom.data.formats import parse_row
from omniloom.data.media_decode import decode_audio, decode_clip, decode_video_frames
from omniloom.data.media_files import MediaLimits
from omniloom.data.media_headers import frame_span, read_header
from omniloom.types import ClipGeometry, ClipOptions, MediaSource, SampleError
from tests.unit.media_files import limits_of, tone, truth_of_video, write_audio, write_streams, write_video

LIMITS = MediaLimits()


def sources_of(content, **lists):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    conversation = parse_row({"messages": messages, **lists}, file="f", line=1, options=DataConfig())
    return [part.media for part in conversation.turns[0].parts if part.media is not None]


# ---------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        ("video", {"video_start": 1, "video_end": 2.5}, ClipOptions(start_seconds=1.0, end_seconds=2.5)),
        ("video", {"start": 0, "end": 3}, ClipOptions(start_seconds=0.0, end_seconds=3.0)),
        ("audio", {"audio_start": 1, "audio_end": 2}, ClipOptions(start_seconds=1.0, end_seconds=2.0)),
        ("audio", {"start": 1.5}, ClipOptions(start_seconds=1.5)),
        ("video", {"nframes": 7}, ClipOptions(num_frames=8)),  # Python rounds 3.5 to 4, as round_by_factor does
        ("video", {"nframes": 5}, ClipOptions(num_frames=4)),
        ("video", {"min_frames": 5, "max_frames": 9}, ClipOptions(min_frames=6, max_frames=8)),
        ("video", {"fps": 1, "total_pixels": 1e6}, ClipOptions(fps=1.0, total_pixels=1_000_000)),
        ("image", {"resized_height": 280, "resized_width": 420}, ClipOptions(resized_height=280, resized_width=420)),
        ("image", {"type": "image_url", "detail": "high"}, ClipOptions()),
    ],
)
def test_known_words_set_their_fields(kind, asked, expected):
    assert clip_options(kind, asked, "here") == expected


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("video", {"n_frames": 8}, r"here\.n_frames: .*did you mean nframes\?"),
        ("video", {"raw_fps": 8}, r"here\.raw_fps: .*did you mean fps\?"),
        ("video", {"video_strat": 8}, r"did you mean video_start\?"),
        ("image", {"fps": 1}, r"here\.fps: no option of a clip of this kind \(image\); known: min_pixels"),
        ("audio", {"video_start": 1}, r"did you mean audio_start\?"),
        ("video", {"start": 1, "video_start": 1}, "start and video_start are the same option"),
        ("video", {"fps": 1, "nframes": 8}, "fps and nframes both say"),
        ("image", {"resized_height": 280}, "go together"),
        ("audio", {"start": 3, "end": 2}, "ends at 2 s, before it begins at 3 s"),
        ("video", {"start": -1}, "0 or more"),
        ("video", {"start": "00:10"}, "expected a number"),
        ("video", {"nframes": 1}, "at least 2"),
        ("video", {"max_frames": True}, "expected a number"),
        ("image", {"max_pixels": math.nan}, "expected a number"),
    ],
)
def test_other_words_and_contradictions_are_refused_by_name(kind, asked, message):
    with pytest.raises(SampleError, match=message):
        clip_options(kind, asked, "here")


def test_options_are_found_wherever_rows_write_them():
    expected = ClipOptions(num_frames=8, start_seconds=1.0)
    asked = {"nframes": 8, "start": 1, "end": None}
    for content, lists in [
        ("<video>", {"videos": [{"path": "a.mp4", **asked}]}),
        ("<video>", {"videos": [{"video": {"url": "a.mp4", **asked}}]}),
        ([{"type": "video", "video": "a.mp4", **asked}], {}),
        ([{"type": "video", "path": "a.mp4", "text": None, **asked}], {}),
        ([{"type": "video_url", "video_url": {"url": "a.mp4"}, **asked}], {}),
        ([{"type": "video_url", "video_url": {"url": "a.mp4", **asked}}], {}),
        ([{"type": "video", **asked}], {"videos": ["a.mp4"]}),  # a block that only marks the place
    ]:
        assert [source.options for source in sources_of(content, **lists)] == [expected], content
    with pytest.raises(SampleError, match=r"nframe: .*did you mean nframes"):
        sources_of([{"type": "video", "nframe": 8}], videos=["a.mp4"])
    with pytest.raises(SampleError, match="stands beside its list of frames"):
        sources_of([{"type": "video", "video": [{"path": "a.png", "max_pixels": 9}]}])


def test_the_rate_of_a_list_of_frames_is_that_at_which_it_was_sampled():
    frames = ["1.png", "2.png"]
    for asked in ({"sample_fps": 4}, {"fps": 4}):
        (source,) = sources_of([{"type": "video", "video": frames, **asked}])
        assert source.options.fps == 4
    with pytest.raises(SampleError, match="sample_fps: is of a video given as a list of frames"):
        sources_of([{"type": "video", "video": "a.mp4", "sample_fps": 4}])


# ---------------------------------------------------------------------------------------- spans


@pytest.mark.parametrize(  # by calculate_video_frame_range of qwen-vl-utils 0.0.14
    ("start", "end", "num_frames", "fps", "expected"),
    [
        (None, None, 100, 25.0, (0, 100)),
        (1.0, 2.0, 100, 25.0, (25, 26)),
        (0.5, None, 100, 24.0, (12, 88)),
        (None, 9.0, 100, 25.0, (0, 100)),
        (1.01, 1.99, 100, 25.0, (26, 24)),
        (0.1, 3.3, 100, 30000 / 1001, (3, 96)),
    ],
)
def test_a_span_holds_the_frames_of_the_published_rule(start, end, num_frames, fps, expected):
    assert frame_span(ClipOptions(start_seconds=start, end_seconds=end), num_frames, fps) == expected


@pytest.mark.parametrize(("start", "end"), [(4.0, None), (1.0, 1.02), (9.0, 10.0)])
def test_a_span_without_two_frames_is_refused(start, end):
    with pytest.raises(SampleError, match=r"holds under two frames of its 4\.00 s"):
        frame_span(ClipOptions(start_seconds=start, end_seconds=end), 100, 25.0)


def test_a_span_is_measured_and_decoded_alike(tmp_path):
    path = write_streams(tmp_path / "a.mkv", "libx264", video_seconds=6, sound_seconds=6)
    options = ClipOptions(start_seconds=2.0, end_seconds=4.0)
    source = MediaSource(path=str(path), use_audio=True, options=options)
    header = read_header(source, "video", LIMITS)
    assert (header.first_frame, header.num_frames, header.duration_seconds) == (20, 21, 2.1)
    assert header.num_audio_samples == 32000
    clip = ClipGeometry(kind="video", num_tokens=1, frame_indices=(20, 40), num_audio_samples=32000)
    decoded = decode_clip(source, clip, LIMITS)
    assert np.array_equal(decoded.pixels, truth_of_video(path)[[20, 40]])
    whole = decode_audio(replace(source, options=ClipOptions()), LIMITS)
    # the span is cut before it is resampled, as librosa does: only its edges differ
    assert np.abs(decoded.waveform[500:-500] - whole[32000:64000][500:-500]).max() < 1e-4


@pytest.mark.parametrize("codec", ["pcm_s16le", "flac"])
def test_the_span_of_a_sound_is_cut_at_its_own_rate(tmp_path, codec):
    rng = np.random.default_rng(0)
    samples = rng.uniform(-0.5, 0.5, (1, 16000 * 10)).astype(np.float32)
    path = write_audio(tmp_path / f"a.{'flac' if codec == 'flac' else 'wav'}", codec, 16000, samples)
    whole = decode_audio(MediaSource(path=str(path)), LIMITS)
    for start, end in [(1.5, 3.25), (None, 2.0), (9.0, None), (8.0, 99.0)]:
        source = MediaSource(path=str(path), options=ClipOptions(start_seconds=start, end_seconds=end))
        expected = whole[int((start or 0) * 16000) : None if end is None else int(end * 16000)]
        assert read_header(source, "audio", LIMITS).num_audio_samples == len(expected)
        assert np.array_equal(decode_audio(source, LIMITS), expected)
    for options in (ClipOptions(start_seconds=10.0), ClipOptions(start_seconds=11.0, end_seconds=12.0)):
        with pytest.raises(SampleError, match=r"has 10\.00 s of sound, none from"):
            read_header(MediaSource(path=str(path), options=options), "audio", LIMITS)
    assert (
        read_header(  # the limit is one of what is used
            MediaSource(path=str(path), options=ClipOptions(end_seconds=1.0)),
            "audio",
            limits_of(audio=2.0),
        ).duration_seconds
        == 1.0
    )


def test_sound_beside_a_video_is_cut_with_it_unless_it_has_a_span_of_its_own(tmp_path):
    video = write_video(tmp_path / "a.mp4", num_frames=100)
    beside = str(write_audio(tmp_path / "a.wav", "pcm_s16le", 16000, tone(16000 * 4, 16000)))
    for own, expected in [(ClipOptions(), 16000), (ClipOptions(end_seconds=3.0), 48000)]:
        source = MediaSource(
            path=str(video),
            use_audio=True,
            sound=MediaSource(path=beside, options=own),
            options=ClipOptions(start_seconds=1.0, end_seconds=2.0),
        )
        assert read_header(source, "video", LIMITS).num_audio_samples == expected
        assert len(decode_audio(source, LIMITS)) == expected


def test_frames_of_a_list_can_be_cut_by_their_rate(tmp_path):
    from PIL import Image

    paths = []
    for index in range(10):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(np.full((20, 30, 3), index, np.uint8)).save(paths[-1])
    source = MediaSource(frames=tuple(paths), options=ClipOptions(fps=2.0, start_seconds=1.0, end_seconds=3.0))
    header = read_header(source, "video", LIMITS)
    assert (header.first_frame, header.num_frames) == (2, 5)
    assert decode_video_frames(source, [2, 6], LIMITS)[:, 0, 0, 0].tolist() == [2, 6]
