"""Models of every published size have, component by component, as many parameters as transformers' own."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from omniloom.families.registry import find_spec
from tests.parity.published_configs import DECODERS, PUBLISHED, TOWERS


def ours(config_json: dict[str, Any]) -> Counter:
    spec = find_spec(config_json)
    with torch.device("meta"):
        model = spec.build(spec.read_config(config_json), modalities=spec.modalities)
    counts: Counter = Counter()
    for name, parameter in model.named_parameters():
        counts[spec.component_of(name)] += parameter.numel()
    return counts


def theirs(config_json: dict[str, Any]) -> Counter:
    """Of transformers' model, or thinker, under our components' names."""
    import transformers

    config_json = copy.deepcopy(config_json)
    name = config_json["architectures"][0].replace("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration")
    if "thinker_config" in config_json:
        name, config_json = name.replace("ForCond", "ThinkerForCond"), config_json["thinker_config"]
    settings = getattr(transformers, name.replace("ForConditionalGeneration", "Config")).from_dict(config_json)
    with torch.device("meta"):
        model = getattr(transformers, name)(settings)
        model.tie_weights()
    counts: Counter = Counter()
    for parameter_name, parameter in model.named_parameters():
        if component := _component(parameter_name):
            counts[component] += parameter.numel()
    return counts


def _component(name: str) -> str | None:
    for part, component in (
        ("audio_bos_eos_token", None),  # published, used by nothing, carried by us
        ("deepstack_merger_list", "vision.deepstack"),
        ("visual.merger_list", "vision.deepstack"),
        ("visual.merger.", "vision.merger"),
        ("visual.", "vision"),
        ("audio_tower.proj", "audio.projector"),
        ("audio_tower.", "audio"),
        ("lm_head", "lm_head"),
        ("embed_tokens", "text.embed"),
        ("mlp.experts.", "text.experts"),
        ("mlp.gate.", "text.router"),
    ):
        if part in name:
            return component
    return "text"


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_component_has_as_many_parameters_as_transformers(name):
    assert ours(PUBLISHED[name].config) == theirs(PUBLISHED[name].config)


@pytest.mark.parametrize("name", [name for name, published in PUBLISHED.items() if published.billions])
def test_the_total_is_the_published_one(name):
    assert_is(sum(ours(PUBLISHED[name].config).values()), PUBLISHED[name].billions)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_are_as_large_as_their_language_models(name):
    counts = ours(PUBLISHED[name].config)
    assert_is(sum(n for key, n in counts.items() if key.startswith("text") and key != "text.embed"), DECODERS[name])


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_towers_are_as_large_as_published(name, tower):
    assert_is(sum(n for key, n in ours(PUBLISHED[name].config).items() if key.startswith(tower)), TOWERS[name, tower])


def assert_is(count: int, shown: str) -> None:
    """`count` is what is shown in billions, to the digits shown."""
    digits = len(shown.split(".")[1]) if "." in shown else 0
    assert abs(count / 1e9 - float(shown)) <= 0.51 * 10**-digits, count


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_can_be_sharded_by_their_plan(name):
    """Every pattern of the plan finds its modules, so no part is left out by a misspelt name."""
    spec = find_spec(PUBLISHED[name].config)
    config = spec.read_config(PUBLISHED[name].config)
    plan = spec.sharding(config)
    with torch.device("meta"):
        model = spec.build(config, modalities=spec.modalities)
    modules = {
        ".".join("*" if part.isdigit() else part for part in path.split(".")) for path, _ in model.named_modules()
    }
    named = {*plan.roots, *plan.blocks, *plan.experts, *plan.dispatches, *plan.expert_products, *plan.layer_calls}
    named |= {
        *plan.router_counts,
        *plan.attention_cores,
        *plan.recurrences,
        *plan.wide,
        *(part for group in plan.groups for part in group),
    }
    assert named <= modules
    assert bool(plan.experts) == (config.text.num_experts > 0)
