from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.data.agreement import report_pack
from omniloom.data.collate import (
    FailedSlot,
    blank_samples,
    check_example,
    collate,
    num_bounds,
    sample_weight_sums,
)
from omniloom.ops.attention import segment_attention_reference
from omniloom.types import (
    IGNORE_LABEL,
    AudioBatch,
    AudioClip,
    BadSample,
    Example,
    LoadedPack,
    PackStats,
    Segments,
    VisionBatch,
    VisionClip,
)

PACK_TOKENS = 256


def make_example(seed: int, num_tokens: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, 90, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < 0.5] = IGNORE_LABEL
    labels[-1] = IGNORE_LABEL
    weights = torch.where(labels == IGNORE_LABEL, 0.0, torch.rand(num_tokens, generator=generator) + 0.1)
    rows = torch.randperm(num_tokens, generator=generator)
    vision = VisionClip(patches=torch.full((8, 3), float(seed)), grid_thw=(1, 2, 4), token_index=rows[:2].sort().values)
    audio = AudioClip(features=torch.full((4, 7), float(seed)), token_index=rows[2:5].sort().values)
    return Example(
        id=f"sample {seed}",
        input_ids=torch.randint(5, 90, (num_tokens,), generator=generator),
        labels=labels,
        loss_weights=weights,
        position_ids=torch.randint(0, 99, (3, num_tokens), generator=generator),
        vision=(vision,) * (seed % 3),
        audio=(audio,) * (seed % 2),
    )


def join_vision(clips) -> VisionBatch:
    null = torch.zeros(4, 3)  # the segment that is always there
    patches = torch.cat([*(clip.patches for clip in clips), null])
    return VisionBatch(
        patches=patches,
        segments=Segments.from_lengths([len(patches)]),
        rotary_index=torch.zeros(len(patches), 2, dtype=torch.int64),
        interpolation_index=torch.zeros(len(patches), 0, dtype=torch.int64),
        interpolation_weights=torch.zeros(len(patches), 0),
        token_index=torch.cat([torch.empty(0, dtype=torch.int64), *(clip.token_index for clip in clips)]),
    )


def join_audio(clips) -> AudioBatch:
    return AudioBatch(
        features=torch.stack([*(clip.features for clip in clips), torch.zeros(4, 7)]),
        chunk_frames=torch.full((len(clips) + 1,), 7),
        valid_index=torch.arange(len(clips) + 1),
        segments=Segments.from_lengths([len(clips) + 1]),
        token_index=torch.cat([torch.empty(0, dtype=torch.int64), *(clip.token_index for clip in clips)]),
    )


def pack(examples, scales=None, pack_tokens=PACK_TOKENS):
    return collate(
        examples,
        pack_tokens=pack_tokens,
        weight_scales=scales or [1.0] * len(examples),
        collate_vision=join_vision,
        collate_audio=join_audio,
    )


lengths = st.lists(st.integers(6, 60), max_size=4)


@settings(max_examples=40, deadline=None)
@given(lengths, st.floats(0.01, 3.0))
def test_every_sample_is_found_again_in_its_own_segment(sizes, scale):
    examples = [make_example(seed, size) for seed, size in enumerate(sizes)]
    batch = pack(examples, [scale] * len(examples))
    bounds = batch.segments.cu_seqlens.tolist()
    for position, example in enumerate(examples):
        rows = slice(bounds[position], bounds[position + 1])
        assert torch.equal(batch.input_ids[rows], example.input_ids)
        assert torch.equal(batch.labels[rows], example.labels)
        assert torch.equal(batch.position_ids[:, rows], example.position_ids)
        assert torch.allclose(batch.loss_weights[rows], example.loss_weights * scale, rtol=1e-6)  # one rounding
        assert not batch.is_padding[rows].any()
    tail = slice(sum(sizes), PACK_TOKENS)
    assert batch.is_padding[tail].all()
    assert (batch.labels[tail] == IGNORE_LABEL).all()
    assert torch.equal(batch.loss_index, batch.loss_weights.nonzero().flatten())
    assert batch.sample_ids == tuple(example.id for example in examples)


@settings(max_examples=40, deadline=None)
@given(lengths)
def test_media_rows_move_with_their_sample(sizes):
    examples = [make_example(seed, size) for seed, size in enumerate(sizes)]
    batch = pack(examples)
    expected_vision, expected_audio, start = [], [], 0
    for example in examples:
        expected_vision += [row + start for clip in example.vision for row in clip.token_index.tolist()]
        expected_audio += [row + start for clip in example.audio for row in clip.token_index.tolist()]
        start += len(example.input_ids)
    assert batch.vision.token_index.tolist() == expected_vision
    assert batch.audio.token_index.tolist() == expected_audio


@pytest.mark.parametrize("sizes", [[], [10], [100, 56, 100], [8] * 30])
def test_bounds_cover_the_pack_and_have_one_length(sizes):
    batch = pack([make_example(seed, size) for seed, size in enumerate(sizes)])
    bounds = batch.segments.cu_seqlens
    assert bounds.dtype == torch.int32
    assert len(bounds) == (16 if len(sizes) < 15 else 32)
    assert bounds[0] == 0
    assert bounds[-1] == PACK_TOKENS
    assert (bounds.diff() >= 0).all()
    assert batch.segments.max_length == int(bounds.diff().max())
    assert bounds.diff()[: len(sizes)].tolist() == sizes


