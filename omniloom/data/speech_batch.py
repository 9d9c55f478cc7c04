"""The speech of a pack: rows of spoken turns beside the rows of their samples' text, and what they predict.

Runs in the loader's workers, behind `collate`. Knows no codec.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from omniloom.data.collate import FailedSlot, num_bounds, padding_rows
from omniloom.types import CODE0, CODES, Example, PackedBatch, Segments, SpeechBatch, SpeechExample, SpeechRows, Targets


def add_speech(
    batch: PackedBatch, slots: Sequence[Example | FailedSlot], scales: Sequence[float], num_code_groups: int
) -> PackedBatch:
    """The pack with the speech of the samples that it was made of, their weights multiplied by `scales`."""
    given = [None if isinstance(slot, FailedSlot) else slot.speech for slot in slots]
    parts = [_no_speech(num_code_groups) if speech is None else speech for speech in (*given, None)]
    starts = batch.sample_bounds
    lengths = [high - low for low, high in pairwise((*starts, len(batch.labels)))]
    own = [len(part.rows.text_ids) for part in parts]
    segments = [length for part, size, rows in zip(parts, lengths, own, strict=True)
                for length in (*part.segment_lengths, size - rows)]  # fmt: skip

    def moved(index_of: Callable[[SpeechRows], Tensor]) -> Tensor:
        return torch.cat([index_of(part.rows) + start for part, start in zip(parts, starts, strict=True)])

    def padded(values_of: Callable[[SpeechRows], Tensor]) -> Tensor:
        rooms = zip(parts, lengths, own, strict=True)
        return torch.cat([pad(values_of(part.rows), (0, size - rows)) for part, size, rows in rooms], dim=-1)

    rows = SpeechRows(
        text_ids=padded(lambda own: own.text_ids),
        position_ids=padded(lambda own: own.position_ids),
        media_index=moved(lambda own: own.media_index),
        state_index=moved(lambda own: own.state_index),
        hidden_index=moved(lambda own: own.hidden_index),
        codec_index=moved(lambda own: own.codec_index),
        codec_ids=torch.cat([part.rows.codec_ids for part in parts]),
        frame_index=moved(lambda own: own.frame_index),
        frames=torch.cat([part.rows.frames for part in parts]),
    )
    targets = {
        name: _join([part.targets[name] for part in parts], starts, (*scales, 1.0)) for name in parts[-1].targets
    }
    bounds = Segments.from_lengths(segments, num_bounds=num_bounds(sum(length > 0 for length in segments)))
    speech = SpeechBatch(rows=rows, segments=bounds, is_padding=padding_rows(own, lengths))
    return replace(batch, speech=speech, targets={**batch.targets, **targets})


def _join(parts: Sequence[Targets], starts: Sequence[int], scales: Sequence[float]) -> Targets:
    weights = [(part.weights.double() * scale).float() for part, scale in zip(parts, scales, strict=True)]
    return Targets(
        token_index=torch.cat([part.token_index + start for part, start in zip(parts, starts, strict=True)]),
        weights=torch.cat(weights),
        values=torch.cat([part.values for part in parts]),
    )


def _no_speech(num_code_groups: int) -> SpeechExample:
    nothing, no_frames = torch.zeros(0, dtype=torch.int64), torch.zeros(0, num_code_groups, dtype=torch.int64)
    rows = SpeechRows(
        text_ids=nothing,
        position_ids=torch.zeros(3, 0, dtype=torch.int64),
        media_index=nothing,
        state_index=nothing,
        hidden_index=nothing,
        codec_index=nothing,
        codec_ids=nothing,
        frame_index=nothing,
        frames=no_frames,
    )
    values = {CODE0: nothing, **({CODES: no_frames} if num_code_groups > 1 else {})}
    targets = {
        name: Targets(token_index=nothing, weights=torch.zeros(0), values=codes) for name, codes in values.items()
    }
    return SpeechExample(rows=rows, targets=targets, segment_lengths=())
