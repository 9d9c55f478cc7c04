"""Ring attention: a pack's tokens spread over ranks, keys and values passed between those whose samples reach across.

The pack is cut into two chunks per rank; rank r of n has chunks r and 2n - 1 - r, so that the causal work of a sample
as long as the pack is the same for all. Queries stay. Each rank meets the keys of the others in n - 1 rounds, those of
one rank at a time, and only the rows that share a segment with queries of its own: at most one segment reaches across
any bound between chunks, so what two chunks have to do with each other is a rectangle or nothing, and every rank knows
on the host what all others need. Short samples move hardly anything.

Sources: Liu et al. 2023 (arXiv 2310.01889); two chunks per rank: Brandon et al. 2023 (arXiv 2311.09431), Megatron-LM.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from omniloom.ops.attention import resolve_kernel
from omniloom.ops.block_attention import attend, attend_backward, join
from omniloom.parallel.collectives import group_of
from omniloom.parallel.context import PrepareHeads
from omniloom.types import Kernel, Segments


class Chunk(NamedTuple):
    """Rows `[start, end)` of a pack. Its first `head` rows are of a segment that began before it, its last `tail` rows
    of one that goes on behind it, up to `reach`: the heads of chunks up to there see the tail."""

    start: int
    end: int
    head: int
    tail: int
    reach: int


def cut_chunks(bounds: Sequence[int], num_chunks: int) -> list[Chunk]:
    """Equal chunks of a pack with these segment bounds."""
    size = bounds[-1] // num_chunks
    chunks = []
    for start in range(0, bounds[-1], size):
        end, first = start + size, bisect_right(bounds, start) - 1
        last = bisect_left(bounds, end)
        head = min(bounds[first + 1], end) - start if bounds[first] < start else 0
        tail = end - max(bounds[last - 1], start) if bounds[last] > end else 0
        chunks.append(Chunk(start, end, head, tail, bounds[last]))
    return chunks


class Rounds:
    """Who sends which rows to whom, seen from one rank. Local rows are those of its first chunk, then of its second.

    `sent[source, target]` has the chunks of `source` whose tails `target` needs, each with its local rows there; pairs
    that have nothing to do with each other are left out.
    """

    def __init__(self, bounds: Sequence[int], size: int, rank: int) -> None:
        self.size, self.me = size, rank
        chunks = cut_chunks(bounds, 2 * size)
        self.rows = chunks[0].end
        self.own = chunks[rank], chunks[-1 - rank]
        self.sent: dict[tuple[int, int], dict[Chunk, slice]] = {}
        for number, chunk in enumerate(chunks):
            source, place = self._holder(number)
            part = slice((place + 1) * self.rows - chunk.tail, (place + 1) * self.rows)
            reached = range(number + 1, -(-chunk.reach // self.rows))
            for target in {self._holder(later)[0] for later in reached}:
                self.sent.setdefault((source, target), {})[chunk] = part
        self.moves = {(target - source) % size for source, target in self.sent}  # how many ranks on anything goes

    def _holder(self, number: int) -> tuple[int, int]:
        """The rank that has a chunk, and whether it is the first or the second there."""
        return (number, 0) if number < self.size else (2 * self.size - 1 - number, 1)

    def local_bounds(self, cu_seqlens: Tensor) -> Tensor:
        """int32, on the device, of the segments within each of this rank's chunks: some cut, others empty."""
        low, high = self.own
        return torch.cat(
            (
                cu_seqlens.clamp(low.start, low.end) - low.start,
                cu_seqlens.clamp(high.start, high.end) - high.start + self.rows,
            )
        )

    def count(self, source: int, target: int) -> int:
        return sum(chunk.tail for chunk in self.sent.get((source, target), ()))

    def blocks(self, source: int) -> Iterator[tuple[slice, slice]]:
        """Rectangles of local queries and of the rows that came from `source`."""
        first = 0
        for chunk in self.sent.get((source, self.me), ()):
            keys = slice(first, first + chunk.tail)
            first = keys.stop
            for place, own in enumerate(self.own):
                if chunk.start < own.start < chunk.reach:  # its head sees the other's tail
                    yield slice(place * self.rows, place * self.rows + own.head), keys

    def keys(self, rows: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
        """Each rank in turn, this one first, and the rows that came from it: while they are worked on the next are on
        their way. Collective over the group: an all-to-all a round, but where no rank needs anything in it."""
        coming: tuple[Tensor, dist.Work | None] = self._leaving(rows, self.me), None
        for shift in range(self.size):
            received, work = coming
            if shift + 1 < self.size:
                leaving = self._leaving(rows, (self.me + shift + 1) % self.size)
                coming = self._start(shift + 1, leaving, 1, group)
            if work is not None:
                work.wait()
            yield (self.me - shift) % self.size, received

    def return_gradients(self, source: int, gradients: Tensor, total: Tensor, group: dist.ProcessGroup) -> None:
        """Send the gradients of rows that came from `source` home, and add those that come home to `total`.

        Collective likewise.
        """
        shift = (self.me - source) % self.size
        if shift:
            gradients, work = self._start(shift, gradients, -1, group)
            if work is not None:
                work.wait()
        for chunk, rows in self.sent.get((self.me, (self.me + shift) % self.size), {}).items():
            total[rows] += gradients[: chunk.tail]
            gradients = gradients[chunk.tail :]

    def _leaving(self, rows: Tensor, target: int) -> Tensor:
        return torch.cat([rows[:0], *(rows[part] for part in self.sent.get((self.me, target), {}).values())])

    def _start(
        self, shift: int, rows: Tensor, direction: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, dist.Work | None]:
        """Rows to the rank `shift` places on (`direction` 1) or before, and those that come from the other side."""
        before, after = (self.me - shift) % self.size, (self.me + shift) % self.size
        source, target = (before, after) if direction > 0 else (after, before)
        count = self.count(before, self.me) if direction > 0 else self.count(self.me, after)
        received = rows.new_empty((count, *rows.shape[1:]))
        if shift not in self.moves:
            return received, None
        send, receive = [0] * self.size, [0] * self.size
        send[target], receive[source] = len(rows), count
        work = dist.all_to_all_single(received, rows, receive, send, group=group, async_op=True)
        return received, work


@lru_cache(maxsize=64)  # stages have several packs at a time
def plan_rounds(bounds: tuple[int, ...], size: int, rank: int) -> Rounds:
    """All layers of a pack ask for one plan, forward and backward."""
    return Rounds(sorted({*bounds}), size, rank)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, host: Tensor, kernel: str, group_name: str
) -> tuple[Tensor, Tensor]:
    """q [t, H, D], k and v [t, Hkv, D] of this rank's two chunks; bounds of the whole pack, on device and host.

    Returns the output [t, H, D] and the log of each softmax's denominator, float32 [t, H]. Collective over the group.
    """
    chosen, group = cast(Kernel, kernel), group_of(group_name)
    rounds = plan_rounds(tuple(host.tolist()), group.size(), group.rank())
    part, log_sums = attend(chosen, q, k, v, rounds.local_bounds(cu_seqlens), rounds.rows)
    out, log_sums = part.float(), log_sums.contiguous()
    for source, keys in rounds.keys(torch.cat((k, v), dim=-1), group):
        for rows, columns in rounds.blocks(source):
            k_part, v_part = keys[columns].chunk(2, dim=-1)
            join(out[rows], log_sums[rows], *attend(chosen, q[rows], k_part, v_part))
    return out.to(q.dtype), log_sums


