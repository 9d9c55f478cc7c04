"""Forward FLOPs of decoder and towers, from their dims and from sizes that are known before anything is decoded.

Counts matrix products and attention, two FLOPs per multiply-add; norms, activations and rotary are left out. The
planner balances packs by these figures and the log's utilisation is measured against them.
Source: Hoffmann et al. 2022 (arXiv 2203.15556), appendix F, with attention counted over the pairs that see each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from omniloom.dims import AudioTowerConfig, VisionTowerConfig
from omniloom.families.decoder import DecoderConfig
from omniloom.ops.delta_rule import CHUNK
from omniloom.types import ClipGeometry

PREDICTED_CODES = 15  # of a frame beside its first, as published


def sample_cost(
    text: DecoderConfig,
    vision: VisionTowerConfig,
    audio: AudioTowerConfig | None,
    num_tokens: int,
    num_loss_tokens: int,
    clips: Sequence[ClipGeometry],
) -> tuple[int, int]:
    """Estimated forward FLOPs / 1e6 of one sample in the decoder and in the towers."""
    flops = 0
    for clip in clips:
        if clip.grid_thw:
            flops += vision_flops(vision, clip.grid_thw)
        if clip.num_mel_frames and audio is not None:
            flops += audio_flops(audio, clip.num_mel_frames)
    return -(-decoder_flops(text, num_tokens, num_loss_tokens) // 10**6), -(-flops // 10**6)


def speech_cost(decoder: DecoderConfig, predictor: DecoderConfig | None, turns: Sequence[tuple[int, int]]) -> int:
    """Estimated forward FLOPs / 1e6 of spoken turns in a talker: of each its rows and, among them, its frames.

    The predictor takes a frame by itself, as many positions as there are codes, of which all but one have a head.
    """
    flops = 0
    for num_rows, num_frames in turns:
        flops += decoder_flops(decoder, num_rows, num_frames + 1)
        if predictor is not None:
            flops += num_frames * decoder_flops(predictor, PREDICTED_CODES + 1, PREDICTED_CODES)
    return -(-flops // 10**6)


def decoder_flops(config: DecoderConfig, num_tokens: int, num_loss_tokens: int) -> int:
    """One sample of `num_tokens` through all layers, and the head for the tokens that have a loss."""
    layers = sum(count * _kind_flops(config, kind, num_tokens) for kind, count in config.layer_kinds.items())
    return layers + 2 * num_loss_tokens * config.hidden_size * config.vocab_size


def layer_flops(config: DecoderConfig, layer: int, num_tokens: int) -> int:
    """One sample through one layer."""
    return _kind_flops(config, (layer in config.delta_layers, config.is_moe(layer)), num_tokens)


def _kind_flops(config: DecoderConfig, kind: tuple[bool, bool], num_tokens: int) -> int:
    (has_delta_rule, is_moe), hidden = kind, config.hidden_size
    mixing = delta_rule_flops(config, num_tokens) if has_delta_rule else attention_flops(config, num_tokens)
    if not is_moe:
        return mixing + 2 * num_tokens * 3 * hidden * config.intermediate_size
    widths = config.moe_intermediate_size * config.num_experts_per_tok + config.shared_expert_intermediate_size
    experts = 3 * widths + config.num_experts  # and the router
    return mixing + 2 * num_tokens * hidden * experts


def attention_flops(config: DecoderConfig, num_tokens: int) -> int:
    """One sample through attention and its projections."""
    q_width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projected = (2 + config.output_gate) * q_width + 2 * kv_width
    return 2 * num_tokens * config.hidden_size * projected + 2 * num_tokens**2 * q_width  # causal: half


def delta_rule_flops(config: DecoderConfig, num_tokens: int) -> int:
    """One sample through a gated delta rule, as `ops.delta_rule` computes it by chunks, and its projections.

    Per token and head: products with a chunk's keys and values, half of them in the triangular system, and three with
    the state, which is read for the correction and for the output, and written.
    """
    dims = config.delta_rule
    assert dims is not None, "layers with a delta rule have dims"
    heads, keys, values = dims.linear_num_value_heads, dims.linear_key_head_dim, dims.linear_value_head_dim
    projected = 2 * dims.key_width + 3 * dims.value_width + 2 * heads  # q, k; v, its gate, the output; decay and beta
    in_chunk = CHUNK * (2 * keys + values) + CHUNK * (keys + values) // 2
    return 2 * num_tokens * (config.hidden_size * projected + heads * (in_chunk + 3 * keys * values))


def vision_flops(config: VisionTowerConfig, grid_thw: tuple[int, int, int]) -> int:
    """One image or video; each temporal grid attends to itself only, or within its windows."""
    num_frames, height, width = grid_thw
    patches, hidden, merged = num_frames * height * width, config.hidden_size, config.spatial_merge_size**2
    embed = 2 * patches * config.patch_dim * hidden
    num_matrices = 3 if config.gated_mlp else 2
    block = 2 * patches * hidden * (4 * hidden + num_matrices * config.intermediate_size)
    num_windowed = sum(config.sees_windows(layer) for layer in range(config.depth))
    side = config.window_squares * config.spatial_merge_size
    pairs = (config.depth - num_windowed) * (height * width) ** 2
    if num_windowed:
        pairs += num_windowed * _sum_of_squares(height, side) * _sum_of_squares(width, side)
    row = merged * hidden
    merger = 2 * (patches // merged) * row * (row + config.out_hidden_size)
    mergers = (1 + len(config.deepstack_visual_indexes)) * merger
    return embed + config.depth * block + 4 * num_frames * pairs * hidden + mergers


def _sum_of_squares(length: int, part: int) -> int:
    """Of the parts that a length is cut into, the last one being what is left."""
    return length // part * part**2 + (length % part) ** 2


def audio_flops(config: AudioTowerConfig, num_frames: int) -> int:
    """One clip of `num_frames` mel frames, whose rows attend within windows."""
    hidden, num_rows = config.d_model, config.num_rows(num_frames)
    if config.downsample_hidden_size is None:
        convolutions = 6 * hidden * (num_frames * config.num_mel_bins + num_rows * hidden)
    else:
        channels = config.downsample_hidden_size
        pixels = config.num_mel_bins * num_frames  # each convolution quarters them
        convolutions = 18 * channels * (pixels // 4 + channels * (pixels // 16 + pixels // 64))
        convolutions += 2 * num_rows * (config.num_mel_bins // 8) * channels * hidden
    layer = 2 * num_rows * hidden * (4 * hidden + 2 * config.encoder_ffn_dim)
    layer += 4 * num_rows * min(num_rows, config.window_rows) * hidden
    project = hidden * (config.projector_layers - 1) + config.output_dim
    return convolutions + config.encoder_layers * layer + 2 * num_rows // config.pool * hidden * project
