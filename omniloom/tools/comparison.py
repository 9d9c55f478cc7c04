"""Several runs on one page: `omniloom report RUN RUN ...`. What differs in their configs, their figures, their curves.

`report.py` draws one run; this uses its parts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from omniloom.checkpoint.files import write_text
from omniloom.checkpoint.run_lock import is_held
from omniloom.options import as_yaml
from omniloom.run.answer_metrics import is_lower_better
from omniloom.run.directory import flat
from omniloom.tools.charts import TONES, Chart, Series, fmt, line_chart
from omniloom.tools.report import groups_of, open_run_files, state_of, template, title_of
from omniloom.tools.run_files import RunFiles, points_of

Table = list[list[str]]
UNITS = {"tokens_per_second": "count", "peak_memory_bytes": "bytes", "mfu": "%", "data_wait_fraction": "%"}


def write_comparison(runs: Sequence[Path], page: Path) -> Path:
    """Draw a page of several runs. Returns its path. Raises: ValueError for what is no run."""
    files = [open_run_files(run) for run in runs]
    names = _names(runs)
    text = template("comparison.html.jinja").render(
        runs=list(zip(_tones(names), names, strict=True)),
        figures=_figures(files, names, now=time.time()),
        differences=_differences(files),
        names=names,
        charts=_charts(files, names),
        drawn=time.strftime("%Y-%m-%d %H:%M"),
    )
    write_text(page, text)
    return page


def _names(runs: Sequence[Path]) -> list[str]:
    """The directories' own names where these differ, else their paths."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _tones(names: Sequence[str]) -> list[str]:
    return [tone for _, tone in zip(names, cycle(TONES), strict=False)]


def _figures(files: Sequence[RunFiles], names: Sequence[str], now: float) -> Table:
    """A row per run under a row of headings; of evaluations the last and the best."""
    evaluated = [key for key in groups_of(line for run in files for line in run.metrics) if key.startswith("eval_")]
    keys = [key for key in evaluated if not key.endswith(".")]
    headings = ["run", "state", "loss", *(title_of(key) for key in keys), "tokens per second", "peak memory"]
    rows = []
    for name, run in zip(names, files, strict=True):
        state, detail = state_of(run, now, is_held(run.directory))
        losses = [value for _, value in points_of(run.metrics, "loss")]
        tail = fmt(statistics.fmean(losses[-max(1, len(losses) // 50) :])) if losses else ""
        speed = [value for _, value in points_of(run.metrics, "tokens_per_second")]
        memory = [value for _, value in points_of(run.metrics, "peak_memory_bytes")]
        evaluations = [_last_and_best(run, key) for key in keys]
        costs = [fmt(statistics.median(speed), "count") if speed else "", fmt(max(memory), "bytes") if memory else ""]
        rows.append([name, f"{state}, {detail}", tail, *evaluations, *costs])
    return [headings, *rows]


def _last_and_best(run: RunFiles, key: str) -> str:
    values = [value for _, value in points_of(run.metrics, key)]
    if not values:
        return ""
    best = min(values) if is_lower_better(key) else max(values)
    return fmt(values[-1]) + (f" (best {fmt(best)})" if best != values[-1] else "")


def _differences(files: Sequence[RunFiles]) -> Table:
    """Keys whose values are not the same in all configs, with the value in each."""
    trees = [flat(run.config) for run in files]
    keys = sorted({key for tree in trees for key in tree if key != "train.run_dir"})
    rows = [[key, *("" if tree.get(key) is None else _as_written(tree[key]) for tree in trees)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _as_written(value: object) -> str:
    return as_yaml(value) if isinstance(value, list | dict | bool) else str(value)


def _charts(files: Sequence[RunFiles], names: Sequence[str]) -> list[Chart]:
    """A chart for every figure that any run has, a line for each run that has it."""
    keys = [
        key for keys in groups_of((line for run in files for line in run.metrics), ("step",)).values() for key in keys
    ]
    first = ("loss", "eval_loss")
    charts = []
    for key in sorted(keys, key=lambda key: (key not in first, key != "loss", not key.startswith("eval_"), key)):
        is_evaluated = key.startswith("eval_")
        series = [
            Series(name=name, points=points, tone=tone, raw=not is_evaluated, dots=is_evaluated)
            for name, tone, run in zip(names, _tones(names), files, strict=True)
            if (points := points_of(run.metrics, key))
        ]
        name, dot, part = key.partition(".")
        title = title_of(name) + (f", {part}" if dot else "")
        svg = line_chart(series, label=f"{title} over steps", unit=UNITS.get(key, ""), log=key == "loss")
        charts.append(Chart(title=title, svg=svg, key=tuple((item.tone, item.name) for item in series)))
    return charts
