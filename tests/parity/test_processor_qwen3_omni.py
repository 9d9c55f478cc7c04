"""The Qwen3-Omni processor gives transformers' tokens, positions and features, and measures what it encodes."""

import functools
import json
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.options import ImageConfig, ProcessorOptions, VideoConfig
from omniloom.tools.tiny import make_tiny
from omniloom.types import (
    IGNORE_LABEL,
    ClipGeometry,
    ClipOptions,
    Conversation,
    DecodedClip,
    MediaHeader,
    MediaSource,
    Part,
    SampleError,
    Turn,
)
from tests.parity.samples import conversation_of, decode, images, sides

OPTIONS = ProcessorOptions(
    image=ImageConfig(min_pixels=32 * 32, max_pixels=96 * 96), video=VideoConfig(min_pixels=32 * 32, max_pixels=64 * 96)
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny("qwen3_omni", tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def config(checkpoint):
    return SPEC.read_config(json.loads((checkpoint / "config.json").read_text()))


@pytest.fixture(scope="module")
def processor(checkpoint, config):
    # through pickle, as loader workers get it
    return pickle.loads(pickle.dumps(functools.partial(SPEC.make_processor, checkpoint, config, OPTIONS)))()


@pytest.fixture(scope="module")
def thinker(checkpoint):
    """transformers' thinker without storage: its rope index needs the config only."""
    from transformers import AutoConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    with torch.device("meta"):
        return Qwen3OmniMoeThinkerForConditionalGeneration(AutoConfig.from_pretrained(checkpoint).thinker_config)


# ------------------------------------------------------------------------------------ random samples

text_parts = st.text(alphabet="ab \n狗😀?", max_size=8).map(lambda text: (Part(kind="text", text=text), None))
audios = st.builds(
    lambda samples: (
        Part(kind="audio", media=MediaSource(path="x")),
        MediaHeader(kind="audio", num_audio_samples=samples, duration_seconds=samples / 16000),
    ),
    st.one_of(st.integers(160, 200_000), st.integers(1, 9).map(lambda n: 16_000 * n), st.just(31 * 16_000)),
)


def videos(use_audio):
    return st.builds(
        lambda size, frames, rate, fps, most, sound: (
            Part(
                kind="video",
                media=MediaSource(path="x", use_audio=use_audio, options=ClipOptions(fps=fps, max_frames=most)),
            ),
            MediaHeader(
                kind="video",
                width=size[0],
                height=size[1],
                num_frames=frames,
                fps=rate,
                duration_seconds=frames / rate,
                num_audio_samples=int(frames / rate * 16000 * sound) + 160,
                has_audio=True,
            ),
        ),
        st.tuples(sides, sides),
        st.integers(1, 60),
        st.sampled_from((5.0, 10.0, 25.0, 29.97)),
        st.sampled_from((None, 1.0, 2.0, 4.0, 1.5, 2.7)),
        st.sampled_from((None, 4, 6)),
        st.sampled_from((0.7, 1.0, 1.2)),
    )


def samples(*media, min_size=1):
    """Conversation of one question, its text and media mixed, and one answer; with the headers."""

    def build(items, answer):
        headers = tuple(header for _, header in items if header is not None)
        return conversation_of(*(part for part, _ in items), answer=answer), headers

    return st.builds(build, st.lists(st.one_of(text_parts, *media), min_size=min_size, max_size=6), st.text(max_size=5))


# ------------------------------------------------------------------------------------ oracles


def expected_ids(processor, conversation, clips):
    """The chat template's text, pads replaced by transformers' own functions, tokenized in one go."""
    from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import (
        Qwen3OmniMoeProcessor,
        _get_feat_extract_output_lengths,
    )

    stub = SimpleNamespace(
        audio_token="<|audio_pad|>",
        video_token="<|video_pad|>",
        audio_bos_token="<|audio_start|>",
        audio_eos_token="<|audio_end|>",
        video_processor=SimpleNamespace(merge_size=2),
    )
    remaining = iter(clips)
    text = ""
    for turn in conversation.turns:
        text += f"<|im_start|>{turn.role}\n"
        for part in turn.parts:
            if part.media is None:
                text += part.text
                continue
            clip = next(remaining)
            num_audio = int(_get_feat_extract_output_lengths(torch.tensor(clip.num_mel_frames)))
            if part.kind == "audio":
                text += "<|audio_start|>" + "<|audio_pad|>" * num_audio + "<|audio_end|>"
                continue
            pads = f"<|{part.kind}_pad|>" * (int(np.prod(clip.grid_thw)) // 4)
            if clip.num_mel_frames:
                pads = Qwen3OmniMoeProcessor.replace_video_with_audio_token(
                    stub,
                    {"video_grid_thw": np.array([clip.grid_thw]), "video_second_per_grid": [clip.seconds_per_grid]},
                    0,
                    {"num_audio_tokens": [num_audio]},
                    0,
                    position_id_per_seconds=13.0,
                )
            text += f"<|vision_start|>{pads}<|vision_end|>"
        text += "<|im_end|>\n"
    return processor.tokenizer.encode(text, add_special_tokens=False).ids


def expected_positions(thinker, config, input_ids, clips):
    """transformers' rope index, floored.

    It takes the sound of all videos or of none. A trailing image makes it walk through any mixture, block by block,
    with the flag off; positions never depend on what follows.
    """
    tail = torch.tensor(
        [
            config.token_ids["vision_start_token_id"],
            config.token_ids["image_token_id"],
            thinker.config.vision_end_token_id,
        ]
    )
    grids = {kind: [clip.grid_thw for clip in clips if clip.kind == kind] for kind in ("image", "video")}
    spans = torch.tensor([clip.seconds_per_grid for clip in clips if clip.kind == "video"])
    mel_frames = torch.tensor([clip.num_mel_frames for clip in clips if clip.num_mel_frames])
    arguments = {
        "video_grid_thw": torch.tensor(grids["video"]) if grids["video"] else None,
        "audio_seqlens": mel_frames,
        "second_per_grids": spans,
    }
    walk_ids = torch.cat([input_ids, tail])[None]
    positions, _ = thinker.get_rope_index(
        walk_ids, torch.tensor([*grids["image"], (1, 2, 2)]), attention_mask=torch.ones_like(walk_ids), **arguments
    )
    walked = positions[:, 0, : len(input_ids)]
    has_sound = {bool(clip.num_mel_frames) for clip in clips if clip.kind == "video"}
    if len(has_sound) == 1:  # then transformers can be asked straight as well
        plain, _ = thinker.get_rope_index(
            input_ids[None],
            torch.tensor(grids["image"]) if grids["image"] else None,
            attention_mask=torch.ones_like(input_ids)[None],
            use_audio_in_video=has_sound == {True},
            **arguments,
        )
        assert torch.equal(plain[:, 0], walked)
    return walked.floor().long()


any_sample = samples(images, audios, videos(False), videos(True))


# ------------------------------------------------------------------------------------ tokens and positions


@settings(deadline=None, max_examples=60)
@given(sample=any_sample)
def test_tokens_are_those_of_transformers(processor, sample):
    conversation, headers = sample
    clips = processor.geometry(conversation, headers)
    example = processor.encode(conversation, clips, [None] * len(clips))
    assert example.input_ids.tolist() == expected_ids(processor, conversation, clips)


@settings(deadline=None, max_examples=60)
@given(sample=any_sample)
def test_positions_are_those_of_transformers_floored(processor, thinker, config, sample):
    conversation, headers = sample
    clips = processor.geometry(conversation, headers)
    example = processor.encode(conversation, clips, [None] * len(clips))
    expected = expected_positions(thinker, config, example.input_ids, clips)
    assert torch.equal(example.position_ids, expected)


def test_positions_equal_transformers_exactly_at_the_usual_rates(processor, thinker, config):
    video = MediaHeader(kind="video", width=64, height=64, num_frames=50, fps=25.0, duration_seconds=2.0)
    for fps in (1.0, 2.0, 4.0):
        source = MediaSource(path="x", options=ClipOptions(fps=fps))
        conversation = one_turn(Part(kind="video", media=source))
        clips = processor.geometry(conversation, (video,))
        assert (13 * clips[0].seconds_per_grid) % 1 == (0.5 if fps == 4.0 else 0.0)
        example = processor.encode(conversation, clips, [None])
        assert torch.equal(example.position_ids, expected_positions(thinker, config, example.input_ids, clips))


# ------------------------------------------------------------------------------------ measure is encode


@settings(deadline=None, max_examples=15)
@given(sample=any_sample)
def test_measuring_headers_equals_encoding_arrays(processor, sample):
    conversation, headers = sample
    extent = processor.measure(conversation, headers)
    example = processor.encode(conversation, extent.clips, decode(extent.clips))
    assert extent.num_tokens == len(example.input_ids) == example.position_ids.shape[1]
    assert extent.num_loss_tokens == int((example.loss_weights > 0).sum())
    assert extent.weight_sum == float(example.loss_weights.sum())
    assert extent.num_patches == sum(len(clip.patches) for clip in example.vision)
    assert extent.num_audio_frames == sum(clip.features.shape[1] for clip in example.audio)
    media_ids = torch.tensor(sorted(processor.media.pad_ids))
    rows = torch.cat([clip.token_index for clip in (*example.vision, *example.audio)] or [torch.zeros(0).long()])
    assert torch.equal(rows.sort().values, torch.isin(example.input_ids, media_ids).nonzero()[:, 0])
    assert len(rows) == sum(clip.num_tokens for clip in extent.clips)
    assert extent.cost > 0


def test_a_clip_decoded_elsewhere_changes_nothing_but_its_features(processor):
    sound = MediaSource(path="x", use_audio=True)
    conversation = one_turn(Part(kind="image", media=MediaSource(path="x")), Part(kind="video", media=sound))
    clips = processor.geometry(conversation, (IMAGE, VIDEO))
    both = processor.encode(conversation, clips, decode(clips))
    one = processor.encode(conversation, clips, (None, decode(clips)[1]))
    assert torch.equal(both.input_ids, one.input_ids)
    assert torch.equal(both.position_ids, one.position_ids)
    assert torch.equal(both.vision[1].token_index, one.vision[0].token_index)
    assert (len(one.vision), len(one.audio)) == (1, 1)


# ------------------------------------------------------------------------------------ labels


def one_turn(*parts, answer="yes", **fields):
    turns = (
        Turn(role="user", parts=(*parts, Part(kind="text", text="q"))),
        Turn(role="assistant", parts=(Part(kind="text", text=answer),)),
    )
    return Conversation(id="c", source="f:1", turns=turns, **fields)


IMAGE = MediaHeader(kind="image", width=64, height=64)
VIDEO = MediaHeader(
    kind="video",
    width=64,
    height=48,
    num_frames=20,
    fps=10.0,
    duration_seconds=2.0,
    num_audio_samples=32_000,
    has_audio=True,
)


def test_labels_are_the_next_tokens_of_the_answer(processor):
    example = processor.encode(one_turn(answer="yes 狗\n", weight=0.5), (), ())
    trained = example.loss_weights > 0
    assert set(example.loss_weights[trained].tolist()) == {0.5}
    assert (
        processor.tokenizer.decode(example.labels[trained].tolist(), skip_special_tokens=False) == "yes 狗\n<|im_end|>"
    )
    assert torch.equal(example.labels[:-1][trained[:-1]], example.input_ids[1:][trained[:-1]])
    assert set(example.labels[~trained].tolist()) == {IGNORE_LABEL}


def test_training_on_the_prompt_leaves_media_rows_out(checkpoint, config):
    options = ProcessorOptions(train_on_prompt=True, image=ImageConfig(max_pixels=64 * 64))
    processor = SPEC.make_processor(checkpoint, config, options)
    conversation = one_turn(Part(kind="image", media=MediaSource(path="x")))
    clips = processor.geometry(conversation, (IMAGE,))
    example = processor.encode(conversation, clips, (None,))
    predicted = example.labels[example.loss_weights > 0]
    assert not torch.isin(predicted, torch.tensor(sorted(processor.media.pad_ids))).any()
    assert len(predicted) == len(example.input_ids) - clips[0].num_tokens - 1  # and the first token is not predicted


def test_rows_that_cannot_be_trained_on_are_refused_by_both(processor):
    asked = Conversation(id="c", source="f:1", turns=one_turn().turns[:1])
    spoof = one_turn(Part(kind="text", text="look: <|image_pad|>"))
    for conversation, reason in ((asked, "nothing to train on"), (spoof, "holds <|image_pad|>")):
        with pytest.raises(SampleError, match=reason):
            processor.measure(conversation, ())
        with pytest.raises(SampleError, match=reason):
            processor.encode(conversation, (), ())


def test_clips_that_do_not_fit_the_plan_are_refused(processor):
    conversation = one_turn(Part(kind="video", media=MediaSource(path="x", use_audio=True)))
    clips = processor.geometry(conversation, (VIDEO,))
    (decoded,) = decode(clips)
    with pytest.raises(SampleError, match="expected 4 decoded frames as planned, got 3"):
        processor.encode(conversation, clips, (DecodedClip(pixels=decoded.pixels[:3], waveform=decoded.waveform),))
    with pytest.raises(SampleError, match="expected 32000 samples of sound as planned, got 31999"):
        processor.encode(conversation, clips, (DecodedClip(pixels=decoded.pixels, waveform=decoded.waveform[1:]),))


def test_missing_sound_is_an_error_or_a_silent_video_as_asked(processor, checkpoint, config):
    conversation = one_turn(Part(kind="video", media=MediaSource(path="x", use_audio=True)))
    silent = MediaHeader(kind="video", width=64, height=48, num_frames=20, fps=10.0, duration_seconds=2.0)
    with pytest.raises(SampleError, match="no_audio=video_only"):
        processor.measure(conversation, (silent,))
    allowed = SPEC.make_processor(checkpoint, config, ProcessorOptions(video=VideoConfig(no_audio="video_only")))
    assert allowed.measure(conversation, (silent,)).num_audio_frames == 0


# ------------------------------------------------------------------------------------ sizes


def test_known_audio_lengths_give_the_published_token_counts(processor):
    for num_samples, tokens in ((5 * 16_000, 65), (585 * 160, 76), (586 * 160, 76), (160, 1), (16_000, 13)):
        header = MediaHeader(kind="audio", num_audio_samples=num_samples)
        clips = processor.geometry(one_turn(Part(kind="audio", media=MediaSource(path="x"))), (header,))
        assert clips[0].num_tokens == tokens


def test_shrinking_fits_the_limit_and_keeps_what_it_can(processor):
    conversation = one_turn(
        Part(kind="image", media=MediaSource(path="x")), Part(kind="video", media=MediaSource(path="x"))
    )
    headers = (MediaHeader(kind="image", width=900, height=600), VIDEO)
    full = processor.measure(conversation, headers)
    previous = 0
    for limit in range(full.num_tokens - 1, 15, -1):
        clips = processor.shrink(conversation, headers, limit)
        if clips is None:
            break
        extent = processor.measure(conversation, headers, clips)
        assert extent.num_tokens <= limit
        assert previous == 0 or extent.num_tokens <= previous
        previous = extent.num_tokens
        processor.encode(conversation, clips, decode(clips))
    assert clips is None  # some limit is below wrappers and words
    num_words = full.num_tokens - sum(clip.num_tokens for clip in full.clips)
    assert previous == num_words + 2  # down to one token for each clip


def test_a_video_kept_to_fewer_frames_still_spans_its_time(processor):
    long = MediaHeader(kind="video", width=64, height=64, num_frames=3000, fps=25.0, duration_seconds=120.0)
    clips = processor.geometry(
        one_turn(Part(kind="video", media=MediaSource(path="x", options=ClipOptions(max_frames=8)))), (long,)
    )
    assert len(clips[0].frame_indices) == 8
    assert clips[0].seconds_per_grid == 30.0


# ------------------------------------------------------------------------------------ features


def test_image_patches_are_those_of_the_published_image_processor(checkpoint, processor):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    reference = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": OPTIONS.image.min_pixels, "longest_edge": OPTIONS.image.max_pixels},
    )
    conversation = one_turn(Part(kind="image", media=MediaSource(path="x")))
    for width, height in ((64, 64), (130, 77), (33, 190)):
        clips = processor.geometry(conversation, (MediaHeader(kind="image", width=width, height=height),))
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        example = processor.encode(conversation, clips, (DecodedClip(pixels=pixels),))
        expected = reference(images=[pixels], return_tensors="pt")
        assert expected["image_grid_thw"].tolist() == [list(clips[0].grid_thw)]
        patches, _ = processor.towers.normalised((example.vision[0].patches, None))
        assert torch.allclose(patches, expected["pixel_values"], atol=1e-6)


def test_mel_features_are_those_of_the_published_feature_extractor(checkpoint, processor):
    from transformers import WhisperFeatureExtractor

    reference = WhisperFeatureExtractor.from_pretrained(checkpoint)
    conversation = one_turn(Part(kind="audio", media=MediaSource(path="x")))
    for num_samples in (16_000, 93_617, 31 * 16_000):
        header = MediaHeader(kind="audio", num_audio_samples=num_samples)
        clips = processor.geometry(conversation, (header,))
        decoded = decode(clips)
        example = processor.encode(conversation, clips, decoded)
        expected = reference(
            decoded[0].waveform, sampling_rate=16_000, padding=True, truncation=False, return_tensors="pt"
        )["input_features"][0]
        assert expected.shape == example.audio[0].features.shape
        assert torch.allclose(example.audio[0].features, expected, atol=2e-4)  # both float32 FFTs


# ------------------------------------------------------------------------------------ the checkpoint's files


def _copy(checkpoint, directory, *without):
    directory.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors" and path.name not in without:
            shutil.copy(path, directory)
    return directory


def test_the_template_is_the_checkpoints_own(checkpoint, config, processor, tmp_path):
    conversation = one_turn()
    conversation = replace(
        conversation, turns=(*conversation.turns, Turn(role="assistant", parts=(Part(kind="text", text="a"),)))
    )
    thinking = _copy(checkpoint, tmp_path / "thinking")
    template = json.loads((checkpoint / "chat_template.json").read_text())["chat_template"]
    changed = template.replace(
        "if reasoning and loop.index0 > ns.last_query_index", "if loop.index0 > ns.last_query_index"
    )
    assert changed != template
    (thinking / "chat_template.jinja").write_text(changed.replace("# Tools", "# Functions"))

    def written(*arguments):
        made = SPEC.make_processor(*arguments)
        return made.tokenizer.decode(made.encode(conversation, (), ()).input_ids.tolist(), skip_special_tokens=False)

    assert "<think>" in written(thinking, config)
    assert "<think>" not in written(thinking, config, ProcessorOptions(template="qwen3_omni_nothink"))
    assert "<think>" in written(checkpoint, config, ProcessorOptions(template="qwen3_omni"))
    assert "<think>" not in written(checkpoint, config)
    with pytest.raises(ValueError, match="unknown template"):
        SPEC.make_processor(checkpoint, config, ProcessorOptions(template="qwen3"))
    with pytest.raises(ValueError, match=r"qwen2_omni is of another family; .* takes qwen3_omni_nothink or qwen3_omni"):
        SPEC.make_processor(checkpoint, config, ProcessorOptions(template="qwen2_omni"))


OPENING = "{{- '<|im_start|>assistant\\n' }}"
THINKING_OPENING = """{{- '<|im_start|>assistant\\n<think>\\n' if enable_thinking is not defined or enable_thinking
    else '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"""


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_answers_are_opened_as_the_checkpoints_own_template_opens_them(checkpoint, config, tmp_path, enable_thinking):
    thinking = _copy(checkpoint, tmp_path / "thinking", "chat_template.json")
    template = json.loads((checkpoint / "chat_template.json").read_text())["chat_template"]
    before, found, after = template.rpartition(OPENING)
    assert found
    (thinking / "chat_template.jinja").write_text(before + THINKING_OPENING + after)
    processor = SPEC.make_processor(thinking, config, ProcessorOptions(enable_thinking=enable_thinking))
    ids = processor.prompt(one_turn(), (), ())["input_ids"][0].tolist()
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    block = "<think>\n" if enable_thinking else "<think>\n\n</think>\n\n"
    assert text == f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{block}"


def test_processor_settings_are_read_from_either_layout(checkpoint, config, processor, tmp_path):
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    image = {key: settings[key] for key in ("image_mean", "image_std")}
    image["size"] = {"shortest_edge": settings["min_pixels"], "longest_edge": settings["max_pixels"]}
    sound = {key: settings[key] for key in ("sampling_rate", "hop_length", "n_fft")}
    other = _copy(checkpoint, tmp_path / "other", "preprocessor_config.json")
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        SPEC.make_processor(other, config)
    (other / "processor_config.json").write_text(json.dumps({"image_processor": image, "feature_extractor": sound}))
    large = MediaHeader(kind="image", width=640, height=480)
    conversation = one_turn(Part(kind="image", media=MediaSource(path="x")))
    expected = SPEC.make_processor(checkpoint, config).geometry(conversation, (large,))
    assert SPEC.make_processor(other, config).geometry(conversation, (large,)) == expected
    assert expected[0].grid_thw == (1, 30, 40)


# ------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("use_audio", [False, True])
def test_transformers_generates_from_our_prompt(checkpoint, processor, use_audio):
    from transformers import Qwen3OmniMoeForConditionalGeneration

    torch.manual_seed(0)
    thinker = Qwen3OmniMoeForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).thinker.eval()
    conversation = one_turn(
        Part(kind="image", media=MediaSource(path="x")),
        Part(kind="audio", media=MediaSource(path="x")),
        Part(kind="video", media=MediaSource(path="x", use_audio=use_audio)),
    )
    headers = (IMAGE, MediaHeader(kind="audio", num_audio_samples=20_000), VIDEO)
    clips = processor.geometry(conversation, headers)
    inputs = processor.prompt(conversation, headers, decode(clips))
    words = processor.tokenizer.decode(inputs["input_ids"][0].tolist(), skip_special_tokens=False)
    assert words.endswith("q<|im_end|>\n<|im_start|>assistant\n")
    made = thinker.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=[])
    assert made.shape[1] == inputs["input_ids"].shape[1] + 3


def test_geometry_is_plain_data(processor):
    clips = processor.geometry(one_turn(Part(kind="image", media=MediaSource(path="x"))), (IMAGE,))
    assert clips == (ClipGeometry(kind="image", num_tokens=4, grid_thw=(1, 4, 4), source_size=(64, 64)),)
