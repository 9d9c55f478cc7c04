"""The order of work in a step: its packs, and within a pack the same for every layout.

Encode, exchange rows, detach to leaves, decoder forward and backward, exchange gradients, one tower backward. Towers
and decoder are two autograd graphs that meet at the leaves, so that rows may be computed on one rank and used on
another. Sits between the training loop and the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from omniloom.parallel.context import slice_batch
from omniloom.parallel.device import widest_float
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.fsdp import set_all_reduce
from omniloom.parallel.mesh import Layout
from omniloom.parallel.staging import to_device
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
    *,
    on_pack: Callable[[int], None] = lambda _: None,
) -> LossTerms:
    """Add the gradient of the objective's share of all `packs` of this rank to every trainable parameter.

    Packs are as loaded, on the host; ranks that share one have the same text, each with the clips it decoded. `pool`
    shares the towers' work by the routes in the packs; without one each rank encodes what it loaded. `on_pack` hears
    the number of the pack that is begun. Returns this rank's sums over the packs, detached, on the device.
    Collective: as many packs on every rank.
    """
    zero = torch.zeros((), dtype=widest_float(layout.device), device=layout.device)
    sums = {name: zero.clone() for name in objective.weight_sums}
    counts: list[Tensor] = []
    for number, batch in enumerate(packs):
        on_pack(number)
        if layout.degrees.replicate > 1:
            set_all_reduce(model, number == len(packs) - 1)
        terms = _forward_backward(model, batch, layout, objective, pool)
        for name, value in terms.sums.items():
            sums[name] += value.detach()
        counts.append(terms.expert_counts)
    return LossTerms(sums=sums, expert_counts=torch.stack(counts).sum(dim=0))


def _forward_backward(
    model: EncodeDecode,
    batch: PackedBatch,
    layout: Layout,
    objective: Objective,
    pool: EncoderPool | None,
) -> LossTerms:
    """One pack of `run_packs`."""
    towers = [tower for tower in (model.vision, model.audio) if tower is not None]
    towers_train = any(parameter.requires_grad for tower in towers for parameter in tower.parameters())
    batch = replace(batch, loss_scales=objective.scales)
    with torch.set_grad_enabled(towers_train):
        share = encode_share(model, batch, layout, pool)
    local, rows = deliver(share, pool)
    leaves = map_rows(lambda row: row.requires_grad_(towers_train), rows)
    terms = model.decode(local, leaves)
    objective.of_pack(terms).backward()
    if towers_train:
        gradients = map_rows(lambda leaf: leaf.grad, leaves)
        if pool is not None and share.media.media_route is not None:
            gradients = pool.return_gradients(share.rows, gradients, share.media.media_route)
        pairs = [
            pair for pair in zip(list_rows(share.rows), list_rows(gradients), strict=True) if pair[0].requires_grad
        ]
        torch.autograd.backward([row for row, _ in pairs], [gradient for _, gradient in pairs])
    return terms


@torch.no_grad()
def evaluate(model: EncodeDecode, batch: PackedBatch, layout: Layout, pool: EncoderPool | None = None) -> LossTerms:
    """This rank's terms of one pack, without gradients. Collective over all ranks, its route being planned here."""
    return model.decode(*prepare(model, batch, layout, pool))


@torch.no_grad()
def prepare(
    model: EncodeDecode, batch: PackedBatch, layout: Layout, pool: EncoderPool | None = None
) -> tuple[PackedBatch, TowerRows]:
    """This rank's tokens of a pack and their media rows, for several calls of `best_tokens`. Collective likewise."""
    if pool is not None:
        (batch,) = pool.plan([batch])
    return deliver(encode_share(model, batch, layout, pool), pool)


@torch.no_grad()
def best_tokens(
    model: EncodeDecode, batch: PackedBatch, prepared: tuple[PackedBatch, TowerRows], layout: Layout
) -> dict[int, int]:
    """The likeliest next token of the rows in `loss_index` that are this rank's, by row of the whole pack.

    `batch`, on the host, may differ from the one that was prepared in `input_ids` and `loss_index`. Collective.
    """
    start = layout.sharer_rank * (batch.input_ids.shape[0] // layout.degrees.sharers)
    text = own_tokens(replace(batch, vision=None, audio=None), layout)
    rows, text = text.loss_index + start, to_device(text, layout.device)
    local, media = prepared
    tokens = model.best_tokens(replace(local, input_ids=text.input_ids, loss_index=text.loss_index), media)
    return dict(zip(rows.tolist(), tokens.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class EncodedShare:
    """A rank's part of the towers' work, on the device."""

    text: PackedBatch  # this rank's tokens of the pack
    media: PackedBatch  # what was encoded here
    rows: TowerRows


def encode_share(model: EncodeDecode, batch: PackedBatch, layout: Layout, pool: EncoderPool | None) -> EncodedShare:
    """Encode this rank's part of the pool's media."""
    shared = pool is not None and not pool.is_alone
    assert shared or layout.degrees.sharers == 1, "ranks that share a pack need an encoder pool to share its media"
    text = to_device(own_tokens(batch, layout), layout.device)
    media = pool.gather_features(text) if pool is not None and shared else text
    return EncodedShare(text=text, media=media, rows=model.encode(media))


def deliver(share: EncodedShare, pool: EncoderPool | None) -> tuple[PackedBatch, TowerRows]:
    """This rank's tokens, on the device, and the media rows that belong to them, detached."""
    if pool is None or share.media.media_route is None:
        return share.text, map_rows(Tensor.detach, share.rows)
    vision, audio, rows = pool.send_rows(share.media, share.rows)
    return replace(share.text, vision=vision, audio=audio), rows


def own_tokens(batch: PackedBatch, layout: Layout) -> PackedBatch:
    """This rank's tokens of a pack."""
    if layout.degrees.sharers == 1:
        return batch
    return slice_batch(batch, layout.sharer_rank, layout.degrees.sharers, layout.degrees.tensor)


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
