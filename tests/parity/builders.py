"""Random tiny Qwen3-Omni models and rows for tests: a config, transformers' model, ours with the same weights, packs.

Everything is drawn from one `random.Random`, which hypothesis can supply, so failures shrink. Also used by tests of
other parts that need a small real model; none of this imports anything of `data` or `training`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.families.spec import ModelSpec
from omniloom.keymap import KeyMap
from omniloom.models.fusion import OmniModel
from omniloom.processors.tower_batches import audio_batch, vision_batch
from omniloom.types import IGNORE_LABEL, AudioClip, Kernels, PackedBatch, Segments, VisionClip

TOKENS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "audio_token_id": 92,
    "audio_start_token_id": 93,
    "vision_start_token_id": 94,
}
AUDIO_END, VISION_END, PAD = 95, 96, 0
NUM_WORDS = 90
VOCAB_SIZE = 100
POSITION_ID_PER_SECONDS = 13


# ---------------------------------------------------------------------------------------- models


def random_config(rng: random.Random, *, num_layers: int | None = None, dense: bool = True) -> dict[str, Any]:
    """A config.json of odd sizes. `num_layers` fixes the decoder's; `dense=False` makes every layer one of experts."""
    num_layers = num_layers or rng.randint(1, 3)
    sections = [rng.randint(1, 3) for _ in range(3)]
    key_value_heads = rng.randint(1, 2)
    num_experts = rng.randint(2, 6)
    hidden_size = 8 * rng.randint(2, 4)
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * rng.randint(3, 9),
        "num_hidden_layers": num_layers,
        "num_attention_heads": key_value_heads * rng.randint(1, 3),
        "num_key_value_heads": key_value_heads,
        "head_dim": 2 * sum(sections),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": {"interleaved": True, "mrope_interleaved": True, "mrope_section": sections, "type": "default"},
        "moe_intermediate_size": 8 * rng.randint(1, 3),
        "num_experts": num_experts,
        "num_experts_per_tok": rng.randint(1, min(3, num_experts)),
        "norm_topk_prob": rng.random() < 0.7,
        "decoder_sparse_step": rng.choice([1, 1, 2]) if dense else 1,
        "mlp_only_layers": [layer for layer in range(num_layers) if rng.random() < 0.2] if dense else [],
        "attention_bias": rng.random() < 0.3,
        "hidden_act": "silu",
    }
    return {
        "model_type": "qwen3_omni_moe",
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "thinker_config": {
            **TOKENS,
            "position_id_per_seconds": POSITION_ID_PER_SECONDS,
            "text_config": text,
            "vision_config": _random_vision(rng, hidden_size, num_layers),
            "audio_config": _random_audio(rng, hidden_size),
        },
    }


def _random_vision(rng: random.Random, hidden_size: int, num_layers: int) -> dict[str, Any]:
    heads, depth = rng.randint(1, 3), rng.randint(1, 3)
    levels = sorted(rng.sample(range(depth), rng.randint(0, min(depth, num_layers))))
    return {
        "depth": depth,
        "hidden_size": heads * 4 * rng.randint(1, 3),
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 4 * rng.randint(3, 7),
        "num_heads": heads,
        "in_channels": 3,
        "patch_size": rng.randint(2, 4),
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": rng.randint(2, 7) ** 2,
        "deepstack_visual_indexes": levels,
    }


def _random_audio(rng: random.Random, hidden_size: int) -> dict[str, Any]:
    heads, window = rng.randint(1, 3), rng.randint(49, 52)  # other windows contradict the published 13 rows a chunk
    return {
        "num_mel_bins": rng.randint(7, 17),
        "encoder_layers": rng.randint(1, 2),
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * rng.randint(3, 7),
        "d_model": heads * 2 * rng.randint(2, 4),
        "activation_function": "gelu",
        "n_window": window,
        "n_window_infer": 2 * window * rng.randint(1, 3) + rng.choice([0, 7]),
        "output_dim": hidden_size,
        "downsample_hidden_size": rng.randint(2, 4),
    }


