"""`omniloom score`: the loss of every sample, one JSON line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniloom.checkpoint.files import write_text
from omniloom.config import ModelConfig, override_config
from omniloom.data.loader import Loader
from omniloom.data.planner import PlanError, plan_all
from omniloom.data.rows import RowReader
from omniloom.data.sources import Sources, open_sources
from omniloom.models.fusion import OmniModel
from omniloom.parallel.apply import materialize
from omniloom.parallel.device import computes_bf16
from omniloom.run.evaluation import describe_question
from omniloom.run.opening import Workshop, load_weights, open_workshop, without_talker
from omniloom.run.rows import PROMPT_KEYS, ROW_KEYS, open_rows
from omniloom.tools.run_files import WORST_ROWS
from omniloom.tools.trained_model import trained_model
from omniloom.types import CODE0, CODES, BadSample, LoadedPack, PackedBatch, SpeechInputs, Targets

TAKES = (
    *("model.modalities", "model.num_layers.*", "model.attention.*", "model.dtype", "memory.loss_chunk_tokens"),
    *(*PROMPT_KEYS, *ROW_KEYS, "data.train_on_prompt", "data.last_turn_only", "data.pack_tokens", "data.overlong"),
    *("data.workers", "data.cache_dir"),
)


def score_file(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    adapter: str | Path | None = None,
    worst: int | None = None,
) -> None:
    """Print {"id", "num_loss_tokens", "loss"} per row, in order; bad rows go to standard error.

    `data` as of `score_rows`. Rows with speech have "loss_code0", "loss_codes" and "num_code_frames" too.
    With `worst` only so many rows of the highest loss, the highest first, with their places, words and media; where
    `model` is a run they are left in its directory, too, for its report.
    Raises: ValueError as `score_rows` does, and where no row could be scored.
    """
    scores, bad = score_rows(model, data, overrides, adapter=adapter, worst=worst)
    if worst is not None and (Path(model) / "config.yaml").is_file():
        lines = "".join(json.dumps(score, ensure_ascii=False) + "\n" for score in scores)
        write_text(Path(model) / WORST_ROWS, lines)
    for score in scores:
        print(json.dumps(score, ensure_ascii=False))
    for one in bad:
        print(f"{one.file}:{one.line}: {one.field}: {one.reason}", file=sys.stderr)
    if not scores:
        raise ValueError(f"none of the {len(bad)} rows of {', '.join(_paths(data))} could be scored")


def score_rows(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    adapter: str | Path | None = None,
    worst: int | None = None,
) -> tuple[list[dict[str, Any]], list[BadSample]]:
    """The loss of every row, in order, and the rows that have none. `adapter` is one of PEFT, put on top.

    `data` is a file, folder or pattern, or several; of several each loss has the name of its "data_set". `worst` as of
    `score_file`. Raises: ValueError for a checkpoint, adapter or data that cannot be read, and for overrides that
    scoring ignores.
    """
    if not _paths(data):
        raise ValueError("no data to score: name at least one file, folder or pattern of rows")
    with trained_model(model) as (path, usual):
        named = ModelConfig(path=path, adapter=None if adapter is None else str(adapter))
        given = replace(usual, model=named, data=replace(usual.data, train=_paths(data)))
        config = override_config(given, overrides, verb="score", takes=TAKES)
        workshop = open_workshop(config, adapter_decides=True, speaks=True)
        workshop = replace(workshop, computes_bf16=computes_bf16(torch.device("cpu")))
        source = open_sources(config.data.train, config.data)
        scores, bad = _score(workshop, source)
        if len(source.parts) > 1:
            names = source.names
            scores = {row: score | {"data_set": names[source.find(row)[0]]} for row, score in scores.items()}
        if worst is None:
            return [scores[row] for row in sorted(scores)], bad
        reader = open_rows(workshop, source, cache=False)()
        rows = sorted(scores, key=lambda row: (-scores[row]["loss"], row))[:worst]
        return [scores[row] | _details(reader, row) for row in rows], bad


def _paths(data: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return tuple(map(str, [data] if isinstance(data, str | Path) else data))


def _details(reader: RowReader, row: int) -> dict[str, Any]:
    """Where a row is, what it asks and expects, and its media."""
    conversation = reader.conversation(row)
    answer = next(turn for turn in reversed(conversation.turns) if turn.role == "assistant")
    expected = "".join(part.text for part in answer.parts)
    return {"source": conversation.source, **describe_question(conversation), "expected": expected}


def _score(workshop: Workshop, source: Sources) -> tuple[dict[int, dict[str, Any]], list[BadSample]]:
    """Scores by row, and the rows that have none."""
    config = workshop.config
    scores: dict[int, dict[str, Any]] = {}
    with closing(Loader(open_rows(workshop, source, cache=False), workers=config.data.workers)) as loader:
        try:
            packs, bad = plan_all(
                num_rows=len(source), pack_tokens=config.data.pack_tokens, measure=loader.measure, locate=source.locate
            )
        except PlanError as error:  # no row can be used; its words are of a run's files
            return {}, list(error.bad_rows)
        if not any(sample.extent.num_code_frames for plan in packs for sample in plan.samples):
            workshop = without_talker(workshop)
        net, failures = _load(workshop), list(bad)
        for plan, loaded in zip(packs, loader.load_in_order(packs), strict=True):
            failures += loaded.bad
            rows = [sample.row for sample in plan.samples]
            scores |= {rows[position]: score for position, score in score_pack(net, loaded)}
    return scores, failures


@torch.no_grad()
def score_pack(net: OmniModel, loaded: LoadedPack) -> Iterator[tuple[int, dict[str, Any]]]:
    """Position in the pack and score of every sample that was loaded. Loss is the weighted mean over its labels."""
    batch = loaded.batch
    hidden, speech_inputs, _, _ = net.text.run(batch, net.encode(batch))
    assert net.text.loss_head is not None
    bounds = batch.sample_bounds
    speech = {} if speech_inputs is None else score_speech(net, batch, speech_inputs)
    for position, sample_id in enumerate(batch.sample_ids):
        inside = (batch.loss_index >= bounds[position]) & (batch.loss_index < bounds[position + 1])
        index = batch.loss_index[inside]
        if len(index) == 0:  # failed after planning; listed among the bad
            continue
        weights = batch.loss_weights[index]
        loss = net.text.loss_head(hidden[index], batch.labels[index], weights) / weights.sum()
        score = {"id": sample_id, "num_loss_tokens": len(index), "loss": float(loss)}
        yield position, score | speech.get(position, {})


def score_speech(net: OmniModel, batch: PackedBatch, inputs: SpeechInputs) -> dict[int, dict[str, object]]:
    """By position in the pack, of every sample with speech: the weighted means of its losses, and its frames.

    Of the first codes over frames and the end of each turn, of the others over groups and frames.
    """
    assert net.talker is not None
    assert batch.speech is not None
    hidden, states, _, _ = net.talker.run(batch, inputs)
    scores: dict[int, dict[str, object]] = {}
    for position, (low, high) in enumerate(pairwise(batch.sample_bounds)):
        inside = {name: _between(batch.targets[name].token_index, low, high) for name in batch.targets}
        own = {name: _take(batch.targets[name], chosen) for name, chosen in inside.items()}
        if not own[CODE0].weights.any():
            continue
        sums = net.talker.losses(hidden, None if states is None else states[inside[CODES]], own)
        means = {f"loss_{name}": float(value / own[name].weights.sum()) for name, value in sums.items()}
        num_frames = int(_between(batch.speech.rows.frame_index, low, high).sum())
        scores[position] = {**means, "num_code_frames": num_frames}
    return scores


def _between(index: Tensor, low: int, high: int) -> Tensor:
    return (index >= low) & (index < high)


def _take(targets: Targets, chosen: Tensor) -> Targets:
    return Targets(
        token_index=targets.token_index[chosen], weights=targets.weights[chosen], values=targets.values[chosen]
    )


def _load(workshop: Workshop) -> OmniModel:
    with torch.device("meta"):
        net = workshop.build()
    materialize(net.to(workshop.compute_dtype), "cpu")
    load_weights(workshop, net)
    return net.eval()
