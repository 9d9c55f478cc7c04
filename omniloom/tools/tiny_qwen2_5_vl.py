"""The recipe of a tiny Qwen2.5-VL: its config.json, where the decoder has no section of its own, and its processor."""

from __future__ import annotations

from typing import Any

from omniloom.tools.tiny_qwen2_5_omni import PICTURES, SIZES
from omniloom.tools.tiny_recipe import Recipe
from omniloom.tools.tiny_tokenizer import QWEN2_5_VL_TOKENS


def _config(size: str, ids: dict[str, int], vocab_size: int) -> dict[str, Any]:
    sizes = SIZES[size]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "image_token_id": ids["<|image_pad|>"],
        "initializer_range": 0.02,
        "intermediate_size": sizes.dense_hidden,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": sizes.mrope_section, "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "depth": sizes.tower_layers,
            "fullatt_block_indexes": sizes.full_attention,
            "hidden_act": "silu",
            "hidden_size": sizes.tower_hidden,
            "in_chans": 3,
            "intermediate_size": 2 * sizes.tower_hidden,
            "num_heads": 2,
            "out_hidden_size": sizes.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 56,  # published: 112; smaller, so that small pictures already have several windows
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vocab_size": vocab_size,
    }


RECIPE = Recipe(
    architecture="Qwen2_5_VLForConditionalGeneration",
    config_class="Qwen2_5_VLConfig",
    tokens=QWEN2_5_VL_TOKENS,
    token_names={},
    chat_template="qwen2_5_vl.jinja",
    processor_class="Qwen2_5_VLProcessor",
    config=_config,
    processor_files={"preprocessor_config.json": {**PICTURES, "processor_class": "Qwen2_5_VLProcessor"}},
)