def reference_model(config_json: Mapping[str, Any], *, seed: int = 0, attention: str = "eager") -> Any:
    """transformers' thinker with random weights, large enough for every parameter to matter and routers to decide."""
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    settings = Qwen3OmniMoeThinkerConfig.from_dict(dict(config_json["thinker_config"]))
    settings._attn_implementation = attention
    return randomise(Qwen3OmniMoeThinkerForConditionalGeneration(settings), seed)


def randomise(model: Any, seed: int) -> Any:
    """A transformers model with random weights, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise if "norm" in name or "ln_" in name else 0.2 * noise)
            elif "embed" in name and "patch" not in name:
                parameter.copy_(noise)
            else:
                fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()
                parameter.copy_(noise * (3.0 if name.endswith("gate.weight") else 1.0) * fan_in**-0.5)
    return model.eval()


def published(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' model, or thinker, under their published names and in their published layout."""
    from transformers.core_model_loading import revert_weight_conversion

    prefix = "thinker." if "Thinker" in type(model).__name__ else ""
    tensors = revert_weight_conversion(model, dict(tensors))
    return {f"{prefix}{name}": value.mT if _is_turned(name) else value for name, value in tensors.items()}


def _is_turned(name: str) -> bool:
    """Stacked experts were published inputs first; transformers 5 reads that but does not write it."""
    return name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))


