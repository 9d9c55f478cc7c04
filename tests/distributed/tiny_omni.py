"""Tiny Qwen3-Omni models with random odd dims, and packs for them; float32, on the CPU."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import torch

from omniloom.dims import AudioTowerConfig, VisionTowerConfig
from omniloom.families.config_fields import FamilyConfig
from omniloom.families.decoder import DecoderConfig, DeltaRuleConfig
from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.families.registry import spec_named
from omniloom.families.spec import ModelSpec
from omniloom.models.fusion import OmniModel
from omniloom.processors.tower_batches import audio_batch, vision_batch
from omniloom.tools.tiny import tiny_config
from omniloom.types import IGNORE_LABEL, AudioClip, PackedBatch, Segments, VisionClip


@dataclass(frozen=True, kw_only=True)
class Dims:
    """What varies between the models of a test. Odd on purpose: nothing may depend on powers of two."""

    hidden_size: int = 24
    heads: int = 4
    key_value_heads: int = 2
    num_layers: int = 2
    num_experts: int = 4
    experts_per_tok: int = 2
    moe_width: int = 12
    vision_hidden: int = 16
    vision_depth: int = 2
    deepstack: tuple[int, ...] = (0,)
    audio_width: int = 12
    vocab_size: int = 61
    tie: bool = False
    hybrid: bool = False  # a gated delta rule in all layers but each second, and the rest of Qwen3.5's decoder


HYBRID = {
    "shared_expert_intermediate_size": 8,
    "partial_rotary_factor": 0.5,
    "zero_centred_norms": True,
    "output_gate": True,
    "delta_rule": DeltaRuleConfig(
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
        linear_conv_kernel_dim=3,
    ),
}


def random_dims(seed: int) -> Dims:
    """Dims that 4 ranks can divide, and otherwise anything."""
    draw = random.Random(seed)
    depth, num_layers = draw.randint(1, 3), draw.randint(1, 3)
    num_levels = draw.randint(0, min(depth, num_layers))  # a level for each of the first layers
    return Dims(
        hidden_size=4 * draw.randint(2, 9),
        heads=draw.choice((4, 8)),
        key_value_heads=draw.choice((1, 2, 4)),
        num_layers=num_layers,
        num_experts=4 * draw.randint(1, 3),
        experts_per_tok=draw.randint(1, 4),
        moe_width=draw.randint(3, 20),
        vision_hidden=8 * draw.randint(1, 4),
        vision_depth=depth,
        deepstack=tuple(sorted(draw.sample(range(depth), num_levels))),
        audio_width=2 * draw.randint(2, 9),
        vocab_size=draw.randint(30, 90),
        tie=draw.random() < 0.3,
    )


def make_config(dims: Dims) -> FamilyConfig:
    return FamilyConfig(
        vision=VisionTowerConfig(
            depth=dims.vision_depth,
            hidden_size=dims.vision_hidden,
            hidden_act="gelu_pytorch_tanh",
            intermediate_size=20,
            num_heads=2,
            in_channels=3,
            patch_size=2,
            temporal_patch_size=2,
            spatial_merge_size=2,
            out_hidden_size=dims.hidden_size,
            num_position_embeddings=25,
            deepstack_visual_indexes=dims.deepstack,
            rope_theta=10_000.0,
        ),
        audio=AudioTowerConfig(
            num_mel_bins=8,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=14,
            d_model=dims.audio_width,
            activation_function="gelu",
            n_window=8,
            n_window_infer=32,
            output_dim=dims.hidden_size,
            downsample_hidden_size=3,
        ),
        text=DecoderConfig(
            vocab_size=dims.vocab_size,
            hidden_size=dims.hidden_size,
            intermediate_size=28,
            num_hidden_layers=dims.num_layers,
            num_attention_heads=dims.heads,
            num_key_value_heads=dims.key_value_heads,
            head_dim=16 if dims.hybrid else 8,
            hidden_act="silu",
            rms_norm_eps=0.1 if dims.hybrid else 1e-6,  # small outputs of the rule are nothing but rounding
            attention_biases=(False, False, False, False),
            qk_norm=True,
            rope_theta=1e4,
            mrope_section=(2, 1, 1),
            mrope_order="interleaved",
            tie_word_embeddings=dims.tie,
            num_experts=dims.num_experts,
            num_experts_per_tok=dims.experts_per_tok,
            moe_intermediate_size=dims.moe_width,
            **(HYBRID | {"delta_layers": tuple(range(0, dims.num_layers, 2))} if dims.hybrid else {}),
        ),
    )


def family_config(family: str) -> FamilyConfig:
    """That of a family's tiny checkpoint."""
    return spec_named(family).read_config(tiny_config(family))


