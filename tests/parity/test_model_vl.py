"""Our Qwen3-VL and Qwen3.5 (with experts, too) and Qwen2.5-VL against transformers on random tiny models, float32."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from omniloom.families.registry import spec_named
from omniloom.types import Kernels
from tests.parity import builders, compare
from tests.parity import builders_vl as vl
from tests.parity.compare import SMALLEST_GAP, assert_equal, assert_sum, run_ours, smallest_router_gap

FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe")
KINDS = {
    "text": (),
    "image": ("image",),
    "images_of_different_sizes": ("image", "image", "image"),
    "video": ("video",),
    "several_videos": ("video", "video", "video"),
    "images_and_videos": ("video", "image", "video", "image"),
}


def make_pair(family, seed, *, attention="eager", kernels=None):
    """A random config.json, transformers' model, ours with its weights, and our family."""
    rng, spec = random.Random(seed), spec_named(family)
    config_json = vl.random_config(rng, family)
    reference = vl.reference_model(config_json, seed=seed, attention=attention)
    return rng, config_json, reference, builders.our_model(config_json, reference, kernels=kernels, spec=spec), spec


def run_reference(reference, spec, config_json, samples):
    return compare.run_reference(reference, spec, config_json, samples, vl.reference_logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_logits_and_gradients_equal_transformers(family, kind):
    rng, config_json, reference, model, spec = make_pair(family, len(kind), attention="sdpa")
    sample = vl.random_sample(rng, reference, KINDS[kind])
    batch = builders.pack([sample], config_json, num_tokens=sample.input_ids.shape[0] + 5, spec=spec)
    assert smallest_router_gap(model, batch) > SMALLEST_GAP, "choose another seed"
    assert_equal(run_ours(model, batch), run_reference(reference, spec, config_json, [sample]))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(FAMILIES),
    rows=st.lists(st.lists(st.sampled_from(["image", "video"]), max_size=4), min_size=1, max_size=3),
    padding=st.integers(0, 9),
    kernel=st.sampled_from(["eager", "sdpa"]),
    seed=st.integers(0, 9999),
)
def test_a_pack_of_random_rows_on_a_random_model_equals_transformers_row_by_row(family, rows, padding, kernel, seed):
    kernels = Kernels(text=kernel, vision=kernel, audio=kernel)
    rng, config_json, reference, model, spec = make_pair(family, seed, kernels=kernels)
    samples = [vl.random_sample(rng, reference, media, seed=seed) for media in rows]
    used = sum(sample.input_ids.shape[0] for sample in samples)
    batch = builders.pack(samples, config_json, num_tokens=used + padding, spec=spec)
    assume(smallest_router_gap(model, batch) > SMALLEST_GAP)
    assert_equal(run_ours(model, batch), run_reference(reference, spec, config_json, samples))


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_does_not_change_loss_or_gradients(family):
    rng, config_json, reference, model, spec = make_pair(family, 7)
    first = vl.random_sample(rng, reference, ["image", "video"], seed=1)
    second = vl.random_sample(rng, reference, ["video", "video"], seed=2)
    together = run_ours(model, builders.pack([first, second], config_json, num_tokens=400, spec=spec))
    alone = [run_ours(model, builders.pack([sample], config_json, spec=spec)) for sample in (first, second)]
    assert_sum(together, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_without_pictures_gives_the_tower_zero_gradients(family):
    rng, config_json, reference, model, spec = make_pair(family, 3)
    result = run_ours(model, builders.pack([vl.random_sample(rng, reference)], config_json, spec=spec))
    tower = [gradient for name, gradient in result.gradients.items() if name.startswith("vision.")]
    assert tower
    assert not any(gradient.any() for gradient in tower)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read_as_what_qwen_published(family, tmp_path):
    """transformers 5 writes stacked experts outputs first; Qwen published them inputs first."""
    from safetensors.torch import load_file

    _, config_json, reference, model, spec = make_pair(family, 11)
    reference.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    turned = [name for name in saved if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    assert bool(turned) == (family == "qwen3_vl_moe")
    weights = builders.assemble(spec.key_map(spec.read_config(config_json)), saved)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_names_that_transformers_holds_are_read_too(family):
    _, config_json, reference, model, spec = make_pair(family, 13)
    key_map = spec.key_map(spec.read_config(config_json))
    weights = builders.assemble(key_map, reference.state_dict())
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_config_that_transformers_writes_back_is_the_published_one():
    import json

    for family in FAMILIES:
        _, config_json, reference, _, spec = make_pair(family, 5)
        written = json.loads(reference.config.to_json_string())
        assert spec.read_config(written) == spec.read_config(config_json)
