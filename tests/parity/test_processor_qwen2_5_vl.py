"""The Qwen2.5-VL processor gives transformers' frames, sizes, tokens and positions, and measures what it encodes."""

import ast
import json
import math
import shutil
from importlib.util import find_spec as find_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.families.qwen2_5_vl.processor import Qwen25VLClips
from omniloom.families.registry import find_spec
from omniloom.options import ImageConfig, ProcessorOptions, VideoConfig
from omniloom.processors.features import smart_resize
from omniloom.tools.tiny import make_tiny
from omniloom.types import (
    ClipOptions,
    Conversation,
    MediaHeader,
    MediaSource,
    Part,
    Turn,
)
from tests.parity.samples import conversation_of, decode
from tests.parity.test_processor_qwen3_vl import expected_positions, samples

OPTIONS = ProcessorOptions(
    image=ImageConfig(min_pixels=28 * 28, max_pixels=84 * 84), video=VideoConfig(max_pixels=56 * 84)
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny("qwen2_5_vl", tmp_path_factory.mktemp("tiny") / "checkpoint")


def make(checkpoint, options=OPTIONS):
    config_json = json.loads((checkpoint / "config.json").read_text())
    spec = find_spec(config_json)
    return spec.make_processor(checkpoint, spec.read_config(config_json), options)


@pytest.fixture(scope="module")
def processor(checkpoint):
    return make(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    """transformers' model without storage: its rope index needs the config only."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(checkpoint)).model


def video(num_frames, rate, **options):
    """A video's part and header."""
    header = MediaHeader(
        kind="video", width=64, height=48, num_frames=num_frames, fps=rate, duration_seconds=num_frames / rate
    )
    return Part(kind="video", media=MediaSource(path="x", options=ClipOptions(**options))), header


# ------------------------------------------------------------------------------------ tokens and positions


def expected_ids(processor, conversation, clips):
    """The chat template's text, pads replaced by transformers' own functions, tokenized in one go."""
    from transformers import Qwen2_5_VLProcessor

    stub = SimpleNamespace(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        image_processor=SimpleNamespace(merge_size=2),
        video_processor=SimpleNamespace(merge_size=2),
        all_special_multimodal_tokens=["<|image_pad|>", "<|video_pad|>"],
    )
    replacements = {"image": [], "video": []}
    for clip in clips:
        replace = getattr(Qwen2_5_VLProcessor, f"replace_{clip.kind}_token")
        replacements[clip.kind].append(replace(stub, {f"{clip.kind}_grid_thw": np.array([clip.grid_thw])}, 0))
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for turn in conversation.turns:
        words = "".join(
            part.text if part.media is None else f"<|vision_start|><|{part.kind}_pad|><|vision_end|>"
            for part in turn.parts
        )
        text += f"<|im_start|>{turn.role}\n{words}<|im_end|>\n"
    (text,), _ = Qwen2_5_VLProcessor.get_text_with_replacements(
        stub, [text], replacements["image"], replacements["video"]
    )
    return processor.tokenizer.encode(text, add_special_tokens=False).ids


def expected_seconds(headers, clips):
    """Of each video's temporal grids, as Qwen2_5_VLProcessor._process_videos has them."""
    from transformers.video_utils import VideoMetadata

    for header, clip in zip(headers, clips, strict=True):
        if clip.kind == "video":
            frames = list(clip.frame_indices)
            metadata = VideoMetadata(total_num_frames=header.num_frames, fps=header.fps, frames_indices=frames)
            yield 2 / metadata.sampled_fps


@settings(deadline=None, max_examples=80)
@given(sample=samples)
def test_tokens_and_positions_are_those_of_transformers(processor, model, sample):
    conversation, headers = sample
    clips = processor.geometry(conversation, headers)
    example = processor.encode(conversation, clips, [None] * len(clips))
    assert example.input_ids.tolist() == expected_ids(processor, conversation, clips)
    seconds = list(expected_seconds(headers, clips))
    expected = expected_positions(
        model, example.input_ids, clips, **({"second_per_grid_ts": torch.tensor(seconds)} if seconds else {})
    )
    assert torch.equal(example.position_ids, expected)


def test_each_of_several_videos_has_the_times_of_its_own_rate(processor):
    videos = [video(16, 8.0, fps=4.0), video(40, 10.0, fps=1.0), video(12, 3.0, fps=3.0)]
    conversation = conversation_of(*(part for part, _ in videos))
    headers = tuple(header for _, header in videos)
    clips = processor.geometry(conversation, headers)
    positions = processor.encode(conversation, clips, (None,) * 3).position_ids
    ids = processor.encode(conversation, clips, (None,) * 3).input_ids
    starts = (ids == processor.media.wrapper_ids["vision"][0]).nonzero()[:, 0].tolist()
    times = []
    for start, clip in zip(starts, clips, strict=True):
        rows = positions[0, start + 1 : start + 1 + clip.num_tokens] - positions[0, start] - 1
        times.append(rows.unique().tolist())
        after = start + 1 + clip.num_tokens  # past the rows and columns, whatever the time
        assert positions[0, after] == positions[0, start] + 1 + max(clip.grid_thw[1:]) // 2
    assert times == [[0, 1, 2, 3], [0, 4], [0, 1, 2, 4, 5, 6]]


# ------------------------------------------------------------------------------------ frames and sizes


@pytest.fixture(scope="module")
def theirs():
    """What the source of transformers' Qwen2VLVideoProcessor says; to import it would take torchvision."""
    from transformers.video_utils import VideoMetadata

    source = Path(find_module("transformers.models.qwen2_vl.video_processing_qwen2_vl").origin).read_text()
    (body,) = (
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Qwen2VLVideoProcessor"
    )
    names = {"size", "min_frames", "sample_frames"}
    kept = [
        node for node in body if names & {getattr(node, "name", None), *map(ast.unparse, getattr(node, "targets", ()))}
    ]
    found = {"math": math, "torch": torch, "VideoMetadata": VideoMetadata}
    exec(compile(ast.Module(body=kept, type_ignores=[]), "Qwen2VLVideoProcessor", "exec"), found)
    return SimpleNamespace(**{name: found[name] for name in names})


@settings(deadline=None, max_examples=100)
@given(num_frames=st.integers(2, 3000), rate=st.floats(1, 60), fps=st.floats(0.2, 8), most=st.integers(4, 200))
def test_sampled_frames_are_those_of_transformers(processor, theirs, num_frames, rate, fps, most):
    from transformers.video_utils import VideoMetadata

    stub = SimpleNamespace(num_frames=None, min_frames=theirs.min_frames, max_frames=most, temporal_patch_size=2)
    metadata = VideoMetadata(total_num_frames=num_frames, fps=rate)
    expected = theirs.sample_frames(stub, metadata, fps=fps).tolist()
    part, header = video(num_frames, rate, fps=fps, max_frames=most)
    clip = processor.media.video_geometry(part.media, header, 1.0)
    # its arange may overshoot by one index through float rounding
    assert list(clip.frame_indices) == expected[: len(expected) // 2 * 2]


def test_without_bounds_of_ours_a_video_has_those_of_its_processor(checkpoint, tmp_path):
    def side(directory, options=None):
        part, _ = video(90, 30.0)
        header = MediaHeader(kind="video", width=1920, height=1080, num_frames=90, fps=30.0, duration_seconds=3.0)
        _, rows, columns = make(directory, options).media.video_geometry(part.media, header, 1.0).grid_thw
        return 14 * rows, 14 * columns

    assert side(checkpoint) == smart_resize(1080, 1920, 28, 128 * 28 * 28, 768 * 28 * 28)
    assert side(checkpoint, ProcessorOptions(video=VideoConfig(max_pixels=56 * 84))) == smart_resize(
        1080, 1920, 28, 784, 56 * 84
    )
    own = shutil.copytree(checkpoint, tmp_path / "own")
    (own / "video_preprocessor_config.json").write_text('{"size": {"shortest_edge": 784, "longest_edge": 200000}}')
    assert side(own) == smart_resize(1080, 1920, 28, 784, 200_000)


def test_the_default_bounds_are_those_of_transformers_video_processor(theirs):
    assert (theirs.size["shortest_edge"], theirs.size["longest_edge"]) == Qwen25VLClips.video_pixels


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
    batch = processor.collate_vision(example.vision)  # window by window, so in another order
    assert torch.equal(batch.token_index.sort().values, rows.sort().values)


def test_shrinking_fits_the_limit(processor):
    part, header = video(200, 10.0)
    conversation = conversation_of(Part(kind="image", media=MediaSource(path="x")), part)
    headers = (MediaHeader(kind="image", width=900, height=600), header)
    full = processor.measure(conversation, headers).num_tokens
    for limit in (full - 1, full // 2):
        clips = processor.shrink(conversation, headers, limit)
        assert processor.measure(conversation, headers, clips).num_tokens <= limit
        processor.encode(conversation, clips, decode(clips))
    assert processor.shrink(conversation, headers, 20) is None


def test_transformers_generates_from_our_prompt(checkpoint, processor):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    fast, slow = video(20, 10.0), video(9, 3.0)
    conversation = conversation_of(fast[0], Part(kind="image", media=MediaSource(path="x")), slow[0])
    headers = (fast[1], MediaHeader(kind="image", width=64, height=64), slow[1])
    inputs = processor.prompt(conversation, headers, decode(processor.geometry(conversation, headers)))
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=[])
    assert made.shape[1] == inputs["input_ids"].shape[1] + 3


def test_the_template_is_the_checkpoints_own(processor, checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for system in (None, "be brief"):
        words = [("user", "q 狗"), ("assistant", "a"), ("user", "b\n"), ("assistant", "c")]
        words = [("system", system), *words] if system else words
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in words]
        turns = tuple(Turn(role=role, parts=(Part(kind="text", text=text),)) for role, text in words)
        conversation = Conversation(id="c", source="f:1", turns=turns)
        expected = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False))
        assert processor.encode(conversation, (), ()).input_ids.tolist() == expected
