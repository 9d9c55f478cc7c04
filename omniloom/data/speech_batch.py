"""The speech of a pack: rows of spoken turns beside the rows of their samples' text, and what they predict.

Runs in the loader's workers, behind `collate`. Knows no codec.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from omniloom.data.collate import FailedSlot, num_bounds
from omniloom.types import CODE0, CODES, Example, PackedBatch, Segments, SpeechBatch, SpeechExample, SpeechRows, Targets


class _Placed(NamedTuple):
    """A spoken turn in the pack."""

    turn: SpeechExample
    start: int  # its first row
    sample_start: int  # that of its sample
    scale: float  # of its weights


def add_speech(
    batch: PackedBatch, slots: Sequence[Example | FailedSlot], scales: Sequence[float], num_code_groups: int
) -> PackedBatch:
    """The pack with the speech of the samples that it was made of, their weights multiplied by `scales`."""
    placed, segments = [], []
    text_ids, position_ids = torch.zeros_like(batch.labels), torch.zeros_like(batch.position_ids)
    is_padding = torch.ones_like(batch.is_padding)
    for slot, scale, (start, end) in zip(slots, scales, pairwise(batch.sample_bounds), strict=True):
        row = start
        for turn in () if isinstance(slot, FailedSlot) else slot.speech:
            placed.append(_Placed(turn, row, start, scale))
            own = slice(row, row + len(turn.rows.text_ids))
            text_ids[own], position_ids[:, own], is_padding[own] = turn.rows.text_ids, turn.rows.position_ids, False
            segments.append(own.stop - own.start)
            row = own.stop
        segments.append(end - row)
    segments.append(len(text_ids) - batch.sample_bounds[-1])
    nothing, no_frames = torch.zeros(0, dtype=torch.int64), torch.zeros(0, num_code_groups, dtype=torch.int64)

    def joined(index_of: Callable[[SpeechRows], Tensor]) -> Tensor:
        return torch.cat([nothing, *(index_of(one.turn.rows) + one.start for one in placed)])

    rows = SpeechRows(
        text_ids=text_ids,
        position_ids=position_ids,
        media_index=joined(lambda own: own.media_index),
        state_index=joined(lambda own: own.state_index),
        hidden_index=torch.cat([nothing, *(one.turn.rows.hidden_index + one.sample_start for one in placed)]),
        codec_index=joined(lambda own: own.codec_index),
        codec_ids=torch.cat([nothing, *(one.turn.rows.codec_ids for one in placed)]),
        frame_index=joined(lambda own: own.frame_index),
        frames=torch.cat([no_frames, *(one.turn.rows.frames for one in placed)]),
    )
    targets = {CODE0: _join(placed, CODE0, nothing)}
    if num_code_groups > 1:
        targets[CODES] = _join(placed, CODES, no_frames)
    bounds = Segments.from_lengths(segments, num_bounds=num_bounds(sum(length > 0 for length in segments)))
    speech = SpeechBatch(rows=rows, segments=bounds, is_padding=is_padding)
    return replace(batch, speech=speech, targets={**batch.targets, **targets})


def _join(placed: Sequence[_Placed], name: str, no_values: Tensor) -> Targets:
    """The targets of one loss; `no_values`: those of no turn."""
    parts = [(one.turn.targets[name], one) for one in placed]
    return Targets(
        token_index=torch.cat([no_values.new_zeros(0), *(part.token_index + one.start for part, one in parts)]),
        weights=torch.cat([torch.zeros(0), *((part.weights.double() * one.scale).float() for part, one in parts)]),
        values=torch.cat([no_values, *(part.values for part, _ in parts)]),
    )
