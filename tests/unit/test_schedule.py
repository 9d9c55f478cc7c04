"""Learning rates against transformers' own schedules."""

import itertools

import pytest
import torch
from transformers import get_scheduler

from omniloom.training.schedule import decay_progress, schedule_factor


@pytest.mark.parametrize(
    ("kind", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_factors_equal_transformers_up_to_its_warmup_starting_at_zero(kind, theirs, warmup) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        progress = decay_progress(step=step, steps=40, warmup_steps=warmup, rows_before=0, total_rows=0)
        ours = schedule_factor(kind, step=step, warmup_steps=warmup, progress=progress, floor=0.0)
        if step >= warmup:  # during warm-up we count from 1, since a first step at rate 0 trains nothing
            assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        else:
            assert ours == pytest.approx((step + 1) / warmup)
        optimizer.step()
        scheduler.step()


def test_the_floor_is_reached_at_the_end_and_under_epochs_rows_count() -> None:
    assert schedule_factor("cosine", step=99, warmup_steps=0, progress=1.0, floor=0.1) == pytest.approx(0.1)
    assert decay_progress(step=3, steps=None, warmup_steps=0, rows_before=25, total_rows=100) == 0.25


def test_a_run_of_a_single_step_under_epochs_trains_at_the_full_rate() -> None:
    progress = decay_progress(step=0, steps=None, warmup_steps=0, rows_before=0, total_rows=24)
    assert schedule_factor("cosine", step=0, warmup_steps=0, progress=progress, floor=0.0) == 1.0


def test_the_rate_makes_no_jump_where_warm_up_ends_under_epochs() -> None:
    factors = [
        schedule_factor(
            "cosine",
            step=step,
            warmup_steps=10,
            progress=decay_progress(step=step, steps=None, warmup_steps=10, rows_before=5 * step, total_rows=100),
            floor=0.0,
        )
        for step in range(20)
    ]
    assert all(abs(a - b) < 0.15 for a, b in itertools.pairwise(factors))
    assert min(factors) > 0
