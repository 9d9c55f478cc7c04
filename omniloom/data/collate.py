"""Puts the examples of one pack into one `PackedBatch` of exactly T tokens.

Owns offsets, the padding tail and what a failed sample leaves behind. Knows no file and no family: media are batched
by the processor's `collate_vision` and `collate_audio`, which also add the null segment. Runs in the loader's workers.

Shapes that follow from T alone: input_ids, labels, loss_weights, is_padding `[T]`, position_ids `[3, T]`. `cu_seqlens`
has `num_bounds(number of segments)` entries, one of few lengths, none of them much too long: kernels work for empty
segments too; its tail repeats T. The last non-empty segment is the padding, if there is any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

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


def _padding_rows(kept: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Which rows are padding, bool: of each slot those past the ones that are kept."""
    pairs = [size for rows, length in zip(kept, lengths, strict=True) for size in (rows, length - rows)]
    return torch.tensor([False, True] * len(kept)).repeat_interleave(torch.tensor(pairs))


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
    within each example, so that no loss crosses from one to the next. A text with fewer rows than its speech is padded.
    """
    num_tokens = sum(slot.num_tokens for slot in examples)
    assert num_tokens <= pack_tokens, f"{num_tokens} tokens were planned into a pack of {pack_tokens}"
    slots = [*examples, FailedSlot(id="", num_tokens=pack_tokens - num_tokens)]
    parts = [_padding(slot) if isinstance(slot, FailedSlot) else _filled(slot) for slot in slots]
    lengths = [part.num_tokens for part in parts]
    starts = list(accumulate(lengths[:-1], initial=0))
    scaled = zip(parts, (*weight_scales, 1.0), strict=True)
    loss_weights = torch.cat([(part.loss_weights.double() * scale).float() for part, scale in scaled])
    kept = [0 if isinstance(slot, FailedSlot) else len(slot.input_ids) for slot in slots]
    segments = [length for part in parts for length in part.segment_lengths or (len(part.input_ids),)]
    placed = list(zip(parts, starts, strict=True))
    vision = [replace(clip, token_index=clip.token_index + start) for part, start in placed for clip in part.vision]
    audio = [replace(clip, token_index=clip.token_index + start) for part, start in placed for clip in part.audio]
    return PackedBatch(
        input_ids=torch.cat([part.input_ids for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        loss_weights=loss_weights,
        loss_index=loss_weights.nonzero().flatten(),
        position_ids=torch.cat([part.position_ids for part in parts], dim=1),
        is_padding=_padding_rows(kept, lengths),
        segments=Segments.from_lengths(segments, num_bounds=num_bounds(sum(length > 0 for length in segments))),
        vision=collate_vision(vision) if collate_vision is not None else None,
        audio=collate_audio(audio) if collate_audio is not None else None,
        sample_ids=tuple(example.id for example in examples),
        sample_bounds=tuple(starts),
    )


def _filled(example: Example) -> Example:
    """An example whose speech has more rows than its text, padded to as many."""
    rest = example.num_tokens - len(example.input_ids)
    if not rest:
        return example
    pad = torch.nn.functional.pad
    return replace(
        example,
        input_ids=pad(example.input_ids, (0, rest), value=_PADDING_ID),
        labels=pad(example.labels, (0, rest), value=IGNORE_LABEL),
        loss_weights=pad(example.loss_weights, (0, rest)),
        position_ids=pad(example.position_ids, (0, rest)),
        segment_lengths=(*(example.segment_lengths or (len(example.input_ids),)), rest),
    )


def _padding(slot: FailedSlot) -> Example:
    ids = torch.full((slot.num_tokens,), _PADDING_ID)
    return Example(
        id=slot.id,
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE_LABEL),
        loss_weights=torch.zeros(slot.num_tokens),
        position_ids=torch.zeros(3, slot.num_tokens, dtype=torch.int64),
    )


def blank_samples(batch: PackedBatch, positions: Sequence[int]) -> PackedBatch:
    """The batch with the given samples (by their place in `sample_ids`) turned into padding of weight zero.

    For samples that another rank of the group could not load. Their media stay in the towers' batches: what they fill
    is padding now, which nothing reads.
    """
    if not positions:
        return batch
    failed = torch.zeros_like(batch.is_padding)
    for position in positions:
        failed[batch.sample_bounds[position] : batch.sample_bounds[position + 1]] = True
    loss_weights, is_padding = batch.loss_weights.masked_fill(failed, 0.0), batch.is_padding | failed
    return replace(
        batch,
        input_ids=batch.input_ids.masked_fill(failed, _PADDING_ID),
        labels=batch.labels.masked_fill(failed, IGNORE_LABEL),
        loss_weights=loss_weights,
        loss_index=loss_weights.nonzero().flatten(),
        position_ids=batch.position_ids.masked_fill(failed, 0),
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


def check_example(example: Example, num_tokens: int) -> str | None:
    """What of the plan an example breaks, or None. A sample that grew would push others out of the pack."""
    if example.num_tokens != num_tokens:
        return f"planned as {num_tokens} tokens, encoded as {example.num_tokens}"
    found = len(example.input_ids)
    if example.segment_lengths and sum(example.segment_lengths) != found:
        return f"its segments {example.segment_lengths} are not its {found} tokens"
    for name, tensor in (("labels", example.labels), ("loss_weights", example.loss_weights)):
        if tensor.shape != (found,):
            return f"{name} has shape {tuple(tensor.shape)}, expected ({found},)"
    if example.position_ids.shape != (3, found):
        return f"position_ids has shape {tuple(example.position_ids.shape)}, expected (3, {found})"
    return None if bool(example.loss_weights.isfinite().all()) else "a loss weight is not finite"
