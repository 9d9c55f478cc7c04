"""The end of a step, once all packs left their gradients: norm, sums over ranks, learning rate, weights.

Knows no pack, no checkpoint and no evaluation. Its one wait for the device is the copy of the step's scalars.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from omniloom.config import TrainConfig
from omniloom.parallel.device import peak_memory_bytes, widest_float
from omniloom.parallel.gradients import clip_gradients
from omniloom.parallel.mesh import Layout
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.step import Objective
from omniloom.parallel.watchdog import Watchdog
from omniloom.training.metrics import StepFigures
from omniloom.training.schedule import decay_progress, schedule_factor
from omniloom.types import LossTerms, StepPlan


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """What turns gradients into weights. Made and used on every rank."""

    layout: Layout
    settings: TrainConfig
    optimizer: Optimizer
    total_rows: int  # of all epochs, over which the learning rate decays where steps are not given
    peak_rate: float  # the highest of the policies, which is the one shown
    pipeline: Pipeline | None
    watchdog: Watchdog

    def take(
        self, plan: StepPlan, terms: LossTerms, objective: Objective, *, wants_stop: bool
    ) -> tuple[StepFigures, bool]:
        """Change the weights, where loss and gradient are finite numbers. `terms` are of this rank's packs.

        Returns figures of all ranks, and whether any of them wants to stop. Collective.
        """
        self.watchdog.enter(plan.step, "gradient norm and optimizer")
        repeated = () if self.pipeline is None else self.pipeline.counted_elsewhere
        norm = clip_gradients(self.optimizer, self.settings.clip_norm, self.layout.device, repeated)
        memory, stopping, loss_sums, loads, grad_norm = self._sum_over_ranks(terms, norm, wants_stop)
        width = terms.expert_counts.shape[1]
        figures = StepFigures(
            losses=objective.means(dict(zip(terms.sums, loss_sums, strict=True))),
            grad_norm=grad_norm,
            learning_rate=self._set_learning_rate(plan),
            expert_load=tuple(
                tuple(map(int, loads[first : first + width])) for first in range(0, len(loads), width or 1)
            ),
            peak_memory_bytes=int(max(memory)),
        )
        if figures.loss is not None and figures.is_finite:  # a step of momentum alone is one that no data asked for
            self.optimizer.step()
        return figures, stopping

    def _sum_over_ranks(
        self, terms: LossTerms, norm: Tensor, wants_stop: bool
    ) -> tuple[list[float], bool, list[float], list[float], float]:
        """Peak memory of each rank, whether any wants to stop, loss sums, expert counts, gradient norm.

        One sum over ranks, and the step's one wait for the device.
        """
        wide = widest_float(self.layout.device)
        peaks = norm.new_zeros(self.layout.world_size, dtype=wide)  # each rank fills its place: a sum that gathers
        peaks[self.layout.rank] = peak_memory_bytes(self.layout.device)
        stop = peaks.new_full((1,), float(wants_stop))  # a tensor of the host would be waited for
        totals = [peaks, stop, torch.stack(list(terms.sums.values())), terms.expert_counts.to(wide).flatten()]
        sums = self.layout.sum_over_ranks(torch.cat(totals))  # ranks that share a pack share its router loss too
        on_host = torch.cat([sums, norm.to(wide)[None]]).cpu()
        memory, (stopping,), loss_sums, loads, (grad_norm,) = (
            part.tolist() for part in torch.split_with_sizes(on_host, [*map(len, totals), 1])
        )
        return memory, stopping > 0, loss_sums, loads, grad_norm

    def _set_learning_rate(self, plan: StepPlan) -> float:
        """By the schedule, for all groups. Returns the highest."""
        settings = self.settings
        progress = decay_progress(
            step=plan.step,
            steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            rows_before=plan.rows_planned - sum(len(pack.samples) for pack in plan.packs),
            total_rows=self.total_rows,
        )
        factor = schedule_factor(
            settings.schedule,
            step=plan.step,
            warmup_steps=settings.warmup_steps,
            progress=progress,
            floor=settings.min_learning_rate / settings.learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * factor
        return self.peak_rate * factor
