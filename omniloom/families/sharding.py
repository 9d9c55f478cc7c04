"""How a model out of the shared parts may be sharded."""

from __future__ import annotations

from omniloom.families.config_fields import FamilyConfig
from omniloom.families.cost import layer_flops
from omniloom.families.decoder import DecoderConfig
from omniloom.sharding import ShardingPlan, TensorSharding

TYPICAL = 2048  # tokens of a sample, by which layers and head are weighed against one another


def standard_sharding(config: FamilyConfig) -> ShardingPlan:
    """The plan of a model's towers, decoder and talker, as far as it has them."""
    vision, audio, text, talker = config.vision, config.audio, config.text, config.talker
    towers = ("vision",) if audio is None else ("vision", "audio")
    # every list of layers, and those of them that have experts
    spoken = [] if talker is None else ["talker.decoder"]
    predicting = [] if talker is None or talker.code_predictor is None else ["talker.code_predictor.decoder"]
    decoders = [*towers, *spoken, *predicting, "text"]
    num_talker_experts = 0 if talker is None else talker.decoder.num_experts
    routed = [*(spoken if num_talker_experts else ()), *(("text",) if text.num_experts else ())]
    moes = [f"{name}.layers.*.moe" for name in routed]
    tied = (("text.embed", "text.loss_head"),)  # one tensor, so one group
    return ShardingPlan(
        roots=(*towers, *(("talker",) if talker else ()), "text"),
        blocks=tuple(f"{part}.layers.*" for part in decoders),
        layer_calls=tuple(f"{part}.call" for part in decoders),
        groups=tied if text.tie_word_embeddings else (("text.embed",), ("text.loss_head",)),
        experts=tuple(f"{moe}.experts" for moe in moes),
        dispatches=tuple(f"{moe}.dispatch" for moe in moes),
        expert_products=tuple(f"{moe}.experts.product" for moe in moes),
        router_counts=tuple(f"{moe}.reduce_counts" for moe in moes),
        attention_cores=(
            "text.layers.*.attention.core",
            *(f"{name}.layers.*.attention.core" for name in spoken),
        ),
        row_gathers=("text.gather_rows",) if talker else (),
        recurrences=("text.layers.*.attention.recurrence",) if text.delta_rule else (),
        wide=("text.layers.*.attention.decay",) if text.delta_rule else (),
        tensor=_tensor_sharding(text),
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        num_recurrent_heads=text.delta_rule.linear_num_key_heads if text.delta_rule else 0,
        num_experts=text.num_experts,
        num_talker_experts=num_talker_experts,
        num_talker_heads=talker.decoder.num_attention_heads if talker else 0,
        layer_costs=tuple(layer_flops(text, layer, TYPICAL) for layer in range(text.num_hidden_layers)),
        embed_cost=2 * TYPICAL * text.hidden_size,  # a row is copied, and its gradient added
        head_cost=TYPICAL * text.hidden_size * text.vocab_size,  # half of the tokens have a loss
        routed_layers=tuple(text.is_moe(layer) for layer in range(text.num_hidden_layers)),
        hidden_size=text.hidden_size,
        patches_per_row=vision.spatial_merge_size**2,
        audio_rows_per_chunk=1 if audio is None else audio.chunk_rows,
    )


def _tensor_sharding(text: DecoderConfig) -> TensorSharding:
    """Experts are not in it: their rows go to whole experts, which `expert` divides over tensor ranks too."""
    layer = "text.layers.*"
    feed_forwards, rule = (f"{layer}.mlp", f"{layer}.moe.shared.mlp"), text.delta_rule
    of_rule = (f"{layer}.attention.in_proj_{name}" for name in "zba")
    parts = () if rule is None else (rule.key_width, rule.key_width, rule.value_width)
    widths = {
        "intermediate_size": 0 if text.num_moe_layers == text.num_hidden_layers else text.intermediate_size,
        "shared_expert_intermediate_size": text.shared_expert_intermediate_size,
        "linear_num_key_heads": 0 if rule is None else rule.linear_num_key_heads,
    }
    return TensorSharding(
        root="text",
        regions=(f"{layer}.attention", *feed_forwards),
        outputs=(
            f"{layer}.attention.q_proj",
            *of_rule,
            f"{layer}.attention.decay",
            *(f"{f}.{name}_proj" for f in feed_forwards for name in ("gate", "up")),
        ),
        key_values=(f"{layer}.attention.k_proj", f"{layer}.attention.v_proj"),
        inputs=(
            f"{layer}.attention.o_proj",
            f"{layer}.attention.out_proj",
            *(f"{name}.down_proj" for name in feed_forwards),
        ),
        embedding="text.embed",
        loss_head="text.loss_head",
        head="text.loss_head.head",
        cross_entropy="text.loss_head.cross_entropy",
        widths=tuple((name, width) for name, width in widths.items() if width),
        vocab_size=text.vocab_size,
        has_output_bias=text.attention_biases[3],
        parted_outputs=tuple((f"{layer}.attention.{name}", parts) for name in ("in_proj_qkv", "conv1d") if parts),
    )
