"""The accuracy that a demo measured, as its report shows it: bars against controls, its course, and by question."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from omniloom.tools.charts import Chart, Figure, Series, line_chart, percent

MODALITY_NAMES = {"image": "Image", "audio": "Audio", "video": "Video", "joint": "Joint", "text": "Text"}
CONTROL_NAMES = {
    "accuracy_without_media": "media blanked",
    "accuracy_frozen_frame": "first frame frozen",
    "accuracy_muted": "sound muted",
}


class Bar(NamedTuple):
    name: str
    share: float
    tone: str


class BarGroup(NamedTuple):
    name: str
    bars: list[Bar]
    chance: float | None


def accuracy_figure(summary: Mapping[str, Any]) -> Figure | None:
    """The mean over modalities; None of a run that is no demo."""
    accuracy = _section(summary, "accuracy")
    if not accuracy:
        return None
    blind = _section(summary, "accuracy_without_media")
    detail = f"{percent(_mean(blind.values()))} with media blanked" if blind else "held out, exact match"
    return Figure(name="Accuracy", value=percent(_mean(accuracy.values())), detail=detail)


def accuracy_groups(summary: Mapping[str, Any]) -> list[BarGroup]:
    """A group of bars for each modality, its controls below it."""
    controls = {name: _section(summary, key) for key, name in CONTROL_NAMES.items()}
    chance = _section(summary, "chance")
    groups = []
    for modality, share in _section(summary, "accuracy").items():
        bars = [Bar("with media", float(share), "a")]
        bars += [Bar(name, float(found[modality]), "muted") for name, found in controls.items() if modality in found]
        groups.append(BarGroup(MODALITY_NAMES.get(modality, modality), bars, chance.get(modality)))
    return groups


def accuracy_details(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(modality, question, share) rows, where the summary tells questions apart."""
    return [
        (MODALITY_NAMES.get(modality, modality), question, percent(float(share)))
        for modality, questions in _section(summary, "accuracy_by_question").items()
        for question, share in questions.items()
    ]


def accuracy_chart(summary: Mapping[str, Any]) -> Chart | None:
    """Accuracy over steps, a line for each modality."""
    course = summary.get("accuracy_by_step")
    if not isinstance(course, list) or not course:
        return None
    series = [
        Series(
            name=MODALITY_NAMES.get(modality, modality),
            points=[(float(point["step"]), float(point[modality])) for point in course if modality in point],
            tone=tone,
            dots=True,
        )
        for modality, tone in zip((key for key in course[-1] if key != "step"), "abcd", strict=False)
    ]
    svg = line_chart(series, label="Accuracy over steps", unit="%", floor=0.0)
    return Chart(title="Accuracy", svg=svg, key=tuple((item.tone, item.name) for item in series))


def _section(summary: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = summary.get(key)
    return found if isinstance(found, dict) else {}


def _mean(values: Iterable[Any]) -> float:
    return statistics.fmean(float(value) for value in values)