def assemble(key_map: KeyMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors out of published ones."""
    assemblies = key_map.assemblies({name: tuple(value.shape) for name, value in tensors.items()})
    ours = {}
    for name, assembly in assemblies.items():
        ours[name] = torch.full(assembly.shape, float("nan"))
        for piece in assembly.pieces:
            part = tensors[piece.published]
            part = part.mT if piece.reshape == "transpose" else part.flatten(1) if piece.reshape == "flatten" else part
            region = tuple(slice(*bounds) for bounds in piece.box)
            ours[name][region] = part[None] if piece.stacked else part
    return ours


def our_model(
    config_json: Mapping[str, Any], reference: Any, *, kernels: Kernels | None = None, spec: ModelSpec = SPEC
) -> OmniModel:
    """Our model with the reference's weights."""
    config = spec.read_config(config_json)
    model = spec.build(config, kernels=kernels)
    weights = assemble(spec.key_map(config), published(reference, reference.state_dict()))
    model.load_state_dict(weights)
    return model


# ---------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row as tensors: what packs are made of, and what transformers' forward wants."""

    input_ids: Tensor  # int64 [t]
    labels: Tensor  # int64 [t], shifted
    loss_weights: Tensor  # float32 [t]
    position_ids: Tensor  # int64 [3, t]
    images: tuple[VisionClip, ...] = ()
    videos: tuple[VisionClip, ...] = ()
    audio: tuple[AudioClip, ...] = ()
    use_audio_in_video: bool = False
    seconds_per_grid: tuple[float, ...] = ()  # of the videos, where transformers is to find the positions


@dataclass
class _Row:
    """A row being written."""

    tokens: list[int] = field(default_factory=list)
    images: list[VisionClip] = field(default_factory=list)
    videos: list[VisionClip] = field(default_factory=list)
    audio: list[AudioClip] = field(default_factory=list)
    seconds_per_grid: list[float] = field(default_factory=list)

    def add(self, *tokens: int) -> None:
        self.tokens += tokens

    def add_media(self, kinds: Sequence[str]) -> dict[str, Tensor]:
        """A token for each entry, of its kind (image, video, audio); the rows that each kind got."""
        start = len(self.tokens)
        self.tokens += [TOKENS[f"{kind}_token_id"] for kind in kinds]
        return {
            wanted: torch.tensor([start + i for i, kind in enumerate(kinds) if kind == wanted]) for wanted in {*kinds}
        }


def random_sample(
    rng: random.Random, reference: Any, media: Sequence[str] = (), *, audio_frames: Sequence[int] = (), seed: int = 0
) -> Sample:
    """A row with the given media in order, words between them.

    `media` are of "image", "video", "audio" and "video_with_audio"; the last cannot stand beside "video", since
    transformers takes it for a property of the call. `audio_frames` are the lengths of the clips, else random.
    """
    config = reference.config
    generator = torch.Generator().manual_seed(seed)
    row, frames = _Row(), list(audio_frames)
    row.add(*_words(rng, 5))
    for kind in media:
        patches, grid, sound = torch.zeros(0), (0, 0, 0), torch.zeros(0)
        if kind in ("image", "video", "video_with_audio"):
            patches, grid = _random_patches(rng, config.vision_config, is_image=kind == "image", generator=generator)
            if kind != "image":
                row.seconds_per_grid.append(rng.choice([1.0, 2.0]))  # whole positions, ours being integers
        if kind in ("audio", "video_with_audio"):
            length = frames.pop(0) if frames else rng.choice([rng.randint(1, 120), rng.randint(90, 420)])
            sound = torch.randn(config.audio_config.num_mel_bins, length, generator=generator)
        _write_media(row, kind, patches, grid, sound, 2 * config.audio_config.n_window)
        row.add(*_words(rng, 4))
    return _finish(rng, reference, row, use_audio_in_video="video_with_audio" in media)


def _words(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(1, NUM_WORDS) for _ in range(rng.randint(1, most))]


def _random_patches(
    rng: random.Random, vision: Any, *, is_image: bool, generator: torch.Generator
) -> tuple[Tensor, tuple[int, int, int]]:
    grid = (1 if is_image else rng.randint(1, 3), 2 * rng.randint(1, 4), 2 * rng.randint(1, 4))
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return torch.randn(grid[0] * grid[1] * grid[2], patch_dim, generator=generator), grid


def audio_rows(num_frames: int, chunk_frames: int) -> int:
    """Tokens of a clip, by the published arithmetic (13 a full chunk)."""
    rest = num_frames % chunk_frames
    return num_frames // chunk_frames * 13 + -(-rest // 8)


def _write_media(
    row: _Row, kind: str, patches: Tensor, grid: tuple[int, int, int], sound: Tensor, chunk_frames: int
) -> None:
    """The clip's tokens in their wrappers, and the clip with the rows they got."""
    frames, height, width = grid
    per_frame = height * width // 4
    num_audio = audio_rows(sound.shape[1], chunk_frames) if sound.numel() else 0
    if kind == "video_with_audio":
        row.add(TOKENS["vision_start_token_id"], TOKENS["audio_start_token_id"])
        step = row.seconds_per_grid[-1] * POSITION_ID_PER_SECONDS
        video = [(frame * step, 0) for frame in range(frames) for _ in range(per_frame)]
        # both in order of time, the video first where they tie
        merged = sorted([*video, *((float(position), 1) for position in range(num_audio))])
        rows = row.add_media([("video", "audio")[which] for _, which in merged])
        row.add(AUDIO_END, VISION_END)
    elif kind == "audio":
        row.add(TOKENS["audio_start_token_id"])
        rows = row.add_media(["audio"] * num_audio)
        row.add(AUDIO_END)
    else:
        row.add(TOKENS["vision_start_token_id"])
        rows = row.add_media([kind] * (frames * per_frame))
        row.add(VISION_END)
    if "image" in rows:
        row.images.append(VisionClip(patches=patches, grid_thw=grid, token_index=rows["image"]))
    if "video" in rows:
        row.videos.append(VisionClip(patches=patches, grid_thw=grid, token_index=rows["video"]))
    if "audio" in rows:
        row.audio.append(AudioClip(features=sound, token_index=rows["audio"]))


def _finish(rng: random.Random, reference: Any, row: _Row, *, use_audio_in_video: bool) -> Sample:
    ids = torch.tensor(row.tokens)
    labels = torch.cat((ids[1:], torch.tensor([IGNORE_LABEL])))
    trained = torch.tensor([rng.random() < 0.6 for _ in row.tokens]) & (labels >= 0)
    weights = torch.tensor([rng.choice([0.25, 1.0, 2.0]) for _ in row.tokens])
    longest = max((clip.features.shape[1] for clip in row.audio), default=None)
    sample = Sample(
        input_ids=ids,
        labels=torch.where(trained, labels, IGNORE_LABEL),
        loss_weights=torch.where(trained, weights, 0.0),
        position_ids=torch.zeros(3, len(row.tokens), dtype=torch.int64),
        images=tuple(row.images),
        videos=tuple(row.videos),
        audio=tuple(replace(clip, longest_frames=longest) for clip in row.audio),
        use_audio_in_video=use_audio_in_video,
    )
    return replace(sample, position_ids=reference_positions(reference, sample, row.seconds_per_grid))


def reference_positions(reference: Any, sample: Sample, seconds_per_grid: Sequence[float]) -> Tensor:
    """transformers' own position_ids of a row, int64 [3, t]."""
    positions, _ = reference.get_rope_index(
        sample.input_ids[None],
        torch.tensor([clip.grid_thw for clip in sample.images]) if sample.images else None,
        torch.tensor([clip.grid_thw for clip in sample.videos]) if sample.videos else None,
        torch.ones_like(sample.input_ids)[None],
        sample.use_audio_in_video,
        torch.tensor([clip.features.shape[1] for clip in sample.audio]) if sample.audio else None,
        torch.tensor(seconds_per_grid) if seconds_per_grid else None,
    )
    return positions[:, 0].to(torch.int64)


def reference_logits(reference: Any, sample: Sample, **options: Any) -> Any:
    """transformers' output for one row."""
    inputs: dict[str, Any] = {
        "input_ids": sample.input_ids[None],
        "attention_mask": torch.ones_like(sample.input_ids)[None],
        "position_ids": sample.position_ids[:, None].float(),
    }
    for clips, values, grids in (
        (sample.images, "pixel_values", "image_grid_thw"),
        (sample.videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if clips:
            inputs[values] = torch.cat([clip.patches for clip in clips])
            inputs[grids] = torch.tensor([clip.grid_thw for clip in clips])
    if sample.audio:
        lengths = torch.tensor([clip.features.shape[1] for clip in sample.audio])
        longest = int(lengths.max())
        inputs["input_features"] = torch.stack(
            [torch.nn.functional.pad(clip.features, (0, longest - clip.features.shape[1])) for clip in sample.audio]
        )
        inputs["feature_attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return reference(**inputs, use_cache=False, **options)


# ---------------------------------------------------------------------------------------- packs


def pack(
    samples: Sequence[Sample], config_json: Mapping[str, Any], *, num_tokens: int | None = None, spec: ModelSpec = SPEC
) -> PackedBatch:
    """The rows one after the other, filled up to `num_tokens` (None: no padding)."""
    config = spec.read_config(config_json)
    lengths = [sample.input_ids.shape[0] for sample in samples]
    used = sum(lengths)
    padding = (num_tokens or used) - used
    assert padding >= 0, f"{used} tokens do not fit into {num_tokens}"
    starts = [sum(lengths[:i]) for i in range(len(samples))]
    vision = [
        replace(clip, token_index=clip.token_index + start)
        for sample, start in zip(samples, starts, strict=True)
        for clip in (*sample.images, *sample.videos)
    ]
    audio = [
        replace(clip, token_index=clip.token_index + start)
        for sample, start in zip(samples, starts, strict=True)
        for clip in sample.audio
    ]
    fill = torch.arange(padding).expand(3, -1)
    weights = torch.cat([*(sample.loss_weights for sample in samples), torch.zeros(padding)])
    return PackedBatch(
        input_ids=torch.cat([*(sample.input_ids for sample in samples), torch.full((padding,), PAD)]),
        labels=torch.cat([*(sample.labels for sample in samples), torch.full((padding,), IGNORE_LABEL)]),
        loss_weights=weights,
        loss_index=weights.nonzero().squeeze(1),
        position_ids=torch.cat([*(sample.position_ids for sample in samples), fill], dim=1),
        is_padding=torch.arange(used + padding) >= used,
        segments=Segments.from_lengths([*lengths, padding]),
        vision=vision_batch(vision, config.vision),
        audio=audio_batch(audio, config.audio) if "audio" in spec.modalities else None,
        sample_ids=tuple(str(number) for number in range(len(samples))),
        sample_bounds=(*starts, used),
    )
