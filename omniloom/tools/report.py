"""One self-contained page about a run: `omniloom report RUN` writes RUN/report.html.

Reads what a run directory holds, finished or going, and shows what is missing as absent. Owns which figures are shown
and how they are summed; `charts` draws lines, `thumbnails` makes pictures of media, `report.html.jinja` is the page.
Knows nothing of how training works: its input is files alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniloom.tools.charts import Series, fmt, heat_map, line_chart
from omniloom.tools.thumbnails import Thumbnail, make_thumbnail

MAX_SAMPLES = 16
MAX_REASONS = 12
IDLE_SECONDS = 600  # a run that is not over and has been silent for longer is said to have stopped
MODALITY_NAMES = {"image": "Image", "audio": "Audio", "video": "Video", "joint": "Joint", "text": "Text"}
CONTROL_NAMES = {
    "accuracy_without_media": "media blanked",
    "accuracy_frozen_frame": "first frame frozen",
    "accuracy_muted": "sound muted",
}

Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Everything read from a run directory; None or empty where a file is absent."""

    directory: Path
    config_text: str | None
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    bad_samples: list[dict[str, Any]]
    expert_load: list[dict[str, Any]]
    trainable: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]
    checkpoints: list[str]
    exported: bool
    written: float | None  # when metrics.jsonl last grew, seconds since the epoch


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A big number: what, how much, and a line of detail below."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    svg: str  # "" where the metric is absent
    last: str
    key: tuple[tuple[str, str], ...] = ()  # (tone, name) of the lines, where there are several


@dataclass(frozen=True, kw_only=True)
class Bar:
    name: str
    share: float
    tone: str


@dataclass(frozen=True, kw_only=True)
class BarGroup:
    name: str
    bars: tuple[Bar, ...]
    chance: float | None


@dataclass(frozen=True, kw_only=True)
class SampleCard:
    question: str
    answer: str
    expected: str | None
    right: bool | None
    modality: str
    media: tuple[Thumbnail | str, ...]  # a thumbnail, or the name of a file that could not be read


def write_report(run: str | Path) -> Path:
    """Draw `report.html` in a run directory and return its path.

    Raises: ValueError if `run` is no directory or holds neither `config.yaml` nor `metrics.jsonl`.
    """
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"{run}: no such run directory; expected the train.run_dir of a run")
    files = read_run(run)
    if files.config_text is None and not files.metrics:
        raise ValueError(
            f"{run}: expected a run directory with config.yaml or metrics.jsonl, found neither; "
            "name the train.run_dir of a run that has started"
        )
    page = render(files, now=time.time())
    path = run / "report.html"
    scratch = run / f".report.html.{os.getpid()}.tmp"
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(path)
    return path


def read_run(run: Path) -> RunFiles:
    """Read a run directory; lines that are cut off or broken are left out."""
    import yaml

    metrics_path, config_path = run / "metrics.jsonl", run / "config.yaml"
    config_text = config_path.read_text("utf-8", errors="replace") if config_path.is_file() else None
    try:
        config = yaml.safe_load(config_text or "") or {}
    except yaml.YAMLError:
        config = {}
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("step_*") if path.is_dir())
    metrics = [line for line in _read_lines(metrics_path) if _is_number(line.get("step"))]
    return RunFiles(
        directory=run,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        metrics=metrics,
        bad_samples=_read_lines(run / "bad_samples.jsonl"),
        expert_load=_read_lines(run / "expert_load.jsonl"),
        trainable=[row for row in _read_json(run / "trainable.json", []) if isinstance(row, dict)],
        samples=[
            {"step": int(file.stem.removeprefix("step_")), **line}
            for file in sorted((run / "answers").glob(f"step_{'[0-9]' * 8}.jsonl"))[-1:]
            for line in _read_lines(file)
        ],
        summary=_read_json(run / "summary.json", {}),
        checkpoints=checkpoints,
        exported=(run / "hf" / "config.json").is_file(),
        written=metrics_path.stat().st_mtime if metrics_path.is_file() else None,
    )


