"""The learning rate as a pure function of how far the run is."""

from __future__ import annotations

import math
from typing import Literal


def schedule_factor(
    kind: Literal["constant", "linear", "cosine"], *, step: int, warmup_steps: int, progress: float, floor: float
) -> float:
    """What the peak learning rate is multiplied by at a step.

    Args:
        step: the step about to be taken, from 0.
        progress: share of the decay that is over, 0 to 1. With a fixed number of steps that is
            (step - warmup) / (steps - warmup), as transformers' schedules count; under epochs it is the rows of
            earlier steps over all rows, since the number of steps is not known in advance, and the decay runs on
            below the warm-up, so that the rate makes no jump where that ends.
        floor: min_learning_rate / learning_rate.

    Source: linear warm-up and half a cosine, Loshchilov & Hutter 2017 (arXiv 1608.03983), equation 5 without restarts.
    """
    ramp = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    progress = min(max(progress, 0.0), 1.0)
    if kind == "constant":
        return ramp
    shape = 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return ramp * (floor + (1.0 - floor) * shape)


def describe_warmup(warmup_steps: int, num_steps: int) -> str | None:
    """A warning where the warm-up is longer than the run, else None."""
    if warmup_steps <= num_steps:
        return None
    return (
        f"warning: train.warmup_steps is {warmup_steps} and the run has {num_steps} steps, so that the learning rate "
        "stays below train.learning_rate; lower train.warmup_steps"
    )


def decay_progress(*, step: int, steps: int | None, warmup_steps: int, rows_before: int, total_rows: int) -> float:
    """Share of the decay that is over, for `schedule_factor`. `rows_before`: of the steps before this one."""
    if steps is not None:
        return (step - warmup_steps) / max(1, steps - warmup_steps)
    return rows_before / max(1, total_rows)
