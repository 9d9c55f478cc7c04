"""The audio tower: log-mel frames to rows of the decoder's width, and how a batch of clips is cut up for it.

The tower is a tensor function of an `AudioBatch`; chunks, valid rows and windows are computed by `audio_batch`, on the
CPU, where batches are collated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniloom.models.layers import ACTIVATIONS, MLP, Attention, Linear
from omniloom.ops.attention import Kernel
from omniloom.types import AudioBatch, AudioClip, Segments

NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class AudioTowerConfig:
    """Dims of an audio tower, named as in Hugging Face configs."""

    num_mel_bins: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    d_model: int
    activation_function: str
    n_window: int
    n_window_infer: int  # mel frames that attend to each other, in whole chunks
    output_dim: int
    downsample_hidden_size: int | None  # channels of the stem in two dims; None: Whisper's stem, over frames only
    key_bias: bool = True
    pool: int = 1  # neighbouring rows of a clip that are averaged after the layers
    projector_layers: Literal[1, 2] = 2

    @property
    def num_halvings(self) -> int:
        """Convolutions that halve the frames, rounding up."""
        return 1 if self.downsample_hidden_size is None else 3

    @property
    def chunk_frames(self) -> int:
        """Mel frames that the convolutions see at a time."""
        return 2 * self.n_window

    @property
    def chunk_rows(self) -> int:
        return halved(self.chunk_frames, self.num_halvings)

    @property
    def window_rows(self) -> int:
        """Rows that attend to each other."""
        return self.chunk_rows * (self.n_window_infer // self.chunk_frames)

    @property
    def least_frames(self) -> int:
        """The shortest clip that makes a token."""
        return next(frames for frames in range(1, self.chunk_frames + 1) if self.num_tokens(frames))

    def num_rows(self, num_frames: int) -> int:
        """Rows that the layers work on for a clip of so many mel frames."""
        chunks, rest = divmod(num_frames, self.chunk_frames)
        return chunks * self.chunk_rows + halved(rest, self.num_halvings)

    def num_tokens(self, num_frames: int) -> int:
        """Rows that come out of the tower for a clip of so many mel frames."""
        return self.num_rows(num_frames) // self.pool


def halved(size: int, times: int) -> int:
    """What is left of a size that is halved so often, rounding up."""
    return -(-size // 2**times)


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

    def forward(self, features: Tensor, chunk_frames: Tensor, draw_key: int | None = None) -> Tensor:
        """features [num_chunks, mel bins, frames], chunk_frames int64 [num_chunks] -> [num_chunks, rows, d_model].

        What a chunk has past its `chunk_frames` is zero before every convolution, as if it ended there.
        """
        x = features[:, None].to(self.conv1.weight.dtype)
        frames = chunk_frames
        for conv in (self.conv1, self.conv2, self.conv3):
            past_end = torch.arange(x.shape[-1], device=x.device) >= frames[:, None]
            x = F.gelu(conv(x.masked_fill(past_end[:, None, None], 0.0)))  # [num_chunks, channels, bins, frames]
            frames = (frames + 1) // 2
        rows = self.out(x.permute(0, 3, 1, 2).flatten(2), draw_key)
        return rows + sinusoids(rows.shape[1], rows.shape[2], rows.device).to(rows.dtype)


class WhisperStem(nn.Module):
    """Two convolutions over the frames of each chunk, the second strided, and sinusoidal positions within it.

    Source: Whisper (arXiv 2212.04356), by chunks as in Qwen2.5-Omni's modelling code in transformers.
    """

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, 3, stride=2, padding=1)

    def forward(self, features: Tensor, chunk_frames: Tensor, draw_key: int | None = None) -> Tensor:
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

    def forward(self, hidden: Tensor, segments: Segments, draw_key: int | None = None) -> Tensor:
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

    def forward(self, hidden: Tensor, draw_key: int | None = None) -> Tensor:
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
        self.norm = nn.LayerNorm(config.d_model, eps=NORM_EPS)
        self.projector = AudioProjector(config)

    def forward(self, batch: AudioBatch, draw_key: int | None = None) -> Tensor:
        """Rows [A, output_dim], pooled rows [B, output_dim]."""
        chunks = self.stem(batch.features, batch.chunk_frames, draw_key)  # [num_chunks, chunk_rows, d_model]
        hidden = chunks.flatten(0, 1)[batch.valid_index]  # [A, d_model]
        for layer in self.layers:
            hidden = layer(hidden, batch.segments, draw_key)
        if batch.pool_index is not None:
            hidden = hidden[batch.pool_index].mean(dim=1)  # [B, d_model]
        return self.projector(self.norm(hidden), draw_key)


# ---------------------------------------------------------------------------------------- geometry, on the CPU


def audio_batch(clips: Sequence[AudioClip], config: AudioTowerConfig) -> AudioBatch:
    """All clips of a pack as one batch of chunks, a null segment of one tower row last.

    `token_index` of the clips counts rows of the pack. Tensors are on the CPU.
    Raises: ValueError where a clip's features and tokens do not agree.
    """
    size, null_frames = config.chunk_frames, config.least_frames
    for number, clip in enumerate(clips):
        _check_clip(number, clip, config)
    features = [*(clip.features for clip in clips), torch.zeros(config.num_mel_bins, null_frames)]
    frames = torch.tensor([part.shape[1] for part in features])
    num_chunks = -(-frames // size)
    last_chunk = num_chunks.cumsum(0) - 1
    real = torch.full((int(num_chunks.sum()),), size)  # frames of each chunk that are the clip's
    real[last_chunk] = (frames - 1) % size + 1
    ends = real  # where the convolutions take a chunk to end
    if config.downsample_hidden_size is not None:  # this stem lets the padding up to the longest clip show
        longest = torch.tensor([*(clip.longest_frames or clip.features.shape[1] for clip in clips), null_frames])
        ends = torch.repeat_interleave(longest.clamp(min=frames).clamp(max=size), num_chunks)
    rows = -(-real // 2**config.num_halvings)
    valid = torch.arange(config.chunk_rows) < rows[:, None]
    chunks = [
        F.pad(part, (0, -part.shape[1] % size)).unflatten(1, (-1, size)).transpose(0, 1) for part in features
    ]  # each [num_chunks, num_mel_bins, size]
    clip_rows = (num_chunks - 1) * config.chunk_rows + rows[last_chunk]
    windows = _windows(clip_rows, config.window_rows)
    return AudioBatch(
        features=torch.cat(chunks),
        chunk_frames=ends,
        valid_index=valid.flatten().nonzero().squeeze(1),
        segments=Segments(cu_seqlens=F.pad(windows.cumsum(0), (1, 0)).to(torch.int32), max_length=int(windows.max())),
        token_index=torch.cat([*(clip.token_index for clip in clips), torch.zeros(0, dtype=torch.int64)]),
        pool_index=_pool_index(clip_rows, config.pool) if config.pool > 1 else None,
    )


def _pool_index(clip_rows: Tensor, pool: int) -> Tensor:
    """Rows that are averaged, int64 [B, pool]: neighbours within a clip, what is left over at its end falls away."""
    starts, counts = clip_rows.cumsum(0) - clip_rows, clip_rows // pool
    firsts = torch.repeat_interleave(starts - pool * (counts.cumsum(0) - counts), counts)
    return (firsts + pool * torch.arange(firsts.shape[0]))[:, None] + torch.arange(pool)


def _check_clip(number: int, clip: AudioClip, config: AudioTowerConfig) -> None:
    num_bins, num_frames = clip.features.shape
    if num_bins != config.num_mel_bins or num_frames < config.least_frames:
        raise ValueError(
            f"clip {number}: expected features of {config.num_mel_bins} mel bins and at least {config.least_frames} "
            f"frames, got {list(clip.features.shape)}"
        )
    rows = config.num_tokens(num_frames)
    if clip.token_index.shape[0] != rows:
        raise ValueError(
            f"clip {number}: {num_frames} mel frames make {rows} rows, but {clip.token_index.shape[0]} tokens wait "
            "for them"
        )


def _windows(clip_rows: Tensor, window_rows: int) -> Tensor:
    """Lengths of the attention windows, int64 [S]: full ones, and what is left over at each clip's end."""
    counts = -(-clip_rows // window_rows)
    lengths = torch.full((int(counts.sum()),), window_rows)
    lengths[counts.cumsum(0) - 1] = (clip_rows - 1) % window_rows + 1
    return lengths
