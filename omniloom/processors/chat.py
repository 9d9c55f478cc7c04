"""From a conversation to sizes and tensors: what every family's processor does alike.

Owns tokenizing the rendered text in one go, labels from character offsets, clip expansion, positions, and the promise
that `measure` and `encode` count the same. A family adds its `FamilyClips`: how clips are written as tokens. Reads no
media file: headers and decoded arrays are handed in. Used by loader workers and by generation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from omniloom.processors.chat_template import MEDIA_KINDS
from omniloom.processors.clips import FamilyClips
from omniloom.processors.grounding import write_boxes
from omniloom.processors.positions import sample_positions
from omniloom.processors.rendering import Rendered, Renderer
from omniloom.processors.speech import ChatTokens, RunKind, SpeechLayout
from omniloom.processors.tower_batches import audio_batch, vision_batch
from omniloom.processors.tower_inputs import TowerInputs
from omniloom.types import (
    IGNORE_LABEL,
    AudioBatch,
    AudioClip,
    ClipGeometry,
    Conversation,
    DecodedClip,
    Example,
    Extent,
    MediaHeader,
    Part,
    SampleError,
    SpeechExample,
    VisionBatch,
    VisionClip,
)

SHRINK_STEPS = tuple(0.8**step for step in range(1, 24))  # scales that `shrink` tries, down to half a percent


class ChatProcessor:
    """A family's processor: one tokenizer, one template, the family's media rules."""

    def __init__(
        self,
        *,
        tokenizer: Any,
        renderer: Renderer,
        media: FamilyClips,
        towers: TowerInputs,
        speech: SpeechLayout | None = None,
    ) -> None:
        """`tokenizer`: the checkpoint's, as `tokenizers.Tokenizer` (fast, gives offsets).

        `speech` is None for a run that makes none.
        """
        self.tokenizer = tokenizer
        self.renderer = renderer
        self.media = media
        self.towers = towers
        self.speech = speech
        self._pad_kinds = {pad: kind for kind, pad in media.pads.items()}
        self._pad_pattern = re.compile("|".join(map(re.escape, media.pads.values())))

    # ------------------------------------------------------------------------------------ sizes

    def geometry(
        self, conversation: Conversation, headers: Sequence[MediaHeader], scale: float = 1.0
    ) -> tuple[ClipGeometry, ...]:
        """Planned size of every clip, in the conversation's order. Raises: SampleError."""
        parts = media_parts(conversation)
        if len(parts) != len(headers):
            raise ValueError(f"{conversation.source}: expected {len(parts)} media headers, got {len(headers)}")
        clips = []
        for part, header in zip(parts, headers, strict=True):
            if part.kind != header.kind:
                raise SampleError(f"{part.kind}s", f"the file is not of this kind but {header.kind}")
            assert part.media is not None
            clip = self.media.geometry(part.media, header, scale)
            clips.append(replace(clip, asked=part.media.options, source_size=(header.width, header.height)))
        return tuple(clips)

    def measure(
        self,
        conversation: Conversation,
        headers: Sequence[MediaHeader],
        clips: tuple[ClipGeometry, ...] | None = None,
    ) -> Extent:
        """Exact sizes from text and headers; `clips` where they were shrunk. Raises: SampleError."""
        clips = self.geometry(conversation, headers) if clips is None else clips
        tokens, weights = self._label(conversation, clips)
        num_loss_tokens = int(np.count_nonzero(weights))
        decoder_cost, tower_cost = self.towers.cost(len(tokens.ids), num_loss_tokens, clips)
        num_tokens, speech_cost, frames = len(tokens.ids), 0, []
        if self.speech is not None and (turns := self.speech.turns(conversation, tokens)):
            # speech has rows beside those of text: what has more of them says how many
            num_tokens = max(num_tokens, sum(self.speech.num_rows(turn, tokens) for turn in turns))
            speech_cost = self.speech.cost(turns, tokens)
            frames = [turn.num_frames for turn in turns]
        return Extent(
            num_tokens=num_tokens,
            num_loss_tokens=num_loss_tokens,
            weight_sum=float(weights.sum(dtype=np.float64)),
            num_patches=sum(math.prod(clip.grid_thw) for clip in clips if clip.grid_thw),
            num_audio_frames=sum(clip.num_mel_frames for clip in clips),
            cost=decoder_cost + tower_cost + speech_cost,
            tower_cost=tower_cost,
            speech_cost=speech_cost,
            num_code_labels=sum(frames) + len(frames),
            num_code_frames=sum(frames),
            clips=clips,
        )

    def shrink(
        self, conversation: Conversation, headers: Sequence[MediaHeader], max_tokens: int
    ) -> tuple[ClipGeometry, ...] | None:
        """The largest clips of lower resolution with which the sample fits, or None. Sound is never shortened."""
        for scale in SHRINK_STEPS:
            clips = self.geometry(conversation, headers, scale)
            if sum(clip.num_tokens for clip in clips) > max_tokens:  # no need to tokenize
                continue
            if self.measure(conversation, headers, clips).num_tokens <= max_tokens:
                return clips
        return None

    # ------------------------------------------------------------------------------------ tensors

    def encode(
        self, conversation: Conversation, clips: tuple[ClipGeometry, ...], decoded: Sequence[DecodedClip | None]
    ) -> Example:
        """The sample as tensors. A clip whose `decoded` is None keeps its tokens and positions, without features.

        Raises: SampleError where the decoded arrays are not of the planned size.
        """
        tokens, weights = self._label(conversation, clips)
        labels = np.full_like(tokens.ids, IGNORE_LABEL)
        np.copyto(labels[:-1], tokens.ids[1:], where=weights[:-1] > 0)
        vision: list[VisionClip] = []
        audio: list[AudioClip] = []
        longest = max((clip.num_mel_frames for clip in clips), default=0)
        for index, (clip, arrays) in enumerate(zip(clips, decoded, strict=True)):
            if arrays is None:
                continue
            patches, mel = self.towers.features(clip, arrays)
            if patches is not None:
                assert clip.grid_thw is not None
                rows = torch.from_numpy(tokens.vision_rows[index])
                vision.append(VisionClip(patches=patches, grid_thw=clip.grid_thw, token_index=rows))
            if mel is not None:
                rows = torch.from_numpy(tokens.audio_rows[index])
                audio.append(AudioClip(features=mel, token_index=rows, longest_frames=longest))
        speech: list[SpeechExample] = []
        if (layout := self.speech) is not None:
            rate = self.media.positions_per_second
            speech = [layout.encode(turn, tokens, rate) for turn in layout.turns(conversation, tokens)]
        return Example(
            speech=tuple(speech),
            id=conversation.id,
            input_ids=torch.from_numpy(tokens.ids),
            labels=torch.from_numpy(labels),
            loss_weights=torch.from_numpy(weights),
            position_ids=sample_positions(tokens.runs, past_time=self.media.past_time),
            vision=tuple(vision),
            audio=tuple(audio),
        )

    def prompt(
        self, conversation: Conversation, headers: Sequence[MediaHeader], decoded: Sequence[DecodedClip]
    ) -> dict[str, Any]:
        """Arguments of transformers' `generate`, batch of one: the turns before the last answer and its opening."""
        turns = conversation.turns
        while turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        asked = Conversation(id=conversation.id, source=conversation.source, turns=turns, tools=conversation.tools)
        num_clips = len(media_parts(asked))
        clips = self.geometry(asked, headers[:num_clips])
        text = self.renderer.prompt(self._write_boxes(asked, clips))
        tokens = self._tokenize(Rendered(text=text, weights=((len(text), 0.0),)), asked, clips)
        given = zip(clips, decoded[:num_clips], strict=True)
        features = [self.towers.normalised(self.towers.features(clip, arrays)) for clip, arrays in given]
        input_ids = torch.from_numpy(tokens.ids)[None]
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return inputs | self.media.generation_inputs(input_ids[0], clips, features)

    def resized(self, clip: ClipGeometry, decoded: DecodedClip) -> DecodedClip:
        """The clip with pictures in their planned size, from which `encode` makes the same."""
        return self.towers.resized(clip, decoded)

    @property
    def num_code_groups(self) -> int:
        """Codes of a frame of speech; 0 for a run that makes none."""
        return 0 if self.speech is None else self.speech.tokens.num_code_groups

    def collate_vision(self, clips: Sequence[VisionClip]) -> VisionBatch:
        return vision_batch(clips, self.towers.vision, self.towers.pixel_rules)

    def collate_audio(self, clips: Sequence[AudioClip]) -> AudioBatch | None:
        """None for a model without an audio tower."""
        assert self.towers.audio is not None or not clips, "sound for a model without an audio tower"
        return None if self.towers.audio is None else audio_batch(clips, self.towers.audio)

    # ------------------------------------------------------------------------------------ tokens

    def _label(self, conversation: Conversation, clips: Sequence[ClipGeometry]) -> tuple[ChatTokens, np.ndarray]:
        """The tokens, and weights float32 [t] of the labels: position i predicts token i + 1."""
        tokens = self._tokenize(self.renderer.render(self._write_boxes(conversation, clips)), conversation, clips)
        weights = np.zeros_like(tokens.weights)
        np.multiply(tokens.weights[1:], conversation.weight, out=weights[:-1])
        if not weights.any():
            raise SampleError("messages", "nothing to train on: no assistant turn with a weight above 0")
        return tokens, weights

    def _tokenize(self, rendered: Rendered, conversation: Conversation, clips: Sequence[ClipGeometry]) -> ChatTokens:
        text, order, moved = self._place_clips(rendered.text, conversation, clips)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        ends = np.array([end for end, _ in rendered.weights], np.int64)
        for place, difference in reversed(moved):
            ends[ends > place] += difference
        # a token that straddles a border belongs to where it begins: the prompt's last character is never trained
        of_runs = np.array([weight for _, weight in rendered.weights], np.float32)
        weights = of_runs[np.searchsorted(ends, starts, side="right")]
        return self._expand(np.array(encoding.ids, np.int64), weights, clips, order)

    def _write_boxes(self, conversation: Conversation, clips: Sequence[ClipGeometry]) -> Conversation:
        if not any(part.boxes for turn in conversation.turns for part in turn.parts):
            return conversation
        return write_boxes(conversation, clips, self.towers.vision.patch_size, relative=self.media.relative_boxes)

    def _place_clips(
        self, text: str, conversation: Conversation, clips: Sequence[ClipGeometry]
    ) -> tuple[str, list[int], list[tuple[int, int]]]:
        """The text with each clip's own words where the template put the token that stands for it.

        Returns the text, the clips in the order of the text, and of each (place in the old text, how much longer).
        """
        found = list(self._pad_pattern.finditer(text))
        numbers = {kind: [i for i, clip in enumerate(clips) if clip.kind == kind] for kind in MEDIA_KINDS}
        for kind, of_kind in numbers.items():
            num_places = sum(self._pad_kinds[match[0]] == kind for match in found)
            if num_places != len(of_kind):
                _refuse_places(
                    conversation, self._pad_pattern, f"{num_places} places for the row's {len(of_kind)}", kind
                )
        pieces, order, moved, done = [], [], [], 0
        for match in found:
            order.append(number := numbers[self._pad_kinds[match[0]]].pop(0))
            words, held = self.media.placeholder(clips[number]), self.media.held(clips[number])
            if not text.startswith(held, match.end()):
                raise SampleError(f"{clips[number].kind}s", f"the chat template writes no {held} after {match[0]}")
            pieces += [text[done : match.start()], words]
            done = match.end() + len(held)
            moved.append((match.start(), len(words) - (done - match.start())))
        return "".join([*pieces, text[done:]]), order, moved

    def _expand(
        self, ids: np.ndarray, weights: np.ndarray, clips: Sequence[ClipGeometry], order: Sequence[int]
    ) -> ChatTokens:
        """Put each clip's tokens where its pad tokens are."""
        is_pad = [ids == pad for pad in self.media.pad_ids]  # of few ids faster than isin
        pads = np.flatnonzero(np.logical_or.reduce(is_pad)) if order else ids[:0]
        parts = [(clip, part) for clip in order for part in self.media.tokens_of(clips[clip])]
        assert len(pads) == len(parts), (len(pads), len(parts))
        vision_rows: list[list[np.ndarray]] = [[] for _ in clips]
        audio_rows: list[list[np.ndarray]] = [[] for _ in clips]
        id_parts, weight_parts, done, length = [], [], 0, 0
        runs: list[int | np.ndarray] = []
        kinds: list[RunKind] = []
        for pad, (clip, part) in zip(pads, parts, strict=True):
            length += int(pad) - done
            vision_rows[clip].append(part.vision_rows + length)
            audio_rows[clip].append(part.audio_rows + length)
            length += len(part.ids)
            id_parts += [ids[done:pad], part.ids]
            weight_parts += [weights[done:pad], np.zeros(len(part.ids), np.float32)]
            runs += [int(pad) - done, part.block]
            both = len(part.audio_rows) and len(part.vision_rows)
            kinds += ["text", "both" if both else "sound" if len(part.audio_rows) else "picture"]
            done = int(pad) + 1
        return ChatTokens(
            ids=np.concatenate([*id_parts, ids[done:]]),
            weights=np.concatenate([*weight_parts, weights[done:]]),
            runs=[*runs, len(ids) - done],
            kinds=[*kinds, "text"],
            vision_rows=[np.concatenate(rows) for rows in vision_rows],
            audio_rows=[np.concatenate(rows) for rows in audio_rows],
        )


def _refuse_places(conversation: Conversation, pads: re.Pattern[str], found: str, kind: str) -> None:
    for turn in conversation.turns:
        for part in turn.parts:
            if match := pads.search(part.text):
                raise SampleError("messages", f"the text holds {match[0]}, which stands for media; remove it")
    raise SampleError(f"{kind}s", f"the chat template writes {found}")


def media_parts(conversation: Conversation) -> tuple[Part, ...]:
    """The conversation's media in the order in which headers, clips and decoded arrays are given."""
    return tuple(part for turn in conversation.turns for part in turn.parts if part.kind in MEDIA_KINDS)