def render(files: RunFiles, *, now: float) -> str:
    """The whole page as HTML text; `now` (seconds since the epoch) tells a going run from a stopped one."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    state, state_detail = _state(files, now)
    return environment.get_template("report.html.jinja").render(
        title=files.directory.resolve().name,
        model=_config_value(files.config, "model", "path") or "",
        state=state,
        state_detail=state_detail,
        drawn=time.strftime("%Y-%m-%d %H:%M", time.localtime(now)),
        figures=_figures(files),
        accuracy=_accuracy_groups(files.summary),
        accuracy_chart=_accuracy_chart(files.summary),
        accuracy_details=_accuracy_details(files.summary),
        charts=_charts(files.metrics) + _expert_charts(files.expert_load),
        mix=_mix(files.metrics),
        mix_charts=_mix_charts(files.metrics),
        bad_reasons=_bad_reasons(files.bad_samples),
        num_bad=len(files.bad_samples),
        trainable=_trainable_table(files.trainable),
        samples=_sample_cards(files),
        samples_step=max((line["step"] for line in files.samples if _is_number(line.get("step"))), default=None),
        num_samples=len(files.samples),
        config_text=files.config_text,
        checkpoints=files.checkpoints,
        exported=files.exported,
    )


# ---------------------------------------------------------------------------------------- reading


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file; a line that is being written, or is broken, is skipped."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _read_json(path: Path, absent: Any) -> Any:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return absent
    return content if isinstance(content, type(absent)) else absent


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(metrics: Sequence[Line], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in metrics if _is_number(line.get(key))]


def _config_value(config: Mapping[str, Any], section: str, key: str) -> Any:
    part = config.get(section)
    return part.get(key) if isinstance(part, dict) else None


# ---------------------------------------------------------------------------------------- the top of the page


def _state(files: RunFiles, now: float) -> tuple[str, str]:
    """(finished | going | stopped | not started, one line of detail)."""
    if not files.metrics:
        return "not started", "no step has been logged"
    done = int(files.metrics[-1]["step"]) + 1
    total = _config_value(files.config, "train", "steps")
    of = f" of {total:,}" if _is_number(total) else ""
    detail = f"step {done:,}{of}"
    if files.exported or (_is_number(total) and done >= total):
        return "finished", detail
    assert files.written is not None
    idle = now - files.written
    if idle <= IDLE_SECONDS:
        return "going", f"{detail}, {_duration(_seconds_left(files.metrics, total))} left" if of else detail
    return "stopped", f"{detail}, silent for {_duration(idle)}"


def _seconds_left(metrics: Sequence[Line], total: float) -> float:
    recent = [value for _, value in _values(metrics[-50:], "step_seconds")]
    left = total - (metrics[-1]["step"] + 1)
    return left * statistics.fmean(recent) if recent else 0.0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _figures(files: RunFiles) -> list[Figure]:
    """The big numbers; each only where its data are there."""
    figures = []
    accuracy = files.summary.get("accuracy")
    if isinstance(accuracy, dict) and accuracy:
        blind = files.summary.get("accuracy_without_media") or {}
        detail = f"{_percent(_mean(blind.values()))} with media blanked" if blind else "held out, exact match"
        figures.append(Figure(name="Accuracy", value=_percent(_mean(accuracy.values())), detail=detail))
    loss = [value for _, value in _values(files.metrics, "loss") if math.isfinite(value)]
    if loss:
        tail = statistics.fmean(loss[-max(1, len(loss) // 50) :])
        figures.append(Figure(name="Loss", value=fmt(tail), detail=f"from {fmt(loss[0])}"))
    evaluation = [value for _, value in _values(files.metrics, "eval_loss") if math.isfinite(value)]
    if evaluation:
        figures.append(Figure(name="Evaluation loss", value=fmt(evaluation[-1]), detail=f"best {fmt(min(evaluation))}"))
    speed = [value for _, value in _values(files.metrics, "tokens_per_second")]
    if speed:
        mfu = [value for _, value in _values(files.metrics, "mfu") if value > 0]
        detail = f"MFU {_percent(statistics.median(mfu))}" if mfu else "median over the run"
        figures.append(Figure(name="Tokens per second", value=fmt(statistics.median(speed), "count"), detail=detail))
    tokens = sum(value for _, value in _values(files.metrics, "num_tokens"))
    if tokens:
        samples = sum(value for _, value in _values(files.metrics, "num_samples"))
        figures.append(Figure(name="Tokens", value=fmt(tokens, "count"), detail=f"{fmt(samples, 'count')} samples"))
    seconds = sum(value for _, value in _values(files.metrics, "step_seconds"))
    if seconds:
        whole = files.summary.get("seconds")
        detail = f"{_duration(whole)} with set-up and tests" if _is_number(whole) else "in training steps"
        figures.append(Figure(name="Time", value=_duration(seconds), detail=detail))
    memory = [value for _, value in _values(files.metrics, "peak_memory_bytes")]
    if memory:
        figures.append(Figure(name="Peak memory", value=fmt(max(memory), "bytes"), detail="largest of any rank"))
    return figures


def _mean(values: Any) -> float:
    return statistics.fmean(float(value) for value in values)


def _percent(share: float) -> str:
    text = f"{100 * share:.1f}".removesuffix(".0")
    return f"{text}%"


# ---------------------------------------------------------------------------------------- accuracy


def _accuracy_groups(summary: Mapping[str, Any]) -> list[BarGroup]:
    accuracy = summary.get("accuracy")
    if not isinstance(accuracy, dict):
        return []
    groups = []
    for modality, share in accuracy.items():
        bars = [Bar(name="with media", share=float(share), tone="a")]
        for key, name in CONTROL_NAMES.items():
            control = summary.get(key)
            if isinstance(control, dict) and modality in control:
                bars.append(Bar(name=name, share=float(control[modality]), tone="muted"))
        chance = (summary.get("chance") or {}).get(modality)
        groups.append(BarGroup(name=MODALITY_NAMES.get(modality, modality), bars=tuple(bars), chance=chance))
    return groups


def _accuracy_details(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(modality, question, share) rows, where the summary tells questions apart."""
    details = summary.get("accuracy_by_question")
    if not isinstance(details, dict):
        return []
    return [
        (MODALITY_NAMES.get(modality, modality), question, _percent(float(share)))
        for modality, questions in details.items()
        for question, share in questions.items()
    ]


