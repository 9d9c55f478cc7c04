"""The order of work in a step: its packs, and within a pack the same for every layout.

Encode, exchange rows, detach to leaves, decoder forward and backward, exchange gradients, one tower backward. Towers
and decoder are two autograd graphs that meet at the leaves, so that rows may be computed on one rank and used on
another. Sits between the training loop and the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from omniloom.parallel.context import slice_batch, token_order
from omniloom.parallel.device import widest_float
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.fsdp import set_all_reduce
from omniloom.parallel.mesh import Layout
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.staging import map_tensors, to_device
from omniloom.types import LossTerms, PackedBatch, TowerRows


class EncodeDecode(Protocol):
    """What a model must offer here: towers and decoder, callable on their own."""

    vision: nn.Module | None
    audio: nn.Module | None

    def encode(self, batch: PackedBatch) -> TowerRows: ...

    def decode(self, batch: PackedBatch, media: TowerRows) -> LossTerms: ...

    def best_tokens(self, batch: PackedBatch, media: TowerRows) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step makes smaller: over its losses, coefficient x sum / weight sum.

    Sums are over all packs of the step on all ranks; the weight sums are what ranks agreed on. A loss without a
    coefficient is measured only.
    """

    coefficients: Mapping[str, float]
    weight_sums: Mapping[str, float]

    @property
    def scales(self) -> dict[str, float]:
        """What each sum is multiplied by. A weight sum of 0 has nothing to divide."""
        return {name: self.coefficients.get(name, 0.0) / (total or 1.0) for name, total in self.weight_sums.items()}

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Each loss that anything has weight in, from its sum over all packs and ranks."""
        return {name: total / self.weight_sums[name] for name, total in sums.items() if self.weight_sums[name]}

    def of_pack(self, terms: LossTerms) -> Tensor:
        """This rank's share for one pack, float32 scalar; losses that ride on hidden rows have no gradient here."""
        shares = [
            self.coefficients[name] * (value / (self.weight_sums[name] or 1.0))
            for name, value in terms.sums.items()
            if self.coefficients.get(name)
        ]
        return torch.stack(shares).sum()


def run_packs(
    model: EncodeDecode,
    packs: Sequence[PackedBatch],
    layout: Layout,
    objective: Objective,
    pool: EncoderPool | None = None,
    pipeline: Pipeline | None = None,
    *,
    on_pack: Callable[[int], None] = lambda _: None,
) -> LossTerms:
    """Add the gradient of the objective's share of all `packs` of this rank to every trainable parameter.

    Packs are as loaded, on the host; ranks that share one have the same text, each with the clips it decoded. `pool`
    shares the towers' work by the routes in the packs; without one each rank encodes what it loaded. `pipeline` has
    the decoder's stages, where it is cut. `on_pack` hears the number of the pack that is begun. Returns this rank's
    sums over the packs, detached, on the device. Collective: as many packs on every rank.
    """
    zero = torch.zeros((), dtype=widest_float(layout.device), device=layout.device)
    sums = {name: zero.clone() for name in objective.weight_sums}
    packs = [replace(pack, loss_scales=objective.scales) for pack in packs]
    terms: list[LossTerms] = []
    if pipeline is not None:
        decode = partial(pipeline.run, share_of=objective.of_pack, on_action=on_pack)
        terms = _forward_backward(model, packs, layout, pool, decode)
    else:
        decode = partial(_decode_in_turn, model, objective)
        for number, batch in enumerate(packs):
            on_pack(number)
            if layout.degrees.replicate > 1:
                set_all_reduce(model.modules(), number == len(packs) - 1)
            terms += _forward_backward(model, [batch], layout, pool, decode)
    for name, value in (item for own in terms for item in own.sums.items()):
        sums[name] += value
    return LossTerms(sums=sums, expert_counts=torch.stack([own.expert_counts for own in terms]).sum(dim=0))


Decode = Callable[[Sequence[tuple[PackedBatch, TowerRows]]], list[LossTerms]]


def _decode_in_turn(
    model: EncodeDecode, objective: Objective, inputs: Sequence[tuple[PackedBatch, TowerRows]]
) -> list[LossTerms]:
    """Forward and backward through the whole decoder."""
    terms = []
    for batch, leaves in inputs:
        made = model.decode(batch, leaves)
        objective.of_pack(made).backward()
        # the graph of the sums would hold the head's gradient of each pack until the step is over
        terms.append(map_tensors(made, Tensor.detach))
    return terms


