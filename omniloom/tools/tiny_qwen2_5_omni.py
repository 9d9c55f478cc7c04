"""The recipe of a tiny Qwen2.5-Omni: its config.json, its processor's files and its speakers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniloom.tools.tiny_recipe import Recipe
from omniloom.tools.tiny_tokenizer import QWEN2_5_OMNI_TOKEN_NAMES, QWEN2_5_OMNI_TOKENS

_SPEAKER_SIZE, _MEL_BINS = 16, 80


@dataclass(frozen=True, kw_only=True)
class Size:
    heads: int
    kv_heads: int
    head_dim: int
    mrope_section: list[int]
    layers: int
    dense_hidden: int
    tower_hidden: int  # of both towers
    tower_layers: int
    full_attention: list[int]

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


SIZES = {
    "tiny": Size(
        heads=4,
        kv_heads=2,
        head_dim=16,
        mrope_section=[2, 3, 3],
        layers=3,
        dense_hidden=128,
        tower_hidden=32,
        tower_layers=3,
        full_attention=[1],
    ),
    "20m": Size(
        heads=8,
        kv_heads=2,
        head_dim=32,
        mrope_section=[4, 6, 6],
        layers=8,
        dense_hidden=2432,
        tower_hidden=128,
        tower_layers=4,
        full_attention=[1, 3],
    ),
}


def _config(size: str, ids: dict[str, int], vocab_size: int) -> dict[str, Any]:
    sizes = SIZES[size]
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "enable_audio_output": True,
        "enable_talker": True,
        "model_type": "qwen2_5_omni",
        "talker_config": _talker(sizes, ids),
        "thinker_config": {
            "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"],
            "audio_config": _audio(sizes),
            **_media_tokens(ids),
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<|im_end|>"],
            "ignore_index": -100,
            "init_std": 0.02,
            "model_type": "qwen2_5_omni_thinker",
            "pad_token_id": ids["<|endoftext|>"],
            "position_id_per_seconds": 25,
            "seconds_per_chunk": 2,
            "text_config": _text(sizes, vocab_size),
            "user_token_id": ids["user"],
            "vision_config": _vision(sizes),
            "vision_token_id": ids["<|vision_pad|>"],
        },
        "token2wav_config": _TOKEN2WAV,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
    }


def _media_tokens(ids: dict[str, int]) -> dict[str, int]:
    return {
        "audio_end_token_id": ids["<|audio_eos|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
        "audio_token_index": ids["<|AUDIO|>"],
        "image_token_index": ids["<|IMAGE|>"],
        "video_token_index": ids["<|VIDEO|>"],
        "vision_end_token_id": ids["<|vision_eos|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
    }


def _text(sizes: Size, vocab_size: int) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "init_std": 0.02,
        "initializer_range": 0.02,
        "intermediate_size": sizes.dense_hidden,
        "max_position_embeddings": 32768,
        "max_window_layers": sizes.layers,
        "model_type": "qwen2_5_omni_text",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": sizes.mrope_section, "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }


def _vision(sizes: Size) -> dict[str, Any]:
    return {
        "depth": sizes.tower_layers,
        "embed_dim": sizes.tower_hidden,
        "fullatt_block_indexes": sizes.full_attention,
        "hidden_act": "silu",
        "hidden_size": sizes.tower_hidden,
        "in_channels": 3,
        "in_chans": 3,
        "init_std": 0.02,
        "intermediate_size": 2 * sizes.tower_hidden,
        "model_type": "qwen2_5_omni_vision_encoder",
        "num_heads": 2,
        "out_hidden_size": sizes.hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 25,
        "window_size": 56,  # published: 112; smaller, so that small pictures already have several windows
    }


def _audio(sizes: Size) -> dict[str, Any]:
    layers = max(2, sizes.tower_layers - 1)
    return {
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "attention_dropout": 0.0,
        "d_model": sizes.tower_hidden,
        "dropout": 0.0,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * sizes.tower_hidden,
        "encoder_layerdrop": 0.0,
        "encoder_layers": layers,
        "init_std": 0.02,
        "max_source_positions": 1500,
        "model_type": "qwen2_5_omni_audio_encoder",
        "n_window": 100,
        "num_hidden_layers": layers,
        "num_mel_bins": 128,
        "output_dim": sizes.hidden,
        "scale_embedding": False,
    }


def _talker(sizes: Size, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2OmniTalkerForConditionalGeneration"],
        "attention_dropout": 0.0,
        **_media_tokens(ids),
        "embedding_size": sizes.hidden,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "init_std": 0.02,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "model_type": "qwen2_5_omni_talker",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "position_id_per_seconds": 25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "seconds_per_chunk": 2,
        "sliding_window": 32768,
        "spatial_merge_size": 2,
        "tts_codec_end_token_id": 94,
        "tts_codec_mask_token_id": 96,
        "tts_codec_pad_token_id": 92,
        "tts_codec_start_token_id": 93,
        "tts_text_end_token_id": ids["<|quad_end|>"],
        "tts_text_pad_token_id": ids["<|box_end|>"],
        "tts_text_start_token_id": ids["<|quad_start|>"],
        "use_cache": True,
        "use_sliding_window": False,
        "vision_token_id": ids["<|vision_pad|>"],
        "vocab_size": 128,
    }


_TOKEN2WAV = {
    "bigvgan_config": {
        "mel_dim": _MEL_BINS,
        "model_type": "qwen2_5_omni_bigvgan",
        "resblock_dilation_sizes": [[1, 3, 5]],
        "resblock_kernel_sizes": [3],
        "upsample_initial_channel": 32,
        "upsample_kernel_sizes": [11, 7],
        "upsample_rates": [5, 3],
        "use_bias_at_final": False,
    },
    "dit_config": {
        "block_size": 24,
        "depth": 2,
        "dropout": 0.1,
        "emb_dim": 32,
        "enc_attention_channels": 8,
        "enc_channels": [16, 16, 16, 16, 48],
        "enc_dim": 16,
        "enc_emb_dim": _SPEAKER_SIZE,
        "enc_res2net_scale": 2,
        "enc_se_channels": 8,
        "ff_mult": 2,
        "head_dim": 8,
        "heads": 4,
        "hidden_size": 32,
        "look_ahead_layers": [1],
        "look_backward_layers": [0],
        "mel_dim": _MEL_BINS,
        "model_type": "qwen2_5_omni_dit",
        "num_attention_heads": 4,
        "num_embeds": 65,
        "num_hidden_layers": 2,
        "repeats": 2,
    },
    "dtype": "float32",
    "model_type": "qwen2_5_omni_token2wav",
}

PICTURES = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "temporal_patch_size": 2,
}
_PREPROCESSOR = {
    **PICTURES,
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "left",
    "padding_value": 0.0,
    "processor_class": "Qwen2_5OmniProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
}


def _write_speakers(directory: Path) -> None:
    """The voices that transformers asks for beside the weights."""
    import torch

    generator = torch.Generator().manual_seed(0)
    speakers = {
        name: {
            "bos_token": bos,
            "cond": torch.randn(1, _SPEAKER_SIZE, generator=generator),
            "ref_mel": torch.randn(1, 30, _MEL_BINS, generator=generator),
        }
        for name, bos in (("Ethan", 97), ("Chelsie", 98))
    }
    torch.save(speakers, directory / "spk_dict.pt")


RECIPE = Recipe(
    architecture="Qwen2_5OmniForConditionalGeneration",
    config_class="Qwen2_5OmniConfig",
    tokens=QWEN2_5_OMNI_TOKENS,
    token_names=QWEN2_5_OMNI_TOKEN_NAMES,
    chat_template="qwen2_5_omni.jinja",
    processor_class="Qwen2_5OmniProcessor",
    config=_config,
    processor_files={"preprocessor_config.json": _PREPROCESSOR},
    float32_modules=("token2wav",),
    write_extra=_write_speakers,
)
