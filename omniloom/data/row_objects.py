"""Boxes and points of a row's `objects`, and the words for them, put where its text has placeholders.

Owns the spellings of `objects` and the count of placeholders against them. Coordinates stay as the row gives them: what
a family writes for them depends on the size to which image or video is resized, see `processors/grounding.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from omniloom.types import Box, BoxUnit, SampleError, suggest

_PLACEHOLDER = re.compile(r"<(bbox|point|ref-object)>")
_UNITS: dict[str, BoxUnit] = {"real": "pixels", "norm1": "one", "norm1000": "thousand"}
_UNITS |= {unit: unit for unit in get_args(BoxUnit)}
_LABELS, _PLACES = ("ref", "label", "caption"), ("bbox", "bbox_2d", "box", "point", "point_2d")
_CLIPS: dict[Literal["image", "video"], tuple[str, str]] = {
    "image": ("image_id", "image"),
    "video": ("video_id", "video"),
}


class RowObjects:
    """The objects of one row, handed out in the order in which its text asks for them."""

    def __init__(self, value: Any) -> None:
        """`value`: lists under `ref` and `bbox`, or a list of records, or either as JSON text. Raises: SampleError."""
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise SampleError("objects", f"not JSON: {error}") from None
        self._labels: list[str] = []
        self._boxes: list[Box] = []
        if isinstance(value, Mapping):
            self._labels = [str(label) for label in _as_list(value, _LABELS)]
            clips, unit = {key: _as_list(value, (key,)) for keys in _CLIPS.values() for key in keys}, _unit(value)
            for number, points in enumerate(_as_list(value, _PLACES)):
                of = {key: ids[number] for key, ids in clips.items() if number < len(ids)}
                self._boxes.append(_box(points, unit, of, f"objects.bbox[{number}]"))
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                self._add_record(item, f"objects[{number}]")
        elif value:
            raise SampleError("objects", f"expected lists under ref and bbox, or a list of records, got {value!r:.60}")
        self._num_boxes = self._num_labels = 0

    def _add_record(self, item: Any, field: str) -> None:
        if not isinstance(item, Mapping):
            raise SampleError(field, f"expected a record with {', '.join((*_LABELS, *_PLACES))}, got {item!r:.60}")
        label, points = (next((item[k] for k in keys if item.get(k) is not None), None) for keys in (_LABELS, _PLACES))
        if label is not None:
            self._labels.append(str(label))
        if points is not None:
            self._boxes.append(_box(points, _unit(item), item, field))

    def fill(self, text: str, *, in_json: bool = False) -> tuple[str, tuple[Box, ...]]:
        """The text with words for `<ref-object>`, and the boxes that its `<bbox>`s (for points, too) stand for."""
        boxes: list[Box] = []

        def put(match: re.Match[str]) -> str:
            if match[1] == "ref-object":
                self._num_labels += 1
                label = self._labels[self._num_labels - 1] if self._num_labels <= len(self._labels) else match[0]
                return json.dumps(label, ensure_ascii=False)[1:-1] if in_json else label
            self._num_boxes += 1
            if self._num_boxes <= len(self._boxes):
                boxes.append(self._boxes[self._num_boxes - 1])
            return "<bbox>"

        return _PLACEHOLDER.sub(put, text), tuple(boxes)

    def check_placed(self, kinds: Sequence[str]) -> None:
        """`kinds` are those of the row's clips.

        Raises: SampleError unless the text, if it asks for any object, asks for just these, of clips there are.
        """
        if not self._num_boxes and not self._num_labels:
            return  # the row's coordinates stand in its text
        if self._num_boxes != len(self._boxes) or self._num_labels > len(self._labels):
            raise SampleError(
                "objects",
                f"{self._num_boxes} <bbox> and {self._num_labels} <ref-object> in the text but {len(self._boxes)} "
                f"boxes and {len(self._labels)} names in the row; write one placeholder where each belongs",
            )
        for box in self._boxes:
            of = box.kind or ("image" if "image" in kinds or "video" not in kinds else "video")
            if box.clip >= (count := kinds.count(of)):
                raise SampleError("objects", f"a box is of {of} {box.clip} (from 0), the row has {count} {of}s")


def _as_list(value: Mapping[str, Any], keys: tuple[str, ...]) -> list[Any]:
    """What stands under the first of the keys that is there."""
    found: Any = next((value[key] for key in keys if value.get(key) is not None), [])
    return list(found) if isinstance(found, list | tuple) else [found]


def _unit(value: Mapping[str, Any]) -> BoxUnit:
    name = value.get("bbox_type", "real")
    if not isinstance(name, str) or name not in _UNITS:
        raise SampleError("objects.bbox_type", f"unknown kind {name!r}" + suggest(str(name), _UNITS))
    return _UNITS[name]


def _box(points: Any, unit: BoxUnit, of: Mapping[str, Any], field: str) -> Box:
    """`of` says which clip it is of, by one of the keys of `_CLIPS`, if any."""
    numbers = isinstance(points, list | tuple) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1e9 for number in points
    )
    if not numbers or len(points) < 2 or len(points) % 2:
        raise SampleError(field, f"expected [x, y] or [x1, y1, x2, y2], got {points!r:.60}")
    if len(points) == 4 and (points[0] > points[2] or points[1] > points[3]):
        raise SampleError(
            field, f"expected the left top and the right bottom corner as [x1, y1, x2, y2], got {list(points)}"
        )
    named = [(kind, of[key]) for kind, keys in _CLIPS.items() for key in keys if of.get(key) is not None]
    if len(named) > 1:
        raise SampleError(field, f"a box is of one image or one video, got {' and '.join(kind for kind, _ in named)}")
    kind, clip = named[0] if named else (None, 0)
    if not isinstance(clip, int) or isinstance(clip, bool) or clip < 0:
        raise SampleError(field, f"which {kind} it is of: expected a number, from 0, got {clip!r:.60}")
    return Box(points=tuple(map(float, points)), unit=unit, kind=kind, clip=clip)
