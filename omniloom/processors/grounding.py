"""Boxes and points in the text of a conversation, in the coordinates that a family was trained on.

A box is written as `[x1, y1, x2, y2]`, a point as `[x, y]`, of whole numbers: relative to 1000, or in pixels of the
image or frame as the tower sees it. Source: the published models' grounding examples (Qwen2.5-VL: absolute, Qwen3-VL:
relative).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from omniloom.types import Box, ClipGeometry, Conversation, Part

PLACEHOLDER = "<bbox>"


def clip_of(box: Box, clips: Sequence[ClipGeometry]) -> int:
    """Which of a row's clips a box is of."""
    kind = box.kind or next((clip.kind for clip in clips if clip.kind == "image"), "video")
    return [number for number, clip in enumerate(clips) if clip.kind == kind][box.clip]


def relative_points(box: Box, clips: Sequence[ClipGeometry]) -> tuple[float, ...]:
    """x and y of each point as shares of its clip's width and height, as the file is displayed."""
    size = clips[clip_of(box, clips)].source_size
    width, height = {"pixels": size, "one": (1, 1), "thousand": (1000, 1000)}[box.unit]
    return tuple(number / (height if place % 2 else width) for place, number in enumerate(box.points))


def write_boxes(
    conversation: Conversation, clips: Sequence[ClipGeometry], patch_size: int, *, relative: bool
) -> Conversation:
    """The conversation with coordinates in place of its boxes' placeholders."""

    def spell(box: Box) -> str:
        grid = clips[clip_of(box, clips)].grid_thw
        assert grid is not None
        width, height = (1000, 1000) if relative else (grid[2] * patch_size, grid[1] * patch_size)
        points = relative_points(box, clips)
        return str([round(share * (height if place % 2 else width)) for place, share in enumerate(points)])

    def write(part: Part) -> Part:
        if not part.boxes:
            return part
        first, *rest = part.text.split(PLACEHOLDER)
        text = first + "".join(spell(box) + words for box, words in zip(part.boxes, rest, strict=True))
        return replace(part, text=text, boxes=())

    turns = (replace(turn, parts=tuple(map(write, turn.parts))) for turn in conversation.turns)
    return replace(conversation, turns=tuple(turns))
