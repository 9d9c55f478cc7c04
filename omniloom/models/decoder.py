"""The text decoder: embedding, layers, loss head, and where media rows enter.

Cuttable: `embed`, `layers` (keyed by global index) and `loss_head` may each be absent, as a pipeline stage has it;
`forward` composes what is there and parameter names never change. Family configs decide dims; nothing here reads a
checkpoint or knows a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from omniloom.models.layers import Attention, GatedMLP, LayerCall, Linear, RMSNorm
from omniloom.models.moe import MoE
from omniloom.ops.auxiliary_loss import attach_loss
from omniloom.ops.cross_entropy import linear_cross_entropy
from omniloom.ops.rotary import Rotary, SectionLayout, multimodal_rotary
from omniloom.types import ROUTER, TEXT, Kernel, LossTerms, PackedBatch, Segments, TowerRows

Want = Literal["loss", "logits", "best_tokens"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Dims of a decoder, named as in Hugging Face configs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    attention_biases: tuple[bool, bool, bool, bool]  # q, k, v, output
    qk_norm: bool
    rope_theta: float
    mrope_section: tuple[int, int, int]
    mrope_layout: SectionLayout
    tie_word_embeddings: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_moe(self, layer: int) -> bool:
        sparse = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return sparse and layer not in self.mlp_only_layers

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe(layer) for layer in range(self.num_hidden_layers))


class DecoderLayer(nn.Module):
    """norm, attention, add; norm, feed-forward or experts, add."""

    def __init__(self, config: DecoderConfig, layer: int, kernel: Kernel) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            biases=config.attention_biases,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
            causal=True,
            kernel=kernel,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp, self.moe = None, None
        if config.is_moe(layer):
            self.moe = MoE(
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size,
                activation=config.hidden_act,
                num_experts=config.num_experts,
                num_experts_per_tok=config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
            )
        else:
            self.mlp = GatedMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                activation=config.hidden_act,
            )

    def forward(
        self, hidden: Tensor, rotary: Rotary, segments: Segments, is_padding: Tensor, draw_key: int | None = None
    ) -> tuple[Tensor] | tuple[Tensor, Tensor, Tensor]:
        """hidden [T, C] -> (hidden [T, C],), with experts also the router loss float32 [] and counts int64 [E]."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary, segments, draw_key)
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

    def forward(
        self, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, low: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """hidden [L, C], head [V, C], labels int64 [L], weights float32 [L], low [L, R] and [V, R] -> float32 []."""
        return linear_cross_entropy(hidden, head, labels, weights, low=low, chunk_tokens=self.chunk_tokens)


class LossHead(nn.Module):
    """The last norm, the head and the loss: one module, so that the head is gathered once for all chunks."""

    def __init__(self, config: DecoderConfig, chunk_tokens: int | None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.cross_entropy = CrossEntropy(chunk_tokens)

    def forward(
        self, hidden: Tensor, labels: Tensor | None, weights: Tensor | None, draw_key: int | None = None
    ) -> Tensor:
        """hidden [L, C], labels int64 [L], weights float32 [L] -> weighted sum of cross entropies, float32 [].

        Without labels: logits, float32 [L, V].
        """
        hidden = self.norm(hidden)
        if labels is None or weights is None:
            return self.head(hidden, draw_key).float()
        low = None if isinstance(self.head, nn.Linear) else self.head.low_rank(hidden, draw_key)
        return self.cross_entropy(hidden, self.head.weight, labels, weights, low)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig, *, kernel: Kernel, loss_chunk_tokens: int | None) -> None:
        super().__init__()
        self.config = config
        self.embed: nn.Embedding | None = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(layer): DecoderLayer(config, layer, kernel) for layer in range(config.num_hidden_layers)}
        )
        self.call = LayerCall()
        self.loss_head: LossHead | None = LossHead(config, loss_chunk_tokens)
        if config.tie_word_embeddings:
            self.loss_head.head.weight = self.embed.weight

    def forward(
        self, batch: PackedBatch, media: TowerRows, hidden: Tensor | None = None, *, want: Want = "loss"
    ) -> LossTerms | Tensor:
        """The loss terms of a pack; or the logits of every row, float32 [T, V]; or the likeliest next token of the rows
        in `loss_index`, int64 [L].

        `hidden` [T, C] are the rows that an earlier part of the model hands on; without them the pack is embedded.
        Where the loss head is not here, the terms hold the rows for the next part. One entry for all, since FSDP
        gathers what a module holds only when the module itself is called.
        """
        if hidden is None:
            hidden = self.embed_rows(batch, media)
        hidden, sums, counts = self.run_layers(hidden, batch, media)
        if self.loss_head is None:
            return LossTerms(sums=sums, expert_counts=counts, hidden=hidden)
        if want == "logits":
            return self.loss_head(hidden, None, None, batch.draw_key)
        index = batch.loss_index
        if want == "best_tokens":
            return self.loss_head(hidden[index], None, None, batch.draw_key).argmax(dim=-1)
        text = self.loss_head(hidden[index], batch.labels[index], batch.loss_weights[index], batch.draw_key)
        return LossTerms(sums={TEXT: text, **sums}, expert_counts=counts)

    def embed_rows(self, batch: PackedBatch, media: TowerRows) -> Tensor:
        """Token embeddings, with media rows in the places of their tokens: [T, C]."""
        assert self.embed is not None, "this stage has no embedding"
        hidden = self.embed(batch.input_ids)
        if media.vision is not None and batch.vision is not None:
            index = batch.vision.token_index
            hidden = hidden.index_copy(0, index, media.vision[: index.shape[0]].to(hidden.dtype))
        if media.audio is not None and batch.audio is not None:
            index = batch.audio.token_index
            hidden = hidden.index_copy(0, index, media.audio[: index.shape[0]].to(hidden.dtype))
        return hidden

    def run_layers(
        self, hidden: Tensor, batch: PackedBatch, media: TowerRows
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The layers that are here, in order.

        Returns: hidden [T, C], on which the gradients of these layers' own losses ride, scaled by `batch.loss_scales`;
        the sums of those losses; expert counts int64 [MoE layers here, E].
        """
        rotary = multimodal_rotary(
            batch.position_ids,
            head_dim=self.config.head_dim,
            theta=self.config.rope_theta,
            sections=self.config.mrope_section,
            layout=self.config.mrope_layout,
        )
        router_scale = batch.loss_scales.get(ROUTER, 0.0)
        router_losses, counts = [], []
        for name, layer in self.layers.items():
            inputs = (hidden, rotary, batch.segments, batch.is_padding, batch.draw_key)
            hidden, *of_router = self.call(int(name), layer, *inputs)
            if of_router:
                router_loss = of_router[0] / self.config.num_moe_layers  # its share of the mean over layers
                if router_scale:
                    hidden = attach_loss(hidden, router_scale * router_loss)
                router_losses.append(router_loss.detach())
                counts.append(of_router[1])
            if int(name) < len(media.deepstack) and batch.vision is not None:
                index = batch.vision.token_index
                hidden = hidden.index_add(0, index, media.deepstack[int(name)][: index.shape[0]].to(hidden.dtype))
        if not counts:
            return hidden, {}, torch.zeros(0, 0, dtype=torch.int64, device=hidden.device)
        return hidden, {ROUTER: torch.stack(router_losses).sum()}, torch.stack(counts)
