"""Our Qwen2.5-Omni against transformers' on random tiny models: logits, loss and every gradient, in float32."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniloom.families.qwen2_5_omni.spec import SPEC
from omniloom.types import Kernels
from tests.parity import builders, compare
from tests.parity import builders_qwen2_5_omni as omni
from tests.parity.compare import assert_equal, assert_sum, run_ours

KINDS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "text": ((), ()),
    "image": (("image",), ()),
    "images_of_different_sizes": (("image", "image", "image"), ()),
    "video": (("video",), ()),
    "images_and_videos": (("video", "image", "video"), ()),
    "audio_under_one_chunk": (("audio",), (37,)),
    "the_shortest_audio": (("audio",), (3,)),
    "audio_whose_last_row_is_not_paired": (("audio", "audio"), (122, 201)),
    "audio_over_30_seconds": (("audio",), (3217,)),
    "short_audio_beside_long": (("audio", "audio", "audio"), (42, 230, 7)),
    "audio_in_video": (("video_with_audio",), ()),
    "sound_longer_than_its_video": (("video_with_audio",), (900,)),
    "audio_in_video_beside_others": (("audio", "video_with_audio", "image", "audio"), ()),
    "video_and_separate_audio": (("video", "audio"), ()),
}


def make_pair(seed, *, attention="eager", kernels=None):
    """A random config.json, transformers' model and ours with its weights."""
    rng = random.Random(seed)
    config_json = omni.random_config(rng)
    reference = omni.reference_model(config_json, seed=seed, attention=attention)
    return rng, config_json, reference, builders.our_model(config_json, reference, kernels=kernels, spec=SPEC)


def run_reference(reference, config_json, samples):
    return compare.run_reference(reference, SPEC, config_json, samples, builders.reference_logits)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_logits_and_gradients_equal_transformers(kind):
    media, frames = KINDS[kind]
    rng, config_json, reference, model = make_pair(len(kind), attention="sdpa")
    sample = omni.random_sample(rng, reference, media, audio_frames=frames)
    batch = builders.pack([sample], config_json, num_tokens=sample.input_ids.shape[0] + 5, spec=SPEC)
    assert_equal(run_ours(model, batch), run_reference(reference, config_json, [sample]))


MEDIA = st.one_of(
    st.lists(st.sampled_from(["image", "video", "audio"]), max_size=4),
    st.lists(st.sampled_from(["image", "video_with_audio", "audio"]), max_size=3),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(MEDIA, min_size=1, max_size=3),
    padding=st.integers(0, 9),
    kernel=st.sampled_from(["eager", "sdpa"]),
    seed=st.integers(0, 9999),
)
def test_a_pack_of_random_rows_on_a_random_model_equals_transformers_row_by_row(rows, padding, kernel, seed):
    rng, config_json, reference, model = make_pair(seed, kernels=Kernels(text=kernel, vision=kernel, audio=kernel))
    samples = [omni.random_sample(rng, reference, media, seed=seed) for media in rows]
    used = sum(sample.input_ids.shape[0] for sample in samples)
    batch = builders.pack(samples, config_json, num_tokens=used + padding, spec=SPEC)
    assert_equal(run_ours(model, batch), run_reference(reference, config_json, samples))


def test_packing_does_not_change_loss_or_gradients():
    rng, config_json, reference, model = make_pair(4)
    first = omni.random_sample(rng, reference, ["image", "audio"], audio_frames=[61], seed=1)
    second = omni.random_sample(rng, reference, ["video_with_audio", "audio"], audio_frames=[350, 20], seed=2)
    together = run_ours(model, builders.pack([first, second], config_json, num_tokens=700, spec=SPEC))
    alone = [run_ours(model, builders.pack([sample], config_json, spec=SPEC)) for sample in (first, second)]
    assert_sum(together, alone)


def test_an_empty_pack_is_harmless():
    _, config_json, _, model = make_pair(9)
    result = run_ours(model, builders.pack([], config_json, num_tokens=16, spec=SPEC))
    assert result.loss == 0
    assert not any(gradient.any() for gradient in result.gradients.values())


def test_the_config_that_transformers_writes_back_is_the_published_one():
    _, config_json, reference, _ = make_pair(5)
    written = {"model_type": "qwen2_5_omni", "thinker_config": json.loads(reference.config.to_json_string())}
    assert SPEC.read_config(written) == SPEC.read_config(config_json)
