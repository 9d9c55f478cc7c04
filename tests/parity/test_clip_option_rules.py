"""Frames and sizes of clips whose rows ask for something, as qwen-vl-utils 0.0.14 gives them."""

import json
import math

import pytest

from omniloom.families.registry import find_spec
from omniloom.options import ProcessorOptions, VideoConfig
from omniloom.processors.features import smart_resize
from omniloom.tools.tiny import make_tiny
from omniloom.types import (
    ClipOptions,
    Conversation,
    MediaHeader,
    MediaSource,
    Part,
    SampleError,
    Turn,
)

FAMILIES = ("qwen3_vl", "qwen3_omni", "qwen2_5_vl", "qwen2_5_omni")
VIDEO = MediaHeader(kind="video", width=640, height=480, num_frames=300, fps=25.0, duration_seconds=12.0)


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request, tmp_path_factory):
    checkpoint = make_tiny(request.param, tmp_path_factory.mktemp("tiny") / "checkpoint")
    config_json = json.loads((checkpoint / "config.json").read_text())
    spec = find_spec(config_json)
    return spec.make_processor(
        checkpoint, spec.read_config(config_json), ProcessorOptions(video=VideoConfig(max_pixels=10**9))
    )


def clip_of(processor, kind, header, **options):
    part = Part(kind=kind, media=MediaSource(path="x", options=ClipOptions(**options)))
    turns = (Turn(role="user", parts=(part,)), Turn(role="assistant", parts=(Part(kind="text", text="a"),)))
    conversation = Conversation(id="i", source="s", turns=turns)
    (clip,) = processor.geometry(conversation, (header,))
    assert processor.measure(conversation, (header,)).clips == (clip,)
    return clip


def pixels_of(processor, clip):
    patch = processor.towers.vision.patch_size
    return clip.grid_thw[1] * patch, clip.grid_thw[2] * patch


def smart_nframes(num_frames, rate, *, nframes=None, fps=2.0, min_frames=4, max_frames=768):
    """The rule of qwen-vl-utils, written down again."""
    if nframes is not None:
        return round(nframes / 2) * 2
    wanted = num_frames / rate * fps
    least, most = math.ceil(min_frames / 2) * 2, math.floor(min(max_frames, num_frames) / 2) * 2
    return math.floor(min(max(wanted, least), most, num_frames) / 2) * 2


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_frames": 10}, {"nframes": 10}),
        ({"num_frames": 300}, {"nframes": 300}),
        ({"fps": 1.0}, {"fps": 1.0}),
        ({"min_frames": 40}, {"min_frames": 40}),
        ({"fps": 25.0, "max_frames": 30}, {"fps": 25.0, "max_frames": 30}),
    ],
)
def test_as_many_frames_as_are_asked_for(processor, asked, words):
    clip = clip_of(processor, "video", VIDEO, **asked)
    assert len(clip.frame_indices) == smart_nframes(300, 25.0, **words)
    assert clip.seconds_per_grid == pytest.approx(12.0 / clip.grid_thw[0])
    with pytest.raises(SampleError, match="nframes asks for 302 frames, there are 300"):
        clip_of(processor, "video", VIDEO, num_frames=302)


def test_frames_of_a_span_are_named_by_their_place_in_the_file(processor):
    header = MediaHeader(
        kind="video", width=64, height=64, first_frame=100, num_frames=51, fps=25.0, duration_seconds=2.04
    )
    clip = clip_of(processor, "video", header, start_seconds=4.0, end_seconds=6.0, num_frames=4)
    assert min(clip.frame_indices) == 100
    assert max(clip.frame_indices) <= 150
    if hasattr(processor.media, "timestamps"):  # written into the prompt, from the beginning of the file
        assert clip.frame_indices == (100, 117, 133, 150)
        assert processor.media.timestamps(clip) == [(100 + 117) / 50, (133 + 150) / 50]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_size_that_is_asked_for_is_taken_to_the_nearest_multiple(processor, kind):
    factor = processor.towers.vision.patch_size * processor.towers.vision.spatial_merge_size
    header = VIDEO if kind == "video" else MediaHeader(kind="image", width=640, height=480)
    clip = clip_of(processor, kind, header, resized_height=5 * factor + 1, resized_width=9 * factor - 2)
    assert pixels_of(processor, clip) == (5 * factor, 9 * factor)
    tiny = clip_of(processor, kind, header, resized_height=1, resized_width=1)
    assert pixels_of(processor, tiny) == smart_resize(1, 1, factor, 4 * factor**2, 16384 * factor**2)


def test_total_pixels_are_shared_by_the_frames(processor):
    factor = processor.towers.vision.patch_size * processor.towers.vision.spatial_merge_size
    for num_frames, share in [(24, 30), (60, 50)]:
        # of every two frames, which make a grid together, so many pixels
        total = share * factor**2 * num_frames // 2
        clip = clip_of(processor, "video", VIDEO, num_frames=num_frames, total_pixels=total, min_pixels=factor**2)
        assert pixels_of(processor, clip) == smart_resize(480, 640, factor, factor**2, share * factor**2)
    floor = clip_of(processor, "video", VIDEO, num_frames=60, total_pixels=1, min_pixels=20 * factor**2)
    assert pixels_of(processor, floor) == smart_resize(480, 640, factor, 20 * factor**2, int(20 * factor**2 * 1.05))
