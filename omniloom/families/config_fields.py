"""Reading a checkpoint's `config.json` into the dims of the shared parts: what every family's `config.py` does alike.

Understands what Qwen published and what transformers 5 writes back. A field that is missing, or whose value the shared
parts do not compute, is an error: sizes are never guessed. Knows sections of config.json and no model type.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omniloom.families.decoder import DecoderConfig
from omniloom.models.audio import AudioTowerConfig
from omniloom.models.layers import ACTIVATIONS
from omniloom.models.vision import VisionTowerConfig
from omniloom.ops.rotary import SectionLayout

DEFAULT_VISION_ROPE_THETA = 10_000.0  # published configs leave it out
THINKER_SUFFIX = "_thinker"  # of the model_type of an omni model's thinker that was saved alone

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_SECTIONS = ("thinker_config", "text_config", "vision_config", "audio_config", "rope_scaling", "rope_parameters")
_VISION_FIELDS = (
    "depth",
    "hidden_size",
    "hidden_act",
    "intermediate_size",
    "num_heads",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "out_hidden_size",
)
_AUDIO_FIELDS = (
    "num_mel_bins",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "d_model",
    "activation_function",
    "n_window",
    "output_dim",
)
_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
)
_EXPERT_FIELDS = ("num_experts_per_tok", "moe_intermediate_size")


_WORDS = ("hidden_act", "activation_function")
_LISTS = ("mrope_section", "deepstack_visual_indexes", "fullatt_block_indexes")


class ConfigReader:
    """Reads fields and remembers all that are missing, so that one message names them."""

    def __init__(self, model_type: str) -> None:
        self._model_type = model_type
        self._missing: list[str] = []
        self._wrong: list[str] = []
        self._paths: dict[int, str] = {}
        self._sections: list[Mapping[str, Any]] = []  # kept, since their paths are known by their ids

    def section(self, parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = parent.get(key)
        path = f"{self._paths.get(id(parent), '')}{key}."
        if not isinstance(value, Mapping):
            self._missing.append(path.removesuffix("."))
            value = {}
        self._sections.append(value)
        self._paths[id(value)] = path
        return value

    def field(self, section: Mapping[str, Any], *keys: str) -> Any:
        """The value under the first of `keys` that is there: later ones are other spellings of the same field."""
        for key in keys:
            if (value := section.get(key)) is not None:
                expected = str if keys[0] in _WORDS else list if keys[0] in _LISTS else int | float
                if isinstance(value, bool) or not isinstance(value, expected):
                    kind = "a text" if expected is str else "a list" if expected is list else "a number"
                    self._wrong.append(f"{self._paths.get(id(section), '')}{key} is {value!r}, expected {kind}")
                    return 0
                return value
        self._missing.append(f"{self._paths.get(id(section), '')}{keys[0]}")
        return 0

    def fields(self, section: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
        return {key: self.field(section, key) for key in keys}

    def finish(self) -> None:
        """Raises: ValueError naming every field that was asked for in vain or has a value of another kind."""
        missing = [f"missing {', '.join(self._missing)} of a {self._model_type} model"] if self._missing else []
        if faults := missing + list(dict.fromkeys(self._wrong)):
            raise ValueError(f"config.json: {'; '.join(faults)}")

    def require(self, rules: Mapping[str, bool]) -> None:
        """Raises: ValueError naming every rule that does not hold."""
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError(
                f"config.json: not a {self._model_type} model that can be built; expected: " + "; ".join(broken)
            )


def refuse_numbers_as_text(config_json: Mapping[str, Any], where: str) -> None:
    """Raises: ValueError naming the numbers that stand in a config.json, or in a section that is read, as text."""
    faults: list[str] = []

    def look(value: Any, path: str) -> None:
        if isinstance(value, str) and _NUMBER.fullmatch(value) and not path.endswith("version"):
            faults.append(f"{path} is the text {value!r}")
        elif isinstance(value, list):
            for item in value:
                look(item, path)

    def look_into(section: Mapping[str, Any], prefix: str) -> None:
        for key, value in section.items():
            if isinstance(value, Mapping) and key in _SECTIONS:
                look_into(value, f"{prefix}{key}.")
            else:
                look(value, f"{prefix}{key}")

    look_into(config_json, "")
    if faults:
        raise ValueError(f"{where}: expected numbers: {', '.join(dict.fromkeys(faults))}; write them without quotes")


def read_thinker(reader: ConfigReader, config_json: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section of an omni model's thinker: the whole file where the thinker was saved alone."""
    alone = str(config_json.get("model_type")).endswith(THINKER_SUFFIX)
    return config_json if alone else reader.section(config_json, "thinker_config")


# ---------------------------------------------------------------------------------------- vision


