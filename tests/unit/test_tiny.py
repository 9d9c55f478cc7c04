"""A tiny checkpoint is a whole published one: transformers finds every weight, name and token where it expects them."""

import hashlib
import json

import pytest
import torch

from omniloom.tools.tiny import make_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny("qwen3_omni", tmp_path_factory.mktemp("tiny") / "checkpoint")


def _digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_transformers_loads_it_with_every_weight_and_no_other(checkpoint):
    from transformers import Qwen3OmniMoeForConditionalGeneration

    model, info = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        checkpoint, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 2e5 < sum(p.numel() for p in model.parameters()) < 2e6
    assert model.talker is not None
    assert model.code2wav is not None


def test_weights_lie_in_several_shards_under_the_published_names(checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name in (
        "thinker.model.layers.2.mlp.experts.7.gate_proj.weight",
        "thinker.model.embed_tokens.weight",
        "thinker.lm_head.weight",
        "thinker.visual.merger_list.1.mlp.2.weight",
        "thinker.audio_tower.conv_out.weight",
        "talker.model.layers.0.mlp.experts.0.down_proj.weight",
        "code2wav.code_embedding.weight",
    ):
        assert name in index


def test_token_ids_of_the_config_are_those_of_the_tokenizer(checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    thinker = config["thinker_config"]
    assert thinker["image_token_id"] == tokenizer.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert thinker["audio_token_id"] == tokenizer.audio_token_id == tokenizer.convert_tokens_to_ids("<|audio_pad|>")
    assert thinker["video_token_id"] == tokenizer.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert tokenizer.vision_bos_token == "<|vision_start|>"
    assert tokenizer.audio_eos_token == "<|audio_end|>"
    assert tokenizer.encode("user") == [config["user_token_id"]]
    assert tokenizer.encode("assistant") == [config["assistant_token_id"]]
    assert len(tokenizer) <= thinker["text_config"]["vocab_size"]
    text = "Hello, 你好 😀 <|im_start|>user\n<think>\n\n</think>\n\n don't 12"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_slow_tokenizer_files_say_the_same_as_the_fast_one(checkpoint, tmp_path):
    from transformers import AutoTokenizer

    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    text = "<|im_start|>user\nWhat's in 这张图片?<|vision_start|> <tool_call>\n{}"
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == AutoTokenizer.from_pretrained(checkpoint).encode(
        text
    )


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(checkpoint, tmp_path):
    again = make_tiny("qwen3_omni", tmp_path / "again")
    other = make_tiny("qwen3_omni", tmp_path / "other", seed=1)
    assert _digests(again) == _digests(checkpoint)
    changed = {name for name, digest in _digests(other).items() if digest != _digests(checkpoint)[name]}
    assert changed
    assert all(name.endswith(".safetensors") for name in changed)


def test_overrides_reach_config_and_weights(tmp_path):
    directory = make_tiny("qwen3_omni", tmp_path / "one", overrides={"thinker_config.text_config.num_hidden_layers": 1})
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(name.startswith("thinker.model.layers.1.") for name in index)


def test_wrong_names_are_refused_with_the_nearest_right_one(tmp_path):
    with pytest.raises(ValueError, match="did you mean qwen3_omni"):
        make_tiny("qwen3omni", tmp_path / "a")
    with pytest.raises(ValueError, match="did you mean 20m"):
        make_tiny("qwen3_omni", tmp_path / "a", size="20M")
    with pytest.raises(ValueError, match="did you mean num_hidden_layers"):
        make_tiny("qwen3_omni", tmp_path / "a", overrides={"thinker_config.text_config.num_hidden_layer": 1})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(ValueError, match="not empty"):
        make_tiny("qwen3_omni", tmp_path / "full")


def test_20m_has_a_thinker_of_about_20_million_parameters(tmp_path):
    from transformers import Qwen3OmniMoeForConditionalGeneration

    model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(make_tiny("qwen3_omni", tmp_path / "m", size="20m"))
    assert 17e6 < sum(parameter.numel() for parameter in model.thinker.parameters()) < 25e6
