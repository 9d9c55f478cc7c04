"""The Qwen3-VL processor gives transformers' frames, sizes, tokens and positions, and measures what it encodes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.families.registry import find_spec
from omniloom.options import ImageConfig, ProcessorOptions, VideoConfig
from omniloom.processors.features import smart_resize_video
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
from tests.parity.samples import conversation_of, decode, images, sides

OPTIONS = ProcessorOptions(
    image=ImageConfig(min_pixels=32 * 32, max_pixels=96 * 96), video=VideoConfig(max_pixels=64 * 64)
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny("qwen3_vl", tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def config_json(checkpoint):
    return json.loads((checkpoint / "config.json").read_text())


@pytest.fixture(scope="module")
def make(checkpoint, config_json):
    spec = find_spec(config_json)
    return lambda options=OPTIONS: spec.make_processor(checkpoint, spec.read_config(config_json), options)


@pytest.fixture(scope="module")
def processor(make):
    return make()


@pytest.fixture(scope="module")
def model(config_json):
    """transformers' model without storage: its rope index needs the config only."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        return Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config_json)).model


# ------------------------------------------------------------------------------------ random samples

texts = st.text(alphabet="ab \n狗😀?<1", max_size=6).map(lambda text: (Part(kind="text", text=text), None))
videos = st.builds(
    lambda width, height, frames, rate, fps, most: (
        Part(kind="video", media=MediaSource(path="x", options=ClipOptions(fps=fps, max_frames=most))),
        MediaHeader(
            kind="video", width=width, height=height, num_frames=frames, fps=rate, duration_seconds=frames / rate
        ),
    ),
    sides,
    sides,
    st.integers(2, 90),
    st.sampled_from((5.0, 10.0, 24.0, 25.0, 29.97)),
    st.sampled_from((None, 1.0, 2.0, 1.5, 2.7)),
    st.sampled_from((None, 5, 6)),
)


samples = st.lists(st.one_of(texts, images, videos), min_size=1, max_size=5).map(
    lambda items: (
        conversation_of(*(part for part, _ in items)),
        tuple(header for _, header in items if header is not None),
    )
)


# ------------------------------------------------------------------------------------ oracles


