"""Clips as tokens: what stands in the text where a template put the token of a clip.

Owns the words and tokens that all families write alike; a family's `processor.py` says in what it differs. Sizes are
`tower_inputs`'; where clips go in a conversation is `chat`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from omniloom.processors.positions import text_block, vision_block
from omniloom.processors.settings import token_id_of
from omniloom.processors.tower_inputs import Features, TowerInputs
from omniloom.types import ClipGeometry, MediaHeader, MediaSource, SampleError


@dataclass(frozen=True, kw_only=True)
class ClipTokens:
    """The tokens that stand where a clip's pad token was."""

    ids: np.ndarray  # int64 [n]
    block: np.ndarray  # float32 [3, n]: positions relative to the first, see positions.py
    vision_rows: np.ndarray  # int64: which of the n tokens take vision embeddings, in order
    audio_rows: np.ndarray  # int64: which take audio embeddings


def picture_tokens(token_id: int, block: np.ndarray) -> ClipTokens:
    """Pictures alone: a token for every row of the tower, at the positions of `block` float32 [3, n]."""
    rows = np.arange(block.shape[1])
    return ClipTokens(ids=np.full(len(rows), token_id, np.int64), block=block, vision_rows=rows, audio_rows=rows[:0])


class FamilyClips:
    """What a family knows of its media: how they are written as tokens."""

    pads: ClassVar[Mapping[str, str]]  # the word that stands for a clip, by kind
    wrappers: ClassVar[Mapping[str, tuple[str, str]]]  # the words around it, by the tower that reads it
    templates: ClassVar[tuple[str, ...]]  # built-in ones that fit the family, see `chat_template.NAMED_TEMPLATES`
    past_time: ClassVar[bool] = True  # see `positions.sample_positions`
    whole_positions: ClassVar[bool] = False  # whether those of a video's time are floored before anything follows
    relative_boxes: ClassVar[bool] = True  # coordinates in text are relative to 1000, else pixels of the resized image
    video_pixels: ClassVar[tuple[int, int]]  # least and most where no file of a checkpoint says it
    min_frames: ClassVar[int] = 2

    def __init__(
        self,
        towers: TowerInputs,
        tokenizer: Any,
        *,
        token_ids: Mapping[str, int],
        positions_per_second: float,
        seconds_per_chunk: float,
    ) -> None:
        """`tokenizer`: as transformers loads it; the others: see `FamilyConfig`.

        Raises: ValueError where config.json and tokenizer name different tokens.
        """
        self.towers = towers
        self.positions_per_second = positions_per_second
        self.seconds_per_chunk = seconds_per_chunk
        found = {name: token_id_of(tokenizer, name, token_ids[name], word) for name, word in self.tokens().items()}
        self.ids = {kind: found[f"{kind}_token_id"] for kind in self.pads}
        self.pad_ids = frozenset(self.ids.values())
        around = {kind: self.wrappers["audio" if kind == "audio" else "vision"] for kind in self.pads}
        self.words = {kind: around[kind][0] + pad + around[kind][1] for kind, pad in self.pads.items()}
        self.wrapper_ids = {kind: tokenizer.convert_tokens_to_ids(list(both)) for kind, both in self.wrappers.items()}

    @classmethod
    def tokens(cls) -> dict[str, str]:
        """The words of tokens whose ids stand in config.json, by their names there."""
        starts = {f"{tower}_start_token_id": start for tower, (start, _) in cls.wrappers.items()}
        return {f"{kind}_token_id": pad for kind, pad in cls.pads.items()} | starts

    def geometry(self, source: MediaSource, header: MediaHeader, scale: float) -> ClipGeometry:
        """Planned size; `scale` below 1 lowers pixels and frames. Raises: SampleError for what cannot be."""
        if header.kind == "image":
            return self.towers.image_geometry(source, header, scale)
        if header.kind == "audio":
            return self.towers.audio_geometry(header)
        return self.video_geometry(source, header, scale)

    def video_geometry(self, source: MediaSource, header: MediaHeader, scale: float) -> ClipGeometry:
        return self.towers.video_geometry(source, header, scale, self.video_pixels, self.min_frames)

    def tokens_of(self, clip: ClipGeometry) -> tuple[ClipTokens, ...]:
        """The tokens that take the place of each pad token of the clip's placeholder."""
        num_audio = self.towers.num_audio_tokens(clip.num_mel_frames)
        if clip.grid_thw is None:
            rows, ids = np.arange(num_audio), np.full(num_audio, self.ids["audio"], np.int64)
            return (ClipTokens(ids=ids, block=text_block(num_audio), vision_rows=rows[:0], audio_rows=rows),)
        merge, seconds = self.towers.vision.spatial_merge_size, clip.seconds_per_grid
        block = vision_block(clip.grid_thw, merge, seconds, self.positions_per_second)
        if self.whole_positions:
            block = np.floor(block)
        if num_audio:
            times = np.arange(clip.grid_thw[0]) * seconds * self.positions_per_second
            return (self.with_sound(block, np.repeat(times, block.shape[1] // clip.grid_thw[0]), num_audio),)
        return (picture_tokens(self.ids[clip.kind], block),)

    def with_sound(self, block: np.ndarray, times: np.ndarray, num_audio: int) -> ClipTokens:
        """A video's tokens, at the positions of `block` and `times` [n] on the time axis, and those of its sound."""
        raise NotImplementedError

    def interleave(
        self, block: np.ndarray, order: np.ndarray, *, before: Sequence[int], after: Sequence[int], start: int
    ) -> ClipTokens:
        """Tokens of a video and its sound in `order`, between those of `before`, at `start`, and of `after`, past them.

        `block` float32 [3, n] are the video's positions past `start`; entries of `order` from n on name sound.
        """
        num_vision, num_audio = block.shape[1], len(order) - block.shape[1]
        inner = np.concatenate([block, text_block(num_audio)], axis=1)[:, order] + np.float32(start + 1)
        end = inner[:, -1].max() + 1
        ends = np.full((3, len(before)), start, np.float32), np.full((3, len(after)), end, np.float32)
        ids = np.repeat([self.ids["video"], self.ids["audio"]], [num_vision, num_audio])[order]
        return ClipTokens(
            ids=np.concatenate([before, ids, after]),
            block=np.concatenate([ends[0], inner, ends[1]], axis=1),
            vision_rows=len(before) + np.flatnonzero(order < num_vision),
            audio_rows=len(before) + np.flatnonzero(order >= num_vision),
        )

    def placeholder(self, clip: ClipGeometry) -> str:
        """What becomes of the clip's pad token: text with one pad token for each of its `tokens_of`."""
        return self.pads[clip.kind]

    def held(self, clip: ClipGeometry) -> str:
        """The token after the clip's pad that is among the last of its `tokens_of`, if one is."""
        return ""

    # ------------------------------------------------------------------------------------ transformers' generate

    def generation_inputs(
        self, input_ids: Tensor, clips: Sequence[ClipGeometry], features: Sequence[Features]
    ) -> dict[str, Any]:
        """Media arguments of transformers' `generate`, by their names there; `input_ids` int64 [t].

        Raises: SampleError for videos with and without sound in one conversation, which transformers cannot express.
        """
        inputs: dict[str, Any] = {}
        for kind, names in (
            ("image", ("pixel_values", "image_grid_thw")),
            ("video", ("pixel_values_videos", "video_grid_thw")),
        ):
            if chosen := [index for index, clip in enumerate(clips) if clip.kind == kind]:
                patches = [of_clip for index in chosen if (of_clip := features[index][0]) is not None]
                inputs[names[0]] = torch.cat(patches)
                inputs[names[1]] = torch.tensor([clips[index].grid_thw for index in chosen])
        if "audio" in self.pads:
            return inputs | _sound_inputs(clips, [mel for _, mel in features if mel is not None])
        kinds = torch.zeros_like(input_ids)
        kinds[input_ids == self.ids["image"]] = 1
        kinds[input_ids == self.ids["video"]] = 2
        return inputs | {"mm_token_type_ids": kinds[None]}


def _sound_inputs(clips: Sequence[ClipGeometry], mels: Sequence[Tensor]) -> dict[str, Any]:
    """Sound, and the timing of videos, as the omni families take them."""
    inputs: dict[str, Any] = {}
    if mels:
        longest = max(mel.shape[1] for mel in mels)
        pad = torch.nn.functional.pad
        inputs["input_features"] = torch.stack([pad(mel, (0, longest - mel.shape[1])) for mel in mels])
        lengths = torch.tensor([mel.shape[1] for mel in mels])
        inputs["feature_attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    if videos := [clip for clip in clips if clip.kind == "video"]:
        sound = {clip.num_mel_frames > 0 for clip in videos}
        if len(sound) > 1:
            reason = "transformers takes the sound of all videos of a row or of none, got both; choose one for all"
            raise SampleError("use_audio_in_video", reason)
        inputs["video_second_per_grid"] = torch.tensor([clip.seconds_per_grid for clip in videos])
        inputs["use_audio_in_video"] = sound == {True}
    return inputs
