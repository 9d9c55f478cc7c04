"""Puts the examples of one pack into one `PackedBatch` of exactly T tokens.

Owns offsets, the padding tail and what a failed sample leaves behind. Knows no file and no family: media are batched
by the processor's `collate_vision` and `collate_audio`, which also add the null segment. Runs in the loader's workers.

Shapes that follow from T alone: input_ids, labels, loss_weights, is_padding `[T]`, position_ids `[3, T]`. `cu_seqlens`
has `num_bounds(number of segments)` entries, one of few lengths, none of them much too long: kernels work for empty
segments too;
its tail repeats T. The last non-empty segment is the padding, if there is any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from omniloom.types import (
    IGNORE_LABEL,
    TEXT,
    AudioBatch,
    AudioClip,
    Example,
    PackedBatch,
    Segments,
    VisionBatch,
    VisionClip,
)

_LEAST_BOUNDS = 16
_PADDING_ID = 0  # any id of the vocabulary: nothing reads what padding rows become


@dataclass(frozen=True, kw_only=True)
class FailedSlot:
    """A sample that was planned and cannot be had: its tokens become padding, so that no other sample moves."""

    id: str
    num_tokens: int


def num_bounds(num_segments: int) -> int:
    """Length of `cu_seqlens`: the least doubling of 16 that holds all bounds."""
    length = _LEAST_BOUNDS
    while length < num_segments + 1:
        length *= 2
    return length


def collate(
    examples: Sequence[Example | FailedSlot],
    *,
    pack_tokens: int,
    weight_scales: Sequence[float],
    collate_vision: Callable[[Sequence[VisionClip]], VisionBatch | None] | None,
    collate_audio: Callable[[Sequence[AudioClip]], AudioBatch | None] | None,
) -> PackedBatch:
    """Concatenate examples, each of one or more segments of its own, and pad to `pack_tokens`.

    `weight_scales[i]` multiplies the loss weights of example i. A collate callable is None where the model has no such
    tower. Media rows keep the order of the examples; their token_index becomes rows of the pack. Labels come shifted
    within each example, so that no loss crosses from one to the next.
    """
    assert len(examples) == len(weight_scales), (len(examples), len(weight_scales))
    lengths = [_length(example) for example in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    num_tokens = int(starts[-1])
    assert num_tokens <= pack_tokens, f"{num_tokens} tokens were planned into a pack of {pack_tokens}"
    input_ids = torch.full((pack_tokens,), _PADDING_ID, dtype=torch.int64)
    labels = torch.full((pack_tokens,), IGNORE_LABEL, dtype=torch.int64)
    loss_weights = torch.zeros(pack_tokens, dtype=torch.float32)
    position_ids = torch.zeros(3, pack_tokens, dtype=torch.int64)
    is_padding = torch.ones(pack_tokens, dtype=torch.bool)
    vision: list[VisionClip] = []
    audio: list[AudioClip] = []
    for example, scale, start in zip(examples, weight_scales, starts.tolist(), strict=False):
        if isinstance(example, FailedSlot):
            continue
        rows = slice(start, start + len(example.input_ids))
        input_ids[rows] = example.input_ids
        labels[rows] = example.labels
        loss_weights[rows] = (example.loss_weights.double() * scale).float()
        position_ids[:, rows] = example.position_ids
        is_padding[rows] = False
        vision += [replace(clip, token_index=clip.token_index + start) for clip in example.vision]
        audio += [replace(clip, token_index=clip.token_index + start) for clip in example.audio]
    return PackedBatch(
        input_ids=input_ids,
        labels=labels,
        loss_weights=loss_weights,
        loss_index=loss_weights.nonzero().flatten(),
        position_ids=position_ids,
        is_padding=is_padding,
        segments=_segments([length for example in examples for length in _segment_lengths(example)], pack_tokens),
        vision=collate_vision(vision) if collate_vision is not None else None,
        audio=collate_audio(audio) if collate_audio is not None else None,
        sample_ids=tuple(example.id for example in examples),
        sample_bounds=tuple(starts.tolist()),
    )


def blank_samples(batch: PackedBatch, positions: Sequence[int]) -> PackedBatch:
    """The batch with the given samples (by their place in `sample_ids`) turned into padding of weight zero.

    For samples that another rank of the group could not load. Their media stay in the towers' batches: what they fill
    is padding now, which nothing reads.
    """
    if not positions:
        return batch
    bounds = batch.sample_bounds
    input_ids, labels, position_ids = batch.input_ids.clone(), batch.labels.clone(), batch.position_ids.clone()
    loss_weights, is_padding = batch.loss_weights.clone(), batch.is_padding.clone()
    for position in positions:
        rows = slice(bounds[position], bounds[position + 1])
        input_ids[rows] = _PADDING_ID
        labels[rows] = IGNORE_LABEL
        position_ids[:, rows] = 0
        loss_weights[rows] = 0.0
        is_padding[rows] = True
    return replace(
        batch,
        input_ids=input_ids,
        labels=labels,
        loss_weights=loss_weights,
        loss_index=loss_weights.nonzero().flatten(),
        position_ids=position_ids,
        is_padding=is_padding,
        targets={
            name: replace(targets, weights=targets.weights.masked_fill(is_padding[targets.token_index], 0.0))
            for name, targets in batch.targets.items()
        },
    )


def sample_weight_sums(batch: PackedBatch) -> dict[str, tuple[float, ...]]:
    """What the weights of each loss add up to, sample by sample in the order of `sample_ids`, in float64."""
    bounds = batch.sample_bounds
    sums = {TEXT: _sum_between(bounds, batch.loss_weights.double())}
    for name, targets in batch.targets.items():
        weights = torch.zeros(batch.loss_weights.shape, dtype=torch.float64)
        sums[name] = _sum_between(bounds, weights.index_add_(0, targets.token_index, targets.weights.double()))
    return sums


def _sum_between(bounds: Sequence[int], weights: Tensor) -> tuple[float, ...]:
    return tuple(float(weights[low:high].sum()) for low, high in pairwise(bounds))


def weight_sum(batch: PackedBatch) -> float:
    """The pack's share of the denominator of text's loss, float64."""
    return sum(sample_weight_sums(batch)[TEXT], start=0.0)


def _length(example: Example | FailedSlot) -> int:
    return example.num_tokens if isinstance(example, FailedSlot) else len(example.input_ids)


def _segment_lengths(example: Example | FailedSlot) -> tuple[int, ...]:
    several = () if isinstance(example, FailedSlot) else example.segment_lengths
    return several or (_length(example),)


def _segments(lengths: list[int], pack_tokens: int) -> Segments:
    filled = [*lengths, pack_tokens - sum(lengths)]
    return Segments.from_lengths(filled, num_bounds=num_bounds(len([length for length in filled if length])))


def check_example(example: Example, num_tokens: int) -> str | None:
    """What of the plan an example breaks, or None. A sample that grew would push others out of the pack."""
    found = len(example.input_ids)
    if found != num_tokens:
        return f"planned as {num_tokens} tokens, encoded as {found}"
    if example.segment_lengths and sum(example.segment_lengths) != found:
        return f"its segments {example.segment_lengths} are not its {found} tokens"
    for name, tensor in (("labels", example.labels), ("loss_weights", example.loss_weights)):
        if tensor.shape != (found,):
            return f"{name} has shape {tuple(tensor.shape)}, expected ({found},)"
    if example.position_ids.shape != (3, found):
        return f"position_ids has shape {tuple(example.position_ids.shape)}, expected (3, {found})"
    if not _finite(example.loss_weights):
        return "a loss weight is not finite"
    return None


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
