"""The text decoder: embedding, layers, loss head, and where media rows enter.

Cuttable: `embed`, `layers` (keyed by global index) and `loss_head` may each be absent, as a pipeline stage has it;
`forward` composes what is there and parameter names never change. Families make the layers, of whatever kind; nothing
here reads a checkpoint or knows a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from omniloom.models.layers import LayerCall, Linear, RMSNorm
from omniloom.ops.auxiliary_loss import attach_loss
from omniloom.ops.cross_entropy import linear_cross_entropy
from omniloom.ops.linear_map import LinearMap, layer_key
from omniloom.ops.rotary import Rotary
from omniloom.types import ROUTER, TEXT, LossTerms, PackedBatch, Segments, SpeechInputs, TowerRows

Want = Literal["loss", "logits", "best_tokens", "speech"]


class DecoderLayer(nn.Module):
    """norm, attention, add; norm, feed-forward or experts, add.

    `attention` is anything that takes (hidden, rotary, segments, draw_key) to rows of the same width: what mixes the
    tokens of a segment. It may have an `ahead()`, tensors that it takes behind these. One of `mlp`, as `GatedMLP`, and
    `moe`, as `MoE`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        norm_eps: float,
        attention: nn.Module,
        mlp: nn.Module | None = None,
        moe: nn.Module | None = None,
        zero_centred_norms: bool = False,
    ) -> None:
        super().__init__()
        assert (mlp is None) != (moe is None), "a layer has a feed-forward or experts"
        self.attention_norm = RMSNorm(hidden_size, norm_eps, zero_centred=zero_centred_norms)
        self.attention = attention
        self.mlp_norm = RMSNorm(hidden_size, norm_eps, zero_centred=zero_centred_norms)
        self.mlp, self.moe = mlp, moe

    def ahead(self) -> tuple[Tensor, ...]:
        """What `forward` takes last, made before it is called: of parameters that FSDP gathers by themselves, which
        within a compiled layer would end its graph."""
        made: tuple[Tensor, ...] = getattr(self.attention, "ahead", tuple)()
        return made

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary,
        segments: Segments,
        is_padding: Tensor,
        draw_key: Tensor | None = None,
        *ahead: Tensor,
    ) -> tuple[Tensor] | tuple[Tensor, Tensor, Tensor]:
        """hidden [T, C] -> (hidden [T, C],), with experts also the router loss float32 [] and counts int64 [E]."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary, segments, draw_key, *ahead)
        if self.moe is None:
            assert self.mlp is not None
            return (hidden + self.mlp(hidden, draw_key, self.mlp_norm),)
        out, router_loss, counts = self.moe(self.mlp_norm(hidden), is_padding, draw_key)
        return hidden + out, router_loss, counts


class CrossEntropy(nn.Module):
    """The loss proper, without parameters, so that a vocabulary-parallel version can take its place."""

    def __init__(self, chunk_tokens: int | None) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden: Tensor, head: LinearMap, labels: Tensor, weights: Tensor) -> Tensor:
        """hidden [L, C], head to [L, V], labels int64 [L], weights float32 [L] -> float32 []."""
        return linear_cross_entropy(hidden, head, labels, weights, chunk_tokens=self.chunk_tokens)


class LossHead(nn.Module):
    """The last norm, the head and the loss: one module, so that the head is gathered once for all chunks."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        norm_eps: float,
        chunk_tokens: int | None,
        zero_centred_norms: bool = False,
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, norm_eps, zero_centred=zero_centred_norms)
        self.head = Linear(hidden_size, vocab_size, bias=False)
        self.cross_entropy = CrossEntropy(chunk_tokens)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        draw_key: Tensor | None = None,
        *,
        norm_only: bool = False,
    ) -> Tensor:
        """hidden [L, C], labels int64 [L], weights float32 [L] -> weighted sum of cross entropies, float32 [].

        Without labels: logits, float32 [L, V]; with `norm_only` what they are made of, [L, C].
        """
        hidden = self.norm(hidden)
        if norm_only:
            return hidden
        if labels is None or weights is None:
            return self.head(hidden, draw_key).float()
        return self.cross_entropy(hidden, self.head.as_map(draw_key), labels, weights)


