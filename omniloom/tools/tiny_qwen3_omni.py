"""The recipe of a tiny Qwen3-Omni: its config.json and its processor's files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omniloom.tools.tiny_recipe import Recipe
from omniloom.tools.tiny_tokenizer import QWEN3_OMNI_TOKEN_NAMES, QWEN3_OMNI_TOKENS


@dataclass(frozen=True, kw_only=True)
class _OmniSize:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mrope_section: list[int]
    experts: int
    experts_per_token: int
    expert_hidden: int
    tower_hidden: int  # of both towers
    tower_layers: int
    deepstack: list[int]


_OMNI_SIZES = {
    "tiny": _OmniSize(
        hidden=64,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mrope_section=[4, 2, 2],
        experts=8,
        experts_per_token=2,
        expert_hidden=32,
        tower_hidden=32,
        tower_layers=3,
        deepstack=[0, 1],
    ),
    "20m": _OmniSize(
        hidden=256,
        layers=8,
        heads=8,
        kv_heads=2,
        head_dim=32,
        mrope_section=[6, 5, 5],
        experts=16,
        experts_per_token=4,
        expert_hidden=160,
        tower_hidden=128,
        tower_layers=4,
        deepstack=[1, 2],
    ),
}


def _qwen3_omni_config(size: str, ids: dict[str, int], vocab_size: int) -> dict[str, Any]:
    sizes = _OMNI_SIZES[size]
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "assistant_token_id": ids["assistant"],
        "code2wav_config": _code2wav_config(),
        "dtype": "bfloat16",
        "enable_audio_output": True,
        "im_end_token_id": ids["<|im_end|>"],
        "im_start_token_id": ids["<|im_start|>"],
        "model_type": "qwen3_omni_moe",
        "system_token_id": ids["system"],
        "talker_config": _talker_config(sizes, ids),
        "thinker_config": {
            "audio_config": _audio_config(sizes),
            **_media_token_ids(ids),
            "audio_end_token_id": ids["<|audio_end|>"],
            "dtype": "bfloat16",
            "initializer_range": 0.02,
            "model_type": "qwen3_omni_moe_thinker",
            "position_id_per_seconds": 13,
            "seconds_per_chunk": 2,
            "text_config": _text_config(sizes, vocab_size),
            "user_token_id": ids["user"],
            "vision_config": _vision_config(sizes),
            "vision_end_token_id": ids["<|vision_end|>"],
        },
        "transformers_version": "4.57.0",
        "tts_bos_token_id": ids["<tts_text_bos>"],
        "tts_eos_token_id": ids["<tts_text_eod>"],
        "tts_pad_token_id": ids["<tts_pad>"],
        "user_token_id": ids["user"],
    }


def _media_token_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "audio_start_token_id": ids["<|audio_start|>"],
        "audio_token_id": ids["<|audio_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }


def _text_config(sizes: _OmniSize, vocab_size: int) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.expert_hidden,
        "max_position_embeddings": 65536,
        "mlp_only_layers": [],
        "model_type": "qwen3_omni_moe_text",
        "moe_intermediate_size": sizes.expert_hidden,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.heads,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "interleaved": True,
            "mrope_interleaved": True,
            "mrope_section": sizes.mrope_section,
            "rope_type": "default",
            "type": "default",
        },
        "rope_theta": 1000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_qk_norm": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }


def _vision_config(sizes: _OmniSize) -> dict[str, Any]:
    return {
        "apply_vit_abs_pos_embed": True,
        "deepstack_visual_indexes": sizes.deepstack,
        "depth": sizes.tower_layers,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": sizes.tower_hidden,
        "image_size": 128,
        "in_channels": 3,
        "in_chans": 3,
        "initializer_range": 0.02,
        "intermediate_size": 2 * sizes.tower_hidden,
        "model_type": "qwen3_omni_moe_vision_encoder",
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": sizes.hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "spatial_patch_size": 16,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
    }


def _audio_config(sizes: _OmniSize) -> dict[str, Any]:
    layers = max(2, sizes.tower_layers - 1)
    return {
        "activation_dropout": 0,
        "activation_function": "gelu",
        "attention_dropout": 0,
        "conv_chunksize": 500,
        "d_model": sizes.tower_hidden,
        "downsample_hidden_size": 8,
        "dropout": 0,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * sizes.tower_hidden,
        "encoder_layers": layers,
        "initializer_range": 0.02,
        "max_source_positions": 1500,
        "model_type": "qwen3_omni_moe_audio_encoder",
        "n_window": 50,
        "n_window_infer": 400,  # published: 800; smaller, so that short clips already have several windows
        "num_hidden_layers": layers,
        "num_mel_bins": 128,
        "output_dim": sizes.hidden,
        "scale_embedding": False,
    }


def _talker_config(sizes: _OmniSize, ids: dict[str, int]) -> dict[str, Any]:
    rope = {"interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default", "type": "default"}
    return {
        "accept_hidden_layer": 1,
        **_media_token_ids(ids),
        "audio_end_token_id": ids["<|audio_end|>"],
        "code_predictor_config": {
            "attention_bias": False,
            "attention_dropout": 0,
            "head_dim": 8,
            "hidden_act": "silu",
            "hidden_size": 32,
            "initializer_range": 0.02,
            "intermediate_size": 32,
            "layer_types": ["full_attention"] * 2,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "model_type": "qwen3_omni_moe_talker_code_predictor",
            "num_attention_heads": 4,
            "num_code_groups": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 64,
        },
        "codec_bos_id": 101,
        "codec_eos_token_id": 102,
        "codec_nothink_id": 107,
        "codec_pad_id": 100,
        "codec_think_bos_id": 108,
        "codec_think_eos_id": 109,
        "model_type": "qwen3_omni_moe_talker",
        "num_code_groups": 4,
        "output_router_logits": False,
        "position_id_per_seconds": 13,
        "seconds_per_chunk": 2,
        "spatial_merge_size": 2,
        "speaker_id": {"chelsie": 110, "ethan": 111, "aiden": 112},
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0,
            "decoder_sparse_step": 1,
            "head_dim": 8,
            "hidden_act": "silu",
            "hidden_size": 32,
            "initializer_range": 0.02,
            "intermediate_size": 32,
            "max_position_embeddings": 65536,
            "mlp_only_layers": [],
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "num_attention_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": rope,
            "rope_theta": 1000000,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 16,
            "sliding_window": None,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 128,
        },
        "thinker_hidden_size": sizes.hidden,
    }


def _code2wav_config() -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "codebook_dim": 32,
        "codebook_size": 64,
        "decoder_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 32,
        "layer_scale_initial_scale": 0.01,
        "max_position_embeddings": 8000,
        "model_type": "",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_quantizers": 4,
        "num_semantic_quantizers": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000,
        "semantic_codebook_size": 64,
        "sliding_window": 72,
        "upsample_rates": [8, 5, 4, 3],
        "upsampling_ratios": [2, 2],
        "vector_quantization_hidden_dimension": 32,
    }


_PREPROCESSOR = {
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "patch_size": 16,
    "processor_class": "Qwen3OmniMoeProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
    "temporal_patch_size": 2,
}

RECIPE = Recipe(
    architecture="Qwen3OmniMoeForConditionalGeneration",
    config_class="Qwen3OmniMoeConfig",
    tokens=QWEN3_OMNI_TOKENS,
    token_names=QWEN3_OMNI_TOKEN_NAMES,
    chat_template="qwen3_omni.jinja",
    processor_class="Qwen3OmniMoeProcessor",
    config=_qwen3_omni_config,
    processor_files={"preprocessor_config.json": _PREPROCESSOR},
)
