"""Held-out rows, with the layout of training: their loss by modality, and answers to some of them.

Packs are planned once, each of one modality, and read anew at each evaluation. Knows which rows and when; how answers
come about is in `run/answers.py`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from omniloom.checkpoint.files import write_text
from omniloom.data.agreement import PlanningRanks, StepAgreement, gather, report_pack, settle
from omniloom.data.loader import Loader
from omniloom.data.packing import pack_everything
from omniloom.data.planner import PlanError, plan_all
from omniloom.data.sources import Sources
from omniloom.data.stream import LISTED, Attempt, BadSampleFile
from omniloom.models.fusion import OmniModel
from omniloom.parallel.device import widest_float
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.mesh import Layout
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.step import evaluate
from omniloom.processors.rendering import split_reasoning
from omniloom.run.answer_metrics import compare_answers, load_metrics
from omniloom.run.answers import Answer, answer_pack
from omniloom.run.best import read_evaluations, write_evaluations
from omniloom.run.opening import Workshop
from omniloom.run.rows import clips_of_rank, open_rows
from omniloom.types import TEXT, BadSample, Conversation, Extent, LoadedPack, PackPlan, PlannedSample, StepPlan

OnRows = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What was measured. `losses` lack those in which no row that could be read had weight."""

    losses: Mapping[str, float]  # by name, weighted means over all held-out rows
    loss_by_modality: Mapping[str, float]  # text's, of the modalities that were measured
    loss_by_set: Mapping[str, float]  # text's, of the data sets where there are several
    code_accuracy: Mapping[str, float]  # of speech, by the code's number in its frame: share that is the likeliest
    num_rows: int
    num_bad: int  # rows that could not be read
    answers: Mapping[str, float] = field(default_factory=dict)  # figures by name, of the rows answered
    rows: tuple[dict[str, Any], ...] = ()  # id, modality, question, media, expected and answer of each row answered

    def figures(self) -> dict[str, float]:
        """All numbers by name, as `metrics.jsonl` has them."""
        found = {"eval_loss" if name == TEXT else f"eval_{name}_loss": loss for name, loss in self.losses.items()}
        found |= {f"eval_loss.{modality}": loss for modality, loss in self.loss_by_modality.items()}
        found |= {f"eval_set_loss.{name}": loss for name, loss in self.loss_by_set.items()}
        found |= {f"eval_code_accuracy.{name}": share for name, share in self.code_accuracy.items()}
        return {**found, **self.answers}

    def write(self, run_dir: Path, step: int) -> None:
        """The answers in `answers/`, and a line of `evaluations.jsonl`, with which the evaluation counts as made."""
        if self.rows:
            (run_dir / "answers").mkdir(exist_ok=True)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
            write_text(run_dir / "answers" / f"step_{step:08d}.jsonl", lines)
        write_evaluations(run_dir, {**read_evaluations(run_dir), step: self.figures()})

    def describe(self, step: int) -> str:
        """One line for the screen, after so many steps."""
        figures = ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in self.figures().items())
        bad = f"{self.num_bad} of {self.num_rows} held-out rows could not be read (see bad_samples.jsonl)"
        if TEXT not in self.losses:
            return f"evaluation after step {step} measured nothing: {bad}, the others have no loss weight"
        return f"evaluation after step {step}: {figures}" + (f"; {bad}" if self.num_bad else "")


class _Measured(NamedTuple):
    sums: Mapping[str, float]  # by the loss's name, over all ranks
    weight_sums: Mapping[str, float]
    num_bad: int