def ring_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    cu_seqlens: Tensor,
    host: Tensor,
    kernel: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, shaped and typed like them. Collective over the group."""
    chosen, group = cast(Kernel, kernel), group_of(group_name)
    rounds = plan_rounds(tuple(host.tolist()), group.size(), group.rank())
    inputs = (grad, q, k, v, out, log_sums)
    own = attend_backward(chosen, *inputs, rounds.local_bounds(cu_seqlens), rounds.rows)
    q_grad, pair = own[0].float(), torch.cat(own[1:], dim=-1).float()
    for source, keys in rounds.keys(torch.cat((k, v), dim=-1), group):
        away = torch.zeros_like(keys, dtype=torch.float32)
        for rows, columns in rounds.blocks(source):
            k_part, v_part = keys[columns].chunk(2, dim=-1)
            of_q, *of_keys = attend_backward(chosen, grad[rows], q[rows], k_part, v_part, out[rows], log_sums[rows])
            q_grad[rows] += of_q
            away[columns] += torch.cat(of_keys, dim=-1)
        rounds.return_gradients(source, away.to(k.dtype), pair, group)
    k_grad, v_grad = pair.to(k.dtype).chunk(2, dim=-1)
    return q_grad.to(q.dtype), k_grad.contiguous(), v_grad.contiguous()


# one operation each: what backward need not compute again is found by its name
_forward = torch.library.custom_op("omniloom::ring_attention", ring_attention, mutates_args=())
_backward = torch.library.custom_op("omniloom::ring_attention_backward", ring_attention_backward, mutates_args=())
_forward.register_fake(lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)))
_backward.register_fake(lambda grad, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, host: Tensor, kernel: str, group_name: str
    ) -> Tensor:
        out, log_sums = torch.ops.omniloom.ring_attention(q, k, v, cu_seqlens, host, kernel, group_name)
        ctx.save_for_backward(q, k, v, out, log_sums, cu_seqlens, host)
        ctx.settings = kernel, group_name
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.omniloom.ring_attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
        return *grads, None, None, None, None


class RingCore(nn.Module):
    """In place of a causal attention core: q [t, H, D], k and v [t, Hkv, D] of this rank's chunks -> [t, H, D]."""

    def __init__(self, kernel: Kernel, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.kernel: Kernel = kernel
        self.group = group

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, norms: PrepareHeads | None = None) -> Tensor:
        if norms is not None:
            q, k = norms(q, k)
        kernel = resolve_kernel(self.kernel, q.device.type, q.dtype)
        bounds = segments.cu_seqlens, segments.host
        return cast(Tensor, _RingAttention.apply(q, k, v, *bounds, kernel, self.group.group_name))
