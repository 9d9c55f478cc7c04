"""One self-contained page about a run: `omniloom report RUN` writes RUN/report.html.

Reads what a run directory holds, finished or going, and shows what is missing as absent. Owns which figures are shown
and how they are summed; `run_files` reads, `charts` draws lines, `thumbnails` makes pictures of media, `demo_accuracy`
shows what a demo measured, `report.html.jinja` is the page. Knows nothing of how training works.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from omniloom.checkpoint.files import write_text
from omniloom.checkpoint.run_lock import is_held
from omniloom.config import Config
from omniloom.run.trainer import run as run_training
from omniloom.tools.charts import TONES, Chart, Figure, Series, duration, fmt, heat_map, line_chart, percent
from omniloom.tools.demo_accuracy import CONTROL_NAMES, MODALITY_NAMES, accuracy_chart, accuracy_figure
from omniloom.tools.run_files import Line, RunFiles, is_number, points_of, read_run
from omniloom.tools.thumbnails import MAX_PLAYABLE_BYTES, Thumbnail, make_thumbnail
from omniloom.training.metrics import StepMetrics

REDRAW_SECONDS, REDRAW_SHARE = 60.0, 0.02  # least time between drawings of a going run, most of a run's time
# in charts of their own, or no curve
CHARTED = (
    *("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "data_wait_fraction"),
    *("peak_memory_bytes", "mfu", "router_loss", "expert_imbalance", "num_images", "video_frames", "audio_seconds"),
)
MAX_SAMPLES = 16
MAX_SPEECH_BYTES = 1_000_000  # of a spoken answer that can be played: 20 seconds
MAX_REASONS = 12
IDLE_SECONDS = 600  # a run that is not over and has been silent for longer is said to have stopped


@dataclass(frozen=True, kw_only=True)
class SampleCard:
    question: str
    answer: str
    expected: str | None
    right: bool | None
    modality: str
    media: tuple[Thumbnail | str, ...]  # a thumbnail, or the name of a file that could not be read


def write_report(run: str | Path, *, is_going: bool | None = None) -> Path:
    """Draw `report.html` in a run directory and return its path.

    `is_going`: whether the run goes on, which its own process knows; None where its lock is to be asked.
    Raises: ValueError if `run` is no directory or holds neither `config.yaml` nor `metrics.jsonl`.
    """
    files = open_run_files(Path(run))
    path = Path(run) / "report.html"
    is_going = is_held(run) if is_going is None else is_going
    write_text(path, render(files, now=time.time(), is_going=is_going))
    return path


def open_run_files(run: Path) -> RunFiles:
    """Everything about a run. Raises: ValueError as `write_report`."""
    if not run.is_dir():
        raise ValueError(f"{run}: no such run directory; expected the train.run_dir of a run")
    files = read_run(run)
    if files.config_text is None and not files.metrics:
        raise ValueError(
            f"{run}: expected a run directory with config.yaml or metrics.jsonl, found neither; "
            "name the train.run_dir of a run that has started"
        )
    return files


def render(files: RunFiles, *, now: float, is_going: bool | None) -> str:
    """The whole page as HTML text; see `state_of`."""
    state, state_detail = state_of(files, now, is_going)
    charts, others = _charts(files.metrics)
    return template("report.html.jinja").render(
        title=files.directory.resolve().name,
        model=files.option("model", "path") or "",
        state=state,
        state_detail=state_detail,
        drawn=time.strftime("%Y-%m-%d %H:%M", time.localtime(now)),
        figures=_figures(files),
        summary=files.summary,
        modality_names=MODALITY_NAMES,
        control_names=CONTROL_NAMES,
        percent=percent,
        accuracy_chart=accuracy_chart(files.summary),
        charts=charts + _expert_charts(files.expert_load),
        other_charts=others,
        mix=_mix(files.metrics),
        mix_charts=_mix_charts(files.metrics),
        bad_reasons=_bad_reasons(files.bad_samples),
        num_bad=len(files.bad_samples),
        trainable=_trainable_table(files.trainable),
        samples=_sample_cards(files),
        worst_rows=[_worst_card(files.directory, line) for line in files.worst_rows],
        spoken_rows=[_spoken_card(files.directory, line) for line in files.spoken_rows[:MAX_SAMPLES]],
        samples_step=max((line["step"] for line in files.samples if is_number(line.get("step"))), default=None),
        num_samples=len(files.samples),
        config_text=files.config_text,
        checkpoints=files.checkpoints,
        exported=files.is_exported,
    )


def template(name: str) -> Any:
    """A page's template, from beside this file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def train_with_report(
    config: Config,
    on_step: Callable[[StepMetrics], None] | None = None,
    on_end: Callable[[Path], None] | None = None,
    *,
    overwrite: bool = False,
) -> int:
    """`run.trainer.run`, its report drawn while it goes on and when it ends, in whatever way."""
    run_dir, next_time, has_begun = Path(config.train.run_dir), 0.0, False

    def draw(*, is_going: bool) -> None:
        nonlocal next_time
        start = time.monotonic()
        try:
            write_report(run_dir, is_going=is_going)
        except OSError as error:  # a page is no reason to end a run
            print(f"warning: {run_dir / 'report.html'} cannot be drawn: {error}; try omniloom report {run_dir} later")
        next_time = time.monotonic() + max(REDRAW_SECONDS, (time.monotonic() - start) / REDRAW_SHARE)

    def step(metrics: StepMetrics) -> None:
        nonlocal has_begun
        has_begun = True
        if time.monotonic() > next_time:
            draw(is_going=True)
        if on_step is not None:
            on_step(metrics)

    def end(run_dir: Path) -> None:
        nonlocal has_begun
        has_begun = False  # nothing more is to be drawn
        write_report(run_dir, is_going=False)
        if on_end is not None:
            on_end(run_dir)

    try:
        return run_training(config, step, end, overwrite=overwrite)
    finally:
        if has_begun:  # a signal, the time limit, or an error
            draw(is_going=False)


