"""Dims of the towers, which their modules are built of and a processor's sizes and batches follow from. No tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """Dims of a vision tower, named as in Hugging Face configs."""

    depth: int
    hidden_size: int
    hidden_act: str
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int  # a square; 0: no learned positions
    deepstack_visual_indexes: tuple[int, ...]
    rope_theta: float
    norm: Literal["layer", "rms"] = "layer"
    gated_mlp: bool = False
    fused_qkv: bool = True  # one projection for q, k and v
    patch_bias: bool = True
    window_size: int = 0  # side in pixels of the windows that patches see; 0: all layers see whole frames
    fullatt_block_indexes: tuple[int, ...] = ()  # under windows, layers that see whole frames nevertheless

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_squares(self) -> int:
        """Side of a window in merged patches; 0 without windows."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    def sees_windows(self, layer: int) -> bool:
        return self.window_size > 0 and layer not in self.fullatt_block_indexes


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

    @property
    def null_frames(self) -> int:
        """Of a null segment, of two rows: layers that are compiled for a single one are compiled anew for others."""
        return next(frames for frames in range(1, self.chunk_frames + 1) if self.num_rows(frames) == 2)

    def num_rows(self, num_frames: int) -> int:
        """Rows that the layers work on for a clip of so many mel frames."""
        chunks, rest = divmod(num_frames, self.chunk_frames)
        return chunks * self.chunk_rows + halved(rest, self.num_halvings)

    def num_tokens(self, num_frames: int) -> int:
        """Rows that come out of the tower for a clip of so many mel frames."""
        return self.num_rows(num_frames) // self.pool


def halved(size: int, times: int) -> int:
    """What is left of a size that is halved so often, rounding up."""
    return -(-size // (1 << times))
