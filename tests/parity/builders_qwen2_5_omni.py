"""Random tiny Qwen2.5-Omni thinkers and rows for them; what `builders.py` is for Qwen3-Omni."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omniloom.types import IGNORE_LABEL, AudioClip, VisionClip
from tests.parity.builders import NUM_WORDS, VOCAB_SIZE, Sample, randomise, reference_positions

IMAGE, VIDEO, AUDIO, AUDIO_START, AUDIO_END, VISION_START, VISION_END = range(90, 97)
POSITIONS_PER_SECOND, CHUNK = 25, 50


def random_config(rng: random.Random) -> dict[str, Any]:
    """A config.json of odd sizes, in the published spelling."""
    sections, key_value_heads = [rng.randint(1, 3) for _ in range(3)], rng.randint(1, 2)
    num_heads, head_dim = key_value_heads * rng.randint(1, 3), 2 * sum(sections)
    hidden_size = num_heads * head_dim
    depth, vision_heads, audio_heads, patch = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 3), rng.randint(2, 4)
    return {
        "model_type": "qwen2_5_omni",
        "architectures": ["Qwen2_5OmniModel"],
        "thinker_config": {
            "model_type": "qwen2_5_omni_thinker",
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "audio_token_index": AUDIO,
            "audio_start_token_id": AUDIO_START,
            "audio_end_token_id": AUDIO_END,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
            "position_id_per_seconds": POSITIONS_PER_SECOND,
            "seconds_per_chunk": 2,
            "tie_word_embeddings": rng.random() < 0.3,
            "text_config": {
                "model_type": "qwen2_5_omni_text",
                "vocab_size": VOCAB_SIZE,
                "hidden_size": hidden_size,
                "intermediate_size": 4 * rng.randint(3, 9),
                "num_hidden_layers": rng.randint(1, 3),
                "num_attention_heads": num_heads,
                "num_key_value_heads": key_value_heads,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10_000.0,
                "rope_scaling": {"mrope_section": sections, "rope_type": "default", "type": "default"},
                "use_sliding_window": False,
                "hidden_act": "silu",
            },
            "vision_config": {
                "model_type": "qwen2_5_omni_vision_encoder",
                "depth": depth,
                "hidden_size": vision_heads * 4 * rng.randint(1, 3),
                "hidden_act": "silu",
                "intermediate_size": 4 * rng.randint(3, 7) + 1,
                "num_heads": vision_heads,
                "in_chans": 3,
                "patch_size": patch,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "out_hidden_size": hidden_size,
                "window_size": 2 * patch * rng.randint(1, 3),
                "fullatt_block_indexes": sorted(rng.sample(range(depth), rng.randint(0, depth))),
            },
            "audio_config": {
                "model_type": "qwen2_5_omni_audio_encoder",
                "num_mel_bins": rng.randint(7, 17),
                "encoder_layers": rng.randint(1, 2),
                "encoder_attention_heads": audio_heads,
                "encoder_ffn_dim": 4 * rng.randint(3, 7),
                "d_model": audio_heads * 2 * rng.randint(2, 4),
                "activation_function": "gelu",
                "n_window": rng.randint(3, 60),
                "output_dim": hidden_size,
            },
        },
    }


def reference_model(config_json: Mapping[str, Any], *, seed: int = 0, attention: str = "eager") -> Any:
    """transformers' thinker with random weights."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    settings = Qwen2_5OmniThinkerConfig.from_dict(copy.deepcopy(dict(config_json["thinker_config"])))
    settings._attn_implementation = attention
    model = randomise(Qwen2_5OmniThinkerForConditionalGeneration(settings), seed)
    model.tie_weights()
    return model


def audio_tokens(num_frames: int) -> int:
    """Tokens of a clip, by the published arithmetic (25 a second)."""
    return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1