def state_of(files: RunFiles, now: float, is_going: bool | None) -> tuple[str, str]:
    """(finished | going | stopped | not started, one line of detail) at `now`, in seconds since the epoch.

    `is_going`: whether the run's process lives; where that is not known (None) silence tells.
    """
    if not files.metrics or files.written is None:
        return "not started", "no step has been logged"
    done = int(files.metrics[-1]["step"]) + 1
    total = files.option("train", "steps")
    detail = f"step {done:,} of {total:,}" if is_number(total) else f"step {done:,}"
    if files.is_finished or (not is_going and (files.is_exported or (is_number(total) and done >= total))):
        return "finished", detail
    idle = now - files.written
    if files.stopped:
        when = str(files.stopped.get("time", ""))[:16].replace("T", " ")
        return "stopped", f"{detail}, by {files.stopped.get('reason')}" + (f" at {when}" if when else "")
    if is_going is False:
        return "stopped", f"{detail}, its process has ended"
    if is_going is None and idle > IDLE_SECONDS:
        return "stopped", f"{detail}, silent for {duration(idle)}"
    recent = [value for _, value in points_of(files.metrics[-50:], "step_seconds")]
    if not is_number(total) or not recent:
        return "going", detail
    return "going", f"{detail}, {duration((total - done) * statistics.fmean(recent))} left"


