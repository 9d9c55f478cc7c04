"""The accuracy that a demo measured, as its report shows it: names, the mean, and its course over steps."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from omniloom.tools.charts import Chart, Figure, Series, line_chart, percent

MODALITY_NAMES = {"image": "Image", "audio": "Audio", "video": "Video", "joint": "Joint", "text": "Text"}
CONTROL_NAMES = {
    "accuracy_without_media": "media blanked",
    "accuracy_frozen_frame": "first frame frozen",
    "accuracy_muted": "sound muted",
}


def accuracy_figure(summary: Mapping[str, Any]) -> Figure | None:
    """The mean over modalities; None of a run that is no demo."""
    shares, blind = (summary.get(key) or {} for key in ("accuracy", "accuracy_without_media"))
    if not shares:
        return None
    detail = f"{percent(fmean(blind.values()))} with media blanked" if blind else "held out, exact match"
    return Figure(name="Accuracy", value=percent(fmean(shares.values())), detail=detail)


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
