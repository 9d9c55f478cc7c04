"""Rows as padded batches, the way a transformers training loop gets them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniloom.types import IGNORE_LABEL, Example, VisionClip


def write_padded_steps(
    directory: Path,
    warmup: Sequence[list[Example]],
    timed: Sequence[list[Example]],
    *,
    rows_per_batch: int,
    grouped_by_length: bool,
    token_ids: dict[str, int],
) -> None:
    """Write `step_NNN.pt`, each a list of padded batches: a step for each of the given ones, of as many rows.

    Grouping takes all timed rows as one pool, sorted by length and cut into batches whose order is shuffled: better for
    padding than transformers' own sampler, which sorts within pools of fifty batches.
    """
    directory.mkdir()
    pools = [(rows, 1) for rows in warmup] + [([row for rows in timed for row in rows], len(timed))]
    step = 0
    for rows, num_steps in pools:
        batches = _cut(rows, rows_per_batch, grouped_by_length)
        for index in range(num_steps):
            low, high = (round(bound * len(batches) / num_steps) for bound in (index, index + 1))
            torch.save([pad(batch, token_ids) for batch in batches[low:high]], directory / f"step_{step:03d}.pt")
            step += 1


def _cut(rows: Sequence[Example], rows_per_batch: int, grouped_by_length: bool) -> list[list[Example]]:
    order, rows = random.Random(0), list(rows)
    order.shuffle(rows)
    if grouped_by_length:
        rows.sort(key=lambda row: len(row.input_ids))
    batches = [rows[start : start + rows_per_batch] for start in range(0, len(rows), rows_per_batch)]
    order.shuffle(batches)
    return batches


def pad(rows: Sequence[Example], token_ids: dict[str, int]) -> dict[str, Tensor]:
    """What transformers' processor and a padding collator would hand over, positions computed beforehand."""
    longest = max(len(row.input_ids) for row in rows)
    batch: dict[str, Any] = {
        "input_ids": torch.full((len(rows), longest), token_ids["pad"]),
        "labels": torch.full((len(rows), longest), IGNORE_LABEL),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.int64),
        "position_ids": torch.zeros(3, len(rows), longest, dtype=torch.int64),
    }
    pictures: list[VisionClip] = []
    videos: list[VisionClip] = []
    for number, row in enumerate(rows):
        size = len(row.input_ids)
        batch["input_ids"][number, :size] = row.input_ids
        batch["labels"][number, 1:size] = row.labels[: size - 1]  # transformers shifts them itself
        batch["attention_mask"][number, :size] = 1
        batch["position_ids"][:, number, :size] = row.position_ids
        for clip in row.vision:
            is_video = int(row.input_ids[clip.token_index[0]]) == token_ids["video"]
            (videos if is_video else pictures).append(clip)
    for clips, pixels, grid in (
        (pictures, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if clips:
            batch[pixels] = torch.cat([clip.patches for clip in clips])
            batch[grid] = torch.tensor([clip.grid_thw for clip in clips])
    return batch | _pad_sounds([clip.features for row in rows for clip in row.audio])


def _pad_sounds(sounds: list[Tensor]) -> dict[str, Tensor]:
    if not sounds:
        return {}
    frames = [sound.shape[1] for sound in sounds]
    features = torch.zeros(len(sounds), sounds[0].shape[0], max(frames))
    mask = torch.zeros(len(sounds), max(frames), dtype=torch.int64)
    for number, (sound, size) in enumerate(zip(sounds, frames, strict=True)):
        features[number, :, :size] = sound
        mask[number, :size] = 1
    return {"input_features": features, "feature_attention_mask": mask}
