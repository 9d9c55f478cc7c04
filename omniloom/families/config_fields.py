"""Reading a checkpoint's `config.json` into the dims of the shared parts: what every family does alike.

Understands what Qwen published and what transformers 5 writes back. A field that is missing, or whose value the shared
parts do not compute, is an error: sizes are never guessed. Knows sections of config.json and no model type.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from omniloom.dims import AudioTowerConfig, VisionTowerConfig
from omniloom.families.decoder import DecoderConfig, DeltaRuleConfig
from omniloom.models.layers import ACTIVATIONS
from omniloom.processors.speech import SpeechTokens

DEFAULT_VISION_ROPE_THETA = 10_000.0  # published configs leave it out
THINKER_SUFFIX = "_thinker"  # of the model_type of an omni model's thinker that was saved alone
KINDS = {int: "a number", str: "a text", bool: "true or false", tuple: "a list of numbers"}

Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class TalkerConfig:
    """Dims of a talker, named as in Hugging Face configs."""

    decoder: DecoderConfig
    code_predictor: DecoderConfig | None  # None: a frame has one code
    thinker_hidden_size: int
    projection_size: int = 0  # between the two maps of a projection; 0: it is one map
    accept_hidden_layer: int  # which of the thinker's hidden states it reads; 0: what goes into the first layer
    tokens: SpeechTokens


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """Dims of a model's parts, and what its processor asks of config.json."""

    vision: VisionTowerConfig
    audio: AudioTowerConfig | None = None  # None: a family that hears nothing
    text: DecoderConfig
    talker: TalkerConfig | None = None  # None: a run that makes no speech
    positions_per_second: float = 0.0  # of the time axis, in videos and sound; 0: a family without time in positions
    seconds_per_chunk: float = 0.0  # of video, then as much of its sound; 0: a family that does not take turns by chunk
    token_ids: Mapping[str, int] = field(default_factory=dict)  # by config.json's names


@dataclass(frozen=True, kw_only=True)
class ConfigSection:
    """A section of a config.json. Remembers all that is missing or wrong in the file, so that one message names it."""

    values: Mapping[str, Any]
    path: str = ""
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    demands: dict[str, bool] = field(default_factory=dict)  # what must hold beside kinds, in words, and whether it does

    def section(self, key: str) -> ConfigSection:
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            self.missing.append(f"{self.path}{key}")
            value = {}
        return dataclasses.replace(self, values=value, path=f"{self.path}{key}.")

    def field(self, *keys: str, kind: type = int, default: Any = None) -> Any:
        """The value under the first of `keys` that is there: later ones are other spellings of the same field.

        `kind`: int (any number), str, bool, or tuple (of numbers). Without a default a field must be there.
        """
        key = next((key for key in keys if self.values.get(key) is not None), None)
        if key is None:
            if default is None:
                self.missing.append(f"{self.path}{keys[0]}")
            return kind() if default is None else default
        value = self.values[key]
        if not _is_of(kind, value):
            self.wrong.append(f"{self.path}{key} is {value!r}, expected {KINDS[kind]}")
            return kind()
        return tuple(value) if kind is tuple else value

    def record(self, kind: type[Record], **given: Any) -> Record:
        """A dataclass whose fields are named as in config.json; those without default that are not given are read."""
        hints = typing.get_type_hints(kind)
        names = [
            item.name
            for item in dataclasses.fields(kind)  # type: ignore[arg-type]
            if item.default is dataclasses.MISSING and item.name not in given
        ]
        read = {name: self.field(name, kind=_kind_of(hints[name])) for name in names}
        return kind(**read, **given)

    def check(self, model_type: str) -> None:
        """Raises: ValueError naming every field that was asked for in vain or has a value of another kind."""
        missing = [f"missing {', '.join(dict.fromkeys(self.missing))} of a {model_type} model"] if self.missing else []
        if faults := missing + list(dict.fromkeys(self.wrong)):
            raise ValueError(f"config.json: {'; '.join(faults)}")

    def check_demands(self, model_type: str, demands: dict[str, bool]) -> None:
        """Raises: ValueError naming everything that does not hold, of `demands` and of those noted before."""
        if broken := [words for words, holds in (demands | self.demands).items() if not holds]:
            raise ValueError(f"config.json: not a {model_type} model that can be built; expected: " + "; ".join(broken))


