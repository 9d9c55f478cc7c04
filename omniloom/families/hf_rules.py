"""Key rules of the shared parts: published names, given a prefix, and ours. A family's `spec.py` joins them."""

from __future__ import annotations

from collections.abc import Mapping

from omniloom.families.decoder import DecoderConfig
from omniloom.keymap import Rule, Tied


def linears(published: str, ours: str, names: Mapping[str, str], *, bias: bool) -> list[Rule]:
    """Rules of modules with a weight and, if `bias`, a bias: published module name -> ours."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [
        Rule(published=f"{published}.{theirs}.{kind}", ours=f"{ours}.{mine}.{kind}")
        for theirs, mine in names.items()
        for kind in kinds
    ]


def vision_rules(tower: str, *, merger: Mapping[str, str], deepstack: str) -> list[Rule]:
    """A tower with learned positions and deepstack. `merger`: published parts of a merger -> ours."""
    block = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.proj",
        "mlp.linear_fc1": "mlp.fc1",
        "mlp.linear_fc2": "mlp.fc2",
    }
    return [
        Rule(reshape="flatten", published=f"{tower}.patch_embed.proj.weight", ours="vision.patch_embed.weight"),
        Rule(published=f"{tower}.patch_embed.proj.bias", ours="vision.patch_embed.bias"),
        Rule(published=f"{tower}.pos_embed.weight", ours="vision.pos_embed.weight"),
        *linears(f"{tower}.blocks.{{i}}", "vision.layers.{i}", block, bias=True),
        *linears(f"{tower}.merger", "vision.merger", merger, bias=True),
        *linears(f"{tower}.{deepstack}.{{i}}", "vision.deepstack.{i}", merger, bias=True),
    ]


def window_vision_rules(tower: str, *, attention: Mapping[str, str]) -> list[Rule]:
    """A tower of Qwen2.5: windows, RMS norms, gated feed-forward. `attention`: published projections -> ours."""
    parts = {theirs: f"attention.{mine}" for theirs, mine in attention.items()}
    parts |= {f"mlp.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    block, merger = f"{tower}.blocks.{{i}}", f"{tower}.merger"
    return [
        Rule(reshape="flatten", published=f"{tower}.patch_embed.proj.weight", ours="vision.patch_embed.weight"),
        *linears(block, "vision.layers.{i}", {"norm1": "norm1", "norm2": "norm2"}, bias=False),
        *linears(block, "vision.layers.{i}", parts, bias=True),
        *linears(merger, "vision.merger", {"ln_q": "norm"}, bias=False),
        *linears(merger, "vision.merger", {"mlp.0": "fc1", "mlp.2": "fc2"}, bias=True),
    ]


def audio_layer_rules(tower: str) -> list[Rule]:
    """The layers and the last norm of an audio tower."""
    block = {
        "self_attn_layer_norm": "norm1",
        "final_layer_norm": "norm2",
        "self_attn.q_proj": "attention.q_proj",
        "self_attn.k_proj": "attention.k_proj",
        "self_attn.v_proj": "attention.v_proj",
        "self_attn.out_proj": "attention.o_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    return [
        *linears(f"{tower}.layers.{{i}}", "audio.layers.{i}", block, bias=True),
        *linears(tower, "audio", {"ln_post": "norm"}, bias=True),
    ]


def layer_rules(model: str, decoder: str = "text") -> list[Rule]:
    """The layers of our `decoder` but for experts; `model` holds the published ones."""
    theirs, ours = f"{model}.layers.{{i}}", f"{decoder}.layers.{{i}}"
    attention = {name: f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.k_norm",
    }
    return [
        *linears(f"{theirs}.self_attn", ours, attention, bias=True),
        *linears(theirs, ours, norms, bias=False),
        *linears(
            theirs, ours, {f"mlp.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}, bias=False
        ),
    ]


def decoder_rules(model: str, head: str, config: DecoderConfig) -> list[Rule | Tied]:
    """The decoder but for its experts. `model` holds embedding, layers and norm; `head` is the head's module."""
    embed, last = "text.embed.weight", "text.loss_head.head.weight"
    tie = config.tie_word_embeddings
    return [
        Rule(published=f"{model}.embed_tokens.weight", ours=embed),
        *layer_rules(model),
        Rule(published=f"{model}.norm.weight", ours="text.loss_head.norm.weight"),
        Tied(published=f"{head}.weight", ours=last, same_as=embed)
        if tie
        else Rule(published=f"{head}.weight", ours=last),
    ]


def router_rule(model: str, decoder: str = "text") -> Rule:
    return Rule(published=f"{model}.layers.{{i}}.mlp.gate.weight", ours=f"{decoder}.layers.{{i}}.moe.router.weight")


def shared_expert_rules(model: str, decoder: str = "text") -> list[Rule]:
    """Of an expert that every token takes, and of its gate."""
    names = {f"shared_expert.{name}": f"shared.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    names["shared_expert_gate"] = "shared.gate"
    return linears(f"{model}.layers.{{i}}.mlp", f"{decoder}.layers.{{i}}.moe", names, bias=False)


def expert_rules(model: str, decoder: str = "text") -> list[Rule]:
    """Experts published one by one, or stacked as transformers 5 has them in memory, outputs before inputs."""
    theirs, ours = f"{model}.layers.{{i}}.mlp.experts", f"{decoder}.layers.{{i}}.moe.experts"
    single = f"{theirs}.{{e}}"
    return [
        Rule(index="e", published=(f"{single}.gate_proj.weight", f"{single}.up_proj.weight"), ours=f"{ours}.gate_up"),
        Rule(index="e", published=f"{single}.down_proj.weight", ours=f"{ours}.down"),
        Rule(published=f"{theirs}.gate_up_proj", ours=f"{ours}.gate_up"),
        Rule(published=f"{theirs}.down_proj", ours=f"{ours}.down"),
    ]
