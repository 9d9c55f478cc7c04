"""The decoder that Qwen's families share: its dims, its kinds of layer, and the whole put together.

A family with layers of other kinds hands its own `make_layer` to `make_decoder`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

from torch import nn

from omniloom.models.decoder import Decoder, DecoderLayer, LossHead
from omniloom.models.delta_rule import GatedDeltaRule
from omniloom.models.layers import Attention, GatedMLP
from omniloom.models.moe import MoE, SharedExpert
from omniloom.ops.rotary import SectionOrder, multimodal_rotary
from omniloom.types import Kernel, RuleKernel


@dataclass(frozen=True, kw_only=True)
class DeltaRuleConfig:
    """Dims of layers with a gated delta rule in the place of attention, named as in Hugging Face configs."""

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    @property
    def key_width(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_width(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim


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
    mrope_order: SectionOrder
    tie_word_embeddings: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    shared_expert_intermediate_size: int = 0  # of an expert that every token takes beside its own; 0: there is none
    partial_rotary_factor: float = 1.0  # of a head's dims, the first ones
    zero_centred_norms: bool = False
    output_gate: bool = False  # of attention
    delta_rule: DeltaRuleConfig | None = None
    delta_layers: tuple[int, ...] = ()

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def is_moe(self, layer: int) -> bool:
        sparse = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return sparse and layer not in self.mlp_only_layers

    @cached_property
    def layer_kinds(self) -> Counter[tuple[bool, bool]]:
        """How many layers there are of each kind: (has a delta rule, is a mixture of experts)."""
        return Counter((layer in self.delta_layers, self.is_moe(layer)) for layer in range(self.num_hidden_layers))

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe(layer) for layer in range(self.num_hidden_layers))


LayerMaker = Callable[[DecoderConfig, int, Kernel, RuleKernel], nn.Module]


def make_layer(config: DecoderConfig, index: int, kernel: Kernel, rule: RuleKernel = "chunked") -> DecoderLayer:
    """Grouped-query attention or a gated delta rule, then a feed-forward or experts."""
    mlp = moe = None
    if config.is_moe(index):
        moe = MoE(
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            activation=config.hidden_act,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            shared=None
            if not config.shared_expert_intermediate_size
            else SharedExpert(
                hidden_size=config.hidden_size,
                intermediate_size=config.shared_expert_intermediate_size,
                activation=config.hidden_act,
            ),
        )
    else:
        mlp = GatedMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
        )
    return DecoderLayer(
        hidden_size=config.hidden_size,
        norm_eps=config.rms_norm_eps,
        attention=_make_delta_rule(config, rule) if index in config.delta_layers else _make_attention(config, kernel),
        mlp=mlp,
        moe=moe,
        zero_centred_norms=config.zero_centred_norms,
    )


def _make_attention(config: DecoderConfig, kernel: Kernel) -> Attention:
    return Attention(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        biases=config.attention_biases,
        qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
        causal=True,
        kernel=kernel,
        zero_centred_norms=config.zero_centred_norms,
        output_gate=config.output_gate,
    )


def _make_delta_rule(config: DecoderConfig, kernel: RuleKernel) -> GatedDeltaRule:
    dims = config.delta_rule
    assert dims is not None, "layers with a delta rule have dims"
    return GatedDeltaRule(
        hidden_size=config.hidden_size,
        num_key_heads=dims.linear_num_key_heads,
        num_value_heads=dims.linear_num_value_heads,
        key_head_dim=dims.linear_key_head_dim,
        value_head_dim=dims.linear_value_head_dim,
        convolution_width=dims.linear_conv_kernel_dim,
        norm_eps=config.rms_norm_eps,
        kernel=kernel,
    )


def make_decoder(
    config: DecoderConfig,
    *,
    kernel: Kernel,
    rule: RuleKernel = "chunked",
    loss_chunk_tokens: int | None,
    make_layer: LayerMaker = make_layer,
    speech_layer: int | None = None,
) -> Decoder:
    """The decoder on the current default device, weights not yet read; `speech_layer`: see `Decoder`."""
    embed = nn.Embedding(config.vocab_size, config.hidden_size)
    loss_head = LossHead(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        norm_eps=config.rms_norm_eps,
        chunk_tokens=loss_chunk_tokens,
        zero_centred_norms=config.zero_centred_norms,
    )
    if config.tie_word_embeddings:
        loss_head.head.weight = embed.weight
    return make_layers(
        config,
        kernel=kernel,
        rule=rule,
        make_layer=make_layer,
        embed=embed,
        loss_head=loss_head,
        speech_layer=speech_layer,
    )


def make_layers(
    config: DecoderConfig,
    *,
    kernel: Kernel,
    rule: RuleKernel = "chunked",
    make_layer: LayerMaker = make_layer,
    embed: nn.Embedding | None = None,
    loss_head: LossHead | None = None,
    speech_layer: int | None = None,
) -> Decoder:
    """The layers with their rotary positions, and whichever ends are given."""
    return Decoder(
        (make_layer(config, index, kernel, rule) for index in range(config.num_hidden_layers)),
        speech_layer=speech_layer,
        rotary=partial(
            multimodal_rotary,
            head_dim=config.rotary_dim,
            theta=config.rope_theta,
            sections=config.mrope_section,
            order=config.mrope_order,
        ),
        embed=embed,
        loss_head=loss_head,
        num_router_losses=config.num_moe_layers,
    )
