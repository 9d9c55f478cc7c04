"""`omniloom score`: the loss of every sample, one JSON line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from omniloom.config import load_config
from omniloom.data.loader import Loader
from omniloom.data.planner import plan_all
from omniloom.data.sources import open_sources
from omniloom.models.fusion import OmniModel
from omniloom.run.opening import Workshop, load_weights, open_workshop
from omniloom.run.rows import open_rows
from omniloom.types import LoadedPack


def score_file(model: Path, data: Path, overrides: list[str]) -> None:
    """Print {"id", "num_loss_tokens", "loss"} per row, in the order of the file; bad rows go to standard error."""
    config = load_config(None, [f"model.path={model}", f"data.train=[{data}]", *overrides])
    workshop = open_workshop(config)
    source = open_sources(config.data.train, max_samples=config.data.max_samples)
    recipe = open_rows(workshop, source, cache=False)
    loader = Loader(recipe, workers=config.data.workers)
    try:
        packs, bad = plan_all(
            num_rows=len(source), pack_tokens=config.data.pack_tokens, measure=loader.measure, locate=source.locate
        )
        net = _load(workshop)
        scores: dict[int, dict[str, object]] = {}
        failures = list(bad)
        for plan, loaded in zip(packs, loader.load_in_order(packs), strict=True):
            failures += loaded.bad
            rows = [sample.row for sample in plan.samples]
            scores |= {rows[position]: score for position, score in score_pack(net, loaded)}
    finally:
        loader.close()
    for row in sorted(scores):
        print(json.dumps(scores[row], ensure_ascii=False))
    for failure in failures:
        print(f"{failure.file}:{failure.line}: {failure.field}: {failure.reason}", file=sys.stderr)


@torch.no_grad()
def score_pack(net: OmniModel, loaded: LoadedPack) -> Iterator[tuple[int, dict[str, object]]]:
    """Position in the pack and score of every sample that was loaded. Loss is the weighted mean over its labels."""
    batch = loaded.batch
    media = net.encode(batch)
    hidden, _, _ = net.text.run_layers(net.text.embed_rows(batch, media), batch, media)
    assert net.text.loss_head is not None
    bounds = batch.segments.cu_seqlens.tolist()
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
    net.to(workshop.compute_dtype)
    load_weights(workshop, net)
    return net.eval()