def read_vision(reader: ConfigReader, section: Mapping[str, Any]) -> VisionTowerConfig:
    """A tower with learned positions and deepstack (Qwen3-VL, Qwen3-Omni)."""
    return VisionTowerConfig(
        **reader.fields(section, _VISION_FIELDS),
        in_channels=reader.field(section, "in_channels", "in_chans"),
        num_position_embeddings=_num_position_embeddings(reader, section),
        deepstack_visual_indexes=tuple(_given(reader, section, "deepstack_visual_indexes")),
        rope_theta=_vision_rope_theta(section),
    )


def read_window_vision(reader: ConfigReader, section: Mapping[str, Any], *, fused_qkv: bool) -> VisionTowerConfig:
    """A tower with windows, RMS norms and gated feed-forwards (Qwen2.5-VL, Qwen2.5-Omni)."""
    return VisionTowerConfig(
        **reader.fields(section, _VISION_FIELDS),
        in_channels=reader.field(section, "in_channels", "in_chans"),
        num_position_embeddings=0,
        deepstack_visual_indexes=(),
        rope_theta=_vision_rope_theta(section),
        norm="rms",
        gated_mlp=True,
        fused_qkv=fused_qkv,
        patch_bias=False,
        window_size=reader.field(section, "window_size"),
        fullatt_block_indexes=tuple(_given(reader, section, "fullatt_block_indexes")),
    )


def _vision_rope_theta(section: Mapping[str, Any]) -> float:
    return float((section.get("rope_parameters") or {}).get("rope_theta", DEFAULT_VISION_ROPE_THETA))


def _given(reader: ConfigReader, section: Mapping[str, Any], key: str) -> Sequence[int]:
    """A list that may be empty, but not absent."""
    return section[key] if isinstance(section.get(key), list | tuple) else reader.field(section, key) or ()