def expected_ids(processor, conversation, headers, clips):
    """The chat template's text, pads replaced by transformers' own functions, tokenized in one go."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    stub = SimpleNamespace(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        image_processor=SimpleNamespace(merge_size=2),
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        all_special_multimodal_tokens=["<|image_pad|>", "<|video_pad|>"],
    )
    stub._calculate_timestamps = lambda *arguments: Qwen3VLProcessor._calculate_timestamps(stub, *arguments)
    replacements = {"image": [], "video": []}
    for header, clip in zip(headers, clips, strict=True):
        grid = np.array([clip.grid_thw])
        if clip.kind == "image":
            replacements["image"].append(Qwen3VLProcessor.replace_image_token(stub, {"image_grid_thw": grid}, 0))
            continue
        frames = clip.frame_indices
        metadata = VideoMetadata(total_num_frames=header.num_frames, fps=header.fps, frames_indices=np.array(frames))
        inputs = {"video_grid_thw": grid, "video_metadata": [metadata]}
        replacements["video"].append(Qwen3VLProcessor.replace_video_token(stub, inputs, 0))
    text = ""
    for turn in conversation.turns:
        words = "".join(
            part.text if part.media is None else f"<|vision_start|><|{part.kind}_pad|><|vision_end|>"
            for part in turn.parts
        )
        text += f"<|im_start|>{turn.role}\n{words}<|im_end|>\n"
    (text,), _ = Qwen3VLProcessor.get_text_with_replacements(stub, [text], replacements["image"], replacements["video"])
    return processor.tokenizer.encode(text, add_special_tokens=False).ids


def expected_positions(model, ids, clips, **times):
    kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    grids = {kind: [clip.grid_thw for clip in clips if clip.kind == kind] for kind in ("image", "video")}
    positions, _ = model.get_rope_index(
        ids[None],
        kinds[None],
        torch.tensor(grids["image"]) if grids["image"] else None,
        torch.tensor(grids["video"]) if grids["video"] else None,
        **times,
    )
    return positions[:, 0]


# ------------------------------------------------------------------------------------ tokens and positions


@settings(deadline=None, max_examples=40)
@given(sample=samples)
def test_tokens_and_positions_are_those_of_transformers(processor, model, sample):
    conversation, headers = sample
    clips = processor.geometry(conversation, headers)
    example = processor.encode(conversation, clips, [None] * len(clips))
    assert example.input_ids.tolist() == expected_ids(processor, conversation, headers, clips)
    assert torch.equal(example.position_ids, expected_positions(model, example.input_ids, clips))


def test_each_of_several_videos_has_the_times_of_its_own_rate(processor):
    def video(fps):
        return MediaHeader(kind="video", width=64, height=64, num_frames=40, fps=fps, duration_seconds=40 / fps)

    parts = [Part(kind="video", media=MediaSource(path="x", options=ClipOptions(fps=fps))) for fps in (2.0, 1.0)]
    conversation = conversation_of(*parts)
    clips = processor.geometry(conversation, (video(10.0), video(5.0)))
    words = processor.tokenizer.decode(
        processor.encode(conversation, clips, (None, None)).input_ids.tolist(), skip_special_tokens=False
    )
    times = [part.split("<")[-1] for part in words.split(" seconds>")[:-1]]
    assert times == ["0.3", "1.4", "2.5", "3.6", "0.6", "2.8", "5.0", "7.2"]


# ------------------------------------------------------------------------------------ frames and sizes


@settings(deadline=None, max_examples=100)
@given(
    num_frames=st.integers(4, 3000),
    rate=st.floats(1, 60),
    fps=st.floats(0.2, 8),
    most=st.integers(4, 200),
)
def test_sampled_frames_are_those_of_transformers(processor, num_frames, rate, fps, most):
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    stub = SimpleNamespace(fps=2, min_frames=4, max_frames=most)
    metadata = VideoMetadata(total_num_frames=num_frames, fps=rate)
    expected = Qwen3VLVideoProcessor.sample_frames(stub, metadata, fps=fps).tolist()
    header = MediaHeader(kind="video", width=64, height=64, num_frames=num_frames, fps=rate)
    clip = processor.media.video_geometry(
        MediaSource(path="x", options=ClipOptions(fps=fps, max_frames=most)), header, 1.0
    )
    assert list(clip.frame_indices) == expected


@settings(deadline=None, max_examples=150)
@given(
    num_frames=st.integers(2, 99),
    height=st.integers(12, 2000),
    width=st.integers(12, 2000),
    low=st.integers(1024, 10**6),
    more=st.integers(0, 10**7),
)
def test_sizes_of_video_frames_are_those_of_transformers(num_frames, height, width, low, more):
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    expected = smart_resize(num_frames, height, width, 2, 32, low, low + more)
    assert smart_resize_video(num_frames, height, width, 2, 32, low, low + more) == expected


def test_without_bounds_of_ours_a_video_has_those_of_the_checkpoint(make):
    header = MediaHeader(kind="video", width=1920, height=1080, num_frames=900, fps=30.0, duration_seconds=30.0)
    clip = make(ProcessorOptions()).media.video_geometry(MediaSource(path="x"), header, 1.0)
    frames, rows, columns = 2 * clip.grid_thw[0], 16 * clip.grid_thw[1], 16 * clip.grid_thw[2]
    assert (frames, rows, columns) == (60, *smart_resize_video(60, 1080, 1920, 2, 32, 4096, 25165824))
    bounded = make(ProcessorOptions(video=VideoConfig(max_pixels=256 * 256))).media.video_geometry(
        MediaSource(path="x"), header, 1.0
    )
    assert 256 * bounded.grid_thw[1] * bounded.grid_thw[2] <= 256 * 256


def test_a_video_of_one_frame_shows_it_twice(processor):
    header = MediaHeader(kind="video", width=64, height=64, num_frames=1, fps=25.0, duration_seconds=0.04)
    clip = processor.media.video_geometry(MediaSource(path="x"), header, 1.0)
    assert (len(clip.frame_indices), clip.grid_thw[0]) == (2, 1)
    assert processor.media.timestamps(clip) == [0.0]


def test_sound_is_refused_clearly(processor):
    with pytest.raises(SampleError, match="no audio tower"):
        processor.geometry(
            conversation_of(Part(kind="audio", media=MediaSource(path="x"))),
            (MediaHeader(kind="audio", num_audio_samples=16_000),),
        )
    assert processor.collate_audio(()) is None


# ------------------------------------------------------------------------------------ measure is encode


@settings(deadline=None, max_examples=15)
@given(sample=samples)
def test_measuring_headers_equals_encoding_arrays(processor, sample):
    conversation, headers = sample
    extent = processor.measure(conversation, headers)
    example = processor.encode(conversation, extent.clips, decode(extent.clips))
    assert extent.num_tokens == len(example.input_ids) == example.position_ids.shape[1]
    assert extent.num_patches == sum(len(clip.patches) for clip in example.vision)
    rows = torch.cat([clip.token_index for clip in example.vision] or [torch.zeros(0).long()])
    pads = torch.tensor(sorted(processor.media.pad_ids))
    assert torch.equal(rows.sort().values, torch.isin(example.input_ids, pads).nonzero()[:, 0])
    batch = processor.collate_vision(example.vision)
    assert torch.equal(batch.token_index, rows)


def test_shrinking_fits_the_limit(processor):
    conversation = conversation_of(*(Part(kind=kind, media=MediaSource(path="x")) for kind in ("image", "video")))
    headers = (
        MediaHeader(kind="image", width=900, height=600),
        MediaHeader(kind="video", width=640, height=480, num_frames=200, fps=10.0, duration_seconds=20.0),
    )
    full = processor.measure(conversation, headers).num_tokens
    for limit in (full - 1, full // 2, full // 4):
        clips = processor.shrink(conversation, headers, limit)
        assert processor.measure(conversation, headers, clips).num_tokens <= limit
        processor.encode(conversation, clips, decode(clips))
    assert processor.shrink(conversation, headers, 20) is None


def test_transformers_generates_from_our_prompt(checkpoint, processor):
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    conversation = conversation_of(
        *(Part(kind=kind, media=MediaSource(path="x")) for kind in ("video", "image", "video"))
    )
    headers = (
        MediaHeader(kind="video", width=64, height=48, num_frames=20, fps=10.0, duration_seconds=2.0),
        MediaHeader(kind="image", width=64, height=64),
        MediaHeader(kind="video", width=64, height=64, num_frames=9, fps=3.0, duration_seconds=3.0),
    )
    inputs = processor.prompt(conversation, headers, decode(processor.geometry(conversation, headers)))
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=[])
    assert made.shape[1] == inputs["input_ids"].shape[1] + 3


def test_the_template_is_the_checkpoints_own(processor, checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q 狗"}]},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "done"},
    ]
    call = Part(kind="tool_call", text='{"name": "f", "arguments": {"x": 1}}')
    turns = (
        Turn(role="system", parts=(Part(kind="text", text="s"),)),
        Turn(role="user", parts=(Part(kind="text", text="q 狗"),)),
        Turn(role="assistant", parts=(Part(kind="text", text="a"), call)),
        Turn(role="tool", parts=(Part(kind="text", text="r"),)),
        Turn(role="assistant", parts=(Part(kind="text", text="done"),)),
    )
    conversation = Conversation(id="c", source="f:1", turns=turns, tools=(json.dumps(tool),))
    expected = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    assert processor.encode(conversation, (), ()).input_ids.tolist() == tokenizer.encode(expected)
