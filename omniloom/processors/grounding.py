"""Boxes and points in the text of a conversation, in the coordinates that a family was trained on.

A box is written as `[x1, y1, x2, y2]`, a point as `[x, y]`, of whole numbers: relative to 1000, or in pixels of the
image as the tower sees it. Source: the published models' grounding examples (Qwen2.5-VL: absolute, Qwen3-VL: relative).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from omniloom.types import Box, ClipGeometry, Conversation, Part

PLACEHOLDER = "<bbox>"


def relative_points(box: Box, image: ClipGeometry) -> tuple[float, ...]:
    """x and y of each point as shares of the image's width and height, as the file is displayed."""
    width, height = {"pixels": image.source_size, "one": (1, 1), "thousand": (1000, 1000)}[box.unit]
    return tuple(number / (height if place % 2 else width) for place, number in enumerate(box.points))


def write_boxes(
    conversation: Conversation, clips: Sequence[ClipGeometry], patch_size: int, *, relative: bool
) -> Conversation:
    """The conversation with coordinates in place of its boxes' placeholders."""
    images = [clip for clip in clips if clip.kind == "image"]

    def spell(box: Box) -> str:
        image = images[box.image]
        assert image.grid_thw is not None
        width, height = (1000, 1000) if relative else (image.grid_thw[2] * patch_size, image.grid_thw[1] * patch_size)
        points = relative_points(box, image)
        return str([round(share * (height if place % 2 else width)) for place, share in enumerate(points)])

    def write(part: Part) -> Part:
        if not part.boxes:
            return part
        first, *rest = part.text.split(PLACEHOLDER)
        text = first + "".join(spell(box) + words for box, words in zip(part.boxes, rest, strict=True))
        return replace(part, text=text, boxes=())

    turns = (replace(turn, parts=tuple(map(write, turn.parts))) for turn in conversation.turns)
    return replace(conversation, turns=tuple(turns))