def _kind_of(hint: Any) -> type:
    return tuple if typing.get_origin(hint) is tuple else str if hint is str else int


def _is_of(kind: type, value: Any) -> bool:
    if kind is int:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, list | tuple) and all(_is_of(int, item) for item in value)
    return isinstance(value, kind)


def all_demands(config: FamilyConfig) -> dict[str, bool]:
    """What the parts of any model must fulfil, in words, and whether they do."""
    vision, audio, text = config.vision, config.audio, config.text
    levels, positions = vision.deepstack_visual_indexes, vision.num_position_embeddings
    demands = {
        f"vision_config: hidden_size / num_heads divides by 4 (got {vision.hidden_size} / {vision.num_heads})": (
            vision.hidden_size % (4 * vision.num_heads) == 0
        ),
        f"vision_config: num_position_embeddings is a square (got {positions})": round(positions**0.5) ** 2
        == positions,
        f"vision_config: deepstack_visual_indexes rise and stay below depth {vision.depth} (got {list(levels)})": (
            all(low < high for low, high in pairwise((-1, *levels, vision.depth)))
        ),
        f"vision_config: window_size {vision.window_size} holds a square of merged patches": (
            vision.window_size == 0 or vision.window_squares > 0
        ),
        f"text_config: num_attention_heads {text.num_attention_heads} divides by num_key_value_heads "
        f"{text.num_key_value_heads}": text.num_attention_heads % text.num_key_value_heads == 0,
        f"text_config: mrope_section {list(text.mrope_section)} adds up to half of a head's turned dims, which are "
        f"{text.rotary_dim}": len(text.mrope_section) == 3 and 2 * sum(text.mrope_section) == text.rotary_dim,
        f"text_config: num_experts_per_tok {text.num_experts_per_tok} is at most num_experts {text.num_experts}": (
            text.num_experts_per_tok <= text.num_experts
        ),
    }
    widths = {"vision_config.out_hidden_size": vision.out_hidden_size}
    activations = {"vision_config.hidden_act": vision.hidden_act, "text_config.hidden_act": text.hidden_act}
    if audio is not None:
        widths["audio_config.output_dim"] = audio.output_dim
        activations["audio_config.activation_function"] = audio.activation_function
        demands |= _audio_demands(audio)
    for name, width in widths.items():
        demands[f"{name} {width} equals text_config.hidden_size {text.hidden_size}"] = width == text.hidden_size
    for name, activation in activations.items():
        demands[f"{name} {activation!r} is among {', '.join(ACTIVATIONS)}"] = activation in ACTIVATIONS
    return demands


def _audio_demands(audio: AudioTowerConfig) -> dict[str, bool]:
    return {
        f"audio_config: n_window_infer {audio.n_window_infer} is at least 2 x n_window {audio.n_window}": (
            audio.n_window_infer >= audio.chunk_frames > 0
        ),
        f"audio_config: d_model {audio.d_model} divides by 2 and by its {audio.encoder_attention_heads} heads": (
            audio.d_model % 2 == 0 and audio.d_model % audio.encoder_attention_heads == 0
        ),
    }


# ---------------------------------------------------------------------------------------- vision


