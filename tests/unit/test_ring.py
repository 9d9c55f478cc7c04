"""Ring attention's plan: every query meets every key of its segment once; work is even, and nothing moves in vain."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.ops.attention import segment_attention_reference
from omniloom.ops.block_attention import attend, attend_backward, join
from omniloom.parallel import ring as ring_module
from omniloom.parallel.context import move_chunks, slice_batch, token_order
from omniloom.parallel.ring import plan_rounds, ring_attention, ring_attention_backward
from omniloom.types import Kernel, Segments
from tests.unit.test_parallel_context import make_batch


def pairs_of(bounds: tuple[int, ...], ring: int, rank: int) -> Counter[tuple[int, int]]:
    """(query, key) in token rows of the pack, as often as a rank computes them."""
    own, met = plan_rounds(bounds, ring, rank), Counter[tuple[int, int]]()
    order = token_order(bounds[-1], ring).tolist()
    local = order[2 * rank * own.rows : 2 * (rank + 1) * own.rows]
    squares = own.local_bounds(torch.tensor(bounds, dtype=torch.int32)).tolist()
    for start, stop in pairwise(squares):
        met.update((local[q], local[k]) for q in range(start, stop) for k in range(start, q + 1))
    for source in range(ring):
        theirs = order[2 * source * own.rows : 2 * (source + 1) * own.rows]
        keys = [row for part in own.sent.get((source, rank), {}).values() for row in theirs[part]]
        for queries, columns in own.blocks(source):
            met.update((query, key) for query in local[queries] for key in keys[columns])
    return met


@given(st.integers(2, 4), st.integers(1, 5), st.data())
@settings(deadline=None, max_examples=60)
def test_every_query_meets_every_key_it_may_see_once(ring: int, size: int, data: st.DataObject) -> None:
    num_tokens = 2 * ring * size
    cuts = data.draw(st.sets(st.integers(1, num_tokens - 1), max_size=num_tokens - 1))
    bounds = (0, *sorted(cuts), num_tokens)
    met = sum((pairs_of(bounds, ring, rank) for rank in range(ring)), Counter())
    allowed = [(q, k) for a, b in pairwise(bounds) for q in range(a, b) for k in range(a, q + 1)]
    assert met == Counter(allowed)


def test_a_sample_as_long_as_the_pack_is_the_same_work_for_every_rank() -> None:
    work = {sum(pairs_of((0, 48), 4, rank).values()) for rank in range(4)}
    assert len(work) == 1


def test_samples_that_end_with_the_chunks_move_nothing() -> None:
    bounds = tuple(range(0, 49, 3))  # chunks of 6
    assert not plan_rounds(bounds, 4, 0).sent
    assert not plan_rounds(bounds, 4, 0).moves


def test_slices_of_a_ring_hold_every_row_once_and_say_where_it_was() -> None:
    batch = make_batch(48, 1)
    parts = [slice_batch(batch, rank, 8, 2, ring=2) for rank in range(8)]
    order = token_order(48, 2)
    assert order.tolist() == [*range(12), *range(36, 48), *range(12, 36)]
    assert torch.equal(move_chunks(order, 48, 2), torch.arange(48))
    assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids[order])
    assert torch.equal(torch.cat([part.position_ids for part in parts[::2]], dim=1), batch.position_ids[:, order])
    weighted = [part.input_ids[part.loss_index][part.loss_weights[part.loss_index] > 0] for part in parts]
    assert sorted(torch.cat(weighted).tolist()) == batch.loss_index.tolist()


def test_a_pack_without_two_chunks_for_each_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens does not divide into two chunks for each of 4 ring ranks"):
        slice_batch(make_batch(12, 0), 0, 4, ring=4)


def test_all_layers_of_a_pack_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    monkeypatch.setattr(ring_module, "group_of", lambda _: alone)
    generator = torch.Generator().manual_seed(0)
    plan_rounds.cache_clear()
    segments = Segments.from_lengths([9, 3])
    for _ in range(3):
        q, k, v = (torch.randn(12, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
        expected = segment_attention_reference(q, k, v, segments, causal=True)
        expected.backward(torch.ones_like(expected))
        settings = (segments.cu_seqlens, segments.cu_seqlens, "sdpa", "")
        with torch.no_grad():
            out, log_sums = ring_attention(q, k, v, *settings)
            found = ring_attention_backward(torch.ones_like(out), q, k, v, out, log_sums, *settings)
        torch.testing.assert_close(out, expected)
        for total, leaf in zip(found, (q, k, v), strict=True):
            torch.testing.assert_close(total, leaf.grad)
    assert plan_rounds.cache_info().misses == 1


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_joined_blocks_are_one_softmax_forward_and_backward(kernel: Kernel) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(12, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    grad = torch.randn(12, 4, 8, generator=generator)
    segments = Segments.from_lengths([9, 3])
    expected = segment_attention_reference(q, k, v, segments, causal=True)
    expected.backward(grad)
    own = torch.tensor([0, 5, 9, 12], dtype=torch.int32)  # the first segment in two parts, and the rectangle between
    rows, keys = slice(5, 9), slice(0, 5)
    with torch.no_grad():
        out, log_sums = attend(kernel, q, k, v, own, 5)
        log_sums = log_sums.contiguous()
        join(out[rows], log_sums[rows], *attend(kernel, q[rows], k[keys], v[keys]))
        torch.testing.assert_close(out, expected)
        found = attend_backward(kernel, grad, q, k, v, out, log_sums, own, 5)
        more = attend_backward(kernel, grad[rows], q[rows], k[keys], v[keys], out[rows], log_sums[rows])
    for total, part, at in zip(found, more, (rows, keys, keys), strict=True):
        total[at] += part
    for total, leaf in zip(found, (q, k, v), strict=True):
        torch.testing.assert_close(total, leaf.grad)
