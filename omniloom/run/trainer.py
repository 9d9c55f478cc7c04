"""The training run: build every part from a config, loop over steps, leave a run directory behind.

Each part is made by its own module (`opening.py` and `rows.py` make those that other verbs need too); this file says in
which order they act within a step, and is the place where all of them meet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from omniloom.checkpoint.hf import gather_full
from omniloom.checkpoint.run_lock import hold_run_lock
from omniloom.checkpoint.stored import StoredCheckpoint
from omniloom.config import Config
from omniloom.data.loader import Loader
from omniloom.data.sources import Sources
from omniloom.data.stream import BadSampleFile, LoadedStep
from omniloom.models.fusion import OmniModel
from omniloom.ops.linear_map import keyed_seed
from omniloom.parallel.device import collect_on_call, computes_bf16, only_deterministic, total_memory_bytes
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.mesh import (
    Layout,
    Ranks,
    build_layout,
    close_distributed,
    init_distributed,
    least_over_ranks,
    says_rank_is_gone,
)
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.step import Objective, run_packs
from omniloom.parallel.watchdog import Watchdog
from omniloom.run.best import BestSteps, read_evaluations
from omniloom.run.compiling import LateCompile
from omniloom.run.description import describe_run
from omniloom.run.directory import (
    check_all_done,
    check_anew,
    check_start,
    find_finished,
    remove_own_files,
    write_finished,
)
from omniloom.run.evaluation import Evaluation, EvaluationReport
from omniloom.run.layouts import choose_degrees
from omniloom.run.opening import Workshop, all_parameters, build_model, build_optimizer
from omniloom.run.optimizer_step import OptimizerStep
from omniloom.run.records import RunRecords
from omniloom.run.results import write_results
from omniloom.run.rows import open_planner, open_rows, open_run, open_stream, options_by_row
from omniloom.run.short_memory import MemoryShortError, describe_short_memory, says_memory_is_short
from omniloom.run.state import RunState
from omniloom.run.step_time import Machine
from omniloom.run.stopping import LostRankError, StopRequest, StopWanted
from omniloom.training.flops import training_work
from omniloom.training.metrics import StepFigures, StepMetrics
from omniloom.training.policy import ParameterPolicy
from omniloom.training.profile import Profile
from omniloom.types import TEXT, PackedBatch

STEPS_BETWEEN_COLLECTIONS = 50  # of Python's garbage
COLLECTIVE_GRACE_SECONDS = 60.0  # collectives give up this much later than the watchdog, which has more to say


def run(
    config: Config,
    on_step: Callable[[StepMetrics], None] | None = None,
    on_end: Callable[[Path], None] | None = None,
    *,
    overwrite: bool = False,
) -> int:
    """Train as the config says, on every rank of the job. Returns 0, or STOPPED_EARLY after a signal or time limit.

    On the first rank `on_step` is called after each step, and `on_end`, with the run directory, once all is written.
    A finished run is left as it is. `overwrite` removes what an earlier one wrote there, once all else proved sound.
    Raises: ValueError for what is wrong with config, checkpoint or data; RunError for what stops a sound run.
    """
    timeout_seconds, run_dir = config.train.step_timeout_seconds, Path(config.train.run_dir)
    workshop, train_rows, eval_rows = open_run(config, spill=run_dir / "stream")
    ranks = init_distributed(timeout_seconds=timeout_seconds + COLLECTIVE_GRACE_SECONDS)
    try:
        workshop, layout = _lay_out(workshop, ranks)
        with hold_run_lock(run_dir, layout.channels["checkpoint"]):
            if not overwrite and (finished := find_finished(run_dir, config)) is not None:
                if layout.is_first:
                    print(finished)
                return 0
            check_start(run_dir, config, overwrite=overwrite)
            layout.barrier()  # nobody writes before everybody has looked
            with ExitStack() as stack:
                code = Trainer(workshop, layout, train_rows, eval_rows, stack, on_step, overwrite=overwrite).run()
            if on_end is not None and layout.is_first and code == 0:
                on_end(run_dir)
            return code
    except (RuntimeError, MemoryError) as error:
        if says_memory_is_short(error):
            short = MemoryShortError(describe_short_memory(error, config, ranks))
            for note in getattr(error, "__notes__", ()):
                short.add_note(note)
            raise short from error
        if not isinstance(error, RuntimeError) or not says_rank_is_gone(error):
            raise
        cause = "; ".join([*getattr(error, "__notes__", ()), str(error).splitlines()[0]])
        raise LostRankError(
            f"rank {ranks.rank} lost another rank, which ended or was silent for {timeout_seconds:g} s (see what it "
            f"said); the same command goes on from the last checkpoint ({cause})"
        ) from error
    finally:
        close_distributed()


def _lay_out(workshop: Workshop, ranks: Ranks) -> tuple[Workshop, Layout]:
    """What all ranks can compute in, and the layout; where that is ours to choose, the first says why. Collective."""
    sharing = ranks.local_world_size if ranks.device.type == "cpu" else 1
    of_device = total_memory_bytes(ranks.device) // sharing
    found = least_over_ranks((of_device, ranks.local_world_size, computes_bf16(ranks.device)), ranks)
    memory_bytes, devices, has_bf16 = found
    workshop, machine = replace(workshop, computes_bf16=bool(has_bf16)), Machine(devices=devices)
    degrees, why = choose_degrees(workshop, ranks.world_size, memory_bytes=memory_bytes, machine=machine)
    if ranks.rank == 0 and why:
        print("\n".join(why))
    return workshop, build_layout(degrees, ranks)


class Trainer:
    """The parts of one run and the order in which they act. Made and used on every rank."""

    def __init__(
        self,
        workshop: Workshop,
        layout: Layout,
        train_rows: Sources,
        eval_rows: Sources | None,
        stack: ExitStack,
        on_step: Callable[[StepMetrics], None] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        config = workshop.config
        self.config, self.layout, self.workshop = config, layout, workshop
        self.run_dir = Path(config.train.run_dir)
        self.options_of_row = options_by_row(config.data, train_rows)
        if config.train.deterministic:
            stack.enter_context(only_deterministic(layout.device))
        self.watchdog = stack.enter_context(Watchdog(layout.ranks, timeout_seconds=config.train.step_timeout_seconds))
        limit, exchange = config.train.time_limit_minutes, layout.exchange if layout.world_size > 1 else None
        self.stop = StopRequest(limit, lambda words: self.records.say(words), exchange)
        attempt = self.stop.attempt
        self.records = RunRecords(config, layout, workshop.compute_dtype, train_rows, stack, attempt, on_step)
        stack.enter_context(self.stop)
        torch.manual_seed(config.train.seed)
        loader = Loader(open_rows(workshop, train_rows), workers=config.data.workers)
        stack.callback(loader.close)
        measure = partial(loader.measure, on_measured=self.records.measured)
        self.planner = open_planner(workshop, train_rows, measure, layout)
        policies = self._build_model(stack)
        about = describe_run(workshop, layout, self.model, train_rows)
        stored = self._find_start(overwrite)
        bad_file = self.run_dir / "bad_samples.jsonl"
        is_anew = stored is None and Path(config.data.exclude or "").resolve() != bad_file.resolve()
        bad_samples = BadSampleFile(bad_file, train_rows.origin, attempt, anew=is_anew) if layout.is_first else None
        self.evaluation: Evaluation | None = None
        if eval_rows is not None:
            self.evaluation = Evaluation(workshop, layout, eval_rows, bad_file, stack, attempt)
        self.stream = stack.enter_context(open_stream(workshop, self.planner, loader, layout, self.pool, bad_samples))
        self.profile = stack.enter_context(closing(Profile(config.log.profile, self.run_dir, layout.rank, attempt)))
        self._begin(stored, about, policies, overwrite)
        self.collect_garbage = stack.enter_context(collect_on_call())

    def _build_model(self, stack: ExitStack) -> dict[str, ParameterPolicy]:
        """The model in its layout, and what trains it. Returns the policy of each parameter. Collective."""
        workshop, layout = self.workshop, self.layout
        self.model, policies = build_model(workshop, layout)
        parameters = all_parameters(workshop, self.model, layout)
        optimizer = build_optimizer(workshop, parameters, policies, layout.device)
        self.state = RunState(workshop, layout, self.model, parameters, policies, optimizer, self.records.say, stack)
        self.work = training_work(self.state.changed, workshop.adapter_names)
        plan = workshop.spec.sharding(workshop.family)
        self.pool = EncoderPool(layout, plan, self.config.parallel.encoder_pool)
        self.pipeline: Pipeline | None = None
        if layout.degrees.pipeline > 1:
            self.pipeline = Pipeline(self.model, layout, plan, self.config.parallel, workshop.compute_dtype)
        self.late_compile = LateCompile(self.config, layout, self.model, plan, self.records.say)
        self.optimizer_step = OptimizerStep(
            layout=layout,
            settings=self.config.train,
            optimizer=optimizer,
            total_rows=self.planner.order.total_rows or 1,
            peak_rate=max((own.learning_rate for own in policies.values() if own.trainable), default=0.0),
            pipeline=self.pipeline,
            watchdog=self.watchdog,
        )
        return policies

    def _begin(
        self,
        stored: StoredCheckpoint | None,
        about: Sequence[str],
        policies: Mapping[str, ParameterPolicy],
        overwrite: bool,
    ) -> None:
        """Read the first rows, load the weights, and leave in the directory what does not change. Collective."""
        self.watchdog.enter(0, "reading the first rows")
        self.records.phase("reading the first rows")
        self.stream.prepare()  # before the weights: rows that cannot be used are said within seconds
        self.watchdog.enter(0, "loading weights")
        self.records.phase(f"loading weights of {self.workshop.checkpoint.directory}")
        self.first_step = self.state.load(stored)
        self.late_compile.go_on(stored)
        if overwrite and self.layout.is_first:
            remove_own_files(self.run_dir)
        before = self.layout.exchange(read_evaluations(self.run_dir, self.first_step))[0]
        self.was_evaluated = self.first_step in before
        self.best = BestSteps(self.config, before)
        self.state.saver.kept_steps = self.best.kept
        self.records.begin(self.first_step, about, policies, self.state.parameters)

    def _find_start(self, overwrite: bool) -> StoredCheckpoint | None:
        """The checkpoint to go on from, its position handed to the planner. Raises: ValueError where it must not be."""
        stored = self.state.find(overwrite=overwrite)
        if stored is not None:
            self.planner.load_state_dict(stored.extras["data"])
            if self.planner.is_over:
                check_all_done(self.run_dir, self.config, stored.step)
        elif not overwrite:
            check_anew(self.run_dir)
        return stored

    def run(self) -> int:
        """Loop until the run is over, or something asks to stop. Raises: what a step does, or an error that waited."""
        every, is_evaluated_after = self.config.checkpoint.every, self.config.train.evaluates_after
        step = self.saved_step = self.first_step
        report: EvaluationReport | None = None  # of an evaluation after the last step
        if self.stop.is_wanted():  # while the run was opened
            return self._leave_early(step)
        self.stop.start_clock()
        if self.evaluation is not None and is_evaluated_after(step) and not self.was_evaluated:
            report = self._evaluate(step)  # which a signal kept from being made, or a new train.eval_every asks for
            if report is None:
                return self._leave_early(step)
        while not self.best.is_exhausted and (loaded := self._next(step)) is not None:
            with self.profile.step(loaded.plan.step):
                taken = self._step(loaded)
            if taken is None:
                self.stream.put_back()
                break
            figures, stop = taken
            step = loaded.plan.step + 1
            if step % STEPS_BETWEEN_COLLECTIONS == 0:
                self.collect_garbage()
            self.state.media.add(loaded.plan, self.options_of_row)
            report = None
            if self.evaluation is not None and is_evaluated_after(step) and not stop:
                report = self._evaluate(step)
                stop = report is None
            self.records.step(figures, loaded, self.work, report)
            self.late_compile.after_step(loaded.progress)
            if stop or (every and step % every == 0) or step in self.best.kept:
                self._save(step)
            if stop:
                return self._leave_early(step)
        return self._finish(step, report)

    def _next(self, step: int) -> LoadedStep | None:
        """What the step after `step` others reads; None where there is none, or no rank could have it."""
        self.watchdog.enter(step, "waiting for data")
        try:
            return next(self.stream, None)
        except Exception as error:  # of whatever kind: all ranks have been told, and are here
            if self.stream.failed_alone:
                raise
            self.stop.note(error)
            return None

    def _finish(self, step: int, report: EvaluationReport | None) -> int:
        """What follows the last step: a checkpoint, an evaluation and the results, as far as they are missing."""
        if self.saved_step != step:
            self._save(step)
        if self.stop.has_failed():
            return self._leave_early(step)
        self.records.say_why_over(step, self.best)
        self.state.saver.finish()
        if self.evaluation is not None and report is None:
            report = self._evaluate(step)
            if report is None:
                return self._leave_early(step)
        self._leave_results(step, report)
        return 0

    def _leave_results(self, step: int, report: EvaluationReport | None) -> None:
        """Model and adapters, and that the run is finished. Raises: ValueError where `report` measured nothing."""
        self.watchdog.enter(step, "export")
        gather = gather_full(self.state.parameters)
        if self.pipeline is not None:
            gather = self.pipeline.gather_from(self.state.parameters, gather)
        write_results(
            self.workshop,
            gather,
            self.state.changed,
            media=self.state.media,
            on_tensor=lambda name: self.watchdog.enter(step, f"export of {name}"),
            say=self.records.say,
            group=self.state.group,
        )
        if report is not None and TEXT not in report.losses:
            raise ValueError(
                f"{report.describe(step)}. The model is trained and saved; correct the rows or name others as "
                "data.eval, then the same command measures them"
            )
        self.records.end(step, self.best)
        if self.layout.is_first:
            write_finished(self.run_dir, step)

    def _leave_early(self, step: int) -> int:
        """After `step` steps that are saved. Collective. Raises: as `StopRequest.leave`."""
        self.state.saver.finish()
        return self.stop.leave(self.run_dir if self.layout.is_first else None, step, self.config.checkpoint.resume)

    def _step(self, loaded: LoadedStep) -> tuple[StepFigures, bool] | None:
        """One optimizer step: its figures, and whether any rank was asked to stop. None where a lone rank failed.

        Raises: NonFiniteError.
        """
        start, step = time.perf_counter(), loaded.plan.step
        objective = _objective_of(loaded, self.config, self.model)
        packs = _keyed_packs(loaded, self.config.train.seed, self.layout, self.model)

        def enter_pack(number: int) -> None:
            self.watchdog.enter(step, f"pack {number + 1} of {len(packs)}")

        self.optimizer_step.optimizer.zero_grad()
        terms = self.stop.compute(
            lambda: run_packs(self.model, packs, self.layout, objective, self.pool, self.pipeline, on_pack=enter_pack),
            f"in step {step + 1}",
        )
        if terms is None:
            return None
        wants_stop = self.stop.reason is not None
        figures, stop = self.optimizer_step.take(loaded.plan, terms, objective, wants_stop=wants_stop)
        self.records.untrained(figures, loaded)
        return replace(figures, step_seconds=time.perf_counter() - start + loaded.data_wait_seconds), stop

    def _save(self, step: int) -> None:
        self.watchdog.enter(step, "checkpoint")
        self.state.save(step, self.stream.state_dict(), compiled=self.late_compile.is_on)
        self.saved_step = step
        self.planner.release(self.stream.state)

    def _evaluate(self, step: int) -> EvaluationReport | None:
        """None where a rank was asked to stop meanwhile, since what is measured by then is of no use, or failed."""
        evaluation = self.evaluation
        assert evaluation is not None

        def before_pack(done: int, total: int) -> None:
            self.watchdog.enter(step, "evaluation")
            self.records.evaluated(step, done, total)
            if self.stop.is_wanted():
                raise StopWanted

        self.model.eval()  # without dropout
        report = self.stop.compute(
            lambda: evaluation.run(self.model, self.pool, before_pack, self.pipeline),
            f"in the evaluation after step {step}",
        )
        self.model.train()
        if report is None or self.stop.has_failed():  # before it counts as made
            return None
        self.records.say(report.describe(step))
        if self.layout.is_first:
            self.stop.attempt(lambda: report.write(self.run_dir, step))
        figures = self.layout.exchange(report.figures())[0]  # what ranks decide by must be one number
        self.stop.attempt(lambda: self.best.add(step, figures))
        self.state.saver.kept_steps = self.best.kept
        return None if self.stop.has_failed() else report


def _objective_of(loaded: LoadedStep, config: Config, model: OmniModel) -> Objective:
    measured = dict(loaded.agreement.weight_sums)
    if model.trains_speech_alone:  # a text that only the talker reads has no loss
        measured.pop(TEXT, None)
    return Objective(coefficients=config.train.loss_coefficients, weight_sums=measured)


def _keyed_packs(loaded: LoadedStep, seed: int, layout: Layout, model: OmniModel) -> list[PackedBatch]:
    """This rank's packs, each with the key of its random draws."""
    packs = [
        replace(pack.batch, draw_key=keyed_seed(seed, loaded.plan.step, pack.index, layout.context_rank))
        for pack in loaded.packs
    ]
    if all(pack.speech is None for pack in packs):  # a model without a talker
        return packs
    # whether a spoken turn of the step reads hidden states, as of media that it may follow: the same on every rank
    hears_words = model.talker is not None and model.talker.projection.hears_words
    samples = (sample.extent for pack in loaded.plan.packs for sample in pack.samples)
    reads_hidden = any(extent.num_code_frames and (hears_words or extent.clips) for extent in samples)
    return [replace(pack, speech=pack.speech and replace(pack.speech, reads_hidden=reads_hidden)) for pack in packs]