class Decoder(nn.Module):
    """The layers are handed in: whatever is called as a `DecoderLayer` is, `ahead` too, and gives what it gives."""

    def __init__(
        self,
        layers: Iterable[nn.Module],
        *,
        rotary: Callable[[Tensor], Rotary],
        embed: nn.Embedding | None,
        loss_head: LossHead | None,
        num_router_losses: int = 0,
        speech_layer: int | None = None,
    ) -> None:
        """`rotary` makes the angles of position_ids int64 [3, T]; `num_router_losses` are those of the whole model.

        `speech_layer`: how many layers make the hidden states that a talker reads; None without one.
        """
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleDict({str(index): layer for index, layer in enumerate(layers)})
        self.call = LayerCall()
        self.loss_head = loss_head
        self.rotary = rotary
        self.num_router_losses = num_router_losses
        self.speech_layer = speech_layer
        self.gather_rows = nn.Identity()  # of a pack that ranks share: a talker may read rows of all

    def forward(
        self, batch: PackedBatch, media: TowerRows, hidden: Tensor | None = None, *, want: Want = "loss"
    ) -> LossTerms | Tensor:
        """The loss terms of a pack; or the logits of every row, float32 [T, V]; or the likeliest next token of the rows
        in `loss_index`, int64 [L]; or, of a model that speaks, terms with nothing but what its talker reads, for which
        only as many layers run as that takes.

        `hidden` [T, C] are the rows that an earlier part of the model hands on; without them the pack is embedded.
        Where the loss head is not here, the terms hold the rows for the next part. One entry for all, since FSDP
        gathers what a module holds only when the module itself is called.
        """
        speech: SpeechInputs | None = None
        if want in ("logits", "best_tokens"):
            batch = replace(batch, speech=None)
        if hidden is None:
            hidden, speech, sums, counts = self.run(batch, media, speech_alone=want == "speech")
            if want == "speech":
                return LossTerms(sums={}, expert_counts=counts, speech=speech)
        else:
            hidden, sums, counts = self.run_layers(hidden, batch, media)
        if self.loss_head is None:
            return LossTerms(sums=sums, expert_counts=counts, hidden=hidden)
        if want == "logits":
            return self.loss_head(hidden, None, None, layer_key(batch.draw_key))
        if want == "best_tokens":
            return self.loss_head(hidden[batch.loss_index], None, None, layer_key(batch.draw_key)).argmax(dim=-1)
        index = batch.loss_index
        text = self.loss_head(hidden[index], batch.labels[index], batch.loss_weights[index], layer_key(batch.draw_key))
        return LossTerms(sums={TEXT: text, **sums}, expert_counts=counts, speech=speech)

    def run(
        self, batch: PackedBatch, media: TowerRows, *, speech_alone: bool = False
    ) -> tuple[Tensor, SpeechInputs | None, dict[str, Tensor], Tensor]:
        """Embedding and layers: hidden [T, C], what a talker reads of a model that speaks, losses and counts.

        With `speech_alone` only as many layers run as the talker needs.
        """
        if self.speech_layer is None or batch.speech is None:
            hidden, sums, counts = self.run_layers(self.embed_rows(batch, media), batch, media)
            return hidden, None, sums, counts
        assert self.embed is not None, "a model that speaks is not cut into stages"
        rows = batch.speech.rows
        # embedded in one call: FSDP gathers at each
        text, spoken = self.embed(torch.cat((batch.input_ids, rows.text_ids))).chunk(2)
        hidden = self.place_media(text, batch, media)
        kept = {self.speech_layer: hidden}  # the first layer's input, until that layer has run
        last = (self.speech_layer if batch.speech.reads_hidden else 0) if speech_alone else None
        hidden, sums, counts = self.run_layers(hidden, batch, media, kept, last)
        states = kept[self.speech_layer]
        heard = (self.gather_rows(states) if batch.speech.reads_hidden else states)[rows.hidden_index]
        if self.speech_layer == len(self.layers):  # transformers has the last state normed
            assert self.loss_head is not None
            heard = self.loss_head(heard, None, None, norm_only=True)
        return hidden, SpeechInputs(text=spoken, hidden=heard), sums, counts

    def embed_rows(self, batch: PackedBatch, media: TowerRows) -> Tensor:
        """Token embeddings, with media rows in the places of their tokens: [T, C]."""
        assert self.embed is not None, "this stage has no embedding"
        return self.place_media(self.embed(batch.input_ids), batch, media)

    @staticmethod
    def place_media(hidden: Tensor, batch: PackedBatch, media: TowerRows) -> Tensor:
        """Embeddings [T, C] with media rows in the places of their tokens."""
        if media.vision is not None and batch.vision is not None:
            index = batch.vision.token_index
            hidden = hidden.index_copy(0, index, media.vision[: index.shape[0]].to(hidden.dtype))
        if media.audio is not None and batch.audio is not None:
            index = batch.audio.token_index
            hidden = hidden.index_copy(0, index, media.audio[: index.shape[0]].to(hidden.dtype))
        return hidden

    def run_layers(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        media: TowerRows,
        kept: dict[int, Tensor] | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The layers that are here, in order, or of the first `last` those that are.

        `kept` gets, by their number, what so many layers make, before deepstack rows are added: as transformers counts
        hidden states.

        Returns: hidden [T, C], on which the gradients of these layers' own losses ride, scaled by `batch.loss_scales`;
        the sums of those losses; expert counts int64 [MoE layers here, E].
        """
        rotary, segments = self.rotary(batch.position_ids), batch.segments.with_host()
        router_scale = batch.loss_scales.get(ROUTER, 0.0)
        router_losses, counts = [], []
        layer: Any
        for name, layer in islice(self.layers.items(), last):
            key = layer_key(batch.draw_key, int(name))
            inputs = (hidden, rotary, segments, batch.is_padding, key, *layer.ahead())
            hidden, *of_router = self.call(int(name), layer, *inputs)
            if of_router:
                router_loss = of_router[0] / self.num_router_losses  # its share of the mean over layers
                if router_scale:
                    hidden = attach_loss(hidden, router_scale * router_loss)
                router_losses.append(router_loss.detach())
                counts.append(of_router[1])
            if kept is not None and int(name) + 1 in kept:
                kept[int(name) + 1] = hidden
            if int(name) < len(media.deepstack) and batch.vision is not None:
                index = batch.vision.token_index
                hidden = hidden.index_add(0, index, media.deepstack[int(name)][: index.shape[0]].to(hidden.dtype))
        if not counts:
            return hidden, {}, torch.zeros(0, 0, dtype=torch.int64, device=hidden.device)
        return hidden, {ROUTER: torch.stack(router_losses).sum()}, torch.stack(counts)
