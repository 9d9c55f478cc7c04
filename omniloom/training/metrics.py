"""Where the numbers of a run go: `metrics.jsonl`, TensorBoard, the screen."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from omniloom.training.trackers import Tracker
from omniloom.types import CODE0, TEXT, PackStats, RunError

EXPERT_LOAD = "expert_load.jsonl"  # of a run directory
PROGRESS_SECONDS, PROGRESS_SHARE = 2.0, 0.25  # between lines on one phase: at least, and of the time it has taken
_STEP = re.compile(rb'\{"step": (\d+)[,}]')  # how each of our lines begins


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What one step's arithmetic gave, over all ranks."""

    # means by the loss's name, without those of which nothing in the step had weight and could be read
    losses: Mapping[str, float]
    grad_norm: float
    learning_rate: float
    expert_load: tuple[tuple[int, ...], ...] = ()  # tokens sent to each expert, by MoE layer
    peak_memory_bytes: int = 0  # the largest of any rank
    step_seconds: float = 0.0

    @property
    def loss(self) -> float | None:
        """Text's, the one that people watch, or of a run that trains speech alone its first codes'.

        None where the step measured nothing.
        """
        return self.losses.get(TEXT, self.losses.get(CODE0))

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.grad_norm) and all(map(math.isfinite, self.losses.values()))

    @property
    def expert_imbalance(self) -> float | None:
        """The busiest expert's load over the mean, averaged over layers; 1 is even. None without experts."""
        if not self.expert_load:
            return None
        return sum(max(layer) * len(layer) / max(sum(layer), 1) for layer in self.expert_load) / len(self.expert_load)


@dataclass(frozen=True, kw_only=True)
class StepMetrics(PackStats):
    """One line of `metrics.jsonl`. Counts are of the whole step, over all ranks; memory is the largest of any rank."""

    step: int
    loss: float | None  # null in the file where the step measured nothing
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    mfu: float  # of the measured peak
    data_wait_fraction: float
    peak_memory_bytes: int
    step_seconds: float
    pack_fill: float
    num_bad_samples: int
    epoch: float | None = None  # passes over the rows so far
    other_losses: Mapping[str, float] | None = None  # by name; `router` is the key `router_loss` of the line
    expert_imbalance: float | None = None
    evaluation: Mapping[str, float] | None = None  # each of its figures is a key of the line
    mfu_of_nominal: float | None = None  # None where the device's nominal peak is not known
    mfu_parts: Mapping[str, float] | None = None  # of `mfu`, by component: keys `mfu_decoder`, `mfu_towers`
    compiled_graphs: int | None = None  # of this process up to now; those of late steps were compiled anew
    samples_of: Mapping[str, int] | None = None  # planned of each data set, where there are several: num_samples.NAME


class MetricsLog:
    """Appends to `metrics.jsonl` and `expert_load.jsonl`, and tells `trackers`, which it does not close.

    Lines past the resumed step are dropped, so steps never repeat.
    """

    def __init__(self, run_dir: Path, *, first_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers
        self.path = run_dir / "metrics.jsonl"
        self._files = {path: _reopen(path, first_step) for path in (self.path, run_dir / EXPERT_LOAD)}

    def write(self, metrics: StepMetrics, expert_load: Sequence[Sequence[int]] = ()) -> None:
        """Raises: RunError where the disk takes no more."""
        line = {"step": metrics.step, **vars(metrics)}
        line |= {f"{name}_loss": value for name, value in (line.pop("other_losses") or {}).items()}
        line |= {f"num_samples.{name}": value for name, value in (line.pop("samples_of") or {}).items()}
        line |= line.pop("evaluation") or {}
        line |= {f"mfu_{name}": share for name, share in (line.pop("mfu_parts") or {}).items()}
        line = {key: value for key, value in line.items() if value is not None or key == "loss"}
        self._append(self.path, line)
        if expert_load and is_load_kept(metrics.step):
            self._append(self.path.with_name(EXPERT_LOAD), {"step": metrics.step, "tokens": expert_load})
        figures = {key: value for key, value in line.items() if key != "step" and value is not None}
        for tracker in self._trackers:
            tracker.log(figures, metrics.step)

    def _append(self, path: Path, line: Mapping[str, Any]) -> None:
        text = (json.dumps(line) + "\n").encode()
        try:
            fault = None if self._files[path].write(text) == len(text) else "only a part fitted"
        except OSError as error:
            fault = error.strerror
        if fault is not None:
            raise RunError(f"cannot write {path}: {fault}; make room on the disk")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def is_load_kept(step: int) -> bool:
    """Whether `expert_load.jsonl` has a line for a step: each of the first 32, then 16 each time their number doubles.

    48 layers of 128 experts are 40 KB a line. A million steps leave 280 lines, and a resumed run the same ones.
    """
    return step % (1 << max(0, step.bit_length() - 5)) == 0


def _reopen(path: Path, first_step: int) -> io.RawIOBase:
    """Open for appending what is kept: the whole lines of earlier steps. Only the beginnings of lines are read."""
    file = path.open("ab+", buffering=0)  # a buffer that cannot be written would raise at close again
    file.seek(0)
    kept = 0
    for line in io.BufferedReader(io.FileIO(file.fileno(), closefd=False)):
        found = _STEP.match(line)
        if found is None or int(found[1]) >= first_step or not line.endswith(b"\n"):
            break
        kept += len(line)
    file.truncate(kept)
    return file


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file; a line that is broken, or being written, is left out."""
    return [line for line in map(parse_line, lines_of(path)) if line is not None]


def lines_of(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


def parse_line(text: str) -> dict[str, Any] | None:
    """The JSON object of a line, None of anything else."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None


class SpikeDetector:
    """Notices a loss far above the median of the steps before it."""

    FACTOR = 3.0
    LEAST = 0.1  # above the usual: a run that has learnt its data by heart has no spikes worth a word
    WINDOW = 50  # steps; half of them must have been seen before anything counts as usual

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW)

    def check(self, loss: float) -> float | None:
        """The usual loss if this one is a spike, else None."""
        usual = median(self._recent) if len(self._recent) >= self.WINDOW // 2 else math.inf
        if math.isfinite(loss):
            self._recent.append(loss)
        return usual if loss > max(self.FACTOR * usual, usual + self.LEAST) else None


