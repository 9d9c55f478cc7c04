"""What a run records of itself while it goes: config, trainable table, metrics, screen, samples of a bad step.

`trainer.py` says when; what is written where, and in which words, is decided here. On ranks other than the first
nothing is written and nothing said.
"""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from omniloom.checkpoint.files import write_json
from omniloom.config import Config, config_to_dict
from omniloom.data.sources import Sources
from omniloom.data.stream import Attempt, LoadedStep
from omniloom.ops.nf4 import shape_of
from omniloom.ops.torch_operators import count_graphs
from omniloom.parallel.mesh import Layout
from omniloom.run.best import BestSteps, read_evaluations, write_evaluations
from omniloom.run.directory import FINISHED, record_config
from omniloom.run.evaluation import EvaluationReport
from omniloom.run.provenance import describe_start, record_start
from omniloom.run.stopping import STOPPED
from omniloom.training.flops import TrainingWork, measure_matmul_peak, model_flops_utilisation, nominal_peak
from omniloom.training.metrics import MetricsLog, Screen, SpikeDetector, StepFigures, StepMetrics, clock
from omniloom.training.policy import ParameterPolicy, table_lines, trainable_table
from omniloom.training.schedule import describe_warmup
from omniloom.training.trackers import open_trackers
from omniloom.types import TEXT, RunError


class _Counter(logging.Handler):
    def __init__(self, count: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self._count = count

    def emit(self, record: logging.LogRecord) -> None:
        self._count()


@contextmanager
def count_warnings(count: Callable[[], None]) -> Iterator[None]:
    """Have `count` called for each warning that our loggers write to the screen."""
    logger = logging.getLogger("omniloom")
    handlers: list[logging.Handler] = [_Counter(count)]
    if logging.lastResort is not None and not logger.hasHandlers():
        handlers.append(logging.lastResort)  # with a handler of its own the logger would fall silent
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)


class NonFiniteError(RunError):
    """Loss or gradient is NaN or infinite, and the policy is to stop."""


