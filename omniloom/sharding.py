"""The vocabulary in which a family declares how it may be sharded. Data only: names, no tensors, no collectives.

Module names are relative to the whole model; `*` stands for one dot-separated part. `parallel/` reads the plan and
installs what a layout needs; `families/sharding.py` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TensorSharding:
    """How the decoder's matrices are divided over tensor ranks, each of which holds some rows of a pack's tokens.

    What of `root` no pattern names is held by every tensor rank and works on its own rows.
    """

    root: str
    # called with rows first, gives rows: computed for all rows of the tensor ranks, each giving its share of a sum
    regions: tuple[str, ...]
    outputs: tuple[str, ...]  # linears in regions, divided by what comes out of them
    key_values: tuple[str, ...]  # linears likewise, but held whole where the key-value heads do not divide
    inputs: tuple[str, ...]  # linears in regions, divided by what goes into them
    embedding: str  # divided by the vocabulary, as the head is
    loss_head: str  # called with (rows, labels or None, weights or None, draw_key)
    head: str
    cross_entropy: str  # parameter-free: (rows, head, labels, weights)
    widths: tuple[tuple[str, int], ...]  # sizes that must divide, with their names in config.json
    vocab_size: int
    has_output_bias: bool = False  # of one of `inputs`
    # modules whose outputs are several parts of these widths, each divided by itself; their parameters are held whole
    parted_outputs: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShardingPlan:
    roots: tuple[str, ...]  # modules entered by a call of their own: the towers and, last, the decoder
    blocks: tuple[str, ...]  # each match is sharded by itself, and in execution order
    layer_calls: tuple[str, ...] = ()  # parameter-free, one in each root: (index, layer, inputs...); recompute's place
    # further groups, each gathered as one, the one that forward uses last at the end; tied weights share a group:
    # (("text.embed", "text.loss_head"),)
    groups: tuple[tuple[str, ...], ...] = ()
    experts: tuple[str, ...] = ()  # modules whose every parameter is stacked [E, ...]
    dispatches: tuple[str, ...] = ()  # parameter-free: (hidden, expert_index, expert_weights, experts)
    expert_products: tuple[str, ...] = ()  # parameter-free: (rows, stacked weights..., offsets)
    router_counts: tuple[str, ...] = ()  # parameter-free: reduces a pack's expert counts over who shares the pack
    attention_cores: tuple[str, ...] = ()  # parameter-free: (q, k, v, segments, norms), over a pack's tokens only
    row_gathers: tuple[str, ...] = ()  # parameter-free: rows of this rank -> those of the whole pack
    recurrences: tuple[str, ...] = ()  # parameter-free: (channels, weight, decay, beta, segments), as `DeltaRuleCore`
    # modules whose parameters are computed with in float32, whatever the others are, and which are called outside of
    # blocks (`DecoderLayer.ahead`): FSDP gathers them by themselves, which would break the graph of a compiled block
    wide: tuple[str, ...] = ()
    tensor: TensorSharding | None = None  # None: this family's decoder is not divided
    num_attention_heads: int = 1
    num_key_value_heads: int = 1
    num_recurrent_heads: int = 0  # of keys, in layers with a recurrence
    num_experts: int = 0
    num_talker_experts: int = 0
    num_talker_heads: int = 0  # 0: no talker is built
    # forward cost of a typical sample, in any unit: of each layer of the decoder, of its embedding and of its head
    layer_costs: tuple[int, ...] = ()
    embed_cost: int = 0
    head_cost: int = 0
    routed_layers: tuple[bool, ...] = ()  # layers with a router
    hidden_size: int = 0  # of the rows that one layer hands to the next
    patches_per_row: int = 4  # vision patches merged into one tower row
    audio_rows_per_chunk: int = 1  # rows that the audio stem makes of one chunk, valid or not