def _num_position_embeddings(reader: ConfigReader, section: Mapping[str, Any]) -> int:
    # Qwen published for Qwen3-Omni the side of the image that the learned positions cover instead
    if section.get("num_position_embeddings") is None and section.get("image_size") and section.get("patch_size"):
        return int(section["image_size"] // section["patch_size"]) ** 2
    return int(reader.field(section, "num_position_embeddings"))


def vision_rules(vision: VisionTowerConfig, text: DecoderConfig) -> dict[str, bool]:
    """What a vision tower must fulfil, in words, and whether it does."""
    heads, indexes = vision.num_heads, vision.deepstack_visual_indexes
    positions = vision.num_position_embeddings
    return {
        f"vision_config: hidden_size / num_heads divides by 4 (got {vision.hidden_size} / {heads})": (
            vision.hidden_size % heads == 0 and vision.hidden_size // heads % 4 == 0
        ),
        f"vision_config: num_position_embeddings is a square (got {positions})": round(positions**0.5) ** 2
        == positions,
        f"vision_config: deepstack_visual_indexes rise and stay below depth {vision.depth} (got {list(indexes)})": (
            all(low < high for low, high in zip((-1, *indexes), (*indexes, vision.depth), strict=True))
        ),
        f"vision_config: window_size {vision.window_size} holds a square of merged patches": (
            vision.window_size == 0 or vision.window_squares > 0
        ),
        f"vision_config.out_hidden_size {vision.out_hidden_size} equals text_config.hidden_size {text.hidden_size}": (
            vision.out_hidden_size == text.hidden_size
        ),
        f"vision_config.hidden_act {vision.hidden_act!r} is among {', '.join(ACTIVATIONS)}": (
            vision.hidden_act in ACTIVATIONS
        ),
    }


# ---------------------------------------------------------------------------------------- audio


def read_audio_dims(reader: ConfigReader, section: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `AudioTowerConfig` that all audio towers have by the same names."""
    return reader.fields(section, _AUDIO_FIELDS)


def audio_rules(audio: AudioTowerConfig, text: DecoderConfig) -> dict[str, bool]:
    """What an audio tower must fulfil, in words, and whether it does."""
    return {
        f"audio_config: n_window_infer {audio.n_window_infer} is at least 2 x n_window {audio.n_window}": (
            audio.n_window_infer >= audio.chunk_frames > 0
        ),
        f"audio_config: d_model {audio.d_model} divides by 2 and by its {audio.encoder_attention_heads} heads": (
            audio.d_model % 2 == 0 and audio.d_model % audio.encoder_attention_heads == 0
        ),
        f"audio_config.output_dim {audio.output_dim} equals text_config.hidden_size {text.hidden_size}": (
            audio.output_dim == text.hidden_size
        ),
        f"audio_config.activation_function {audio.activation_function!r} is among {', '.join(ACTIVATIONS)}": (
            audio.activation_function in ACTIVATIONS
        ),
    }


# ---------------------------------------------------------------------------------------- text


def read_decoder(
    reader: ConfigReader,
    section: Mapping[str, Any],
    *,
    has_experts: bool,
    qk_norm: bool,
    attention_biases: tuple[bool, bool, bool, bool],
    mrope_layout: SectionLayout,
    tie_word_embeddings: bool,
) -> DecoderConfig:
    """A decoder with multimodal rotary positions. Raises: ValueError for a rope_type that is not computed here."""
    # Qwen published rope_theta beside rope_scaling; transformers 5 writes both into rope_parameters
    rope = section.get("rope_parameters") or {**(section.get("rope_scaling") or {})}
    rope = reader.section({"rope_scaling": {"rope_theta": section.get("rope_theta"), **rope}}, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ValueError(f"config.json: text_config has rope_type {kind!r}; only default is known")
    num_heads = reader.field(section, "num_attention_heads")
    experts = reader.fields(section, _EXPERT_FIELDS) if has_experts else {}
    if has_experts:
        experts["num_experts"] = reader.field(section, "num_experts", "num_local_experts")  # the latter: transformers 5
        experts["decoder_sparse_step"] = section.get("decoder_sparse_step", 1)
        experts["norm_topk_prob"] = bool(section.get("norm_topk_prob", True))
        experts["mlp_only_layers"] = tuple(section.get("mlp_only_layers") or ())
    return DecoderConfig(
        **reader.fields(section, _TEXT_FIELDS),
        **experts,
        num_attention_heads=num_heads,
        head_dim=section.get("head_dim") or reader.field(section, "hidden_size") // max(num_heads, 1),
        attention_biases=attention_biases,
        qk_norm=qk_norm,
        rope_theta=float(reader.field(rope, "rope_theta")),
        mrope_section=tuple(reader.field(rope, "mrope_section") or (0, 0, 0)),
        mrope_layout=mrope_layout,
        tie_word_embeddings=tie_word_embeddings,
    )


def decoder_rules(text: DecoderConfig) -> dict[str, bool]:
    """What a decoder must fulfil, in words, and whether it does."""
    return {
        f"text_config: num_attention_heads {text.num_attention_heads} divides by num_key_value_heads "
        f"{text.num_key_value_heads}": text.num_attention_heads % text.num_key_value_heads == 0,
        f"text_config: mrope_section {list(text.mrope_section)} adds up to head_dim / 2 = {text.head_dim / 2:g}": (
            len(text.mrope_section) == 3 and 2 * sum(text.mrope_section) == text.head_dim
        ),
        f"text_config: num_experts_per_tok {text.num_experts_per_tok} is at most num_experts {text.num_experts}": (
            text.num_experts_per_tok <= text.num_experts
        ),
        f"text_config.hidden_act {text.hidden_act!r} is among {', '.join(ACTIVATIONS)}": text.hidden_act in ACTIVATIONS,
    }


# ---------------------------------------------------------------------------------------- fewer layers


def reduce_layers(
    config_json: Mapping[str, Any],
    *,
    parent: str | None,
    text: int | None = None,
    vision: int | None = None,
    audio: int | None = None,
) -> dict[str, Any]:
    """The config of a model with so many layers of each component, from the front; None keeps all.

    `parent` names the section that holds text_config and the towers' (absent, or None: the file itself); the decoder's
    fields may lie beside the towers' sections, without one of their own. Lists of layers lose what lies past the cut:
    deepstack levels, layers without experts, tower layers of full attention, layer types.
    Raises: ValueError for more layers than there are, and for a component that the model has not.
    """
    reduced = copy.deepcopy(dict(config_json))
    sections = reduced if parent is None else reduced.get(parent, reduced)
    for component, key, count in (
        ("text", "num_hidden_layers", text),
        ("vision", "depth", vision),
        ("audio", "encoder_layers", audio),
    ):
        if count is None:
            continue
        section = sections.get(f"{component}_config", sections if component == "text" else None)
        if section is None:
            raise ValueError(f"model.num_layers.{component}: the checkpoint has no such tower; remove the key")
        if not 1 <= count <= section[key]:
            raise ValueError(
                f"model.num_layers.{component}: expected 1 to {section[key]}, the layers of the checkpoint, got {count}"
            )
        for name in {key, "num_hidden_layers"} & section.keys():  # some configs say it twice
            section[name] = count
    vision_json, text_json = sections["vision_config"], sections.get("text_config", sections)
    for section, count, key in (
        (vision_json, vision_json["depth"], "deepstack_visual_indexes"),
        (vision_json, vision_json["depth"], "fullatt_block_indexes"),
        (text_json, text_json["num_hidden_layers"], "mlp_only_layers"),
    ):
        if section.get(key):
            section[key] = [index for index in section[key] if index < count]
    if vision_json.get("deepstack_visual_indexes"):  # a level is added after the decoder layer of its number
        vision_json["deepstack_visual_indexes"] = vision_json["deepstack_visual_indexes"][
            : text_json["num_hidden_layers"]
        ]
    if text_json.get("layer_types"):
        text_json["layer_types"] = text_json["layer_types"][: text_json["num_hidden_layers"]]
    return reduced
