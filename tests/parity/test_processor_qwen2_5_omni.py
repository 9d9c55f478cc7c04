"""The Qwen2.5-Omni processor gives transformers' tokens, positions and features, and measures what it encodes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.families.registry import find_spec
from omniloom.options import ImageConfig, ProcessorOptions, VideoConfig
from omniloom.processors.positions import merge_by_chunks
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
    image=ImageConfig(min_pixels=28 * 28, max_pixels=84 * 84), video=VideoConfig(min_pixels=28 * 28, max_pixels=56 * 84)
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny("qwen2_5_omni", tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def config_json(checkpoint):
    return json.loads((checkpoint / "config.json").read_text())


@pytest.fixture(scope="module")
def processor(checkpoint, config_json):
    spec = find_spec(config_json)
    return spec.make_processor(checkpoint, spec.read_config(config_json), OPTIONS)


@pytest.fixture(scope="module")
def thinker(config_json):
    """transformers' thinker without storage: its rope index needs the config only."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    with torch.device("meta"):
        return Qwen2_5OmniThinkerForConditionalGeneration(
            Qwen2_5OmniThinkerConfig.from_dict(config_json["thinker_config"])
        )


# ------------------------------------------------------------------------------------ random samples

texts = st.text(alphabet="ab \n狗😀?", max_size=6).map(lambda text: (Part(kind="text", text=text), None))
audios = st.builds(
    lambda samples: (
        Part(kind="audio", media=MediaSource(path="x")),
        MediaHeader(kind="audio", num_audio_samples=samples, duration_seconds=samples / 16000),
    ),
    st.one_of(st.integers(480, 200_000), st.integers(1, 9).map(lambda n: 16_000 * n), st.just(31 * 16_000)),
)


def videos(use_audio):
    return st.builds(
        lambda width, height, frames, rate, fps, most, sound: (
            Part(
                kind="video",
                media=MediaSource(path="x", use_audio=use_audio, options=ClipOptions(fps=fps, max_frames=most)),
            ),
            MediaHeader(
                kind="video",
                width=width,
                height=height,
                num_frames=frames,
                fps=rate,
                duration_seconds=frames / rate,
                num_audio_samples=int(frames / rate * 16000 * sound) + 480,
                has_audio=True,
            ),
        ),
        sides,
        sides,
        st.integers(1, 200),
        st.sampled_from((5.0, 10.0, 25.0, 29.97)),
        st.sampled_from((None, 1.0, 2.0, 4.0, 0.5)),
        st.sampled_from((None, 4, 6)),  # few frames of a long video lie further apart than a chunk
        st.sampled_from((0.4, 1.0, 1.3)),
    )


def samples(*media):
    return st.lists(st.one_of(texts, *media), min_size=1, max_size=5).map(
        lambda items: (
            conversation_of(*(part for part, _ in items)),
            tuple(header for _, header in items if header is not None),
        )
    )


any_sample = st.one_of(samples(images, audios, videos(False)), samples(images, audios, videos(True)))


# ------------------------------------------------------------------------------------ oracles


