"""Random tiny models of the families that see only, and rows for them; what `builders.py` is for Qwen3-Omni."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omniloom.types import IGNORE_LABEL, VisionClip
from tests.parity import builders_qwen2_5_omni
from tests.parity.builders import NUM_WORDS, VOCAB_SIZE, Sample, randomise

TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def random_config(rng: random.Random, family: str) -> dict[str, Any]:
    """A config.json of odd sizes, in the published spelling."""
    if family.startswith("qwen3_5"):
        return _qwen3_5(rng, experts=family == "qwen3_5_moe")
    return _qwen2_5_vl(rng) if family == "qwen2_5_vl" else _qwen3_vl(rng, experts=family == "qwen3_vl_moe")


def _qwen2_5_vl(rng: random.Random) -> dict[str, Any]:
    """Qwen2.5-Omni's decoder and tower; the decoder's fields lie in the file itself."""
    thinker = builders_qwen2_5_omni.random_config(rng)["thinker_config"]
    text = thinker["text_config"]
    return {
        **text,
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "rope_scaling": {"mrope_section": text["rope_scaling"]["mrope_section"], "type": "mrope"},
        "tie_word_embeddings": thinker["tie_word_embeddings"],
        "vision_config": {**thinker["vision_config"], "model_type": "qwen2_5_vl", "tokens_per_second": 2},
        **TOKENS,
    }


def _qwen3_vl(rng: random.Random, *, experts: bool) -> dict[str, Any]:
    num_layers, depth, vision_heads = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 3)
    sections, key_value_heads = [rng.randint(1, 3) for _ in range(3)], rng.randint(1, 2)
    hidden_size, num_experts = 8 * rng.randint(2, 4), rng.randint(2, 6)
    kind = "qwen3_vl_moe" if experts else "qwen3_vl"
    text = {
        "model_type": f"{kind}_text",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * rng.randint(3, 9),
        "num_hidden_layers": num_layers,
        "num_attention_heads": key_value_heads * rng.randint(1, 3),
        "num_key_value_heads": key_value_heads,
        "head_dim": 2 * sum(sections),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": sections, "rope_type": "default"},
        "attention_bias": rng.random() < 0.3,
        "hidden_act": "silu",
    }
    if experts:
        text |= {
            # never such that a stacked weight is square: its layout could not be told
            "moe_intermediate_size": hidden_size + 8 * rng.randint(1, 3),
            "num_experts": num_experts,
            "num_experts_per_tok": rng.randint(1, min(3, num_experts)),
            "norm_topk_prob": True,
            "decoder_sparse_step": rng.choice([1, 1, 2]),
            "mlp_only_layers": [layer for layer in range(num_layers) if rng.random() < 0.2],
        }
    vision = {
        "model_type": kind,  # as published: the tower calls itself by the model's name
        "depth": depth,
        "hidden_size": vision_heads * 4 * rng.randint(1, 3),
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 4 * rng.randint(3, 7),
        "num_heads": vision_heads,
        "in_channels": 3,
        "patch_size": rng.randint(2, 4),
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": rng.randint(2, 7) ** 2,
        "deepstack_visual_indexes": sorted(rng.sample(range(depth), rng.randint(0, min(depth, num_layers)))),
    }
    return {
        "model_type": kind,
        "architectures": [f"Qwen3VL{'Moe' if experts else ''}ForConditionalGeneration"],
        "tie_word_embeddings": rng.random() < 0.5,
        "text_config": text,
        "vision_config": vision,
        **TOKENS,
    }


def _qwen3_5(rng: random.Random, *, experts: bool) -> dict[str, Any]:
    """Qwen3-VL's tower without deepstack, and a decoder of both kinds of layer in any order."""
    config, kind = _qwen3_vl(rng, experts=False), "qwen3_5_moe" if experts else "qwen3_5"
    text, vision, key_heads, num_experts = config["text_config"], config["vision_config"], rng.randint(1, 2), 5
    sections, num_layers = text.pop("rope_scaling")["mrope_section"], rng.randint(2, 4)
    turned = 2 * sum(sections)
    text |= {
        "model_type": f"{kind}_text",
        "num_hidden_layers": num_layers,
        "head_dim": turned * rng.choice([1, 2, 4]),
        # the norm after the rule brings small outputs, nothing but rounding where a query meets no key, to length 1:
        # at 1e-6 transformers' float32 is 1e-4 off what float64 gives, ours half of that
        "rms_norm_eps": 0.1,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": sections,
            "rope_theta": text.pop("rope_theta"),
            "rope_type": "default",
        },
        "layer_types": [rng.choice(["linear_attention", "full_attention"]) for _ in range(num_layers - 1)]
        + ["linear_attention"],
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * rng.randint(1, 3),
        "linear_key_head_dim": rng.randint(2, 7),
        "linear_value_head_dim": rng.randint(2, 7),
        "linear_conv_kernel_dim": rng.randint(2, 4),
    }
    text["rope_parameters"]["partial_rotary_factor"] = turned / text["head_dim"]
    if experts:
        del text["intermediate_size"]
        text |= {
            "moe_intermediate_size": 4 * rng.randint(2, 6),
            "shared_expert_intermediate_size": 4 * rng.randint(2, 6),
            "num_experts": num_experts,
            "num_experts_per_tok": rng.randint(1, 3),
        }
    del vision["deepstack_visual_indexes"]
    vision["model_type"] = kind
    return {
        **config,
        "model_type": kind,
        "architectures": [f"Qwen3_5{'Moe' if experts else ''}ForConditionalGeneration"],
    }