def _accuracy_chart(summary: Mapping[str, Any]) -> Chart | None:
    points = summary.get("accuracy_by_step")
    if not isinstance(points, list) or not points:
        return None
    modalities = [key for key in points[-1] if key != "step"]
    series = [
        Series(
            name=MODALITY_NAMES.get(modality, modality),
            points=[(float(point["step"]), float(point[modality])) for point in points if modality in point],
            tone=tone,
            dots=True,
        )
        for modality, tone in zip(modalities, "abcd", strict=False)
    ]
    svg = line_chart(series, label="Accuracy over steps", unit="%", floor=0.0)
    return Chart(title="Accuracy", svg=svg, last="", key=tuple((item.tone, item.name) for item in series))


# ---------------------------------------------------------------------------------------- curves


def _charts(metrics: Sequence[Line]) -> list[Chart]:
    charts = [_loss_chart(metrics)]
    for title, key, unit, floor, raw in (
        ("Gradient norm", "grad_norm", "", 0.0, True),
        ("Learning rate", "learning_rate", "", 0.0, False),
        ("Throughput, tokens per second", "tokens_per_second", "count", 0.0, True),
        ("Waiting for data", "data_wait_fraction", "%", 0.0, True),
        ("Peak memory", "peak_memory_bytes", "bytes", 0.0, False),
    ):
        charts.append(_chart(metrics, title, key, unit=unit, floor=floor, raw=raw))
    for title, key, unit in (
        ("Model FLOPs utilisation", "mfu", "%"),
        ("Router loss", "router_loss", ""),
        ("Expert imbalance, most loaded over mean", "expert_imbalance", ""),
    ):
        if any(value for _, value in _values(metrics, key)):
            charts.append(_chart(metrics, title, key, unit=unit, floor=0.0, raw=True))
    return charts


def _expert_charts(lines: Sequence[Line]) -> list[Chart]:
    """How many tokens went to each expert at the last step that was written down."""
    if not lines or not lines[-1].get("tokens"):
        return []
    last = lines[-1]
    svg = heat_map(last["tokens"], label="Tokens sent to each expert, by layer")
    return [Chart(title="Load of each expert, by layer", svg=svg, last=f"step {last['step'] + 1}")]


def _loss_chart(metrics: Sequence[Line]) -> Chart:
    training, evaluation = _values(metrics, "loss"), _values(metrics, "eval_loss")
    series = [Series(name="training", points=training, tone="a", raw=True)]
    if evaluation:
        series.append(Series(name="evaluation", points=evaluation, tone="b", dots=True))
    return Chart(
        title="Loss",
        svg=line_chart(series, label="Loss over steps", floor=0.0, log=True),
        last=_last(training, ""),
        key=tuple((item.tone, item.name) for item in series) if evaluation else (),
    )


def _chart(metrics: Sequence[Line], title: str, key: str, *, unit: str, floor: float | None, raw: bool) -> Chart:
    points = _values(metrics, key)
    svg = line_chart([Series(name=title, points=points, raw=raw)], label=f"{title} over steps", unit=unit, floor=floor)
    return Chart(title=title, svg=svg, last=_last(points, unit))