def _figures(files: RunFiles) -> list[Figure]:
    """The big numbers; each only where its data are there."""

    def values(key: str) -> list[float]:
        return [value for _, value in points_of(files.metrics, key) if math.isfinite(value)]

    accuracy = accuracy_figure(files.summary)
    figures = [accuracy] if accuracy is not None else []
    if loss := values("loss"):
        tail = statistics.fmean(loss[-max(1, len(loss) // 50) :])
        figures.append(Figure(name="Loss", value=fmt(tail), detail=f"from {fmt(loss[0])}"))
    if losses := values("eval_loss"):
        figures.append(Figure(name="Evaluation loss", value=fmt(losses[-1]), detail=f"best {fmt(min(losses))}"))
    if speed := values("tokens_per_second"):
        mfu = [value for value in values("mfu") if value > 0]
        detail = f"MFU {percent(statistics.median(mfu))}" if mfu else "median over the run"
        figures.append(Figure(name="Tokens per second", value=fmt(statistics.median(speed), "count"), detail=detail))
    if tokens := sum(values("num_tokens")):
        samples = fmt(sum(values("num_samples")), "count")
        figures.append(Figure(name="Tokens", value=fmt(tokens, "count"), detail=f"{samples} samples"))
    names = {key for line in files.metrics for key in line if key.startswith("num_samples.")}
    if total := sum(sum(values(name)) for name in names):
        shares = [f"{name.partition('.')[2]} {percent(sum(values(name)) / total)}" for name in sorted(names)]
        figures.append(Figure(name="Data sets", value=str(len(names)), detail=", ".join(shares)))
    if seconds := sum(values("step_seconds")):
        whole = files.summary.get("seconds")
        detail = f"{duration(whole)} with set-up and tests" if is_number(whole) else "in training steps"
        figures.append(Figure(name="Time", value=duration(seconds), detail=detail))
    if memory := values("peak_memory_bytes"):
        figures.append(Figure(name="Peak memory", value=fmt(max(memory), "bytes"), detail="largest of any rank"))
    return figures


# ---------------------------------------------------------------------------------------- curves


def _charts(metrics: Sequence[Line]) -> tuple[list[Chart], list[Chart]]:
    """The curves that people look for first, evaluations among them, and those of all other figures."""
    charts = [
        _loss_chart(metrics),
        _chart(metrics, "Gradient norm", "grad_norm"),
        _chart(metrics, "Learning rate", "learning_rate", raw=False),
        _chart(metrics, "Throughput, tokens per second", "tokens_per_second", "count"),
        _chart(metrics, "Waiting for data", "data_wait_fraction", "%"),
        _chart(metrics, "Peak memory", "peak_memory_bytes", "bytes", raw=False),
        *_chart_if_any(metrics, "Model FLOPs utilisation", "mfu", "%"),
        *_chart_if_any(metrics, "Router loss", "router_loss", ""),
        *_chart_if_any(metrics, "Expert imbalance, most loaded over mean", "expert_imbalance", ""),
    ]
    groups = groups_of(metrics, CHARTED)
    evaluated = [_group_chart(metrics, *group) for group in groups.items() if group[0].startswith("eval_")]
    others = [_group_chart(metrics, *group) for group in groups.items() if not group[0].startswith("eval_")]
    return charts[:1] + evaluated + charts[1:], others


def groups_of(metrics: Iterable[Line], without: Collection[str] = ()) -> dict[str, list[str]]:
    """Keys with numbers, those with parts by what stands before their first dot, and the dot."""
    keys = dict.fromkeys(key for line in metrics for key, value in line.items() if is_number(value))
    groups: dict[str, list[str]] = {}
    for key in keys:
        if key not in without:
            name, dot, _ = key.partition(".")
            groups.setdefault(name + dot, []).append(key)
    return dict(sorted(groups.items()))


def _group_chart(metrics: Sequence[Line], name: str, keys: Sequence[str]) -> Chart:
    """One figure, or a line for each of its parts."""
    is_parted = name.endswith(".")
    title = title_of(name)
    series = [
        Series(
            name=key.partition(".")[2] if is_parted else title,
            points=points_of(metrics, key),
            tone=tone,
            raw=not name.startswith("eval_"),
            dots=name.startswith("eval_"),
        )
        for key, tone in zip(sorted(keys), cycle(TONES), strict=False)
    ]
    svg = line_chart(series, label=f"{title} over steps")
    key = tuple((item.tone, item.name) for item in series) if is_parted else ()
    return Chart(title=title, svg=svg, last="" if is_parted else _last(series[0].points, ""), key=key)


def title_of(name: str) -> str:
    """A figure's name in words."""
    words = name.removesuffix(".").removeprefix("eval_").replace("_", " ")
    words = {"cer": "character error rate", "wer": "word error rate", "iou": "box IoU"}.get(words, words)
    of = {
        "eval_loss.": " by modality",
        "eval_set_loss.": " by data set",
        "num_samples.": " by data set",
        "eval_code_accuracy.": " by code",
    }.get(name, "")
    return f"Evaluation: {words}{of}" if name.startswith("eval_") else f"{words.capitalize()}{of}"


def _expert_charts(line: Line | None) -> list[Chart]:
    """How many tokens went to each expert at the last step that was written down."""
    if line is None or not line.get("tokens"):
        return []
    svg = heat_map(line["tokens"], label="Tokens sent to each expert, by layer")
    return [Chart(title="Load of each expert, by layer", svg=svg, last=f"step {line['step'] + 1}")]


def _loss_chart(metrics: Sequence[Line]) -> Chart:
    training, evaluation = points_of(metrics, "loss"), points_of(metrics, "eval_loss")
    series = [Series(name="training", points=training, tone="a", raw=True)]
    if evaluation:
        series.append(Series(name="evaluation", points=evaluation, tone="b", dots=True))
    return Chart(
        title="Loss",
        svg=line_chart(series, label="Loss over steps", floor=0.0, log=True),
        last=_last(training, ""),
        key=tuple((item.tone, item.name) for item in series) if evaluation else (),
    )


def _chart(metrics: Sequence[Line], title: str, key: str, unit: str = "", *, raw: bool = True) -> Chart:
    points = points_of(metrics, key)
    svg = line_chart([Series(name=title, points=points, raw=raw)], label=f"{title} over steps", unit=unit, floor=0.0)
    return Chart(title=title, svg=svg, last=_last(points, unit))


def _chart_if_any(metrics: Sequence[Line], title: str, key: str, unit: str) -> list[Chart]:
    """None of a figure that the run does not have, or that is always zero."""
    return [_chart(metrics, title, key, unit)] if any(value for _, value in points_of(metrics, key)) else []


def _last(points: Sequence[tuple[float, float]], unit: str) -> str:
    return fmt(points[-1][1], unit) if points else ""


# ---------------------------------------------------------------------------------------- modality mix


def _mix(metrics: Sequence[Line]) -> list[Figure]:
    """Totals of what was trained on."""
    names = {
        "num_samples": "samples",
        "num_tokens": "tokens",
        "num_loss_tokens": "trained tokens",
        "num_images": "images",
        "video_frames": "video frames",
        "audio_seconds": "of sound",
    }
    points = {key: points_of(metrics, key) for key in names}
    totals = {key: sum(value for _, value in found) for key, found in points.items() if found}
    return [
        Figure(name=names[key], value=duration(total) if key == "audio_seconds" else fmt(total, "count"))
        for key, total in totals.items()
    ]


def _mix_charts(metrics: Sequence[Line]) -> list[Chart]:
    """How much of each medium a step holds, for those that the run has."""
    return [
        *_chart_if_any(metrics, "Images per step", "num_images", "count"),
        *_chart_if_any(metrics, "Video frames per step", "video_frames", "count"),
        *_chart_if_any(metrics, "Seconds of sound per step", "audio_seconds", "count"),
    ]


# ---------------------------------------------------------------------------------------- tables


def _bad_reasons(bad_samples: Sequence[Line]) -> list[tuple[str, int, str]]:
    """(reason with its numbers and names taken out, how many, an example) from the most frequent down."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for line in bad_samples:
        reason = f"{line.get('field', '?')}: {line.get('reason', '?')}"
        kind = reason_kind(reason)
        counts[kind] += 1
        examples.setdefault(kind, f"{line.get('file', '?')}:{line.get('line', '?')} {reason}")
    return [(kind, count, examples[kind]) for kind, count in counts.most_common(MAX_REASONS)]


def reason_kind(reason: str) -> str:
    """A reason without its numbers and names, by which rows with the same fault are counted together."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S+|\d[\d,.]*", "…", reason)


def _trainable_table(rows: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """(column names, rows of text) of `trainable.json`, without columns that are empty; counts summed at the end."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in keys if any(row.get(key) is not None for row in rows)]
    table = [[_cell(row, key) for key in columns] for row in rows]
    if len(rows) > 1:
        sums = {key: sum(row[key] for row in rows if is_number(row.get(key))) for key in columns if key[:4] == "num_"}
        table.append(["all", *(fmt(sums[key], "count") if key in sums else "" for key in columns[1:])])
    return [key.removeprefix("num_").replace("_", " ") for key in columns], table


def _cell(row: Line, key: str) -> str:
    value = row.get(key)
    if value is None or (row.get("num_trainable") == 0 and key in ("learning_rate", "weight_decay")):
        return "-"
    if key == "num_trainable" and value == 0:
        return "frozen"
    if is_number(value):
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


def _worst_card(directory: Path, line: Line) -> SampleCard:
    """A row of high loss: its answer is what it expects, its expectation says how surprising that is."""
    card = _card(directory, {**line, "answer": line.get("expected")})
    words = f"loss {fmt(line['loss'])}, {line.get('source', '')}" if is_number(line.get("loss")) else ""
    return dataclasses.replace(card, expected=words, right=None)


def _spoken_card(directory: Path, line: Line) -> SampleCard:
    """A row that was answered aloud: its sound, its words, and how the codes match those of the row."""
    words = [f"{line.get('num_code_frames')} frames"]
    if is_number(match := line.get("code_match")):
        words.append(f"{line.get('expected_frames')} expected, {percent(match)} of the codes match")
    if "heard" in line:
        words.append(f"heard as {line['heard']!r}" + (f", CER {percent(line['cer'])}" if "cer" in line else ""))
    card = _card(directory, {**line, "media": [line.get("speech")], "modality": "audio"}, MAX_SPEECH_BYTES)
    return dataclasses.replace(card, expected=", ".join(words), right=None)


def _card(directory: Path, line: Line, max_bytes: int = MAX_PLAYABLE_BYTES) -> SampleCard:
    media: list[Thumbnail | str] = []
    for name in line.get("media") or []:
        path = Path(str(name))
        found = next((place for place in (directory / path, path) if place.is_file()), None)
        thumbnail = make_thumbnail(found, max_bytes) if found else None
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