def make_model(config: FamilyConfig, spec: ModelSpec = SPEC) -> OmniModel:
    """On the current default device, values undefined."""
    return spec.build(config)


def random_weights(model: OmniModel, seed: int) -> dict[str, torch.Tensor]:
    """Values by parameter name, spread wide enough that a router's choices are far from ties."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            middle = 1.6 if name.endswith("magnitude") else 1.0  # about the norms of the rows with their additions
            weights[name] = middle + 0.1 * noise if name.endswith(("norm.weight", "magnitude")) else 0.3 * noise
        elif "lora_" in name or parameter.ndim != 2:
            weights[name] = 0.3 * noise
        else:
            scale = 4.0 if name.endswith("router.weight") else 1.0
            weights[name] = scale * noise * parameter[0].numel() ** -0.5
    return weights


def make_pack(
    config: FamilyConfig,
    *,
    seed: int,
    pack_tokens: int,
    images: tuple[tuple[int, int, int], ...] = (),
    audio_frames: tuple[int, ...] = (),
    num_samples: int = 3,
    empty: bool = False,
    share: tuple[int, int] = (0, 1),
) -> PackedBatch:
    """A pack of random samples whose media tokens lie anywhere; `images` are grids, `audio_frames` mel lengths.

    `empty`: nothing but padding. `share` (r, n): only every n-th clip, from the r-th on, as a rank loads it that
    decodes a share of the clips.
    """
    generator, audio_frames = torch.Generator().manual_seed(seed), audio_frames if config.audio is not None else ()
    num_tokens = 0 if empty else pack_tokens - int(torch.randint(3, 9, (), generator=generator))
    rows_of_image = [t * h * w // 4 for t, h, w in images]
    rows_of_audio = [config.audio.num_tokens(frames) for frames in audio_frames]
    places = torch.randperm(num_tokens, generator=generator)[: sum(rows_of_image) + sum(rows_of_audio)]
    assert len(places) == sum(rows_of_image) + sum(rows_of_audio), "media do not fit into the pack"
    split = places.split([*rows_of_image, *rows_of_audio])
    vision = [
        VisionClip(
            patches=torch.randn(t * h * w, config.vision.patch_dim, generator=generator),
            grid_thw=(t, h, w),
            token_index=index.sort().values,
        )
        for (t, h, w), index in zip(images, split, strict=False)
    ]
    audio = [
        AudioClip(
            features=torch.randn(config.audio.num_mel_bins, frames, generator=generator),
            token_index=index.sort().values,
        )
        for frames, index in zip(audio_frames, split[len(images) :], strict=True)
    ]
    valid = torch.arange(pack_tokens) < num_tokens
    labels = torch.randint(0, config.text.vocab_size, (pack_tokens,), generator=generator)
    weights = torch.rand(pack_tokens, generator=generator) + 0.5
    trained = valid & (torch.rand(pack_tokens, generator=generator) < 0.6)
    weights = weights * trained
    cuts = torch.randperm(max(num_tokens - 1, 0), generator=generator)[: max(num_samples - 1, 0)].sort().values + 1
    bounds = [0, *(cuts.tolist() if not empty else []), num_tokens, pack_tokens]
    bounds = sorted(set(bounds))
    lengths = [end - start for start, end in pairwise(bounds)]
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    return PackedBatch(
        input_ids=torch.randint(0, config.text.vocab_size, (pack_tokens,), generator=generator),
        labels=torch.where(trained, labels, IGNORE_LABEL),
        loss_weights=weights,
        loss_index=weights.nonzero().squeeze(1),
        position_ids=position_ids.expand(3, -1).contiguous(),
        is_padding=~valid,
        segments=Segments.from_lengths(lengths, num_bounds=len(bounds) + 2),
        vision=vision_batch(vision[share[0] :: share[1]], config.vision),
        audio=None if config.audio is None else audio_batch(audio[share[0] :: share[1]], config.audio),
    )
