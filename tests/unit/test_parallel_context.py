"""A pack's slices put together are the pack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.parallel.context import slice_batch
from omniloom.types import PackedBatch, Segments


def make_batch(num_tokens: int, seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num_tokens, generator=generator) * (torch.rand(num_tokens, generator=generator) < 0.5)
    return PackedBatch(
        input_ids=torch.arange(num_tokens),
        labels=torch.arange(num_tokens) + 1,
        loss_weights=weights,
        loss_index=weights.nonzero().squeeze(1),
        position_ids=torch.arange(3 * num_tokens).view(3, num_tokens),
        is_padding=torch.rand(num_tokens, generator=generator) < 0.2,
        segments=Segments.from_lengths([num_tokens]),
        vision=None,
        audio=None,
    )


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_slices_hold_every_token_and_every_loss_row_once(degree: int, size: int, seed: int) -> None:
    batch = make_batch(degree * size, seed)
    parts = [slice_batch(batch, rank, degree) for rank in range(degree)]
    for name in ("input_ids", "labels", "loss_weights", "is_padding"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([part.position_ids for part in parts], dim=1), batch.position_ids)
    loss_rows = torch.cat([part.input_ids[part.loss_index] for part in parts])
    assert torch.equal(loss_rows, batch.input_ids[batch.loss_index])
    assert all(part.segments is batch.segments for part in parts)


def test_tokens_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens does not divide over 4"):
        slice_batch(make_batch(10, 0), 0, 4)
