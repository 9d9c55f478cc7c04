"""Context parallelism: a pack's tokens spread over ranks, attention by swapping heads for tokens (Ulysses).

Each rank holds a slice of consecutive tokens, of a pack whose chunks change places first where there is a ring
(`ring.py`). Everything but attention works row by row; attention's core is replaced by one that gathers the tokens for
a share of the heads, so segment bounds stay exact. Sits between the loaded pack and the decoder; knows of the model
only the signature of `attention.core`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omniloom.parallel.collectives import gather_heads, gather_rows, scatter_heads
from omniloom.types import PackedBatch, Segments, SpeechBatch, SpeechRows, Targets


def move_chunks(tokens: Tensor, num_tokens: int, ring: int) -> Tensor:
    """Token rows of a pack -> their places where ring rank r of n has chunks r and 2n - 1 - r of 2n, int64.

    Raises: ValueError where the pack does not divide.
    """
    if ring == 1:
        return tokens
    if num_tokens % (2 * ring):
        raise ValueError(f"a pack of {num_tokens} tokens does not divide into two chunks for each of {ring} ring ranks")
    size = num_tokens // (2 * ring)
    chunk, row = tokens // size, tokens % size
    return torch.where(chunk < ring, 2 * chunk, 2 * (2 * ring - 1 - chunk) + 1) * size + row


def token_order(num_tokens: int, ring: int) -> Tensor:
    """The token rows of a pack by place, int64 [T]: the inverse of `move_chunks`."""
    return move_chunks(torch.arange(num_tokens), num_tokens, ring).argsort()


def slice_batch(batch: PackedBatch, rank: int, degree: int, tensor: int = 1, ring: int = 1) -> PackedBatch:
    """The share of one of the ranks among which a pack's tokens are: `[rank * T / degree, (rank + 1) * T / degree)`.

    Token tensors become local, `loss_index` counts local rows; `segments` and the media stay those of the whole pack.
    Of `degree` ranks, each `tensor` neighbours compute with all their rows: they get the same position_ids, of these
    rows, and loss rows of one number, filled up with rows that have no weight. With a ring, rows change places first.
    Raises: ValueError where T does not divide.
    """
    num_tokens = batch.input_ids.shape[0]
    if num_tokens % degree:
        raise ValueError(f"a pack of {num_tokens} tokens does not divide over {degree} ranks")

    def rows_at(start: int, end: int) -> slice | Tensor:
        return slice(start, end) if ring == 1 else token_order(num_tokens, ring)[start:end]

    size, moved = num_tokens // degree, partial(move_chunks, num_tokens=num_tokens, ring=ring)
    start, end, first = rank * size, (rank + 1) * size, rank // tensor * tensor
    share = _Share(start, end, moved, rows_at(start, end))
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids[share.rows],
        labels=batch.labels[share.rows],
        loss_weights=batch.loss_weights[share.rows],
        loss_index=_slice_loss_index(moved(batch.loss_index), size, rank, range(first, first + tensor)),
        position_ids=batch.position_ids[:, rows_at(first * size, (first + tensor) * size)],
        is_padding=batch.is_padding[share.rows],
        targets={name: _slice_targets(targets, share) for name, targets in batch.targets.items()},
        speech=batch.speech and _slice_speech(batch.speech, share),
    )


def _slice_loss_index(loss_index: Tensor, size: int, rank: int, neighbours: range) -> Tensor:
    counts = [((loss_index >= size * each) & (loss_index < size * (each + 1))).sum() for each in neighbours]
    mine = loss_index[(loss_index >= size * rank) & (loss_index < size * (rank + 1))] - size * rank
    missing = int(max(counts)) - len(mine)
    free = torch.ones(size, dtype=torch.bool).index_fill(0, mine, False).nonzero().squeeze(1)
    return torch.cat((mine, free[:missing]))


class _Share(NamedTuple):
    """The part of a pack that is one rank's."""

    start: int  # of the places that are its own
    end: int
    moved: Callable[[Tensor], Tensor]  # rows of the pack -> their places
    rows: slice | Tensor  # at its places

    def of(self, index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Those of some rows that are its own, counted from its first place, and the values that belong to them."""
        places = self.moved(index)
        mine = (places >= self.start) & (places < self.end)
        return (places[mine] - self.start, *(value[mine] for value in values))


def _slice_targets(targets: Targets, share: _Share) -> Targets:
    token_index, weights, values = share.of(targets.token_index, targets.weights, targets.values)
    return Targets(token_index=token_index, weights=weights, values=values)


def _slice_speech(speech: SpeechBatch, share: _Share) -> SpeechBatch:
    """What is read in own rows. The states that rows read stay numbered by the whole pack."""
    rows = speech.rows
    (media_index,) = share.of(rows.media_index)
    state_index, hidden_index = share.of(rows.state_index, share.moved(rows.hidden_index))
    codec_index, codec_ids = share.of(rows.codec_index, rows.codec_ids)
    frame_index, frames = share.of(rows.frame_index, rows.frames)
    own = SpeechRows(
        text_ids=rows.text_ids[share.rows],
        position_ids=rows.position_ids[:, share.rows],
        media_index=media_index,
        state_index=state_index,
        hidden_index=hidden_index,
        codec_index=codec_index,
        codec_ids=codec_ids,
        frame_index=frame_index,
        frames=frames,
    )
    return dataclasses.replace(speech, rows=own, is_padding=speech.is_padding[share.rows])


def check_heads(num_heads: int, num_key_value_heads: int, degree: int) -> None:
    """Raises: ValueError where the query heads cannot be shared out evenly. Key-value heads are repeated as needed."""
    if num_heads % degree:
        allowed = [d for d in range(1, num_heads + 1) if num_heads % d == 0]
        raise ValueError(
            f"parallel.context: {num_heads} attention heads do not divide over {degree} context ranks; "
            f"choose from {allowed}, and give other ranks to parallel.context.ring"
        )
    assert num_heads % num_key_value_heads == 0, f"{num_heads} heads over {num_key_value_heads} key-value heads"


def share_of_parts(x: Tensor, widths: Sequence[int], rank: int, degree: int) -> Tensor:
    """Of rows [sum of widths, ...] that are several parts, this rank's share of each part, in the same order."""
    return torch.cat([part.chunk(degree)[rank] for part in x.split(tuple(widths))])


class GatherRows(nn.Module):
    """Rows [t, C] of this rank -> [t * n, C], those of all ranks of the group in rank order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, rows: Tensor) -> Tensor:
        return gather_rows(rows, self.group)


PrepareHeads = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of q and k


class UlyssesCore(nn.Module):
    """Wraps an attention core: local tokens and all heads outside, all tokens and local heads inside.

    q [t, H, D], k, v [t, Hkv, D] with t = T / n; returns [t, H, D]. Where n does not divide Hkv, key-value heads are
    repeated up to the least common multiple, so that every rank's query heads meet their own. Two all-to-alls of
    activations in, one out, over the context group. Source: DeepSpeed Ulysses, arXiv 2309.14509.
    """

    def __init__(self, core: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.core = core
        self.group = group

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, norms: PrepareHeads | None = None) -> Tensor:
        if norms is not None:  # each rank those of its own tokens
            q, k = norms(q, k)
        degree = self.group.size()
        check_heads(q.shape[1], k.shape[1], degree)
        repeats = math.lcm(k.shape[1], degree) // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        q, k, v = (scatter_heads(x, self.group) for x in (q, k, v))
        return gather_heads(self.core(q, k, v, segments), self.group)


class UlyssesRecurrence(nn.Module):
    """Wraps a recurrence as `UlyssesCore` does attention: each rank runs the heads that are its share over all tokens.

    A state that rank hands to rank would be fewer bytes, but each rank would wait for all before it.
    The convolution runs inside too, where the tokens before a slice are. Two all-to-alls in, one out.
    """

    def __init__(self, core: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.core: Any = core
        self.group = group

    def forward(self, channels: Tensor, weight: Tensor, decay: Tensor, beta: Tensor, segments: Segments) -> Tensor:
        """channels [t, C], weight [C, K], decay, beta [t, H] of t = T / n tokens -> [t, H, D]."""
        degree, widths = self.group.size(), self.core.widths(channels.shape[1], beta.shape[1])
        by_rank = torch.cat([part.unflatten(1, (degree, -1)) for part in channels.split(widths, dim=1)], dim=2)
        mine = scatter_heads(by_rank, self.group).squeeze(1)  # [T, C / n]
        gates = scatter_heads(torch.stack((decay, beta.to(decay.dtype)), dim=2), self.group)  # [T, H / n, 2]
        weight = share_of_parts(weight, widths, self.group.rank(), degree)
        return gather_heads(self.core(mine, weight, *gates.unbind(2), segments), self.group)
