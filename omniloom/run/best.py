"""Which of a run's evaluations is the best one: whose checkpoints are kept, and when to stop early.

The record is `evaluations.jsonl` of the run directory, a line of figures for each evaluation. Knows files alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from omniloom.checkpoint.files import write_text
from omniloom.config import Config
from omniloom.run.answer_metrics import is_lower_better
from omniloom.training.metrics import read_lines

EVALUATIONS = "evaluations.jsonl"


def read_evaluations(run_dir: Path, last_step: int | None = None) -> dict[int, dict[str, float]]:
    """Figures by the number of steps done, in order, up to `last_step`."""
    lines = [line for line in read_lines(run_dir / EVALUATIONS) if isinstance(line.get("step"), int)]
    found = {line.pop("step"): line for line in lines}
    return {step: found[step] for step in sorted(found) if last_step is None or step <= last_step}


def write_evaluations(run_dir: Path, evaluations: Mapping[int, Mapping[str, float]]) -> None:
    lines = (json.dumps({"step": step, **figures}) + "\n" for step, figures in evaluations.items())
    write_text(run_dir / EVALUATIONS, "".join(lines))


class BestSteps:
    """The values of `checkpoint.best` at each evaluation of a run, from the first one on."""

    def __init__(self, config: Config, evaluations: Mapping[int, Mapping[str, float]]) -> None:
        settings = config.checkpoint
        self.name, self._num_kept, self._patience = settings.best, settings.keep_best, config.train.patience
        is_lowest = settings.best_is == "lowest" if settings.best_is else is_lower_better(settings.best or "")
        self._sign = 1 if is_lowest else -1
        self._values = {
            step: figures[self.name]
            for step, figures in evaluations.items()
            if self.name is not None and self.name in figures
        }

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Note an evaluation. Raises: ValueError where it has no such figure."""
        if self.name is None:
            return
        if self.name not in figures:
            raise ValueError(
                f"checkpoint.best: {self.name} was not measured after step {step}; this evaluation has "
                f"{', '.join(figures) or 'no figure'}: name one of them"
            )
        self._values[step] = figures[self.name]

    @property
    def kept(self) -> list[int]:
        """Steps whose checkpoints are to stay, the best first; of equal ones the earlier."""
        return sorted(self._values, key=lambda step: (self._sign * self._values[step], step))[: self._num_kept]

    @property
    def value(self) -> float | None:
        """The best one."""
        return self._values[self.kept[0]] if self._values else None

    @property
    def is_exhausted(self) -> bool:
        """Whether `train.patience` evaluations in a row were no better than one before them."""
        if self._patience is None or not self._values:
            return False
        return sum(step > self.kept[0] for step in self._values) >= self._patience