def read_vision(parent: ConfigSection, *, deepstack: bool = True) -> VisionTowerConfig:
    """A tower with learned positions (Qwen3-VL, Qwen3-Omni, Qwen3.5, the last without deepstack)."""
    section = parent.section("vision_config")
    # Qwen published for Qwen3-Omni the side of the image that the learned positions cover instead
    side, patch = section.field("image_size", default=0), section.field("patch_size")
    covered = int(side // patch) ** 2 if side and patch else None
    return section.record(
        VisionTowerConfig,
        in_channels=section.field("in_channels", "in_chans"),
        num_position_embeddings=section.field("num_position_embeddings", default=covered),
        rope_theta=_vision_rope_theta(section),
        **({} if deepstack else {"deepstack_visual_indexes": ()}),
    )


def read_window_vision(parent: ConfigSection, *, fused_qkv: bool) -> VisionTowerConfig:
    """A tower with windows, RMS norms and gated feed-forwards (Qwen2.5-VL, Qwen2.5-Omni)."""
    section = parent.section("vision_config")
    return section.record(
        VisionTowerConfig,
        in_channels=section.field("in_channels", "in_chans"),
        num_position_embeddings=0,
        deepstack_visual_indexes=(),
        rope_theta=_vision_rope_theta(section),
        norm="rms",
        gated_mlp=True,
        fused_qkv=fused_qkv,
        patch_bias=False,
        window_size=section.field("window_size"),
        fullatt_block_indexes=section.field("fullatt_block_indexes", kind=tuple),
    )


def _vision_rope_theta(section: ConfigSection) -> float:
    return float((section.values.get("rope_parameters") or {}).get("rope_theta", DEFAULT_VISION_ROPE_THETA))


# ---------------------------------------------------------------------------------------- text


def read_decoder(
    parent: ConfigSection,
    *,
    has_experts: bool = False,
    qwen2_5: bool = False,
    flat: bool = False,
    hybrid: bool = False,
) -> DecoderConfig:
    """The decoder, with multimodal rotary positions.

    `parent` holds text_config and says whether the embeddings are tied; with `flat` it may hold the decoder's fields
    itself. Decoders of `qwen2_5` have no norms of queries and keys, biases of their own, and positions by blocks;
    `hybrid` ones have layers with a gated delta rule among those with attention (Qwen3.5).
    Raises: ValueError for a rope_type that is not computed here.
    """
    text = parent if flat and "text_config" not in parent.values else parent.section("text_config")
    tied = [parent, text] if flat else [parent]
    rope, rope_theta = _read_rope(text)
    if qwen2_5:
        text.demands[f"{text.path}use_sliding_window is false"] = not text.values.get("use_sliding_window")
        biases = (True, True, True, False)
    else:
        biases = (text.field("attention_bias", kind=bool, default=False),) * 4
    num_heads = text.field("num_attention_heads")
    head_dim = text.field("head_dim", default=0) or text.field("hidden_size") // max(num_heads, 1)
    return text.record(
        DecoderConfig,
        num_attention_heads=num_heads,
        head_dim=head_dim,
        attention_biases=biases,
        qk_norm=not qwen2_5,
        rope_theta=rope_theta,
        mrope_section=rope.field("mrope_section", kind=tuple),
        mrope_order="blocks" if qwen2_5 else "interleaved",
        tie_word_embeddings=any(section.field("tie_word_embeddings", kind=bool, default=False) for section in tied),
        **(_expert_fields(text) if has_experts else {}),
        **(_hybrid_fields(text, rope, has_experts=has_experts) if hybrid else {}),
    )


def _read_rope(text: ConfigSection) -> tuple[ConfigSection, float]:
    """The section on rotary positions, and their base."""
    # Qwen published rope_theta beside rope_scaling; transformers 5 writes both into rope_parameters
    rope = text.section("rope_parameters" if text.values.get("rope_parameters") else "rope_scaling")
    rope_type = rope.values.get("rope_type", rope.values.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise ValueError(f"config.json: text_config has rope_type {rope_type!r}; only default is known")
    return rope, float((text if rope.values.get("rope_theta") is None else rope).field("rope_theta"))


def _hybrid_fields(text: ConfigSection, rope: ConfigSection, *, has_experts: bool) -> dict[str, Any]:
    num_layers, interval = text.field("num_hidden_layers"), text.field("full_attention_interval", default=4)
    kinds = text.values.get("layer_types") or [
        "full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(num_layers)
    ]
    dims, known = text.record(DeltaRuleConfig), {"linear_attention", "full_attention"}
    text.demands[f"{text.path}layer_types has {num_layers} of {', '.join(sorted(known))}"] = (
        len(kinds) == num_layers and set(kinds) <= known
    )
    text.demands[
        f"{text.path}linear_num_value_heads {dims.linear_num_value_heads} divides by linear_num_key_heads "
        f"{dims.linear_num_key_heads}"
    ] = dims.linear_num_key_heads > 0 and dims.linear_num_value_heads % dims.linear_num_key_heads == 0
    where = text if rope.values.get("partial_rotary_factor") is None else rope
    fields: dict[str, Any] = {
        "partial_rotary_factor": float(where.field("partial_rotary_factor", default=0.25)),
        "zero_centred_norms": True,
        "output_gate": True,
        "delta_rule": dims,
        "delta_layers": tuple(layer for layer, kind in enumerate(kinds) if kind == "linear_attention"),
    }
    if has_experts:  # in every layer, so that there is no other width
        fields["shared_expert_intermediate_size"] = text.field("shared_expert_intermediate_size")
        fields["intermediate_size"] = 0
    return fields


def _expert_fields(text: ConfigSection) -> dict[str, Any]:
    return {
        "num_experts": text.field("num_experts", "num_local_experts"),  # the latter: transformers 5
        "num_experts_per_tok": text.field("num_experts_per_tok"),
        "moe_intermediate_size": text.field("moe_intermediate_size"),
        "norm_topk_prob": text.field("norm_topk_prob", kind=bool, default=True),
        "decoder_sparse_step": text.field("decoder_sparse_step", default=1),
        "mlp_only_layers": text.field("mlp_only_layers", kind=tuple, default=()),
    }


# ---------------------------------------------------------------------------------------- fewer layers


def reduce_layers(config_json: Mapping[str, Any], parent: str | None, counts: Mapping[str, int]) -> dict[str, Any]:
    """The config of a model with so many layers of some components, from the front.

    `parent` names the section that holds text_config and the towers' (absent, or None: the file itself); the decoder's
    fields may lie beside the towers' sections, without one of their own. Lists of layers lose what lies past the cut:
    deepstack levels, layers without experts, tower layers of full attention, layer types.
    Raises: ValueError for more layers than there are, and for a component that the model has not.
    """
    reduced = copy.deepcopy(dict(config_json))
    parts = reduced if parent is None else reduced.get(parent, reduced)
    names = {"text": "num_hidden_layers", "vision": "depth", "audio": "encoder_layers"}
    for component, count in counts.items():
        key, section = names[component], parts.get(f"{component}_config", parts if component == "text" else None)
        if section is None:
            raise ValueError(f"model.num_layers.{component}: the checkpoint has no such tower; remove the key")
        if not 1 <= count <= section[key]:
            raise ValueError(
                f"model.num_layers.{component}: expected 1 to {section[key]}, the layers of the checkpoint, got {count}"
            )
        for name in {key, "num_hidden_layers"} & section.keys():  # some configs say it twice
            section[name] = count
    vision, text = parts["vision_config"], parts.get("text_config", parts)
    depth, num_layers = vision["depth"], text["num_hidden_layers"]
    for section, key, count in (
        (vision, "deepstack_visual_indexes", depth),
        (vision, "fullatt_block_indexes", depth),
        (text, "mlp_only_layers", num_layers),
    ):
        if section.get(key):
            section[key] = [index for index in section[key] if index < count]
    # a deepstack level is added after the decoder layer of its number
    for section, key in ((vision, "deepstack_visual_indexes"), (text, "layer_types")):
        if section.get(key):
            section[key] = section[key][:num_layers]
    return reduced
