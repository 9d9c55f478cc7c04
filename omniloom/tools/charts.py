"""Small line charts as inline SVG text, for pages that must work without a network.

Owns scales, ticks and thinning of long series. Knows nothing of runs; colours are the page's CSS classes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 360, 172
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 8, 20
TONES = "abcdef"
LOG_SPAN = 100.0  # largest over smallest
MAX_HOVERS = 80  # places of a chart that tell their values
MAX_POINTS = 240  # a line of more is thinned to the means of equal stretches

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]  # data coordinates to those of the drawing


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: `points` are (x, y) in order of x; y that is not finite is left out and marked."""

    name: str
    points: Points
    tone: str = "a"  # CSS class, one of TONES
    raw: bool = False  # draw faintly, with a moving mean in full colour above it
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with its title; `svg` is "" where there is nothing to draw."""

    title: str
    svg: str
    last: str = ""  # the newest value, in words
    key: tuple[tuple[str, str], ...] = ()  # (tone, name) of the lines, where there are several


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A big number: what, how much, and a line of detail below."""

    name: str
    value: str
    detail: str = ""


def line_chart(
    series: Sequence[Series], *, label: str, unit: str = "", floor: float | None = None, log: bool = False
) -> str:
    """An `<svg>` of the series over a common x axis; "" where nothing is finite.

    `unit` is one of "", "%", "bytes", "count": how y ticks are written. `floor` is a y that must be in the picture.
    Where all y are positive it is drawn with a log axis, too, which has no floor; the page's CSS shows one of the two.
    With `log` that is the log axis, unless the reader chooses, where y spans more than LOG_SPAN.
    """
    finite = [point for item in series for point in _finite(item.points)]
    if not finite:
        return ""
    values = [y for _, y in finite]
    low_x, high_x = min(x for x, _ in finite), max(x for x, _ in finite)

    def across(x: float) -> float:
        return LEFT + ((x - low_x) / (high_x - low_x) if high_x > low_x else 0.5) * (WIDTH - LEFT - RIGHT)

    views = {"linear": _view(series, across, unit, floor, log=False)}
    if min(values) > 0:
        views["log"] = _view([_logged(item) for item in series], across, unit, None, log=True)
    shown = "log" if log and min(values) > 0 and max(values) / min(values) > LOG_SPAN else "linear"
    classes = f"chart shows-{shown}" + (" both" if len(views) > 1 else "")
    parts = [f'<svg class="{classes}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for name in sorted(views, key=lambda name: name != shown):
        parts += [f'<g class="axis-{name}">', *views[name], "</g>"]
    ticks_x = _ticks(low_x, high_x, 5, whole=True) if high_x > low_x else [low_x]
    parts += [_mark(across(tick), fmt(tick, "count")) for tick in ticks_x if low_x <= tick <= high_x]
    for x in sorted({x for item in series for x, y in item.points if not math.isfinite(y)}):
        left = across(min(max(x, low_x), high_x))
        parts.append(f'<line class="lost" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    return "".join([*parts, *_hovers(series, across, unit), "</svg>"])


def _logged(item: Series) -> Series:
    return replace(item, points=[(x, math.log10(y) if math.isfinite(y) else y) for x, y in item.points])


def _view(
    series: Sequence[Series], across: Callable[[float], float], unit: str, floor: float | None, *, log: bool
) -> list[str]:
    """Grid and lines on one y axis; with `log` the y are logarithms."""
    low_y, high_y = _bounds([y for item in series for y in _extremes(item)], floor)
    scale = _byte_unit(high_y)[0] if unit == "bytes" and not log else 1.0  # round numbers of MiB, not of bytes
    ticks = [tick * scale for tick in _ticks(low_y / scale, high_y / scale, 4, whole=log or unit == "count")]
    low_y, high_y = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return across(x), HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    lines = [part for item in series for part in _draw(item, place)]
    return [*_grid(ticks, place, lambda tick: fmt(10**tick if log else tick, unit)), *lines]


def _hovers(series: Sequence[Series], across: Callable[[float], float], unit: str) -> list[str]:
    """Strips that say, under the pointer, what each line has there: its newest value up to that x."""
    finite = [(item.name, _finite(item.points)) for item in series]
    places = sorted({x for _, points in finite for x, _ in points})
    chosen = [places[round(at)] for at in np.linspace(0, len(places) - 1, min(len(places), MAX_HOVERS))]
    edges = [LEFT, *((across(a) + across(b)) / 2 for a, b in pairwise(chosen)), WIDTH - RIGHT]
    parts = []
    for x, (start, stop) in zip(chosen, pairwise(edges), strict=True):
        found = [
            (name, points[bisect_right(points, x, key=lambda point: point[0]) - 1]) for name, points in finite if points
        ]
        words = "\n".join(f"{name} {fmt(y, unit)}" for name, (at, y) in found if at <= x)
        box = f'x="{start:.1f}" y="{TOP}" width="{max(stop - start, 0.1):.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        parts.append(f'<rect class="hover" {box}><title>{fmt(x, "count")}\n{escape(words)}</title></rect>')
    return parts


def _grid(ticks: Sequence[float], place: Place, write: Callable[[float], str]) -> list[str]:
    parts = []
    for tick in ticks:
        _, y = place(0.0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{write(tick)}</text>')
    return parts


def _mark(x: float, text: str) -> str:
    anchor = "end" if x > WIDTH - 24 else "middle"
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{text}</text>'


def heat_map(rows: Sequence[Sequence[float]], *, label: str) -> str:
    """An `<svg>` of a cell for each value, darker for more: full colour is twice the mean of its row, or beyond."""
    width, height = (WIDTH - LEFT - RIGHT) / max(map(len, rows)), (HEIGHT - TOP - BOTTOM) / len(rows)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for down, row in enumerate(rows):
        mean = sum(row) / len(row) or 1.0
        for across, value in enumerate(row):
            x, y, share = LEFT + across * width, TOP + down * height, min(value / mean / 2, 1.0)
            box = f'x="{x:.2f}" y="{y:.2f}" width="{width * 0.94:.2f}" height="{height * 0.94:.2f}"'
            parts.append(f'<rect class="cell" {box} fill-opacity="{share:.2f}"><title>{fmt(value)}</title></rect>')
    for down in sorted({0, len(rows) - 1}):
        y = TOP + (down + 0.5) * height + 3
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">layer {down}</text>')
    return "".join([*parts, "</svg>"])


def _draw(item: Series, place: Place) -> list[str]:
    finite, parts = _finite(item.points), []
    drawn = _thin(finite)
    is_noisy = item.raw and len(drawn) > 8
    if is_noisy:  # the CSS chooses among as it is, a little smoothed, much
        parts += ['<g class="noisy">', _polyline(drawn, place, f"raw {item.tone}")]
        parts.append(_polyline(_thin(_moving_mean(finite, 8)), place, f"much {item.tone}"))
        drawn = _thin(_moving_mean(finite, 80))
    parts += [_polyline(drawn, place, f"line {item.tone}"), *(["</g>"] if is_noisy else [])]
    if item.dots or len(drawn) == 1:
        for x, y in (place(*point) for point in drawn):
            parts.append(f'<circle class="dot {item.tone}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')
    return parts


def _polyline(points: Points, place: Place, css_class: str) -> str:
    text = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
    return f'<polyline class="{css_class}" points="{text}"/>'


def _thin(points: Points) -> Points:
    """At most MAX_POINTS points, means of equal stretches; the first and the last stay where they are."""
    if len(points) <= MAX_POINTS:
        return points
    return [points[0], *(tuple(part.mean(0)) for part in np.array_split(points[1:-1], MAX_POINTS - 2)), points[-1]]


def _moving_mean(points: Points, part: int) -> Points:
    """Each y replaced by the mean over a window that reaches a `part`-th of the series to either side."""
    reach = max(1, len(points) // part)
    sums = np.cumsum([0.0, *(y for _, y in points)])
    stops = np.minimum(np.arange(len(points)) + reach + 1, len(points))
    starts = np.maximum(np.arange(len(points)) - reach, 0)
    return [(x, float(y)) for (x, _), y in zip(points, (sums[stops] - sums[starts]) / (stops - starts), strict=True)]


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _extremes(item: Series) -> list[float]:
    """The y values that the scale must show: a noisy line may leave the picture at its highest hundredth."""
    finite = _finite(item.points)
    values = sorted(y for _, y in finite)
    if item.raw and len(values) > 50:
        usual = values[math.floor(len(values) * 0.99)]
        return [values[0], max(usual, *(y for _, y in _moving_mean(finite, 80)))]
    return values[:1] + values[-1:]


def _bounds(values: Sequence[float], floor: float | None) -> tuple[float, float]:
    low, high = min(values), max(values)
    if floor is not None:
        low, high = min(low, floor), max(high, floor)
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # alike, but for the rounding of means
        margin = abs(high) / 2 or 1.0
        below = 0.0 if low == floor else min(margin, low) if low >= 0 else margin  # figures that are never negative
        return low - below, high + margin
    return low, high


def _ticks(low: float, high: float, wanted: int, *, whole: bool = False) -> list[float]:
    """Round numbers that span low to high (x axes: lie within), about `wanted` of them."""
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= wanted)
    if whole:
        step = max(1.0, round(step))
    first = math.floor(low / step)
    count = max(1, math.ceil(round(high / step - first, 6)))
    return [(first + index) * step for index in range(count + 1)]


def fmt(value: float, unit: str = "") -> str:
    """A number as people write it: three figures, with k, M or G for thousands, or as % or bytes."""
    if not math.isfinite(value):
        return str(value)
    if unit == "%":
        return f"{100 * value:.3g}%"
    if unit == "bytes":
        factor, name = _byte_unit(value)
        return f"{_figures(value / factor)} {name}"
    for factor, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{_figures(value / (1e3 if name == 'k' else factor))}{name}"
    if unit == "count":
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    """A share with one figure behind the point, if that is not zero."""
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _byte_unit(value: float) -> tuple[float, str]:
    units = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
    return next((unit for unit in units if abs(value) >= unit[0]), (1.0, "B"))


def _figures(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
