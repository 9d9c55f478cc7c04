"""Tiny checkpoints of every family are whole published ones, which both transformers and our own code read."""

import json

import pytest
import torch

from omniloom.checkpoint.hf import check_names
from omniloom.checkpoint.tensor_files import open_checkpoint
from omniloom.families.registry import SPECS, find_spec
from omniloom.families.spec import COMPONENTS
from omniloom.tools.tiny import FAMILIES, make_tiny

FAMILY_NAMES = [spec.name for spec in SPECS]


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def checkpoint(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


def read_config(checkpoint):
    return json.loads((checkpoint / "config.json").read_text())


def test_every_family_has_a_tiny_checkpoint():
    assert sorted(FAMILIES) == sorted(FAMILY_NAMES)


def test_transformers_loads_it_with_every_weight_and_no_other(checkpoint):
    import transformers

    name = read_config(checkpoint)["architectures"][0]
    published = {"Qwen2_5OmniModel": "Qwen2_5OmniForConditionalGeneration"}  # as transformers calls it by now
    model_class = getattr(transformers, published.get(name, name))
    # not model_class's own, which for Qwen2.5-Omni cannot tell what it loaded
    load = super(model_class, model_class).from_pretrained
    model, info = load(checkpoint, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype != torch.bfloat16}
    assert {name.split(".")[0] for name in wide} <= {"token2wav"}
    assert model_class.from_pretrained(checkpoint, dtype="auto") is not None  # with the files beside the weights


def test_our_family_consumes_or_carries_every_tensor(checkpoint):
    config_json = read_config(checkpoint)
    spec = find_spec(config_json)
    config = spec.read_config(config_json)
    key_map = spec.key_map(config)
    with torch.device("meta"):
        model = spec.build(config, modalities=spec.modalities)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_names(shapes, key_map.assemblies(open_checkpoint(checkpoint).shapes), key_map)
    assert {spec.component_of(name) for name, _ in model.named_parameters()} <= set(COMPONENTS)


def test_token_ids_of_the_config_are_the_tokenizers(checkpoint):
    from transformers import AutoTokenizer

    config_json = read_config(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = find_spec(config_json).read_config(config_json)
    words = {name: tokenizer.convert_ids_to_tokens(token_id) for name, token_id in config.token_ids.items()}
    assert all(word.startswith("<|") for word in words.values()), words
    assert len(tokenizer) <= config.text.vocab_size


def test_fewer_layers_keep_the_config_readable(checkpoint):
    config_json = read_config(checkpoint)
    spec = find_spec(config_json)
    counts = {"text": 1, "vision": 1} | ({"audio": 1} if "audio" in spec.modalities else {})
    reduced = spec.reduce_config(config_json, **counts)
    config = spec.read_config(reduced)
    assert (config.text.num_hidden_layers, config.vision.depth) == (1, 1)
    assert len(config.vision.deepstack_visual_indexes) <= 1
    with pytest.raises(ValueError, match=r"model\.num_layers\.text: expected 1 to"):
        spec.reduce_config(config_json, text=99)
    if "audio" not in spec.modalities:
        with pytest.raises(ValueError, match="no such tower"):
            spec.reduce_config(config_json, audio=1)


def test_missing_fields_are_named_all_at_once(checkpoint):
    config_json = read_config(checkpoint)
    spec = find_spec(config_json)
    broken = spec.reduce_config(config_json)
    sections = broken.get("thinker_config", broken)
    text = sections.get("text_config", sections)
    del text["num_attention_heads"], sections["vision_config"]["depth"]
    with pytest.raises(ValueError, match=r"missing .*vision_config\.depth.*\bnum_attention_heads"):
        spec.read_config(broken)


def test_stacked_experts_lie_inputs_first_as_published(tmp_path):
    shapes = open_checkpoint(make_tiny("qwen3_vl_moe", tmp_path / "moe")).shapes
    assert shapes["model.language_model.layers.0.mlp.experts.gate_up_proj"] == (8, 64, 96)
    assert shapes["model.language_model.layers.0.mlp.experts.down_proj"] == (8, 48, 64)
