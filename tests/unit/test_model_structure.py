"""What must hold of the Qwen3-Omni model whatever its weights: configs, sizes, names, one graph, no look at values."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.families.registry import find_spec
from omniloom.families.spec import COMPONENTS, TALKER_COMPONENTS
from omniloom.ops.rotary import Rotary
from omniloom.tools.tiny import tiny_config
from omniloom.types import Kernels
from tests.parity import builders

# The fields that matter, as in the published Qwen3-Omni-30B-A3B checkpoints.
PUBLISHED = {
    "model_type": "qwen3_omni_moe",
    "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
    "thinker_config": {
        "audio_start_token_id": 151669,
        "audio_token_id": 151675,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "position_id_per_seconds": 13,
        "audio_config": {
            "activation_function": "gelu",
            "d_model": 1280,
            "downsample_hidden_size": 480,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "encoder_layers": 32,
            "n_window": 50,
            "n_window_infer": 800,
            "num_mel_bins": 128,
            "output_dim": 2048,
        },
        "text_config": {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 768,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "interleaved": True,
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
                "type": "default",
            },
            "rope_theta": 1000000,
            "vocab_size": 152064,
        },
        "vision_config": {
            "deepstack_visual_indexes": [8, 16, 24],
            "depth": 27,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "image_size": 768,
            "in_channels": 3,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
}


def changed(path: str, value: object) -> dict:
    tree = copy.deepcopy(PUBLISHED)
    *parents, last = ("thinker_config." + path).split(".")
    node = tree
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return tree


def test_published_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = SPEC.build(SPEC.read_config(PUBLISHED))
    count = sum(p.numel() for p in model.text.parameters())
    # Qwen3-30B-A3B, the same decoder, has 30,532,122,624 with a vocabulary of 151,936; 2 x 128 rows of 2,048 more
    assert count == 30_532_122_624 + 2 * 128 * 2048
    assert model.vision.pos_embed.weight.shape == (2304, 1152)
    assert model.audio.stem.out.weight.shape == (1280, 480 * 16)


def test_what_transformers_writes_back_reads_the_same():
    from transformers import Qwen3OmniMoeConfig

    rewritten = Qwen3OmniMoeConfig.from_dict(copy.deepcopy(PUBLISHED)).to_dict()
    assert "rope_parameters" in rewritten["thinker_config"]["text_config"]
    assert SPEC.read_config(rewritten) == SPEC.read_config(PUBLISHED)


def test_every_missing_field_is_named_at_once():
    tree = changed("text_config.num_experts", ...)
    del tree["thinker_config"]["audio_config"]
    del tree["thinker_config"]["text_config"]["rope_scaling"]["mrope_section"]
    with pytest.raises(ValueError, match="missing") as caught:
        SPEC.read_config(tree)
    for name in ("thinker_config.audio_config,", "text_config.num_experts", "mrope_section"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("vision_config.num_heads", 15, "hidden_size / num_heads"),
        ("vision_config.num_position_embeddings", 2305, "num_position_embeddings"),
        ("vision_config.deepstack_visual_indexes", [8, 30], "deepstack_visual_indexes"),
        ("vision_config.out_hidden_size", 1024, "out_hidden_size 1024"),
        ("vision_config.hidden_act", "swish7", "swish7"),
        ("audio_config.n_window", 40, "13 rows"),
        ("audio_config.n_window_infer", 80, "n_window_infer"),
        ("text_config.num_key_value_heads", 5, "num_key_value_heads"),
        ("text_config.num_experts_per_tok", 500, "num_experts_per_tok 500"),
        ("text_config.rope_scaling.mrope_section", [24, 20, 21], "mrope_section"),
        ("text_config.rope_scaling.rope_type", "yarn", "yarn"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(path, value, named):
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        SPEC.read_config(changed(path, value))
    assert named in str(caught.value)


def test_fewer_layers_keep_what_lies_in_front():
    reduced = SPEC.reduce_config(changed("text_config.mlp_only_layers", [0, 2, 5]), text=3, vision=17, audio=4)
    config = SPEC.read_config(reduced)
    assert (config.text.num_hidden_layers, config.vision.depth, config.audio.encoder_layers) == (3, 17, 4)
    assert config.vision.deepstack_visual_indexes == (8, 16)
    assert config.text.mlp_only_layers == (0, 2)
    assert SPEC.reduce_config(PUBLISHED) == PUBLISHED
    assert SPEC.read_config(SPEC.reduce_config(PUBLISHED, text=2)).vision.deepstack_visual_indexes == (8, 16)
    with pytest.raises(ValueError, match=r"model\.num_layers\.vision: expected 1 to 27"):
        SPEC.reduce_config(PUBLISHED, vision=28)


def test_the_registry_finds_the_family_and_names_the_known_ones():
    assert find_spec(PUBLISHED) is SPEC
    with pytest.raises(ValueError, match=r"'qwen3_omni'.*qwen3_omni_moe"):
        find_spec({"model_type": "qwen3_omni"})
    with pytest.raises(ValueError, match="no known model"):
        find_spec({})


def test_every_parameter_belongs_to_a_component_and_every_component_has_some():
    config_json = builders.random_config(random.Random(0), num_layers=1, dense=False)
    config_json["thinker_config"]["vision_config"].update(depth=2, deepstack_visual_indexes=[0])
    model = SPEC.build(SPEC.read_config(config_json))
    found = {SPEC.component_of(name) for name, _ in model.named_parameters()}
    assert found == set(COMPONENTS)
    assert SPEC.component_of("text.loss_head.norm.weight") == "text"
    with pytest.raises(ValueError, match="no component"):
        SPEC.component_of("code2wav.x")
    speaks = SPEC.build(SPEC.read_config(tiny_config("qwen3_omni"), speaks=True), modalities=("text",))
    assert {SPEC.component_of(name) for name, _ in speaks.talker.named_parameters("talker")} == set(TALKER_COMPONENTS)


def test_every_pattern_of_the_sharding_plan_matches_a_module():
    config_json = builders.random_config(random.Random(0), num_layers=2, dense=False)
    config = SPEC.read_config(config_json)
    names = [name.split(".") for name, _ in SPEC.build(config).named_modules()]
    plan = SPEC.sharding(config)
    patterns = [
        pattern
        for field in dataclasses.fields(plan)
        for value in [getattr(plan, field.name)]
        if isinstance(value, tuple)
        for group in value
        for pattern in (group if isinstance(group, tuple) else (group,))
        if isinstance(pattern, str)  # costs of layers are numbers
    ]
    assert len(patterns) > 8
    for pattern in patterns:
        wanted = pattern.split(".")
        assert any(
            len(name) == len(wanted) and all(w in ("*", n) for n, w in zip(name, wanted, strict=True)) for name in names
        ), pattern


@pytest.mark.parametrize("modalities", [("text",), ("text", "audio"), ("text", "video")])
def test_a_tower_that_no_modality_needs_is_not_built(modalities):
    config_json = builders.random_config(random.Random(1), num_layers=1)
    model = SPEC.build(SPEC.read_config(config_json), modalities=modalities)
    assert (model.vision is None) == ("video" not in modalities)
    assert (model.audio is None) == ("audio" not in modalities)
    batch = builders.pack([], config_json, num_tokens=8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model(batch).sums["text"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_model_never_looks_at_a_value():
    """Fake tensors have none: any branch, size or Python number out of a tensor's content raises."""
    config_json = builders.random_config(random.Random(2), num_layers=2, dense=False)
    batch = builders.pack([], config_json, num_tokens=16)
    before = torch.get_default_dtype()
    with FakeTensorMode() as mode:
        torch.set_default_dtype(torch.bfloat16)  # the fake grouped product takes nothing else
        try:
            model = SPEC.build(SPEC.read_config(config_json), kernels=Kernels(text="eager"))
        finally:
            torch.set_default_dtype(before)
        batch = dataclasses.replace(_convert(batch, mode.from_tensor), loss_scales={"router": 1.0})
        terms = model(batch)
        terms.sums["text"].backward()
        assert model.logits(batch).shape == (16, builders.VOCAB_SIZE)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at inputs'
