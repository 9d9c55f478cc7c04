"""The planner's FLOP estimate is what torch counts in transformers' forward pass."""

import json
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from omniloom.families.cost import audio_flops, decoder_flops, vision_flops
from omniloom.families.registry import spec_named
from omniloom.ops.delta_rule import CHUNK
from omniloom.tools.tiny import make_tiny

# Rotary tables are left out, and convolutions are counted as if frames halved without rounding up.
TOLERANCE = 0.005


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny("qwen3_omni", tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def config(checkpoint):
    return spec_named("qwen3_omni").read_config(json.loads((checkpoint / "config.json").read_text()))


@pytest.fixture(scope="module")
def thinker(checkpoint):
    from transformers import Qwen3OmniMoeForConditionalGeneration

    model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.thinker.eval()


def count(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_tokens", [40, 300])
def test_decoder_flops(config, thinker, num_tokens):
    ids = torch.randint(0, 1000, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    counted = count(lambda: thinker(input_ids=ids))
    text = config.text
    # eager attention computes the half that causality masks
    masked = text.num_hidden_layers * 2 * num_tokens**2 * text.num_attention_heads * text.head_dim
    assert decoder_flops(text, num_tokens, num_tokens) == pytest.approx(counted - masked, rel=TOLERANCE)


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 30, 22), (4, 8, 8)])
def test_vision_flops(config, thinker, grid):
    patches = torch.zeros(grid[0] * grid[1] * grid[2], config.vision.patch_dim)
    counted = count(lambda: thinker.model.visual(patches, grid_thw=torch.tensor([grid])))
    assert vision_flops(config.vision, grid) == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize("num_frames", [100, 400, 1000])
def test_audio_flops(config, thinker, num_frames):
    features = torch.zeros(config.audio.num_mel_bins, num_frames)
    counted = count(lambda: thinker.model.audio_tower(features, feature_lens=torch.tensor([num_frames])))
    assert audio_flops(config.audio, num_frames) == pytest.approx(counted, rel=TOLERANCE)


# ------------------------------------------------------------------------------------ Qwen2.5-Omni


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """Qwen2.5-Omni's config and transformers' thinker: towers with windows, dense decoder with biases."""
    from transformers import Qwen2_5OmniForConditionalGeneration

    directory = make_tiny("qwen2_5_omni", tmp_path_factory.mktemp("tiny") / "checkpoint")
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    config = spec_named("qwen2_5_omni").read_config(json.loads((directory / "config.json").read_text()))
    return config, model.thinker.eval()


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 30, 22), (3, 8, 10)])
def test_vision_flops_of_windows(windowed, grid):
    config, thinker = windowed
    patches = torch.zeros(grid[0] * grid[1] * grid[2], config.vision.patch_dim)
    counted = count(lambda: thinker.model.visual(patches, grid_thw=torch.tensor([grid])))
    assert vision_flops(config.vision, grid) == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize("num_frames", [200, 1000])
def test_audio_flops_of_the_whisper_tower(windowed, num_frames):
    config, thinker = windowed
    features = torch.zeros(config.audio.num_mel_bins, num_frames)
    counted = count(lambda: thinker.model.audio_tower(features, feature_lens=torch.tensor([num_frames])))
    assert audio_flops(config.audio, num_frames) == pytest.approx(counted, rel=TOLERANCE)


def test_decoder_flops_of_a_dense_decoder(windowed):
    config, thinker = windowed
    ids = torch.randint(0, 1000, (1, 70), generator=torch.Generator().manual_seed(0))
    counted = count(lambda: thinker(input_ids=ids))
    text = config.text
    masked = text.num_hidden_layers * 2 * 70**2 * text.num_attention_heads * text.head_dim
    assert decoder_flops(text, 70, 70) == pytest.approx(counted - masked, rel=TOLERANCE)


# ------------------------------------------------------------------------------------ Qwen3.5


def test_decoder_flops_of_layers_with_a_delta_rule(tmp_path, monkeypatch):
    """torch counts no triangular systems, and our estimate no short convolutions; both are made up for here."""
    from transformers import Qwen3_5MoeForConditionalGeneration
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

    by_our_chunks = partial(modeling.torch_chunk_gated_delta_rule, chunk_size=CHUNK)
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", by_our_chunks)

    directory, num_tokens = make_tiny("qwen3_5_moe", tmp_path / "checkpoint"), 256
    model = Qwen3_5MoeForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    text = spec_named("qwen3_5_moe").read_config(json.loads((directory / "config.json").read_text())).text
    ids = torch.randint(0, 1000, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    counted, dims = count(lambda: model(input_ids=ids)), text.delta_rule
    masked = 2 * num_tokens**2 * text.num_attention_heads * text.head_dim  # of the one layer with attention
    solved = num_tokens * dims.linear_num_value_heads * CHUNK * (dims.linear_key_head_dim + dims.linear_value_head_dim)
    channels = 2 * dims.key_width + dims.value_width
    convolved = 2 * num_tokens * dims.linear_conv_kernel_dim * channels
    expected = counted - masked + len(text.delta_layers) * (solved - convolved)
    assert decoder_flops(text, num_tokens, num_tokens) == pytest.approx(expected, rel=TOLERANCE)