class RunRecords:
    """The records of one run of `rows`, on every rank. What cannot be written is left to `attempt`.

    Made before generators are seeded: measuring the peak draws numbers.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        compute_dtype: torch.dtype,
        rows: Sources,
        stack: ExitStack,
        attempt: Attempt,
        on_step: Callable[[StepMetrics], None] | None = None,
    ) -> None:
        self.config, self.layout, self._rows, self._stack, self._on_step = config, layout, rows, stack, on_step
        self._attempt = attempt
        self.run_dir = Path(config.train.run_dir)
        self._peak_flops = measure_matmul_peak(layout.device, compute_dtype)
        self._nominal_flops = nominal_peak(layout.device, compute_dtype)
        self._screen = Screen(enabled=layout.is_first, total_steps=config.train.steps, every=config.log.every)
        stack.callback(self._screen.close)
        self._log: MetricsLog | None = None
        self._start = time.monotonic()
        self._totals = {"samples": 0, "tokens": 0}  # of this start
        self._trained = ""  # what, in words
        self._num_warnings = 0
        if layout.is_first:
            stack.enter_context(count_warnings(self._count_warning))
        self._spikes = SpikeDetector()

    def say(self, words: str) -> None:
        self._num_warnings += words.startswith("warning: ")
        self._attempt(lambda: self._screen.say(words))

    def phase(self, words: str) -> None:
        """What begins now, with the time since the start."""
        self._screen.phase(f"{clock(time.monotonic() - self._start)}  {words}")

    def measured(self, done: int, total: int) -> None:
        """Rows that have been measured, until the first step is done."""
        if self._log is None:
            self._screen.progress("measured", done, total, "rows")

    def evaluated(self, step: int, done: int, total: int) -> None:
        """Rows that an evaluation after so many steps is through with."""
        what = f"evaluation after step {step}:"
        self._attempt(lambda: self._screen.progress(what, done, total, "rows"))

    def _count_warning(self) -> None:
        self._num_warnings += 1

    def say_why_over(self, step: int, best: BestSteps) -> None:
        """Why no step follows, where it is not that all are done; and what that means for the warm-up."""
        train = self.config.train
        if best.is_exhausted:
            self.say(f"ended after step {step}: {best.name} was no better than after {best.kept[0]}")
        elif train.steps is not None and step < train.steps:
            self.say(f"the streams of data.train ended at step {step}, before train.steps={train.steps}")
        if train.steps is None and (warning := describe_warmup(train.warmup_steps, step)):
            self.say(warning)

    def end(self, step: int, best: BestSteps) -> None:
        """What was trained, how good it is, where it is, and what to type next."""
        evaluations = read_evaluations(self.run_dir) if self.layout.is_first else {}
        samples, tokens = self._totals["samples"], self._totals["tokens"]
        seconds = time.monotonic() - self._start
        self.say(
            f"trained {self._trained} of {self.config.model.path} on {samples:,} rows, {tokens:,} tokens, "
            f"in {clock(seconds)}; {step} steps done"
        )
        if evaluations:
            last = list(evaluations)[-1]
            words = f"evaluation: eval_loss {evaluations[last].get('eval_loss', math.nan):.4f} after step {last}"
            if best.value is not None:
                words += f"; best {best.name} {best.value:.4f} after step {best.kept[0]}"
            self.say(words)
        if self._num_warnings:
            self.say(f"{self._num_warnings} warnings above")
        written = [name for name in ("hf", "adapter") if (self.run_dir / name).is_dir()]
        self.say(f"results: {', '.join(str(self.run_dir / name) for name in written) or 'checkpoints alone'}")
        is_older = best.value is not None and best.kept[0] != step
        run_dir = shlex.quote(str(self.run_dir))  # to be copied into a shell
        self.say(f"next: omniloom {f'export {run_dir} DIR --best' if is_older else f'chat {run_dir}'}")

    def begin(
        self,
        first_step: int,
        about: Sequence[str],
        policies: Mapping[str, ParameterPolicy],
        parameters: Mapping[str, torch.Tensor],
    ) -> None:
        """Leave what does not change in the run directory, say it, and open the metrics.

        `about` are lines on model and data.
        """
        if not self.layout.is_first:
            return
        for name in (FINISHED, STOPPED):  # the run goes on
            (self.run_dir / name).unlink(missing_ok=True)
        start = describe_start(first_step, self.layout.world_size)
        record_start(self.run_dir, start)  # by which a directory is known as a run's
        if changes := record_config(self.run_dir, self.config, first_step):
            self.say(
                f"changed from step {first_step + 1} on: {'; '.join(map(str, changes))}; what held before is in "
                f"config_until_step_{first_step:08d}.yaml"
            )
        table = trainable_table(policies, {name: math.prod(shape_of(weight)) for name, weight in parameters.items()})
        trained = [row for row in table if row.num_trainable]
        self._trained = f"{sum(row.num_trainable for row in trained):,} parameters" + (
            " of adapters" if all(row.lora_rank is not None for row in trained) else ""
        )
        write_json(self.run_dir / "trainable.json", [asdict(row) for row in table])
        for words in (*about, *table_lines(table)):
            self.say(words)
        if evaluations := read_evaluations(self.run_dir):
            kept = {done: figures for done, figures in evaluations.items() if done <= first_step}
            write_evaluations(self.run_dir, kept)
        known = {**config_to_dict(self.config), "start": start}
        trackers = open_trackers(self.config.log, self.run_dir, known, first_step=first_step)
        for tracker in trackers:
            self._stack.callback(self._attempt, tracker.close)  # whose error must not take the place of another one
        self._log = MetricsLog(self.run_dir, first_step=first_step, trackers=trackers)
        self._stack.callback(self._log.close)

    def step(
        self, figures: StepFigures, loaded: LoadedStep, work: TrainingWork, report: EvaluationReport | None
    ) -> None:
        """One finished step: its line in the metrics, and on the screen."""
        self._totals["samples"] += loaded.agreement.stats.num_samples
        self._totals["tokens"] += loaded.agreement.stats.num_tokens
        line = self._line(figures, loaded, work, report)
        self._attempt(lambda: self._show(line, figures, loaded.progress))
        if line.loss is not None and (usual := self._spikes.check(line.loss)) is not None:
            self.say(f"warning: loss {line.loss:.3f} at step {line.step + 1} is a spike, usual is {usual:.3f}")

    def _show(self, line: StepMetrics, figures: StepFigures, progress: float) -> None:
        if self._log is not None:
            self._log.write(line, figures.expert_load)
            if self._on_step is not None:
                self._on_step(line)
        self._screen.step(line, progress=progress)

    def _line(
        self, figures: StepFigures, loaded: LoadedStep, work: TrainingWork, report: EvaluationReport | None
    ) -> StepMetrics:
        stats, seconds, train, rows = loaded.agreement.stats, figures.step_seconds, self.config.train, self._rows
        samples = [sample for pack in loaded.plan.packs for sample in pack.samples]
        shares = {
            name: model_flops_utilisation(megaflops, seconds, self._peak_flops, self.layout.world_size)
            for name, megaflops in work.by_component(sample.extent for sample in samples).items()
        }
        mfu = sum(shares.values())
        passes = loaded.plan.rows_planned / len(rows) if train.steps else loaded.progress * (train.epochs or 1.0)
        return StepMetrics(
            step=loaded.plan.step,
            loss=figures.loss,
            grad_norm=figures.grad_norm,
            learning_rate=figures.learning_rate,
            **vars(stats),
            tokens_per_second=stats.num_tokens / seconds,
            mfu=mfu,
            mfu_of_nominal=mfu * self._peak_flops / self._nominal_flops if self._nominal_flops else None,
            mfu_parts=shares,
            compiled_graphs=count_graphs() or None,
            data_wait_fraction=loaded.data_wait_seconds / seconds,
            peak_memory_bytes=figures.peak_memory_bytes,
            step_seconds=seconds,
            pack_fill=stats.num_tokens / (len(loaded.plan.packs) * self.config.data.pack_tokens),
            num_bad_samples=len(loaded.bad),
            epoch=None if rows.streams else passes,
            other_losses={name: loss for name, loss in figures.losses.items() if name != TEXT},
            expert_imbalance=figures.expert_imbalance,
            evaluation=None if report is None else report.figures(),
            samples_of=rows.count(sample.row for sample in samples),
        )

    def untrained(self, figures: StepFigures, loaded: LoadedStep) -> None:
        """Say of a step that has changed no weight why. Raises: NonFiniteError, where that is to stop the run."""
        if figures.loss is None:  # it is null in the metrics
            planned, failed = sum(len(pack.samples) for pack in loaded.plan.packs), len(loaded.agreement.bad)
            self.say(
                f"warning: step {loaded.plan.step + 1} trained nothing: {failed} of its {planned} samples could not be "
                "read (see bad_samples.jsonl), the others have no loss weight; the weights stay as they are"
            )
        elif not figures.is_finite:
            what = self._list_samples(figures, loaded)
            if self.config.train.nonfinite == "stop":
                raise NonFiniteError(
                    f"{what}. The weights are as before this step and earlier checkpoints are intact; lower "
                    "train.learning_rate, look at the samples, or set train.nonfinite=skip"
                )
            self.say(f"warning: {what}; the step is skipped")

    def _list_samples(self, figures: StepFigures, loaded: LoadedStep) -> str:
        """Write out which samples were in a step whose loss or gradient is not finite. Returns what to say of it."""
        step = loaded.plan.step + 1
        path = self.run_dir / f"nonfinite_step_{step:08d}.json"
        if self.layout.is_first:
            samples = [
                {
                    **dict(zip(("source", "row"), self._rows.origin(sample.row), strict=True)),
                    "line": int(self._rows.locate(sample.row)[1]),
                    "epoch": sample.epoch,
                }
                for pack in loaded.plan.packs
                for sample in pack.samples
            ]
            report = {"step": step, "loss": figures.loss, "grad_norm": figures.grad_norm, "samples": samples}
            self._attempt(lambda: write_json(path, report))
        return f"step {step}: loss {figures.loss}, gradient norm {figures.grad_norm}; its samples are in {path}"