def expected_ids(processor, conversation, clips):
    """The chat template's text, pads replaced by transformers' own functions, tokenized in one go."""
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import (
        Qwen2_5OmniProcessor,
        _get_feat_extract_output_lengths,
    )

    stub = SimpleNamespace(
        audio_token="<|AUDIO|>",
        video_token="<|VIDEO|>",
        audio_bos_token="<|audio_bos|>",
        audio_eos_token="<|audio_eos|>",
        video_processor=SimpleNamespace(merge_size=2),
    )
    stub.get_chunked_index = lambda *arguments: Qwen2_5OmniProcessor.get_chunked_index(stub, *arguments)
    remaining = iter(clips)
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for turn in conversation.turns:
        text += f"<|im_start|>{turn.role}\n"
        for part in turn.parts:
            if part.media is None:
                text += part.text
                continue
            clip = next(remaining)
            num_audio = int(_get_feat_extract_output_lengths(torch.tensor(clip.num_mel_frames)))
            if part.kind == "audio":
                text += "<|audio_bos|>" + "<|AUDIO|>" * num_audio + "<|audio_eos|>"
                continue
            pads = f"<|{part.kind.upper()}|>" * (int(np.prod(clip.grid_thw)) // 4)
            if clip.num_mel_frames:
                pads = Qwen2_5OmniProcessor.replace_video_with_audio_token(
                    stub,
                    {"video_grid_thw": np.array([clip.grid_thw]), "video_second_per_grid": [clip.seconds_per_grid]},
                    0,
                    {"num_audio_tokens": [num_audio]},
                    0,
                    position_id_per_seconds=25,
                    seconds_per_chunk=2.0,
                )
            text += f"<|vision_bos|>{pads}<|vision_eos|>"
        text += "<|im_end|>\n"
    return processor.tokenizer.encode(text, add_special_tokens=False).ids


def expected_positions(thinker, ids, clips):
    grids = {kind: [clip.grid_thw for clip in clips if clip.kind == kind] for kind in ("image", "video")}
    spans = [clip.seconds_per_grid for clip in clips if clip.kind == "video"]
    mel_frames = [clip.num_mel_frames for clip in clips if clip.num_mel_frames]
    positions, _ = thinker.get_rope_index(
        ids[None],
        torch.tensor(grids["image"]) if grids["image"] else None,
        torch.tensor(grids["video"]) if grids["video"] else None,
        attention_mask=torch.ones_like(ids)[None],
        use_audio_in_video=any(clip.kind == "video" and clip.num_mel_frames for clip in clips),
        audio_seqlens=torch.tensor(mel_frames) if mel_frames else None,
        second_per_grids=torch.tensor(spans) if spans else None,
    )
    return positions[:, 0]


# ------------------------------------------------------------------------------------ tokens and positions


@settings(deadline=None, max_examples=60)
@given(sample=any_sample)
def test_tokens_and_positions_are_those_of_transformers(processor, thinker, sample):
    conversation, headers = sample
    clips = processor.geometry(conversation, headers)
    example = processor.encode(conversation, clips, [None] * len(clips))
    assert example.input_ids.tolist() == expected_ids(processor, conversation, clips)
    assert torch.equal(example.position_ids, expected_positions(thinker, example.input_ids, clips))


@settings(deadline=None, max_examples=200)
@given(
    steps=st.lists(st.floats(0, 120), max_size=40),
    num_audio=st.integers(0, 300),
    size=st.integers(1, 60),
)
def test_chunks_are_those_that_transformers_walks_through(steps, num_audio, size):
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

    times = np.cumsum([0.0, *steps])
    expected = []
    chunks = [Qwen2_5OmniProcessor.get_chunked_index(None, indices, size) for indices in (times, np.arange(num_audio))]
    for number in range(max(map(len, chunks))):
        for offset, of_kind in zip((0, len(times)), chunks, strict=True):
            if number < len(of_kind):
                expected += [offset + index for index in range(*of_kind[number])]
    assert merge_by_chunks(times, num_audio, size).tolist() == expected


def test_known_audio_lengths_give_the_published_token_counts(processor):
    for num_samples, tokens in ((5 * 16_000, 125), (585 * 160, 146), (586 * 160, 146), (480, 1), (16_000, 25)):
        header = MediaHeader(kind="audio", num_audio_samples=num_samples)
        clips = processor.geometry(conversation_of(Part(kind="audio", media=MediaSource(path="x"))), (header,))
        assert clips[0].num_tokens == tokens
    short = MediaHeader(kind="audio", num_audio_samples=479)
    with pytest.raises(SampleError, match="at least 480 make a token"):
        processor.geometry(conversation_of(Part(kind="audio", media=MediaSource(path="x"))), (short,))


# ------------------------------------------------------------------------------------ measure is encode


@settings(deadline=None, max_examples=15)
@given(sample=any_sample)
def test_measuring_headers_equals_encoding_arrays(processor, sample):
    conversation, headers = sample
    extent = processor.measure(conversation, headers)
    example = processor.encode(conversation, extent.clips, decode(extent.clips))
    assert extent.num_tokens == len(example.input_ids) == example.position_ids.shape[1]
    assert extent.num_patches == sum(len(clip.patches) for clip in example.vision)
    assert extent.num_audio_frames == sum(clip.features.shape[1] for clip in example.audio)
    rows = torch.cat([clip.token_index for clip in (*example.vision, *example.audio)] or [torch.zeros(0).long()])
    pads = torch.tensor(sorted(processor.media.pad_ids))
    assert torch.equal(rows.sort().values, torch.isin(example.input_ids, pads).nonzero()[:, 0])
    vision, audio = processor.collate_vision(example.vision), processor.collate_audio(example.audio)
    filled = torch.cat([vision.token_index, audio.token_index])  # pictures window by window, so in another order
    assert torch.equal(filled.sort().values, rows.sort().values)


@pytest.mark.parametrize("use_audio", [False, True])
def test_transformers_generates_from_our_prompt(checkpoint, processor, use_audio):
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    conversation = conversation_of(
        Part(kind="image", media=MediaSource(path="x")),
        Part(kind="audio", media=MediaSource(path="x")),
        Part(kind="video", media=MediaSource(path="x", use_audio=use_audio)),
    )
    headers = (
        MediaHeader(kind="image", width=64, height=64),
        MediaHeader(kind="audio", num_audio_samples=20_000),
        MediaHeader(
            kind="video",
            width=64,
            height=48,
            num_frames=20,
            fps=10.0,
            duration_seconds=2.0,
            num_audio_samples=32_000,
            has_audio=True,
        ),
    )
    inputs = processor.prompt(conversation, headers, decode(processor.geometry(conversation, headers)))
    made = thinker.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=[])
    assert made.shape[1] == inputs["input_ids"].shape[1] + 3


def test_the_template_is_the_checkpoints_own(processor, checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for system in (None, "be brief"):
        words = [("user", "q 狗"), ("assistant", "a"), ("user", "b\n"), ("assistant", "c")]
        words = [("system", system), *words] if system else words
        messages = [{"role": role, "content": text} for role, text in words]
        turns = tuple(Turn(role=role, parts=(Part(kind="text", text=text),)) for role, text in words)
        conversation = Conversation(id="c", source="f:1", turns=turns)
        expected = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False))
        assert processor.encode(conversation, (), ()).input_ids.tolist() == expected