class Screen:
    """Progress for people: lines, and on a terminal a bar with the ETA below them. Silent on ranks other than 0."""

    def __init__(self, *, enabled: bool, total_steps: int | None, every: int) -> None:
        self._enabled = enabled
        self._total = total_steps
        self._every = every
        self._start: tuple[float, float] | None = None  # time and share of the run at the end of the first step shown
        self._phase, self._phase_start, self._next = "", 0.0, 0.0  # of `progress`: what, since when, its next line
        self._bar: Any = None
        if enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            columns = BarColumn(bar_width=24), TextColumn("{task.fields[text]}")
            self._bar = Progress(*columns, transient=True)
            self._task = self._bar.add_task("train", total=1.0, text="")
            self._bar.start()

    def say(self, text: str) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            # soft: a terminal wraps a long line itself, so that a command in it can be copied
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def step(self, metrics: StepMetrics, *, progress: float) -> None:
        """Show a finished step. `progress` is the share of the run that is over, for the ETA under epochs."""
        if not self._enabled:
            return
        done = f"step {metrics.step + 1}" + (f"/{self._total}" if self._total else "") + f"  {progress:.0%}"
        eta = f"  eta {self._eta(progress, time.monotonic())}"
        text = done + ("" if metrics.epoch is None else f"  epoch {metrics.epoch:.2f}")
        text += (
            f"  loss {'none' if metrics.loss is None else f'{metrics.loss:.4f}'}  norm {metrics.grad_norm:.3f}  "
            f"lr {metrics.learning_rate:.2e}  {metrics.step_seconds:.2f} s  "
            f"{metrics.tokens_per_second:,.0f} tok/s  "
            f"memory {metrics.peak_memory_bytes / 2**30:.1f} GiB"
        )
        if metrics.data_wait_fraction >= 0.01:
            text += f"  wait {metrics.data_wait_fraction:.0%}"
        if metrics.num_bad_samples:
            text += f"  bad {metrics.num_bad_samples}"
        if metrics.step % self._every == 0:
            self.say(text + eta)
        if self._bar is not None:
            self._bar.update(self._task, completed=progress, text=done + eta)

    def phase(self, text: str) -> None:
        """Say what begins now; what the bar said is over."""
        self.say(text)
        if self._bar is not None:
            self._bar.update(self._task, text="")

    def progress(self, what: str, done: int, total: int, of: str) -> None:
        """How far something is that takes long: in place on a terminal, elsewhere on lines that become ever fewer."""
        now = time.monotonic()
        if what != self._phase or done == 0:
            self._phase, self._phase_start, self._next = what, now, now + PROGRESS_SECONDS
        text = f"{what} {done:,} of {total:,} {of}"
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        elif now >= self._next:
            self._next = now + max(PROGRESS_SECONDS, PROGRESS_SHARE * (now - self._phase_start))
            self.say(f"{text}, {clock(now - self._phase_start)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _eta(self, progress: float, now: float) -> str:
        """By the steps since the first one, which waits for kernels, compilation and the first rows."""
        if self._start is None:
            self._start = now, progress
        begun, before = self._start
        if progress <= before:
            return "?"
        seconds = int((1 - progress) * (now - begun) / (progress - before))
        return clock(seconds)


def clock(seconds: float) -> str:
    """Hours, minutes, seconds."""
    whole = int(seconds)
    return f"{whole // 3600:d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