def reference_model(config_json: Mapping[str, Any], *, seed: int = 0, attention: str = "eager") -> Any:
    """transformers' model with random weights."""
    import copy

    import transformers

    name = config_json["architectures"][0]
    settings = getattr(transformers, name.replace("ForConditionalGeneration", "Config")).from_dict(
        copy.deepcopy(dict(config_json))
    )
    settings._attn_implementation = attention
    model = randomise(getattr(transformers, name)(settings), seed)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ in ("Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm"):  # they add 1 themselves
                module.weight -= 1
    model.tie_weights()
    return model


def random_sample(rng: random.Random, reference: Any, media: Sequence[str] = (), *, seed: int = 0) -> Sample:
    """A row with the given images and videos in order, words between them.

    Qwen3-VL has each grid of a video stand alone; Qwen2.5-VL has a rate for each video instead.
    """
    generator = torch.Generator().manual_seed(seed)
    vision = reference.config.vision_config
    tokens = [1, *_words(rng, 5)]
    images: list[VisionClip] = []
    videos: list[VisionClip] = []
    seconds: list[float] = []
    alone = reference.config.model_type != "qwen2_5_vl"
    start, end = TOKENS["vision_start_token_id"], TOKENS["vision_end_token_id"]
    for kind in media:
        grid = (1 if kind == "image" else rng.randint(1, 3), 2 * rng.randint(1, 4), 2 * rng.randint(1, 4))
        rows: list[int] = []
        num_blocks = grid[0] if alone else 1
        per_block = grid[0] * grid[1] * grid[2] // 4 // num_blocks
        if kind == "video" and alone:
            tokens.append(start)
        for _ in range(num_blocks):
            tokens += _words(rng, 3) if kind == "video" and alone else []  # the time
            tokens.append(start)
            rows += range(len(tokens), len(tokens) + per_block)
            tokens += [TOKENS[f"{kind}_token_id"]] * per_block + [end]
        if kind == "video" and alone:
            tokens.append(end)
        if kind == "video" and not alone:
            seconds.append(rng.choice([1.0, 0.5, 0.08, 2 / 3, 1.5, 7.3]))
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.randn(grid[0] * grid[1] * grid[2], patch_dim, generator=generator)
        clip = VisionClip(patches=patches, grid_thw=grid, token_index=torch.tensor(rows))
        (images if kind == "image" else videos).append(clip)
        tokens += _words(rng, 4)
    ids = torch.tensor(tokens)
    labels = torch.cat((ids[1:], torch.tensor([IGNORE_LABEL])))
    trained = torch.tensor([place == 0 or rng.random() < 0.6 for place in range(len(tokens))]) & (labels >= 0)
    weights = torch.tensor([rng.choice([0.25, 1.0, 2.0]) for _ in tokens])
    inputs = _media_inputs(ids, images, videos, seconds)
    sizes = {key: value for key, value in inputs.items() if not key.startswith("pixel_values")}
    positions, _ = reference.model.get_rope_index(ids[None], **sizes)
    return Sample(
        input_ids=ids,
        labels=torch.where(trained, labels, IGNORE_LABEL),
        loss_weights=torch.where(trained, weights, 0.0),
        position_ids=positions[:, 0],
        images=tuple(images),
        videos=tuple(videos),
        seconds_per_grid=tuple(seconds),
    )


def _words(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(1, NUM_WORDS) for _ in range(rng.randint(1, most))]


def _media_inputs(
    ids: Tensor, images: Sequence[VisionClip], videos: Sequence[VisionClip], seconds: Sequence[float]
) -> dict[str, Tensor]:
    kinds = (ids == TOKENS["image_token_id"]).long() + 2 * (ids == TOKENS["video_token_id"]).long()
    inputs = {"mm_token_type_ids": kinds[None]}
    for clips, values, grids in (
        (images, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if clips:
            inputs[values] = torch.cat([clip.patches for clip in clips])
            inputs[grids] = torch.tensor([clip.grid_thw for clip in clips])
    return inputs | ({"second_per_grid_ts": torch.tensor(seconds)} if seconds else {})


def reference_logits(reference: Any, sample: Sample) -> Any:
    """transformers' output for one row; it finds the positions itself."""
    reference.model.rope_deltas = None
    inputs = _media_inputs(sample.input_ids, sample.images, sample.videos, sample.seconds_per_grid)
    return reference(input_ids=sample.input_ids[None], use_cache=False, **inputs)