def _last(points: Sequence[tuple[float, float]], unit: str) -> str:
    return fmt(points[-1][1], unit) if points else ""


# ---------------------------------------------------------------------------------------- modality mix


def _mix(metrics: Sequence[Line]) -> list[Figure]:
    """Totals of what was trained on."""
    totals = {
        key: sum(value for _, value in _values(metrics, key))
        for key in ("num_samples", "num_tokens", "num_loss_tokens", "num_images", "video_frames", "audio_seconds")
        if _values(metrics, key)
    }
    writers: dict[str, tuple[str, Callable[[float], str]]] = {
        "num_samples": ("samples", _count),
        "num_tokens": ("tokens", _count),
        "num_loss_tokens": ("trained tokens", _count),
        "num_images": ("images", _count),
        "video_frames": ("video frames", _count),
        "audio_seconds": ("of sound", _duration),
    }
    return [Figure(name=writers[key][0], value=writers[key][1](total)) for key, total in totals.items()]


def _count(value: float) -> str:
    return fmt(value, "count")


def _mix_charts(metrics: Sequence[Line]) -> list[Chart]:
    """How much of each medium a step holds, for those that the run has."""
    charts = []
    for title, key in (
        ("Images per step", "num_images"),
        ("Video frames per step", "video_frames"),
        ("Seconds of sound per step", "audio_seconds"),
    ):
        if any(value for _, value in _values(metrics, key)):
            charts.append(_chart(metrics, title, key, unit="count", floor=0.0, raw=True))
    return charts


# ---------------------------------------------------------------------------------------- tables


def _bad_reasons(bad_samples: Sequence[Line]) -> list[tuple[str, int, str]]:
    """(reason with its numbers and names taken out, how many, an example) from the most frequent down."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for line in bad_samples:
        reason = f"{line.get('field', '?')}: {line.get('reason', '?')}"
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S+|\d[\d,.]*", "…", reason)
        counts[kind] += 1
        examples.setdefault(kind, f"{line.get('file', '?')}:{line.get('line', '?')} {reason}")
    return [(kind, count, examples[kind]) for kind, count in counts.most_common(MAX_REASONS)]


def _trainable_table(rows: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """(column names, rows of text) of `trainable.json`, without columns that are empty; counts summed at the end."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in keys if any(row.get(key) is not None for row in rows)]
    table = [[_cell(row, key) for key in columns] for row in rows]
    if len(rows) > 1:
        sums = {key: sum(row[key] for row in rows if _is_number(row.get(key))) for key in columns if key[:4] == "num_"}
        table.append(["all", *(fmt(sums[key], "count") if key in sums else "" for key in columns[1:])])
    return [key.removeprefix("num_").replace("_", " ") for key in columns], table


def _cell(row: Line, key: str) -> str:
    value = row.get(key)
    if value is None or (row.get("num_trainable") == 0 and key in ("learning_rate", "weight_decay")):
        return "-"
    if key == "num_trainable" and value == 0:
        return "frozen"
    if _is_number(value):
        return fmt(value, "count" if isinstance(value, int) else "")
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------------------------------- sample answers


def _sample_cards(files: RunFiles) -> list[SampleCard]:
    """Cards of the newest step's samples, modalities in turn so that each is seen."""
    by_modality: dict[str, list[Line]] = {}
    for line in files.samples:
        by_modality.setdefault(str(line.get("modality", "text")), []).append(line)
    share = -(-MAX_SAMPLES // max(1, len(by_modality)))
    return [_card(files.directory, line) for lines in by_modality.values() for line in lines[:share]]


def _card(directory: Path, line: Line) -> SampleCard:
    media: list[Thumbnail | str] = []
    for name in line.get("media") or []:
        path = Path(str(name))
        found = next((place for place in (directory / path, path) if place.is_file()), None)
        thumbnail = make_thumbnail(found) if found else None
        if thumbnail is not None and line.get("modality") == "video":  # asked about the picture alone
            thumbnail = dataclasses.replace(thumbnail, sound=None)
        media.append(thumbnail or path.name)
    answer, expected = str(line.get("answer", "")), line.get("expected")
    return SampleCard(
        question=str(line.get("question", "")),
        answer=answer,
        expected=None if expected is None else str(expected),
        right=None if expected is None else answer.strip() == str(expected).strip(),
        modality=" + ".join(MODALITY_NAMES.get(part, "") for part in str(line.get("modality", "")).split("+")),
        media=tuple(media),
    )