class Evaluation:
    """Held-out rows, packed once; each call of `run` reads them anew."""

    def __init__(
        self,
        workshop: Workshop,
        layout: Layout,
        rows: Sources,
        bad_file: Path,
        stack: ExitStack,
        attempt: Attempt,
    ) -> None:
        """Reads headers. Collective. Raises: ValueError where no row can be used.

        `attempt` does what may fail on one rank alone; `run` must be left on all ranks before a next pack if it does.
        """
        config = workshop.config
        self.layout, self._attempt = layout, attempt
        self.bad_samples = BadSampleFile(bad_file, rows.origin, attempt) if layout.is_first else None
        self.own_metrics = load_metrics(config.train.eval_metrics)
        open_reader = open_rows(workshop, rows)
        self.loader = Loader(open_reader, workers=min(config.data.workers, 1))
        stack.callback(self.loader.close)
        packs = self._plan(rows, config.data.pack_tokens)
        groups: dict[str, list[PlannedSample]] = {}
        measured: dict[tuple[str, str], list[PlannedSample]] = {}  # by modality and data set
        names = rows.names
        for sample in (sample for pack in packs for sample in pack.samples):
            modality = modality_of(sample.extent)
            groups.setdefault(modality, []).append(sample)
            measured.setdefault((modality, names[rows.find(sample.row)[0]]), []).append(sample)
        pack_tokens, self.max_new_tokens = config.data.pack_tokens, config.train.eval_answer_tokens
        self.packs = {key: self._pack(samples, pack_tokens) for key, samples in sorted(measured.items())}
        self.sets = names if len(names) > 1 else ()
        chosen = choose_in_turn(groups, config.train.eval_answers, pack_tokens - self.max_new_tokens)
        self.to_answer = self._pack(chosen, pack_tokens, room=self.max_new_tokens)
        self.answer_loader = self.loader
        if chosen:
            open_reader = replace(open_reader, last_answer_only=True)
            self.answer_loader = Loader(open_reader, workers=0)
            stack.callback(self.answer_loader.close)
            self.reader = open_reader()

    def _plan(self, rows: Sources, pack_tokens: int) -> list[PackPlan]:
        self.num_rows = len(rows)
        try:
            packs, bad = plan_all(
                num_rows=len(rows),
                pack_tokens=pack_tokens,
                measure=self.loader.measure,
                locate=rows.locate,
                ranks=PlanningRanks(
                    exchange=self.layout.exchange, rank=self.layout.rank, world_size=self.layout.world_size
                ),
            )
        except PlanError as error:
            self._list_bad(error.bad_rows)
            listed = f"\n{LISTED}" if error.bad_rows else ""
            raise ValueError(f"held-out rows (data.eval, data.split): {error}{listed}") from None
        self._list_bad(bad)
        self.num_unusable = len(bad)
        return packs

    def run(
        self, model: OmniModel, pool: EncoderPool, on_rows: OnRows, pipeline: Pipeline | None = None
    ) -> EvaluationReport:
        """Everything about the model as it is. Collective over all ranks.

        Before each pack `on_rows` is called with the rows that are done, on all ranks together, and how many there are;
        rows that are answered count twice. Where `attempt` has failed on any rank it must raise on all.
        """
        planned, done = [*self.packs.values(), self.to_answer], 0
        num_rows = sum(len(pack.samples) for packs in planned for pack in packs)

        def on_pack(num_next: int) -> None:
            nonlocal done
            on_rows(done, num_rows)
            done += num_next

        parts = {key: self._measure(packs, model, pool, on_pack, pipeline) for key, packs in self.packs.items()}
        rows = self._answers(model, pool, on_pack, pipeline)
        means = _means(parts.values())
        return EvaluationReport(
            losses={name: mean for name, mean in means.items() if "." not in name},
            code_accuracy={name.partition(".")[2]: mean for name, mean in means.items() if "." in name},
            loss_by_modality=_text_means(parts, 0, {modality for modality, _ in parts}),
            loss_by_set=_text_means(parts, 1, self.sets),
            num_rows=self.num_rows,
            num_bad=self.num_unusable + sum(part.num_bad for part in parts.values()),
            answers=self._attempt(lambda: compare_answers(rows, self.own_metrics)) or {},
            rows=tuple(rows),
        )

    def _measure(
        self,
        packs: list[PackPlan],
        model: OmniModel,
        pool: EncoderPool,
        on_pack: Callable[[int], None],
        pipeline: Pipeline | None,
    ) -> _Measured:
        sums, weights, num_bad = dict[str, torch.Tensor](), defaultdict[str, float](float), 0
        for _, pack, agreement in self._load(packs, on_pack, self.loader):
            for name, value in evaluate(model, pack.batch, self.layout, pool, pipeline).sums.items():
                sums[name] = sums.get(name, 0.0) + value.to(widest_float(self.layout.device))
                weights[name] += agreement.weight_sums[name.partition(".")[0]]
            num_bad += len(agreement.bad)
        return _Measured({name: float(self.layout.sum_over_ranks(sums[name])) for name in sums}, weights, num_bad)

    def _answers(
        self, model: OmniModel, pool: EncoderPool, on_pack: Callable[[int], None], pipeline: Pipeline | None
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for plan, pack, _ in self._load(self.to_answer, on_pack, self.answer_loader):
            answers = answer_pack(
                model, pack.batch, self.layout, pool, pipeline, self.layout.exchange, max_new_tokens=self.max_new_tokens
            )
            found += self._attempt(partial(self._describe, plan, pack, answers)) or []
        return [row for part in self.layout.exchange(found if self.layout.group_rank == 0 else []) for row in part]

    def _describe(self, plan: PackPlan, pack: LoadedPack, answers: list[Answer]) -> list[dict[str, Any]]:
        """The answered rows of one pack, as metrics and `answers/` have them. Reads the rows again."""
        return [
            {
                "id": pack.batch.sample_ids[one.position],
                "modality": modality_of(plan.samples[one.position].extent),
                **describe_question(self.reader.conversation(plan.samples[one.position].row)),
                "expected": self._decode(one.expected),
                "answer": self._decode(one.tokens),
            }
            for one in answers
        ]

    def _decode(self, tokens: Sequence[int]) -> str:
        return split_reasoning(self.reader.processor.tokenizer.decode(list(tokens), skip_special_tokens=True))[1]

    def _load(
        self, packs: list[PackPlan], on_pack: Callable[[int], None], loader: Loader
    ) -> Iterator[tuple[PackPlan, LoadedPack, StepAgreement]]:
        """This rank's packs, agreed with those who load the others. Collective over all ranks."""
        layout = self.layout
        mine = packs[layout.data_rank :: layout.data_world]
        loading = loader.load_in_order(mine, clips_of=lambda pack: clips_of_rank(pack, layout))
        for number in range(len(mine)):
            loaded = self._attempt(partial(next, loading))
            together = tuple(packs[number * layout.data_world :][: layout.data_world])
            on_pack(sum(len(one.samples) for one in together))
            assert loaded is not None, "on_pack must raise where a rank could not load"
            # ranks that share a pack decode different clips: what one could not read must count on none
            step = StepPlan(step=number, packs=together, rows_planned=0)
            agreement, (pack,) = settle(step, (loaded,), gather(layout.exchange, [report_pack(loaded)]))
            self._list_bad(agreement.bad)
            yield mine[number], pack, agreement

    def _pack(self, samples: list[PlannedSample], pack_tokens: int, *, room: int = 0) -> list[PackPlan]:
        """Full packs with `room` tokens left for each sample; as many for every rank, the last ones empty."""
        tokens = np.array([sample.extent.num_tokens + room for sample in samples], np.int64)
        costs = np.array([sample.extent.cost for sample in samples], np.int64)
        place = pack_everything(tokens, costs, pack_tokens=pack_tokens).tolist()
        filled: list[list[PlannedSample]] = [[] for _ in range(1 + max(place, default=-1))]
        for sample, number in zip(samples, place, strict=True):
            filled[number].append(sample)
        filled += [[] for _ in range(-len(filled) % self.layout.data_world)]
        return [PackPlan(index=index, samples=tuple(own)) for index, own in enumerate(filled)]

    def _list_bad(self, bad: tuple[BadSample, ...]) -> None:
        if self.bad_samples is not None and bad:
            self.bad_samples.append(bad)


def _means(parts: Collection[_Measured]) -> dict[str, float]:
    """Each loss over all parts together, if anything had weight in it."""
    sums, weights = defaultdict[str, float](float), defaultdict[str, float](float)
    for part in parts:
        for name, value in part.sums.items():
            sums[name] += value
            weights[name] += part.weight_sums[name]
    return {name: total / weights[name] for name, total in sums.items() if weights[name]}


def _text_means(parts: Mapping[tuple[str, str], _Measured], place: int, names: Collection[str]) -> dict[str, float]:
    """Text's loss over the parts of each name, which is the first or the second of their keys."""
    found = {name: _means([part for key, part in parts.items() if key[place] == name]) for name in sorted(names)}
    return {name: means[TEXT] for name, means in found.items() if TEXT in means}


def describe_question(conversation: Conversation) -> dict[str, Any]:
    """The words of the question before the last answer, and the files of all media."""
    turns = conversation.turns
    answer = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    asked = next((turn for turn in reversed(turns[:answer]) if turn.role == "user"), turns[0])
    media = [part.media for turn in turns for part in turn.parts if part.media is not None]
    return {
        "question": "".join(part.text for part in asked.parts),
        "media": [clip.path for clip in media if clip.path is not None],
    }


def modality_of(extent: Extent) -> str:
    """The kinds of media a row has, joined by +; a video with its sound counts as audio too."""
    kinds = {clip.kind for clip in extent.clips} | {"audio" for clip in extent.clips if clip.num_mel_frames}
    return "+".join(sorted(kinds)) or "text"


def choose_in_turn(groups: dict[str, list[PlannedSample]], wanted: int, max_tokens: int) -> list[PlannedSample]:
    """Up to `wanted` samples that have an answer and at most `max_tokens`, the groups taking turns."""
    queues = [
        [sample for sample in samples if sample.extent.num_loss_tokens and sample.extent.num_tokens <= max_tokens]
        for _, samples in sorted(groups.items())
    ]
    in_turn = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return in_turn[:wanted]
