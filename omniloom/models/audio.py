"""The audio tower: log-mel frames to rows of the decoder's width.

The tower is a tensor function of an `AudioBatch`, which brings along chunks, valid rows and windows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniloom.dims import AudioTowerConfig, halved
from omniloom.models.layers import ACTIVATIONS, MLP, Attention, LayerCall, Linear
from omniloom.ops.linear_map import layer_key
from omniloom.types import AudioBatch, Kernel, Segments

NORM_EPS = 1e-5


class AudioStem(nn.Module):
    """Three strided convolutions over (mel bins, frames) of each chunk, and sinusoidal positions within it."""

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        channels = config.downsample_hidden_size
        assert channels is not None
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.out = Linear(channels * halved(config.num_mel_bins, config.num_halvings), config.d_model, bias=False)

    def forward(self, features: Tensor, chunk_frames: Tensor, draw_key: Tensor | None = None) -> Tensor:
        """features [num_chunks, mel bins, frames], chunk_frames int64 [num_chunks] -> [num_chunks, rows, d_model].

        What a chunk has past its `chunk_frames` is zero before every convolution, as if it ended there.
        """
        x = features[:, None].to(self.conv1.weight.dtype)
        frames = chunk_frames
        for conv in (self.conv1, self.conv2, self.conv3):
            past_end = torch.arange(x.shape[-1], device=x.device) >= frames[:, None]
            x = F.gelu(conv(x.masked_fill(past_end[:, None, None], 0.0)))  # [num_chunks, channels, bins, frames]
            frames = (frames + 1) // 2
        rows = self.out(x.permute(0, 3, 1, 2).flatten(2).flatten(0, 1), draw_key).unflatten(0, (x.shape[0], -1))
        return rows + sinusoids(rows.shape[1], rows.shape[2], rows.device).to(rows.dtype)


class WhisperStem(nn.Module):
    """Two convolutions over the frames of each chunk, the second strided, and sinusoidal positions within it.

    Source: Whisper (arXiv 2212.04356), by chunks as in Qwen2.5-Omni's modelling code in transformers.
    """

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, 3, stride=2, padding=1)

    def forward(self, features: Tensor, chunk_frames: Tensor, draw_key: Tensor | None = None) -> Tensor:
        """As `AudioStem.forward`."""
        past_end = (torch.arange(features.shape[-1], device=features.device) >= chunk_frames[:, None])[:, None]
        x = F.gelu(self.conv1(features.to(self.conv1.weight.dtype).masked_fill(past_end, 0.0)))
        rows = F.gelu(self.conv2(x.masked_fill(past_end, 0.0))).transpose(1, 2)
        return rows + sinusoids(rows.shape[1], rows.shape[2], rows.device).to(rows.dtype)


def sinusoids(length: int, channels: int, device: torch.device) -> Tensor:
    """Sines, then cosines, of positions at geometric timescales from 1 to 10,000: float32 [length, channels].

    Source: Whisper (arXiv 2212.04356), as in its published code.
    """
    step = math.log(10_000) / (channels // 2 - 1)
    frequencies = torch.exp(-step * torch.arange(channels // 2, dtype=torch.float32, device=device))
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class AudioBlock(nn.Module):
    def __init__(self, config: AudioTowerConfig, kernel: Kernel) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model, eps=NORM_EPS)
        self.attention = Attention(
            hidden_size=config.d_model,
            num_heads=config.encoder_attention_heads,
            num_key_value_heads=config.encoder_attention_heads,
            head_dim=config.d_model // config.encoder_attention_heads,
            biases=(True, config.key_bias, True, True),
            qk_norm_eps=None,
            causal=False,
            kernel=kernel,
        )
        self.norm2 = nn.LayerNorm(config.d_model, eps=NORM_EPS)
        self.mlp = MLP(
            hidden_size=config.d_model,
            intermediate_size=config.encoder_ffn_dim,
            activation=config.activation_function,
        )

    def forward(self, hidden: Tensor, segments: Segments, draw_key: Tensor | None = None) -> Tensor:
        """hidden [A, C] -> [A, C]."""
        hidden = hidden + self.attention(self.norm1(hidden), None, segments, draw_key)
        return hidden + self.mlp(self.norm2(hidden), draw_key)


class AudioProjector(nn.Module):
    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        self.proj1: Linear | None = None
        if config.projector_layers == 2:
            self.proj1 = Linear(config.d_model, config.d_model)
        self.act = ACTIVATIONS[config.activation_function]
        self.proj2 = Linear(config.d_model, config.output_dim)

    def forward(self, hidden: Tensor, draw_key: Tensor | None = None) -> Tensor:
        """hidden [A, C] -> [A, output_dim]."""
        if self.proj1 is not None:
            hidden = self.act(self.proj1(hidden, draw_key))
        return self.proj2(hidden, draw_key)


class AudioTower(nn.Module):
    """Chunked convolutions, windowed attention, pooling if any, projector."""

    def __init__(self, config: AudioTowerConfig, *, kernel: Kernel) -> None:
        super().__init__()
        self.config = config
        self.stem = WhisperStem(config) if config.downsample_hidden_size is None else AudioStem(config)
        self.layers = nn.ModuleList([AudioBlock(config, kernel) for _ in range(config.encoder_layers)])
        self.call = LayerCall()
        self.norm = nn.LayerNorm(config.d_model, eps=NORM_EPS)
        self.projector = AudioProjector(config)

    def forward(self, batch: AudioBatch, draw_key: int | None = None) -> Tensor:
        """Rows [A, output_dim], pooled rows [B, output_dim]."""
        chunks = self.stem(batch.features, batch.chunk_frames, layer_key(draw_key))  # [num_chunks, chunk_rows, d_model]
        hidden = chunks.flatten(0, 1)[batch.valid_index]  # [A, d_model]
        for index, layer in enumerate(self.layers):
            hidden = self.call(index, layer, hidden, batch.segments, layer_key(draw_key, index))
        if batch.pool_index is not None:
            hidden = hidden[batch.pool_index].mean(dim=1)  # [B, d_model]
        return self.projector(self.norm(hidden), layer_key(draw_key))
