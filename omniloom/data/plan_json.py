"""Sizes and plans as JSON, without loss: for the planner's state in a checkpoint, its hash, and the extent cache.

Knows the fields of `types.py` and nothing else. Fields at their defaults are left out, so that most extents are short
and a field added later reads as its default.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from omniloom.types import BadSample, ClipGeometry, Extent, PackPlan, PlannedSample, StepPlan


def extent_to_json(extent: Extent) -> dict[str, Any]:
    record = _without_defaults(extent)
    if extent.clips:
        record["clips"] = [_without_defaults(clip) for clip in extent.clips]
    return record


def extent_from_json(record: dict[str, Any]) -> Extent:
    """Raises: TypeError or ValueError where the record is not an extent's."""
    clips = []
    for clip in record.get("clips", ()):
        arrays = {name: tuple(clip[name]) for name in ("grid_thw", "frame_indices") if name in clip}
        clips.append(ClipGeometry(**{**clip, **arrays}))
    return Extent(**{**record, "clips": tuple(clips)})


def sample_to_json(sample: PlannedSample) -> list[Any]:
    return [sample.row, sample.epoch, sample.weight_scale, extent_to_json(sample.extent)]


def sample_from_json(record: list[Any]) -> PlannedSample:
    row, epoch, weight_scale, extent = record
    return PlannedSample(row=row, epoch=epoch, weight_scale=weight_scale, extent=extent_from_json(extent))


def bad_to_json(bad: BadSample) -> list[Any]:
    return [bad.file, bad.line, bad.field, bad.reason, bad.epoch, bad.row]


def bad_from_json(record: list[Any]) -> BadSample:
    file, line, field, reason, epoch, row = record
    return BadSample(file=file, line=line, field=field, reason=reason, epoch=epoch, row=row)


def step_to_json(step: StepPlan) -> dict[str, Any]:
    return {
        "step": step.step,
        "rows_planned": step.rows_planned,
        "bad_rows": [bad_to_json(bad) for bad in step.bad_rows],
        "packs": [[pack.index, [sample_to_json(sample) for sample in pack.samples]] for pack in step.packs],
    }


def step_from_json(record: dict[str, Any]) -> StepPlan:
    return StepPlan(
        step=record["step"],
        rows_planned=record["rows_planned"],
        bad_rows=tuple(bad_from_json(bad) for bad in record["bad_rows"]),
        packs=tuple(
            PackPlan(index=index, samples=tuple(sample_from_json(sample) for sample in samples))
            for index, samples in record["packs"]
        ),
    )


def _without_defaults(value: Extent | ClipGeometry) -> dict[str, Any]:
    return {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if field.name != "clips" and getattr(value, field.name) != field.default
    }
