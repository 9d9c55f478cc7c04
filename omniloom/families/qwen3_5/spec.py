"""Qwen3.5 with a dense decoder, three of four layers with a gated delta rule: dims and tensor names."""

from __future__ import annotations

from dataclasses import replace

from omniloom.families.config_fields import ConfigSection, FamilyConfig, read_decoder, read_vision
from omniloom.families.hf_rules import linears
from omniloom.families.qwen3_vl import spec as qwen3_vl
from omniloom.families.qwen3_vl.processor import Qwen3VLClips
from omniloom.keymap import KeyMap, Rule

PROJECTIONS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "norm")


class Qwen3_5Clips(Qwen3VLClips):
    """Media as tokens of Qwen3-VL, under templates of its own."""

    templates = ("qwen3_5", "qwen3_5_nothink")


def read_parts(file: ConfigSection) -> FamilyConfig:
    return FamilyConfig(vision=read_vision(file, deepstack=False), text=read_decoder(file, hybrid=True))


def key_map(config: FamilyConfig) -> KeyMap:
    theirs, ours = f"{qwen3_vl.MODEL}.layers.{{i}}.linear_attn", "text.layers.{i}.attention"
    rules = (
        *linears(theirs, ours, {name: name for name in PROJECTIONS}, bias=False),
        Rule(reshape="flatten", published=f"{theirs}.conv1d.weight", ours=f"{ours}.conv1d.weight"),
        *(Rule(published=f"{theirs}.{name}", ours=f"{ours}.decay.{name}") for name in ("A_log", "dt_bias")),
    )
    # the head that predicts the token after the next does not train
    return KeyMap(rules=(*qwen3_vl.key_map(config).rules, *rules), carried=("mtp.",))


SPEC = replace(
    qwen3_vl.SPEC,
    name="qwen3_5",
    model_type="qwen3_5",
    read_parts=read_parts,
    key_map=key_map,
    clips=Qwen3_5Clips,
    tokenizer="Qwen3_5Tokenizer",
)