def test_a_compiled_block_is_one_graph_shared_by_all_layers():
    from torch._dynamo.testing import CompileCounterWithBackend

    config_json = builders.random_config(random.Random(3), num_layers=3, dense=False)
    model = SPEC.build(SPEC.read_config(config_json)).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = builders.pack([], config_json, num_tokens=24)
    batch = dataclasses.replace(batch, loss_index=torch.arange(4), labels=batch.labels.clamp(min=0))
    plain = model(batch)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.text.layers.values():
        layer.compile(backend=counter, fullgraph=True)
    compiled = model(batch)
    compiled.sums["text"].backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled.sums["text"], plain.sums["text"])
    torch._dynamo.reset()


def test_fewer_heads_in_the_weights_are_fewer_heads_in_the_layer():
    """A shard of the projections works without being told: half of the heads give half of the output's terms."""
    config_json = builders.random_config(random.Random(4), num_layers=1)
    text = config_json["thinker_config"]["text_config"]
    text.update(num_attention_heads=4, num_key_value_heads=2, attention_bias=False)
    attention = SPEC.build(SPEC.read_config(config_json)).text.layers["0"].attention
    batch = builders.pack([], config_json, num_tokens=6)
    hidden = torch.randn(6, text["hidden_size"], generator=torch.Generator().manual_seed(0))
    angles = torch.arange(6.0)[:, None] * torch.ones(attention.head_dim // 2)
    rotary = Rotary(cos=angles.cos(), sin=angles.sin())
    whole = attention(hidden, rotary, batch.segments)
    total = torch.zeros_like(whole)
    for half in range(2):
        shard = copy.deepcopy(attention)
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(shard, name)
            linear.weight = torch.nn.Parameter(linear.weight.detach().chunk(2, dim=0)[half])
        shard.o_proj.weight = torch.nn.Parameter(shard.o_proj.weight.detach().chunk(2, dim=1)[half])
        total = total + shard(hidden, rotary, batch.segments)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)


def _convert(value, function):
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: _convert(getattr(value, field.name), function) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
