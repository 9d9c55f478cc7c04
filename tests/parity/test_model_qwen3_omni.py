"""Our Qwen3-Omni against transformers' on random tiny models: logits, loss and every gradient, in float32."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.types import Kernels
from tests.parity import builders, compare
from tests.parity.compare import SMALLEST_GAP, assert_equal, assert_sum, run_ours, smallest_router_gap

KINDS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "text": ((), ()),
    "image": (("image",), ()),
    "images_of_different_sizes": (("image", "image", "image"), ()),
    "video": (("video",), ()),
    "images_and_videos": (("video", "image", "video"), ()),
    "audio_under_one_chunk": (("audio",), (37,)),
    "audio_of_one_frame": (("audio",), (1,)),
    "audio_of_exact_chunks": (("audio",), (200,)),
    "audio_over_30_seconds": (("audio",), (3217,)),
    "short_audio_beside_long": (("audio", "audio", "audio"), (42, 230, 7)),
    "short_audio_beside_shorter": (("audio", "audio"), (42, 15)),
    "audio_in_video": (("video_with_audio",), ()),
    "audio_in_video_beside_others": (("audio", "video_with_audio", "image", "audio"), ()),
    "video_and_separate_audio": (("video", "audio"), ()),
}


def run_reference(reference, config_json, samples):
    return compare.run_reference(reference, SPEC, config_json, samples, builders.reference_logits)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_logits_and_gradients_equal_transformers(kind):
    media, frames = KINDS[kind]
    rng = random.Random(f"{kind}.2")
    config_json = builders.random_config(rng, num_layers=3)
    reference = builders.reference_model(config_json, seed=1, attention="sdpa")
    model = builders.our_model(config_json, reference)
    sample = builders.random_sample(rng, reference, media, audio_frames=frames)
    batch = builders.pack([sample], config_json, num_tokens=sample.input_ids.shape[0] + 5)
    assert smallest_router_gap(model, batch) > SMALLEST_GAP, "choose another seed"
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
    seed=st.integers(0, 9999),  # a draw per number instead would take longer than the models do
)
def test_a_pack_of_random_rows_on_a_random_model_equals_transformers_row_by_row(rows, padding, kernel, seed):
    rng = random.Random(seed)
    config_json = builders.random_config(rng)
    reference = builders.reference_model(config_json, seed=seed)
    model = builders.our_model(config_json, reference, kernels=Kernels(text=kernel, vision=kernel, audio=kernel))
    samples = [builders.random_sample(rng, reference, media, seed=seed) for media in rows]
    used = sum(sample.input_ids.shape[0] for sample in samples)
    batch = builders.pack(samples, config_json, num_tokens=used + padding)
    assume(smallest_router_gap(model, batch) > SMALLEST_GAP)
    assert_equal(run_ours(model, batch), run_reference(reference, config_json, samples))


@pytest.fixture(scope="module")
def pair():
    """A model of one layer and transformers' equal, for tests that need no particular config."""
    rng = random.Random(5)
    config_json = builders.random_config(rng, num_layers=1, dense=False)
    reference = builders.reference_model(config_json, seed=5)
    return config_json, reference, builders.our_model(config_json, reference)


def test_packing_does_not_change_loss_or_gradients(pair):
    config_json, reference, model = pair
    rng = random.Random(1)
    first = builders.random_sample(rng, reference, ["image", "audio"], audio_frames=[61], seed=1)
    second = builders.random_sample(rng, reference, ["video_with_audio", "audio"], audio_frames=[350, 20], seed=2)
    together = run_ours(model, builders.pack([first, second], config_json, num_tokens=400))
    alone = [run_ours(model, builders.pack([sample], config_json)) for sample in (first, second)]
    # a key bias's gradient is zero but for what rounding leaves of terms that cancel
    assert_sum(together, alone, least=1e-6)


