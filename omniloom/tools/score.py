"""`omniloom score`: the loss of every sample, one JSON line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from omniloom.config import Config, DataConfig, ModelConfig, override_config
from omniloom.data.loader import Loader
from omniloom.data.planner import PlanError, plan_all
from omniloom.data.sources import open_sources
from omniloom.models.fusion import OmniModel
from omniloom.parallel.apply import materialize
from omniloom.run.opening import Workshop, load_weights, open_workshop
from omniloom.run.rows import PROMPT_KEYS, ROW_KEYS, open_rows
from omniloom.types import BadSample, LoadedPack

TAKES = (
    *("model.modalities", "model.num_layers.*", "model.attention.*", "model.dtype", "memory.loss_chunk_tokens"),
    *(*PROMPT_KEYS, *ROW_KEYS, "data.train_on_prompt", "data.last_turn_only", "data.pack_tokens", "data.overlong"),
    *("data.workers", "data.cache_dir"),
)


def score_file(
    model: str | Path, data: str | Path, overrides: Sequence[str] = (), *, adapter: str | Path | None = None
) -> None:
    """Print {"id", "num_loss_tokens", "loss"} per row, in the order of the file; bad rows go to standard error.

    Raises: ValueError as `score_rows` does, and where no row could be scored.
    """
    scores, bad = score_rows(model, data, overrides, adapter=adapter)
    for score in scores:
        print(json.dumps(score, ensure_ascii=False))
    for one in bad:
        print(f"{one.file}:{one.line}: {one.field}: {one.reason}", file=sys.stderr)
    if not scores:
        raise ValueError(f"none of the {len(bad)} rows of {data} could be scored")


def score_rows(
    model: str | Path, data: str | Path, overrides: Sequence[str] = (), *, adapter: str | Path | None = None
) -> tuple[list[dict[str, object]], list[BadSample]]:
    """The loss of every row of one file, in order, and the rows that have none. `adapter` is one of PEFT, put on top.

    Raises: ValueError for a checkpoint, adapter or file that cannot be read, and for overrides that scoring ignores.
    """
    named = ModelConfig(path=str(model), adapter=None if adapter is None else str(adapter))
    given = Config(model=named, data=DataConfig(train=(str(data),)))
    config = override_config(given, overrides, verb="score", takes=TAKES)
    workshop = open_workshop(config, adapter_decides=True)
    source = open_sources(config.data.train, config.data)
    scores: dict[int, dict[str, object]] = {}
    with closing(Loader(open_rows(workshop, source, cache=False), workers=config.data.workers)) as loader:
        try:
            packs, bad = plan_all(
                num_rows=len(source), pack_tokens=config.data.pack_tokens, measure=loader.measure, locate=source.locate
            )
        except PlanError as error:  # no row can be used; its words are of a run's files
            return [], list(error.bad_rows)
        net, failures = _load(workshop), list(bad)
        for plan, loaded in zip(packs, loader.load_in_order(packs), strict=True):
            failures += loaded.bad
            rows = [sample.row for sample in plan.samples]
            scores |= {rows[position]: score for position, score in score_pack(net, loaded)}
    return [scores[row] for row in sorted(scores)], failures


@torch.no_grad()
def score_pack(net: OmniModel, loaded: LoadedPack) -> Iterator[tuple[int, dict[str, object]]]:
    """Position in the pack and score of every sample that was loaded. Loss is the weighted mean over its labels."""
    batch = loaded.batch
    media = net.encode(batch)
    hidden, _, _ = net.text.run_layers(net.text.embed_rows(batch, media), batch, media)
    assert net.text.loss_head is not None
    bounds = batch.sample_bounds
    for position, sample_id in enumerate(batch.sample_ids):
        inside = (batch.loss_index >= bounds[position]) & (batch.loss_index < bounds[position + 1])
        index = batch.loss_index[inside]
        if len(index) == 0:  # failed after planning; listed among the bad
            continue
        weights = batch.loss_weights[index]
        loss = net.text.loss_head(hidden[index], batch.labels[index], weights) / weights.sum()
        yield position, {"id": sample_id, "num_loss_tokens": len(index), "loss": float(loss)}


def _load(workshop: Workshop) -> OmniModel:
    with torch.device("meta"):
        net = workshop.build()
    materialize(net.to(workshop.compute_dtype), "cpu")
    load_weights(workshop, net)
    return net.eval()
