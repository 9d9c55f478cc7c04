"""Spoken answers as rows that a talker reads and predicts: what transformers' `generate` feeds it, laid out at once.

Each spoken turn is a segment of its own: what was said before it, rows that open the answer, and a row for each frame
of codes. A family's `SpeechLayout` says which token, state and code each row takes; what is spoken, what it predicts
and with which weight is said here. Knows of the conversation only its tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from omniloom.types import CODE0, CODES, Conversation, SampleError, Speech, SpeechExample, SpeechRows, Targets

NUM_HEADER = 3  # tokens that open an answer: its start, the role, the line's end

RunKind = Literal["text", "picture", "sound", "both"]


@dataclass(frozen=True, kw_only=True)
class SpeechTokens:
    """Ids that speech is laid out with, and the sizes of its codebooks."""

    turn: tuple[int, ...]  # <|im_start|>, <|im_end|>, user, assistant
    tts: tuple[int, ...]  # of text: pad, begin, end
    prefix: tuple[int, ...]  # of the codec, those that open an answer, in the family's order
    codec_eos: int
    media: tuple[int, ...]  # of text: what takes a hidden state in place of an embedding
    speakers: Mapping[str, int]  # voices by name, in lower case
    usual_speaker: str  # transformers' own default
    num_code_groups: int
    num_codes: int  # of each codebook
    positions_per_second: float
    of_recordings: str  # how recordings become codes, in words

    def voice(self, name: str, where: str) -> int:
        """The id of a voice, of the usual one where `name` is empty. Raises: SampleError about `where`."""
        if (found := self.speakers.get((name or self.usual_speaker).lower())) is None:
            said = f"unknown speaker {name!r}" if name else "no speaker is given"
            raise SampleError(where, f"{said}; the checkpoint knows {', '.join(self.speakers) or 'none'}")
        return found


@dataclass(frozen=True, kw_only=True)
class SpokenTurn:
    """Where a spoken turn lies in the tokens of its conversation."""

    start: int  # its <|im_start|>
    end: int  # its <|im_end|>
    codes: np.ndarray  # int64 [num_code_groups, F]
    speaker: int
    weight: float

    @property
    def num_frames(self) -> int:
        return int(self.codes.shape[1])


@dataclass(frozen=True, kw_only=True)
class ChatTokens:
    """A conversation's tokens as the chat processor made them."""

    ids: np.ndarray  # int64 [t]
    weights: np.ndarray  # float32 [t]: of each token as something to predict
    runs: Sequence[int | np.ndarray]  # see `positions.sample_positions`
    kinds: Sequence[RunKind]  # of the runs
    vision_rows: Sequence[np.ndarray]  # per clip, int64
    audio_rows: Sequence[np.ndarray]


class SpeechLayout(ABC):
    """Lays out the spoken turns of conversations for one checkpoint."""

    def __init__(self, tokens: SpeechTokens, cost: Callable[[Sequence[tuple[int, int]]], int]) -> None:
        """`cost`: estimated FLOPs / 1e6 of turns, each given as its rows and frames."""
        self.tokens = tokens
        self._cost = cost

    def turns(self, conversation: Conversation, chat: ChatTokens) -> list[SpokenTurn]:
        """The turns that are spoken and trained. Raises: SampleError for speech that the model cannot have."""
        if not any(turn.speech for turn in conversation.turns):
            return []
        im_start, im_end, _, assistant = self.tokens.turn
        ids = chat.ids
        starts = np.flatnonzero((ids[:-1] == im_start) & (ids[1:] == assistant))
        answers = [(index, turn) for index, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        if len(starts) != len(answers):
            reason = f"the chat template writes {len(starts)} answers for the row's {len(answers)}"
            raise SampleError("speech", f"{reason}, so that it is not known which is spoken")
        found = []
        for start, (index, turn) in zip(starts.tolist(), answers, strict=True):
            if turn.speech is None:
                continue
            where = f"messages[{index}].speech"
            ends = np.flatnonzero(ids[start:] == im_end)
            end = start + int(ends[0]) if len(ends) else len(ids)
            if end <= start + NUM_HEADER or end == len(ids):
                raise SampleError(where, "the answer has no words, and what is spoken follows words; give its text")
            if weight := float(chat.weights[end]) * conversation.weight:
                codes = self._codes(turn.speech, where)
                speaker = self.tokens.voice(turn.speech.speaker, f"{where}, speaker")
                found.append(SpokenTurn(start=start, end=end, codes=codes, speaker=speaker, weight=weight))
        return found

    @abstractmethod
    def num_rows(self, turn: SpokenTurn, chat: ChatTokens) -> int:
        """Of the turn's segment."""

    @abstractmethod
    def lay_out(self, turn: SpokenTurn, chat: ChatTokens, rate: float) -> SpeechRows:
        """The rows of a turn's segment, the last of them those of its frames; `rate` as in `encode`."""

    def cost(self, turns: Sequence[SpokenTurn], chat: ChatTokens) -> int:
        return self._cost([(self.num_rows(turn, chat), turn.num_frames) for turn in turns]) if turns else 0

    def encode(self, turn: SpokenTurn, chat: ChatTokens, rate: float) -> SpeechExample:
        """Rows and targets of a turn; `rate` is the positions per second of the runs' blocks."""
        rows = self.lay_out(turn, chat, rate)
        num_rows = len(rows.text_ids)
        predicting = torch.arange(num_rows - 1 - turn.num_frames, num_rows)  # the row before predicts a frame's first
        weights = torch.full((turn.num_frames + 1,), turn.weight)
        ends = torch.tensor([*turn.codes[0], self.tokens.codec_eos])
        targets = {CODE0: Targets(token_index=predicting, weights=weights, values=ends)}
        if self.tokens.num_code_groups > 1:
            targets[CODES] = Targets(token_index=predicting[:-1], weights=weights[:-1], values=rows.frames)
        return SpeechExample(rows=rows, targets=targets)

    def _codes(self, speech: Speech, where: str) -> np.ndarray:
        groups = self.tokens.num_code_groups
        lengths = {len(group) for group in speech.codes}
        if len(speech.codes) != groups or len(lengths) != 1:
            got = f"{len(speech.codes)} groups of {', '.join(map(str, sorted(lengths))) or 'no'} frames"
            raise SampleError(where, f"expected codes of {groups} groups, all of as many frames, got {got}")
        codes = np.array(speech.codes, np.int64)
        if codes.shape[1] == 0:
            raise SampleError(where, "expected codes of at least one frame, got none")
        low, high, limit = int(codes.min()), int(codes.max()), self.tokens.num_codes
        if low < 0 or high >= limit:
            raise SampleError(
                where, f"codes must be from 0 to {limit - 1}, those of the codebooks, got {low} to {high}"
            )
        return codes