def test_router_loss_equals_transformers_for_one_layer(pair):
    config_json, reference, model = pair
    sample = builders.random_sample(random.Random(2), reference, ["image"])
    output = builders.reference_logits(reference, sample, output_router_logits=True)
    batch = dataclasses.replace(builders.pack([sample], config_json, num_tokens=200), loss_scales={"router": 1.0})
    model.zero_grad()
    reference.zero_grad()
    terms = model(batch)
    torch.testing.assert_close(terms.sums["router"], output.aux_loss, rtol=1e-5, atol=0)
    (0.0 * terms.sums["text"]).backward()  # the router's gradient rides on the rows that this one takes back
    output.aux_loss.backward()
    wanted = reference.model.language_model.layers[0].mlp.gate.weight.grad
    torch.testing.assert_close(model.text.layers["0"].moe.router.weight.grad, wanted, rtol=1e-4, atol=1e-7)
    config = SPEC.read_config(config_json)
    assert terms.expert_counts.shape == (1, config.text.num_experts)
    assert terms.expert_counts.sum() == sample.input_ids.shape[0] * config.text.num_experts_per_tok


def test_loss_equals_the_one_that_transformers_computes_from_labels(pair):
    config_json, reference, model = pair
    sample = builders.random_sample(random.Random(3), reference, ["audio"])
    sample = dataclasses.replace(sample, loss_weights=(sample.labels >= 0).float() / (sample.labels >= 0).sum())
    unshifted = torch.cat((torch.tensor([-100]), sample.labels[:-1]))
    wanted = builders.reference_logits(reference, sample, labels=unshifted[None]).loss
    loss = model(builders.pack([sample], config_json)).sums["text"]
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)


def test_a_pack_without_labels_has_zero_loss_and_zero_gradients(pair):
    config_json, reference, model = pair
    sample = builders.random_sample(random.Random(4), reference, ["image", "audio"])
    sample = dataclasses.replace(
        sample, labels=torch.full_like(sample.labels, -100), loss_weights=torch.zeros_like(sample.loss_weights)
    )
    result = run_ours(model, builders.pack([sample], config_json))
    assert result.loss == 0
    assert all(not gradient.any() for gradient in result.gradients.values())


def test_an_empty_pack_is_harmless(pair):
    config_json, _, model = pair
    batch = dataclasses.replace(builders.pack([], config_json, num_tokens=16), loss_scales={"router": 1.0})
    model.zero_grad()
    terms = model(batch)
    terms.sums["text"].backward()
    assert terms.sums["text"] == 0
    assert terms.sums["router"] == 0
    assert not terms.expert_counts.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_padding_never_reaches_what_is_computed_of_valid_tokens(pair):
    """Padding rows get random tokens; nothing else may move, to the last bit."""
    config_json, reference, model = pair
    sample = builders.random_sample(random.Random(6), reference, ["image"])
    batch = builders.pack([sample], config_json, num_tokens=sample.input_ids.shape[0] + 40)
    noise = torch.randint(1, 90, batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    other = dataclasses.replace(batch, input_ids=torch.where(batch.is_padding, noise, batch.input_ids))
    first, second = run_ours(model, batch), run_ours(model, other)
    assert first.loss == second.loss
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in first.gradients)


def test_a_saved_checkpoint_has_exactly_the_names_that_the_key_map_reads(tmp_path, pair):
    from safetensors import safe_open

    config_json, reference, model = pair
    reference.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {f"thinker.{name}": tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assemblies = SPEC.key_map(SPEC.read_config(config_json)).assemblies(shapes)
    assert {name: assembly.shape for name, assembly in assemblies.items()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }


def test_bfloat16_stays_near_float32(pair):
    """Compute in bfloat16, with what must stay wide (positions, softmax, loss) wide."""
    config_json, reference, model = pair
    sample = builders.random_sample(random.Random(8), reference, ["image", "audio"])
    batch = builders.pack([sample], config_json, num_tokens=sample.input_ids.shape[0] + 7)
    wide = model(batch).sums["text"]
    low = builders.our_model(config_json, reference).to(torch.bfloat16)
    terms = low(batch)
    terms.sums["text"].backward()
    assert terms.sums["text"].dtype == torch.float32
    # 8 bits of mantissa over a few layers; a collapsed position or a low softmax would show as tens of percent
    torch.testing.assert_close(terms.sums["text"], wide, rtol=0.05, atol=0)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in low.parameters())