def test_bounds_have_few_lengths_and_leave_at_most_as_much_empty_as_they_hold():
    assert {num_bounds(count) for count in range(1, 16)} == {16}
    assert {num_bounds(count) for count in range(16, 1024)} == {32, 64, 128, 256, 512, 1024}
    assert all(num_bounds(count) <= 2 * count for count in range(16, 1024))


def test_a_failed_sample_keeps_its_slot_and_moves_nothing():
    examples = [make_example(seed, 40) for seed in range(4)]
    whole = pack(examples)
    failed = pack([examples[0], FailedSlot(id="sample 1", num_tokens=40), *examples[2:]])
    assert torch.equal(whole.segments.cu_seqlens, failed.segments.cu_seqlens)
    assert failed.is_padding[40:80].all()
    assert (failed.loss_weights[40:80] == 0).all()
    for rows in (slice(0, 40), slice(80, PACK_TOKENS)):
        assert torch.equal(whole.input_ids[rows], failed.input_ids[rows])
        assert torch.equal(whole.loss_weights[rows], failed.loss_weights[rows])
    assert failed.sample_ids == whole.sample_ids


def test_a_sample_of_two_segments_is_one_sample():
    """A chosen and a rejected answer, say: counted, weighted and lost together, and blind to one another."""
    two = replace(make_example(7, 60), segment_lengths=(25, 35))
    batch = pack([make_example(1, 40), two, make_example(2, 30)], [1.0, 0.5, 1.0])
    whole = pack([make_example(1, 40), make_example(7, 60), make_example(2, 30)], [1.0, 0.5, 1.0])
    assert batch.segments.cu_seqlens.tolist()[:6] == [0, 40, 65, 100, 130, PACK_TOKENS]
    assert batch.segments.max_length == 126
    assert batch.sample_bounds == whole.sample_bounds == (0, 40, 100, 130)
    assert sample_weight_sums(batch) == sample_weight_sums(whole)
    assert check_example(two, 60) is None
    assert "not its 60 tokens" in check_example(replace(two, segment_lengths=(25, 36)), 60)
    blanked = blank_samples(batch, [1])
    assert blanked.is_padding.nonzero().flatten().tolist() == [*range(40, 100), *range(130, PACK_TOKENS)]
    assert sample_weight_sums(blanked)["text"][1] == 0.0
    loaded = LoadedPack(
        index=0,
        batch=blanked,
        stats=PackStats(),
        bad=(BadSample(file="f", line=1, field="x", reason="y"),),
    )
    assert [position for position, _ in report_pack(loaded).bad] == [1]
    q, k, v = (torch.randn(PACK_TOKENS, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out = segment_attention_reference(q, k, v, batch.segments, causal=True)
    k[40:65] += 100.0  # the first segment of the sample
    assert torch.equal(segment_attention_reference(q, k, v, batch.segments, causal=True)[65:], out[65:])


def test_blanking_a_sample_afterwards_gives_what_its_failure_would_have_given():
    examples = [make_example(seed, 40) for seed in (0, 3, 6, 5)]  # the blanked ones have no media or some
    slots = [FailedSlot(id=example.id, num_tokens=40) for example in examples]
    for gone in ([], [0], [1, 3], [0, 1, 2, 3]):
        planned = pack([slots[i] if i in gone else example for i, example in enumerate(examples)])
        blanked = blank_samples(pack(examples), gone)
        for name in ("input_ids", "labels", "loss_weights", "loss_index", "position_ids", "is_padding"):
            assert torch.equal(getattr(planned, name), getattr(blanked, name)), name
        assert sample_weight_sums(planned) == sample_weight_sums(blanked)
        # what its media still write lands on padding only
        extra = set(blanked.audio.token_index.tolist()) - set(planned.audio.token_index.tolist())
        assert blanked.is_padding[sorted(extra)].all()


def test_weight_sums_are_exact_sums_of_the_weights_that_the_loss_sees():
    examples = [make_example(seed, 50) for seed in range(3)]
    batch = pack(examples, [1 / 3, 0.1, 7.0])
    sums = sample_weight_sums(batch)["text"]
    expected = batch.loss_weights.numpy().astype(np.float64)
    for position in range(3):
        assert sums[position] == pytest.approx(expected[50 * position : 50 * position + 50].sum(), rel=1e-14)
    assert sample_weight_sums(pack([])) == {"text": ()}


def test_a_full_pack_has_no_padding_segment():
    batch = pack([make_example(0, 100), make_example(1, 156)])
    assert batch.segments.cu_seqlens[:3].tolist() == [0, 100, 256]
    assert not batch.is_padding.any()
    assert len(sample_weight_sums(batch)["text"]) == 2


def test_towers_the_model_lacks_are_none():
    batch = collate([make_example(0, 10)], pack_tokens=64, weight_scales=[1.0], collate_vision=None, collate_audio=None)
    assert batch.vision is None
    assert batch.audio is None


def test_example_that_breaks_its_plan_is_told_how():
    example = make_example(0, 30)
    assert check_example(example, 30) is None
    assert check_example(example, 29) == "planned as 29 tokens, encoded as 30"
