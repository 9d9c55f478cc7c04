"""A decoder runs layers of kinds that the package has not: what a later family brings needs no change of models/."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from omniloom.models.decoder import Decoder, DecoderLayer, LossHead
from omniloom.models.layers import Attention, GatedMLP, Linear
from omniloom.ops.rotary import Rotary, multimodal_rotary
from omniloom.parallel.recompute import recompute_layers
from omniloom.types import PackedBatch, Segments, TowerRows

WIDTH, VOCABULARY, EPS = 16, 31, 1e-6
NO_MEDIA = TowerRows(vision=None, deepstack=(), audio=None)


class GatedDeltaRule(nn.Module):
    """A recurrence instead of attention: the state forgets, and is corrected towards each value. Row by row, to read.

    Source: Yang et al. 2024 (arXiv 2412.06464), equation 10.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv = Linear(WIDTH, 3 * WIDTH, bias=False)
        self.gates = Linear(WIDTH, 2, bias=True)
        self.out = Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor, rotary: Rotary, segments: Segments, draw_key: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(hidden, draw_key).chunk(3, dim=-1)
        k = k / k.norm(dim=-1, keepdim=True)
        keep, write = self.gates(hidden, draw_key).sigmoid().unbind(-1)
        rows = []
        for low, high in pairwise(segments.bounds):  # known on the host: no wait for the device
            state = hidden.new_zeros(WIDTH, WIDTH)
            for row in range(low, high):
                wrong = v[row] - keep[row] * (state @ k[row])
                state = keep[row] * state + write[row] * torch.outer(wrong, k[row])
                rows.append(state @ q[row])
        return self.out(torch.stack(rows), draw_key)


def make_decoder() -> Decoder:
    layers = [
        DecoderLayer(
            hidden_size=WIDTH,
            norm_eps=EPS,
            attention=GatedDeltaRule(),
            mlp=GatedMLP(hidden_size=WIDTH, intermediate_size=24, activation="silu"),
        )
        for _ in range(2)
    ]
    decoder = Decoder(
        layers,
        rotary=partial(multimodal_rotary, head_dim=4, theta=1e4, sections=(1, 1, 0), order="blocks"),
        embed=nn.Embedding(VOCABULARY, WIDTH),
        loss_head=LossHead(vocab_size=VOCABULARY, hidden_size=WIDTH, norm_eps=EPS, chunk_tokens=None),
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return decoder


def make_batch(lengths: list[int], seed: int = 0) -> PackedBatch:
    num_tokens, generator = sum(lengths), torch.Generator().manual_seed(seed)
    return PackedBatch(
        input_ids=torch.randint(0, VOCABULARY, (num_tokens,), generator=generator),
        labels=torch.randint(0, VOCABULARY, (num_tokens,), generator=generator),
        loss_weights=torch.ones(num_tokens),
        loss_index=torch.arange(num_tokens),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).expand(3, -1),
        is_padding=torch.zeros(num_tokens, dtype=torch.bool),
        segments=Segments.from_lengths(lengths),
        vision=None,
        audio=None,
    )


def gradients(decoder: Decoder, batch: PackedBatch) -> list[Tensor]:
    decoder.zero_grad()
    decoder(batch, NO_MEDIA).sums["text"].backward()
    return [parameter.grad for parameter in decoder.parameters()]


def test_a_recurrent_layer_trains_and_packing_does_not_change_its_loss() -> None:
    decoder, lengths = make_decoder(), [5, 1, 9]
    batch = make_batch(lengths)
    packed = decoder(batch, NO_MEDIA).sums["text"]
    alone = []
    for (low, high), length in zip(pairwise(batch.segments.bounds), lengths, strict=True):
        one = make_batch([length])
        rows = {"input_ids": batch.input_ids[low:high], "labels": batch.labels[low:high]}
        alone.append(decoder(replace(one, **rows), NO_MEDIA).sums["text"])
    torch.testing.assert_close(packed, torch.stack(alone).sum())
    joined = replace(batch, segments=Segments.from_lengths([sum(lengths)]))
    assert not torch.isclose(decoder(joined, NO_MEDIA).sums["text"], packed)
    assert all(gradient.any() for gradient in gradients(decoder, batch))


@pytest.mark.parametrize("how", ["full", 2])
def test_a_recurrent_layer_is_recomputed_as_any_other(how: str | int) -> None:
    decoder, batch = make_decoder(), make_batch([7, 6])
    expected = gradients(decoder, batch)
    recompute_layers(decoder, how, routes=False)
    for found, wanted in zip(gradients(decoder, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_bounds_on_the_host_are_those_on_the_device_without_empty_segments() -> None:
    segments = Segments.from_lengths([3, 0, 4, 1, 0], num_bounds=8)
    assert segments.cu_seqlens.tolist() == [0, 3, 7, 8, 8, 8, 8, 8]
    assert segments.bounds == (0, 3, 7, 8)
    assert segments.max_length == 4


class Names(TorchDispatchMode):
    """Of the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_queries_are_copied_only_where_a_gate_lies_between_them(gated: bool) -> None:
    attention = Attention(
        hidden_size=WIDTH,
        num_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        biases=(False,) * 4,
        qk_norm_eps=EPS,
        causal=True,
        kernel="eager",
        output_gate=gated,
    )
    segments = Segments(cu_seqlens=torch.tensor([0, 5], dtype=torch.int32), bounds=(0, 5), max_length=5)
    rotary = multimodal_rotary(torch.arange(5).expand(3, -1), head_dim=8, theta=1e4, sections=(2, 1, 1), order="blocks")
    with Names() as names:
        attention(torch.randn(5, WIDTH, requires_grad=True), rotary, segments).sum().backward()
    assert ("aten.stack.default" in names.found) == gated
