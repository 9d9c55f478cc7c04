"""Qwen3-Omni's talker: its dims, its tensor names, and the module of the shared parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omniloom.families.config_fields import ConfigSection, TalkerConfig, read_decoder
from omniloom.families.cost import speech_cost
from omniloom.families.decoder import DecoderConfig, make_layers
from omniloom.families.hf_rules import expert_rules, layer_rules, linears, router_rule, shared_expert_rules
from omniloom.families.qwen3_omni.speech import Qwen3OmniSpeech
from omniloom.keymap import Rule
from omniloom.models.layers import MLP
from omniloom.models.talker import CodePredictor, ProjectedRows, Talker
from omniloom.processors.speech import SpeechLayout, SpeechTokens
from omniloom.types import Kernel


def read_talker(config: ConfigSection) -> TalkerConfig:
    """From the whole config.json. Demands are noted in the section."""
    talker = config.section("talker_config")
    text, predictor = talker.section("text_config"), talker.section("code_predictor_config")
    decoder = replace(
        read_decoder(talker, has_experts=True),
        norm_topk_prob=text.field("norm_topk_prob", kind=bool, default=False),
        shared_expert_intermediate_size=text.field("shared_expert_intermediate_size"),
        decoder_sparse_step=1,  # every layer has experts, whatever these fields say
        mlp_only_layers=(),
    )
    code_predictor = _read_predictor(predictor)
    result = TalkerConfig(
        decoder=decoder,
        code_predictor=code_predictor,
        thinker_hidden_size=talker.field("thinker_hidden_size"),
        projection_size=text.field("intermediate_size"),
        accept_hidden_layer=talker.field("accept_hidden_layer"),
        tokens=_read_tokens(config, talker, predictor.field("vocab_size")),
    )
    thinker = config.section("thinker_config")
    layers = thinker.section("text_config").field("num_hidden_layers")
    groups = talker.field("num_code_groups")
    demands = {
        f"talker_config.accept_hidden_layer {result.accept_hidden_layer} is at most the thinker's {layers} layers": (
            result.accept_hidden_layer <= layers
        ),
        "talker_config.thinker_hidden_size is thinker_config.text_config.hidden_size": (
            result.thinker_hidden_size == thinker.section("text_config").field("hidden_size")
        ),
        "the code predictor's hidden_size is the talker's": (code_predictor.hidden_size == decoder.hidden_size),
        "num_code_groups of talker_config and of its code_predictor_config are the same, and 2 or more": (
            groups == predictor.field("num_code_groups") and groups > 1
        ),
        "layer_types of code_predictor_config are full_attention": not (
            {*(predictor.values.get("layer_types") or ())} - {"full_attention"}
        ),
    }
    talker.demands.update(demands)
    return result


def _read_predictor(section: ConfigSection) -> DecoderConfig:
    rope = section.values.get("rope_parameters")
    rope = section if not rope or rope.get("rope_theta") is None else section.section("rope_parameters")
    kind = (section.values.get("rope_scaling") or {}).get("rope_type", rope.values.get("rope_type", "default"))
    section.demands[f"code_predictor_config has rope_type default (got {kind!r})"] = kind == "default"
    head_dim = section.field("head_dim")
    return section.record(
        DecoderConfig,
        attention_biases=(section.field("attention_bias", kind=bool, default=False),) * 4,
        qk_norm=True,
        rope_theta=float(rope.field("rope_theta")),
        mrope_section=(head_dim // 2, 0, 0),  # all axes alike: positions of a frame have one
        mrope_order="blocks",
        tie_word_embeddings=False,
    )


def _read_tokens(config: ConfigSection, talker: ConfigSection, num_codes: int) -> SpeechTokens:
    speakers = talker.values.get("speaker_id")
    names = speakers if isinstance(speakers, dict) else {}
    return SpeechTokens(
        turn=tuple(config.field(f"{name}_token_id") for name in ("im_start", "im_end", "user", "assistant")),
        tts=tuple(config.field(f"tts_{name}_token_id") for name in ("pad", "bos", "eos")),
        prefix=tuple(talker.field(f"codec_{name}_id") for name in ("nothink", "think_bos", "think_eos", "pad", "bos")),
        codec_eos=talker.field("codec_eos_token_id"),
        media=tuple(talker.field(f"{name}_token_id") for name in ("audio", "image", "video")),
        speakers={str(name).lower(): number for name, number in names.items()},
        num_code_groups=talker.field("num_code_groups"),
        num_codes=num_codes,
        positions_per_second=float(talker.field("position_id_per_seconds")),
        usual_speaker="ethan",
        of_recordings="recordings become codes by `omniloom convert speech ROWS OUT --codec DIR`, DIR with kyutai/mimi "
        "for published checkpoints",
    )


def add_speakers(config_json: Mapping[str, Any], new: Mapping[str, str]) -> dict[str, Any]:
    """The whole config.json with voices of new names, each with an id that nothing has.

    `new` says which voice each starts from. Raises: ValueError.
    """
    changed = copy.deepcopy(dict(config_json))
    talker = changed["talker_config"]
    known = talker.get("speaker_id") or {}
    taken = {value for value in (*talker.values(), *known.values()) if isinstance(value, int)}
    free = (number for number in range(max(known.values(), default=0) + 1, talker["text_config"]["vocab_size"]))
    for name, origin in new.items():
        if origin.lower() not in known:
            raise ValueError(
                f"model.new_speakers.{name}: {origin!r} is no voice; the checkpoint has {', '.join(known)}"
            )
        if name.lower() in known:
            raise ValueError(f"model.new_speakers.{name}: the checkpoint has this voice; remove it, it trains anyway")
        number = next((number for number in free if number not in taken), None)
        if number is None:
            raise ValueError(f"model.new_speakers.{name}: the talker has no id left for another voice")
        talker["speaker_id"] = talker["speaker_id"] | {name.lower(): number}  # transformers looks for lower case
    return changed


def talker_rules() -> list[Rule]:
    theirs, predictor, ours = "talker.model", "talker.code_predictor", "talker.decoder"
    ends = {"linear_fc1": "fc1", "linear_fc2": "fc2"}
    return [
        *linears("talker.text_projection", "talker.projection.text", ends, bias=True),
        *linears("talker.hidden_projection", "talker.projection.hidden", ends, bias=True),
        Rule(published=f"{theirs}.codec_embedding.weight", ours="talker.codec_embed.weight"),
        *layer_rules(theirs, ours),
        router_rule(theirs, ours),
        *expert_rules(theirs, ours),
        *shared_expert_rules(theirs, ours),
        Rule(published=f"{theirs}.norm.weight", ours="talker.norm.weight"),
        Rule(published="talker.codec_head.weight", ours="talker.head.weight"),
        Rule(
            published=f"{predictor}.model.codec_embedding.{{i}}.weight", ours="talker.code_predictor.embed.{i}.weight"
        ),
        *layer_rules(f"{predictor}.model", "talker.code_predictor.decoder"),
        Rule(published=f"{predictor}.model.norm.weight", ours="talker.code_predictor.norm.weight"),
        Rule(published=f"{predictor}.lm_head.{{i}}.weight", ours="talker.code_predictor.heads.{i}.weight"),
    ]


def make_talker(config: TalkerConfig, *, kernel: Kernel, loss_chunk_tokens: int | None) -> Talker:
    """The talker on the current default device, weights not yet read."""
    decoder, predictor = config.decoder, config.code_predictor
    assert predictor is not None
    code_predictor = CodePredictor(
        make_layers(predictor, kernel=kernel),
        num_groups=config.tokens.num_code_groups,
        vocab_size=predictor.vocab_size,
        hidden_size=predictor.hidden_size,
        norm_eps=predictor.rms_norm_eps,
        chunk=loss_chunk_tokens,
    )
    return Talker(
        make_layers(decoder, kernel=kernel),
        code_predictor,
        projection=ProjectedRows(text=_projection(config), hidden=_projection(config)),
        vocab_size=decoder.vocab_size,
        codec_size=decoder.hidden_size,
        hidden_size=decoder.hidden_size,
        norm_eps=decoder.rms_norm_eps,
        chunk=loss_chunk_tokens,
    )


def open_speech(config: TalkerConfig, directory: Path, tokenizer: Any) -> SpeechLayout:
    return Qwen3OmniSpeech(config.tokens, partial(speech_cost, config.decoder, config.code_predictor))


def _projection(config: TalkerConfig) -> MLP:
    return MLP(
        hidden_size=config.thinker_hidden_size,
        intermediate_size=config.projection_size,
        out_size=config.decoder.hidden_size,
        activation=config.decoder.hidden_act,
    )
