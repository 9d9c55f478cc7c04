"""Models of every published size have, component by component, as many parameters as transformers' own."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from omniloom.models.registry import find_spec
from tests.parity.published_configs import PUBLISHED


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
    shown = PUBLISHED[name].billions
    digits = len(shown.split(".")[1]) if "." in shown else 0
    assert f"{sum(ours(PUBLISHED[name].config).values()) / 1e9:.{digits}f}" == shown


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
    named = {*plan.roots, *plan.blocks, *plan.experts, *plan.dispatches, *plan.expert_products, *plan.router_choices}
    named |= {*plan.router_counts, *plan.attention_cores, *(part for group in plan.groups for part in group)}
    assert named <= modules
    assert bool(plan.experts) == (config.text.num_experts > 0)
