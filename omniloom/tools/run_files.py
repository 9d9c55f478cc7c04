"""What a run directory holds, read for a report, finished or going. What is absent or broken is left out."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from omniloom.run.best import read_evaluations
from omniloom.run.directory import finished_step
from omniloom.run.stopping import STOPPED
from omniloom.training.metrics import EXPERT_LOAD, lines_of, parse_line, read_lines

Line = Mapping[str, Any]
WORST_ROWS = "worst_rows.jsonl"  # that `omniloom score RUN DATA --worst N` leaves
SPOKEN_ROWS = "spoken_rows.jsonl"  # that `omniloom generate RUN --data FILE --speech FOLDER` leaves


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Everything read from a run directory; None or empty where a file is absent."""

    directory: Path
    config_text: str | None
    config: dict[str, Any]
    metrics: Sequence[Line]
    bad_samples: Sequence[Line]
    expert_load: Line | None  # the last line
    trainable: Sequence[Line]
    samples: Sequence[Line]
    worst_rows: Sequence[Line]  # those of the highest loss, the highest first
    spoken_rows: Sequence[Line]
    summary: dict[str, Any]
    checkpoints: list[str]
    is_exported: bool
    is_finished: bool
    stopped: Line  # why the run was left before its end
    written: float | None  # when metrics.jsonl last grew, seconds since the epoch

    def option(self, section: str, key: str) -> Any:
        """A value of config.yaml, None where it is absent."""
        part = self.config.get(section)
        return part.get(key) if isinstance(part, dict) else None


def read_run(run: Path) -> RunFiles:
    """Read a run directory; lines that are cut off or broken are left out."""
    import yaml

    metrics_path, config_path = run / "metrics.jsonl", run / "config.yaml"
    config_text = config_path.read_text("utf-8", errors="replace") if config_path.is_file() else None
    try:
        config = yaml.safe_load(config_text or "")
    except yaml.YAMLError:
        config = None
    answers = sorted((run / "answers").glob(f"step_{'[0-9]' * 8}.jsonl"))[-1:]
    newest_loads = deque(lines_of(run / EXPERT_LOAD), maxlen=2)  # the last may be half written
    return RunFiles(
        directory=run,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        metrics=_with_evaluations(run, [line for line in read_lines(metrics_path) if is_number(line.get("step"))]),
        bad_samples=read_lines(run / "bad_samples.jsonl"),
        expert_load=next(filter(None, map(parse_line, reversed(newest_loads))), None),
        trainable=[row for row in _read_json(run / "trainable.json", []) if isinstance(row, dict)],
        samples=[
            {"step": int(file.stem.removeprefix("step_")), **line} for file in answers for line in read_lines(file)
        ],
        worst_rows=read_lines(run / WORST_ROWS),
        spoken_rows=read_lines(run / SPOKEN_ROWS),
        summary=_read_json(run / "summary.json", {}),
        checkpoints=sorted(path.name for path in (run / "checkpoints").glob("step_*") if path.is_dir()),
        is_exported=(run / "hf" / "config.json").is_file(),
        is_finished=finished_step(run) is not None,
        stopped=_read_json(run / STOPPED, {}),
        written=metrics_path.stat().st_mtime if metrics_path.is_file() else None,
    )


def _with_evaluations(run: Path, metrics: list[dict[str, Any]]) -> list[Line]:
    """The lines of steps, and evaluations that are in none of them, as that after the last step."""
    known = {line["step"] for line in metrics if any(key.startswith("eval_") for key in line)}
    others = [
        {**figures, "step": done - 1}
        for done, figures in read_evaluations(run).items()
        if metrics and done - 1 not in known
    ]
    return sorted([*metrics, *others], key=lambda line: float(line["step"]))


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def points_of(metrics: Sequence[Line], key: str) -> list[tuple[float, float]]:
    """(steps done, value) of the lines that have a number under this key."""
    return [(float(line["step"]) + 1, float(line[key])) for line in metrics if is_number(line.get(key))]


def _read_json(path: Path, absent: Any) -> Any:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return absent
    return content if isinstance(content, type(absent)) else absent