def _forward_backward(
    model: EncodeDecode,
    packs: Sequence[PackedBatch],
    layout: Layout,
    pool: EncoderPool | None,
    decode: Decode,
) -> list[LossTerms]:
    """One pack of `run_packs`, or all of them where stages work on several at a time."""
    towers = [tower for tower in (model.vision, model.audio) if tower is not None]
    towers_train = any(parameter.requires_grad for tower in towers for parameter in tower.parameters())
    with torch.set_grad_enabled(towers_train):
        share = encode_share(model, packs, layout, pool)
    inputs = [
        (local, map_rows(lambda row: row.requires_grad_(towers_train), rows)) for local, rows in deliver(share, pool)
    ]
    terms = decode(inputs)
    if towers_train:
        # rows that another stage reads have none
        gradients = [
            map_rows(lambda leaf: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, leaves)
            for _, leaves in inputs
        ]
        back = gradients[0]
        if pool is not None and share.media.media_route is not None:
            back = pool.return_gradients(share.rows, gradients, share.media.media_route)
        pairs = [pair for pair in zip(list_rows(share.rows), list_rows(back), strict=True) if pair[0].requires_grad]
        torch.autograd.backward([row for row, _ in pairs], [gradient for _, gradient in pairs])
    return terms


@torch.no_grad()
def evaluate(
    model: EncodeDecode,
    batch: PackedBatch,
    layout: Layout,
    pool: EncoderPool | None = None,
    pipeline: Pipeline | None = None,
) -> LossTerms:
    """This rank's terms of one pack, without gradients. Collective over all ranks, its route being planned here."""
    inputs = prepare(model, batch, layout, pool)
    return model.decode(*inputs) if pipeline is None else pipeline.evaluate(*inputs)


@torch.no_grad()
def prepare(
    model: EncodeDecode, batch: PackedBatch, layout: Layout, pool: EncoderPool | None = None
) -> tuple[PackedBatch, TowerRows]:
    """This rank's tokens of a pack and their media rows, for several calls of `best_tokens`. Collective likewise."""
    packs = [batch] if pool is None else pool.plan([batch])
    (inputs,) = deliver(encode_share(model, packs, layout, pool), pool)
    return inputs


@torch.no_grad()
def best_tokens(
    model: EncodeDecode,
    batch: PackedBatch,
    prepared: tuple[PackedBatch, TowerRows],
    layout: Layout,
    pipeline: Pipeline | None = None,
) -> dict[int, int]:
    """The likeliest next token of the rows in `loss_index` that are this rank's, by row of the whole pack.

    `batch`, on the host, may differ from the one that was prepared in `input_ids` and `loss_index`. Under a pipeline
    the last stage knows them. Collective.
    """
    num_tokens = batch.input_ids.shape[0]
    start = layout.sharer_rank * (num_tokens // layout.degrees.sharers)
    text = own_tokens(replace(batch, vision=None, audio=None), layout)
    rows = token_order(num_tokens, layout.degrees.ring)[text.loss_index + start]
    text = to_device(text, layout.device)
    local, media = prepared
    local = replace(local, input_ids=text.input_ids, loss_index=text.loss_index)
    tokens = model.best_tokens(local, media) if pipeline is None else pipeline.best_tokens(local, media)
    return {} if tokens is None else dict(zip(rows.tolist(), tokens.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class EncodedShare:
    """A rank's part of the towers' work, on the device."""

    texts: tuple[PackedBatch, ...]  # this rank's tokens of each pack
    media: PackedBatch  # what was encoded here
    rows: TowerRows


def encode_share(
    model: EncodeDecode, packs: Sequence[PackedBatch], layout: Layout, pool: EncoderPool | None
) -> EncodedShare:
    """Encode this rank's part of the pool's media, which come with the first of the packs."""
    shared = pool is not None and not pool.is_alone
    assert shared or layout.group_size == 1, "ranks that share a pack need an encoder pool to share its media"
    texts = [to_device(own_tokens(pack, layout), layout.device) for pack in packs]
    media = pool.gather_features(texts[0]) if pool is not None and shared else texts[0]
    return EncodedShare(texts=tuple(texts), media=media, rows=model.encode(media))


def deliver(share: EncodedShare, pool: EncoderPool | None) -> list[tuple[PackedBatch, TowerRows]]:
    """This rank's tokens of each pack, on the device, and the media rows that belong to them, detached."""
    if pool is None or share.media.media_route is None:
        return [(share.texts[0], map_rows(Tensor.detach, share.rows))]
    sent = pool.send_rows(share.media, share.rows, len(share.texts))
    return [
        (replace(text, vision=media.vision, audio=media.audio), rows)
        for text, (media, rows) in zip(share.texts, sent, strict=True)
    ]


def own_tokens(batch: PackedBatch, layout: Layout) -> PackedBatch:
    """This rank's tokens of a pack."""
    if layout.degrees.sharers == 1:
        return batch
    degrees = layout.degrees
    return slice_batch(batch, layout.sharer_rank, degrees.sharers, degrees.tensor, degrees.ring)


def list_rows(rows: TowerRows) -> list[Tensor]:
    """Every tensor of rows that is there, in a fixed order."""
    return [row for row in (rows.vision, *rows.deepstack, rows.audio) if row is not None]


def map_rows(change: Callable[[Tensor], Tensor], rows: TowerRows) -> TowerRows:
    """`change` applied to every tensor of rows that is there."""
    return TowerRows(
        vision=None if rows.vision is None else change(rows.vision),
        deepstack=tuple(change(level) for level in rows.deepstack),
        audio=None if rows.audio is None else change(rows.audio),
    )
