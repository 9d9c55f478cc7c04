"""The Qwen3-Omni and the packs that `layouts.py` measures: every dim divides by four ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omniloom.dims import AudioTowerConfig, VisionTowerConfig
from omniloom.families.config_fields import FamilyConfig
from omniloom.families.decoder import DecoderConfig
from omniloom.processors.tower_batches import audio_batch, vision_batch
from omniloom.types import PackedBatch, Segments, VisionClip

SAMPLE_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model of a bit over 100M parameters, and how much it works on."""

    hidden: int = 512
    heads: int = 8
    layers: int = 4
    experts: int = 16
    expert_hidden: int = 896
    tower_hidden: int = 384
    tower_layers: int = 4
    vocab_size: int = 8192
    tokens_per_rank: int = 256
    video_grid: tuple[int, int, int] = (8, 16, 16)

    @classmethod
    def small(cls) -> Size:
        return cls(hidden=128, layers=4, expert_hidden=128, tower_hidden=128, tower_layers=2, vocab_size=1024)

    @property
    def video_rows(self) -> int:
        frames, height, width = self.video_grid
        return frames * height * width // 4


def make_config(size: Size) -> FamilyConfig:
    return FamilyConfig(
        vision=VisionTowerConfig(
            depth=size.tower_layers,
            hidden_size=size.tower_hidden,
            hidden_act="gelu_pytorch_tanh",
            intermediate_size=4 * size.tower_hidden,
            num_heads=4,
            in_channels=3,
            patch_size=16,
            temporal_patch_size=2,
            spatial_merge_size=2,
            out_hidden_size=size.hidden,
            num_position_embeddings=576,
            deepstack_visual_indexes=(0, 1),
            rope_theta=10_000.0,
        ),
        audio=AudioTowerConfig(
            num_mel_bins=128,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=4 * 128,
            d_model=128,
            activation_function="gelu",
            n_window=50,
            n_window_infer=400,
            output_dim=size.hidden,
            downsample_hidden_size=16,
        ),
        text=DecoderConfig(
            vocab_size=size.vocab_size,
            hidden_size=size.hidden,
            intermediate_size=size.expert_hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            head_dim=size.hidden // size.heads,
            hidden_act="silu",
            rms_norm_eps=1e-6,
            attention_biases=(False, False, False, False),
            qk_norm=True,
            rope_theta=1e6,
            mrope_section=_mrope_section(size.hidden // size.heads),
            mrope_order="interleaved",
            tie_word_embeddings=False,
            num_experts=size.experts,
            num_experts_per_tok=2,
            moe_intermediate_size=size.expert_hidden,
        ),
    )


def _mrope_section(head_dim: int) -> tuple[int, int, int]:
    third = head_dim // 8
    return head_dim // 2 - 2 * third, third, third


def make_pack(
    config: FamilyConfig,
    *,
    seed: int,
    num_tokens: int,
    videos: tuple[tuple[int, int, int], ...] = (),
    sample_tokens: int = SAMPLE_TOKENS,
) -> PackedBatch:
    """A full pack of random samples of equal length, every token trained; rows of `videos` from its start on."""
    assert num_tokens % sample_tokens == 0, f"{num_tokens} tokens are no whole samples of {sample_tokens}"
    generator = torch.Generator().manual_seed(seed)
    clips, first = [], 0
    for frames, height, width in videos:
        rows = frames * height * width // config.vision.spatial_merge_size**2
        patches = torch.randn(frames * height * width, config.vision.patch_dim, generator=generator)
        index = torch.arange(first, first + rows)
        clips.append(VisionClip(patches=patches, grid_thw=(frames, height, width), token_index=index))
        first += rows
    return PackedBatch(
        input_ids=torch.randint(0, config.text.vocab_size, (num_tokens,), generator=generator),
        labels=torch.randint(0, config.text.vocab_size, (num_tokens,), generator=generator),
        loss_weights=torch.ones(num_tokens),
        loss_index=torch.arange(num_tokens),
        position_ids=(torch.arange(num_tokens) % sample_tokens).expand(3, -1).contiguous(),
        is_padding=torch.zeros(num_tokens, dtype=torch.bool),
        segments=Segments.from_lengths([sample_tokens] * (num_tokens // sample_tokens)),
        vision=vision_batch(clips, config.vision),
        audio=audio_batch([], config.audio),
    )
