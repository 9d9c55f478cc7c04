"""Qwen3-Omni's spoken answers as rows: the user's turns before one, nine rows that open it, and a row for each frame.

Source: transformers, Qwen3OmniMoeForConditionalGeneration.generate, _get_talker_user_parts and
_get_talker_assistant_parts, and prepare_inputs_for_generation of its talker.
"""

from __future__ import annotations

import numpy as np
import torch

from omniloom.processors.positions import sample_positions
from omniloom.processors.speech import NUM_HEADER, ChatTokens, SpeechLayout, SpokenTurn
from omniloom.types import SpeechRows

NUM_PREFIX = 9  # rows of an answer before its first frame; the last of them predicts it


class Qwen3OmniSpeech(SpeechLayout):
    def num_rows(self, turn: SpokenTurn, chat: ChatTokens) -> int:
        return int(self._user_rows(chat)[: turn.start].sum()) + NUM_PREFIX + turn.num_frames

    def lay_out(self, turn: SpokenTurn, chat: ChatTokens, rate: float) -> SpeechRows:
        pad, begin, end = self.tokens.tts
        asked = np.flatnonzero(self._user_rows(chat)[: turn.start])
        header, words = np.split(chat.ids[turn.start : turn.end], [NUM_HEADER])
        opening = [*header, *[pad] * 4, begin, words[0]]
        spoken = [*words[1:], end, *[pad] * turn.num_frames][: turn.num_frames]
        text_ids = np.concatenate([chat.ids[asked], np.array([*opening, *spoken], np.int64)])
        is_media = np.isin(chat.ids[asked], self.tokens.media)
        nothink, think_begin, think_end, codec_pad, codec_begin = self.tokens.prefix
        return SpeechRows(
            text_ids=torch.from_numpy(text_ids),
            position_ids=self._positions(asked, NUM_PREFIX + turn.num_frames, chat, rate),
            media_index=(heard := torch.from_numpy(np.flatnonzero(is_media))),
            state_index=heard,
            hidden_index=torch.from_numpy(asked[is_media]),
            codec_index=torch.arange(len(asked) + NUM_HEADER, len(asked) + NUM_PREFIX),
            codec_ids=torch.tensor([nothink, think_begin, think_end, turn.speaker, codec_pad, codec_begin]),
            frame_index=torch.arange(len(asked) + NUM_PREFIX, len(text_ids)),
            frames=torch.from_numpy(turn.codes.T),
        )

    def _user_rows(self, chat: ChatTokens) -> np.ndarray:
        """Which tokens are of turns of the user: bool [t]."""
        im_start, _, user, _ = self.tokens.turn
        starts = np.maximum.accumulate(np.where(chat.ids == im_start, np.arange(len(chat.ids)), 0))
        roles = chat.ids[np.minimum(starts + 1, len(chat.ids) - 1)]
        return np.asarray(roles == user)

    def _positions(self, asked: np.ndarray, num_own: int, chat: ChatTokens, rate: float) -> torch.Tensor:
        """As the talker's own `get_rope_index` has them. It is told nothing of sound in videos: such a clip counts like
        text, unless pictures without sound follow it."""
        bounds = np.cumsum([0, *(run if isinstance(run, int) else run.shape[1] for run in chat.runs)])
        places = np.searchsorted(asked, bounds)
        kept: list[int | np.ndarray] = []
        followed = False
        for number in reversed(range(len(chat.runs))):
            run, kind, length = chat.runs[number], chat.kinds[number], int(places[number + 1] - places[number])
            if not length or isinstance(run, int) or (kind == "both" and not followed):
                kept.append(length)
            else:
                kept.append(run * np.array([[self.tokens.positions_per_second / rate], [1], [1]], np.float32))
            followed |= length > 0 and kind == "picture"
        return sample_positions([*reversed(kept), num_own])
