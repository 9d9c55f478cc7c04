"""The recipes of tiny Qwen3-VLs, dense and with experts: their config.json and their processor's files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from omniloom.tools.tiny_recipe import Recipe
from omniloom.tools.tiny_tokenizer import QWEN3_VL_TOKENS


@dataclass(frozen=True, kw_only=True)
class _Size:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mrope_section: list[int]
    dense_hidden: int
    experts: int
    experts_per_token: int
    expert_hidden: int
    tower_hidden: int
    tower_layers: int
    deepstack: list[int]


_SIZES = {
    "tiny": _Size(
        hidden=64,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mrope_section=[4, 2, 2],
        dense_hidden=128,
        experts=8,
        experts_per_token=2,
        expert_hidden=48,  # neither it nor its double is `hidden`: no stacked weight may be square
        tower_hidden=32,
        tower_layers=3,
        deepstack=[0, 1],
    ),
    "20m": _Size(
        hidden=256,
        layers=8,
        heads=8,
        kv_heads=2,
        head_dim=32,
        mrope_section=[6, 5, 5],
        dense_hidden=2432,
        experts=16,
        experts_per_token=4,
        expert_hidden=160,
        tower_hidden=128,
        tower_layers=4,
        deepstack=[1, 2],
    ),
}


def _config(size: str, ids: dict[str, int], vocab_size: int, *, experts: bool) -> dict[str, Any]:
    sizes = _SIZES[size]
    kind = "qwen3_vl_moe" if experts else "qwen3_vl"
    return {
        "architectures": [f"Qwen3VL{'Moe' if experts else ''}ForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "model_type": kind,
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "dtype": "bfloat16",
            "eos_token_id": ids["<|im_end|>"],
            "head_dim": sizes.head_dim,
            "hidden_act": "silu",
            "hidden_size": sizes.hidden,
            "initializer_range": 0.02,
            "intermediate_size": sizes.dense_hidden,
            "max_position_embeddings": 262144,
            "model_type": f"{kind}_text",
            **(_experts(sizes) if experts else {}),
            "num_attention_heads": sizes.heads,
            "num_hidden_layers": sizes.layers,
            "num_key_value_heads": sizes.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": sizes.mrope_section, "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": not experts,
            "use_cache": True,
            "vocab_size": vocab_size,
        },
        "tie_word_embeddings": not experts,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "deepstack_visual_indexes": sizes.deepstack,
            "depth": sizes.tower_layers,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": sizes.tower_hidden,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 2 * sizes.tower_hidden,
            "model_type": kind,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": sizes.hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }


def _experts(sizes: _Size) -> dict[str, Any]:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.expert_hidden,
        "norm_topk_prob": True,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_per_token,
    }


_PICTURES = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "processor_class": "Qwen3VLProcessor",
    "temporal_patch_size": 2,
}

DENSE = Recipe(
    architecture="Qwen3VLForConditionalGeneration",
    config_class="Qwen3VLConfig",
    tokens=QWEN3_VL_TOKENS,
    token_names={},
    chat_template="qwen3_vl.jinja",
    processor_class="Qwen3VLProcessor",
    config=partial(_config, experts=False),
    processor_files={
        "preprocessor_config.json": {
            **_PICTURES,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        },
        "video_preprocessor_config.json": {
            **_PICTURES,
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    },
)
EXPERTS = Recipe(
    architecture="Qwen3VLMoeForConditionalGeneration",
    config_class="Qwen3VLMoeConfig",
    tokens=DENSE.tokens,
    token_names=DENSE.token_names,
    chat_template=DENSE.chat_template,
    processor_class=DENSE.processor_class,
    config=partial(_config, experts=True),
    processor_files=DENSE.processor_files,
    turned=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)