def random_sample(
    rng: random.Random, reference: Any, media: Sequence[str] = (), *, audio_frames: Sequence[int] = (), seed: int = 0
) -> Sample:
    """A row with the given media in order, words between them; kinds and limits as in `builders.random_sample`."""
    config, generator = reference.config, torch.Generator().manual_seed(seed)
    tokens, frames, seconds = [1, *_words(rng, 5)], list(audio_frames), []
    images: list[VisionClip] = []
    videos: list[VisionClip] = []
    audio: list[AudioClip] = []
    for kind in media:
        patches, grid, sound = torch.zeros(0), (0, 0, 0), None
        if kind != "audio":
            patches, grid = _random_patches(rng, config.vision_config, is_image=kind == "image", generator=generator)
        if kind in ("video", "video_with_audio"):
            seconds.append(rng.choice([1.0, 2.0, 0.5, 2 / 3]))
        if kind in ("audio", "video_with_audio"):
            length = frames.pop(0) if frames else rng.choice([rng.randint(3, 120), rng.randint(90, 900)])
            sound = torch.randn(config.audio_config.num_mel_bins, length, generator=generator)
        kinds = _token_kinds(grid, sound, seconds[-1] if seconds else 0.0, is_image=kind == "image")
        starts = [AUDIO_START] if kind == "audio" else [VISION_START]
        ends = [AUDIO_END] if kind == "audio" else [VISION_END]
        if kind == "video_with_audio":
            starts, ends = [VISION_START, AUDIO_START], [AUDIO_END, VISION_END]
        tokens += starts
        rows = torch.arange(len(tokens), len(tokens) + len(kinds))
        tokens += [*kinds, *ends, *_words(rng, 4)]
        kinds_of = torch.tensor(kinds)
        if grid[0]:
            clip = VisionClip(patches=patches, grid_thw=grid, token_index=rows[kinds_of != AUDIO])
            (images if kind == "image" else videos).append(clip)
        if sound is not None:
            audio.append(AudioClip(features=sound, token_index=rows[kinds_of == AUDIO]))
    return _finish(rng, reference, tokens, images, videos, audio, seconds, "video_with_audio" in media)


def _words(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(1, NUM_WORDS) for _ in range(rng.randint(1, most))]


def _random_patches(
    rng: random.Random, vision: Any, *, is_image: bool, generator: torch.Generator
) -> tuple[Tensor, tuple[int, int, int]]:
    grid = (1 if is_image else rng.randint(1, 4), 2 * rng.randint(1, 5), 2 * rng.randint(1, 5))
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return torch.randn(grid[0] * grid[1] * grid[2], patch_dim, generator=generator), grid


def _token_kinds(grid: tuple[int, int, int], sound: Tensor | None, seconds: float, *, is_image: bool) -> list[int]:
    """The clip's pad tokens in order: chunks of two seconds take turns, the video's first."""
    vision = [(frame * seconds * POSITIONS_PER_SECOND // CHUNK, 0) for frame in range(grid[0])]
    vision = [entry for entry in vision for _ in range(grid[1] * grid[2] // 4)]
    heard = [] if sound is None else [(position // CHUNK, 1) for position in range(audio_tokens(sound.shape[1]))]
    # grids are at most two seconds apart, so no chunk is skipped and the published walk is a sort
    return [AUDIO if which else IMAGE if is_image else VIDEO for _, which in sorted([*vision, *heard])]


def _finish(
    rng: random.Random,
    reference: Any,
    tokens: list[int],
    images: list[VisionClip],
    videos: list[VisionClip],
    audio: list[AudioClip],
    seconds: list[float],
    use_audio_in_video: bool,
) -> Sample:
    ids = torch.tensor(tokens)
    labels = torch.cat((ids[1:], torch.tensor([IGNORE_LABEL])))
    trained = torch.tensor([place == 0 or rng.random() < 0.6 for place in range(len(tokens))]) & (labels >= 0)
    weights = torch.tensor([rng.choice([0.25, 1.0, 2.0]) for _ in tokens])
    fields: dict[str, Any] = {
        "input_ids": ids,
        "labels": torch.where(trained, labels, IGNORE_LABEL),
        "loss_weights": torch.where(trained, weights, 0.0),
        "images": tuple(images),
        "videos": tuple(videos),
        "audio": tuple(audio),
        "use_audio_in_video": use_audio_in_video,
    }
    unplaced = Sample(position_ids=torch.zeros(3, len(ids), dtype=torch.int64), **fields)
    return Sample(position_ids=reference_positions(reference, unplaced, seconds), **fields)
