"""Dims of every published size, as their config.json have them (what concerns the thinker), and parameters in billions.

Totals are those that the model pages show for what is here; of the omni models, whose pages count the talker too, only
the components are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Published:
    config: dict[str, Any]
    billions: str | None  # as shown


def _vl_vision(kind: str, out: int, *, small: bool) -> dict[str, Any]:
    dims = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    if not small:
        dims = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    return {
        **dims,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "initializer_range": 0.02,
        "model_type": kind,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": out,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _vl(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    *,
    kv_heads: int = 8,
    experts: dict[str, Any] | None = None,
    tied: bool = False,
    small: bool = False,
) -> dict[str, Any]:
    kind = "qwen3_vl" if experts is None else "qwen3_vl_moe"
    return {
        "architectures": [f"Qwen3VL{'' if experts is None else 'Moe'}ForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": kind,
        "text_config": {
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "max_position_embeddings": 262144,
            "model_type": f"{kind}_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "vocab_size": 151936,
            **(experts or {}),
        },
        "tie_word_embeddings": tied,
        "video_token_id": 151656,
        "vision_config": _vl_vision(kind, hidden, small=small),
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


def _experts(width: int) -> dict[str, Any]:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }


def _qwen3_5(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    intermediate: int = 0,
    value_heads: int = 32,
    experts: tuple[int, int, int] | None = None,
    tied: bool = False,
    tower: dict[str, int] | None = None,
) -> dict[str, Any]:
    """`experts`: how many, of how many each token takes, and their width, which is that of the shared one, too."""
    kind = "qwen3_5" if experts is None else "qwen3_5_moe"
    text: dict[str, Any] = {
        "attention_bias": False,
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "layer_types": [("full" if layer % 4 == 3 else "linear") + "_attention" for layer in range(layers)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": f"{kind}_text",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "vocab_size": 248320,
    }
    if experts is None:
        text["intermediate_size"] = intermediate
    else:
        number, chosen, width = experts
        text |= {"num_experts": number, "num_experts_per_tok": chosen}
        text |= {"moe_intermediate_size": width, "shared_expert_intermediate_size": width}
    return {
        "architectures": [f"Qwen3_5{'' if experts is None else 'Moe'}ForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": kind,
        "text_config": text,
        "tie_word_embeddings": tied,
        "video_token_id": 248057,
        "vision_config": {**_vl_vision(kind, hidden, small=False), "deepstack_visual_indexes": [], **(tower or {})},
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    }


def _window_vision(out: int, intermediate: int = 3420) -> dict[str, Any]:
    return {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": intermediate,
        "num_heads": 16,
        "out_hidden_size": out,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    }


def _qwen2_5_vl(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, tower: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "image_token_id": 151655,
        "intermediate_size": intermediate,
        "max_position_embeddings": 128000,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "video_token_id": 151656,
        "vision_config": _window_vision(hidden, tower),
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
        "vocab_size": 151936 if tied else 152064,
    }


def _qwen2_5_omni(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab_size: int
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "thinker_config": {
            "audio_config": {
                "activation_function": "gelu",
                "d_model": 1280,
                "encoder_attention_heads": 20,
                "encoder_ffn_dim": 5120,
                "encoder_layers": 32,
                "max_source_positions": 1500,
                "model_type": "qwen2_5_omni_audio_encoder",
                "n_window": 100,
                "num_mel_bins": 128,
                "output_dim": hidden,
            },
            "audio_end_token_id": 151648,
            "audio_start_token_id": 151647,
            "audio_token_index": 151646,
            "image_token_index": 151655,
            "model_type": "qwen2_5_omni_thinker",
            "position_id_per_seconds": 25,
            "seconds_per_chunk": 2,
            "text_config": {
                "hidden_act": "silu",
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "max_position_embeddings": 32768,
                "model_type": "qwen2_5_omni_text",
                "num_attention_heads": heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": kv_heads,
                "rms_norm_eps": 1e-06,
                "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
                "rope_theta": 1000000.0,
                "use_sliding_window": False,
                "vocab_size": vocab_size,
            },
            "video_token_index": 151656,
            "vision_config": {**_window_vision(hidden), "model_type": "qwen2_5_omni_vision_encoder"},
            "vision_end_token_id": 151653,
            "vision_start_token_id": 151652,
        },
    }


_QWEN3_OMNI_30B = {
    "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
    "model_type": "qwen3_omni_moe",
    "thinker_config": {
        "audio_config": {
            "activation_function": "gelu",
            "conv_chunksize": 500,
            "d_model": 1280,
            "downsample_hidden_size": 480,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "encoder_layers": 32,
            "max_source_positions": 1500,
            "model_type": "qwen3_omni_moe_audio_encoder",
            "n_window": 50,
            "n_window_infer": 800,
            "num_mel_bins": 128,
            "output_dim": 2048,
        },
        "audio_start_token_id": 151669,
        "audio_token_id": 151675,
        "image_token_id": 151655,
        "model_type": "qwen3_omni_moe_thinker",
        "position_id_per_seconds": 13,
        "text_config": {
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 768,
            "max_position_embeddings": 65536,
            "model_type": "qwen3_omni_moe_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 1000000,
            "vocab_size": 152064,
            **_experts(768),
        },
        "video_token_id": 151656,
        "vision_config": {
            **_vl_vision("qwen3_omni_moe_vision_encoder", 2048, small=False),
            "image_size": 768,
        },
        "vision_start_token_id": 151652,
    },
}

_TOWER_0_1B = {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12}
_TOWER_0_3B = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}

PUBLISHED = {
    "Qwen3-VL-2B": Published(config=_vl(2048, 6144, 28, 16, tied=True, small=True), billions="2.1"),
    "Qwen3-VL-4B": Published(config=_vl(2560, 9728, 36, 32, tied=True, small=True), billions="4.4"),
    "Qwen3-VL-8B": Published(config=_vl(4096, 12288, 36, 32), billions="8.8"),
    "Qwen3-VL-32B": Published(config=_vl(5120, 25600, 64, 64), billions="33"),
    "Qwen3-VL-30B-A3B": Published(config=_vl(2048, 6144, 48, 32, kv_heads=4, experts=_experts(768)), billions="31"),
    "Qwen3-VL-235B-A22B": Published(
        config=_vl(4096, 12288, 94, 64, kv_heads=4, experts=_experts(1536)), billions="236"
    ),
    "Qwen2.5-VL-3B": Published(config=_qwen2_5_vl(2048, 11008, 36, 16, 2, tower=3420, tied=True), billions="3.75"),
    "Qwen2.5-VL-7B": Published(config=_qwen2_5_vl(3584, 18944, 28, 28, 4, tower=3420), billions="8.29"),
    "Qwen2.5-VL-32B": Published(config=_qwen2_5_vl(5120, 27648, 64, 40, 8, tower=3456), billions="33.5"),
    "Qwen2.5-VL-72B": Published(config=_qwen2_5_vl(8192, 29568, 80, 64, 8, tower=3456), billions="73.4"),
    "Qwen2.5-Omni-3B": Published(config=_qwen2_5_omni(2048, 11008, 36, 16, 2, 151936), billions=None),
    "Qwen2.5-Omni-7B": Published(config=_qwen2_5_omni(3584, 18944, 28, 28, 4, 152064), billions=None),
    "Qwen3-Omni-30B-A3B": Published(config=_QWEN3_OMNI_30B, billions=None),
    "Qwen3.5-0.8B": Published(
        config=_qwen3_5(1024, 24, 8, 2, intermediate=3584, value_heads=16, tied=True, tower=_TOWER_0_1B), billions="0.9"
    ),
    "Qwen3.5-2B": Published(
        config=_qwen3_5(2048, 24, 8, 2, intermediate=6144, value_heads=16, tied=True, tower=_TOWER_0_3B), billions="2"
    ),
    "Qwen3.5-4B": Published(
        config=_qwen3_5(2560, 32, 16, 4, intermediate=9216, tied=True, tower=_TOWER_0_3B), billions="5"
    ),
    "Qwen3.5-9B": Published(config=_qwen3_5(4096, 32, 16, 4, intermediate=12288), billions="9"),
    "Qwen3.5-27B": Published(config=_qwen3_5(5120, 64, 24, 4, intermediate=17408, value_heads=48), billions="27"),
    "Qwen3.5-35B-A3B": Published(config=_qwen3_5(2048, 40, 16, 2, experts=(256, 8, 512)), billions="35"),
    "Qwen3.5-122B-A10B": Published(
        config=_qwen3_5(3072, 48, 32, 2, value_heads=64, experts=(256, 8, 1024)),
        billions=None,  # 122.6
    ),
    "Qwen3.5-397B-A17B": Published(
        config=_qwen3_5(4096, 60, 32, 2, value_heads=64, experts=(512, 10, 1024)), billions="397"
    ),
}

# Billions without embeddings and head, as the model cards of the language models that became these decoders have them
DECODERS = {
    "Qwen3-VL-2B": "1.4",
    "Qwen3-VL-4B": "3.6",
    "Qwen3-VL-8B": "6.95",
    "Qwen3-VL-32B": "31.2",
    "Qwen3-VL-30B-A3B": "29.9",
    "Qwen3-VL-235B-A22B": "234",
    "Qwen2.5-VL-3B": "2.77",
    "Qwen2.5-VL-7B": "6.53",
    "Qwen2.5-Omni-3B": "2.77",
    "Qwen2.5-Omni-7B": "6.53",
    "Qwen3-Omni-30B-A3B": "29.9",
}
# Billions of the towers, as the technical reports have them (arXiv 2509.17765, 2503.20215)
TOWERS = {
    ("Qwen3-Omni-30B-A3B", "audio"): "0.65",
    ("Qwen3-Omni-30B-A3B", "vision"): "0.54",
    ("Qwen2.5-Omni-7B", "vision"): "0.68",
}
