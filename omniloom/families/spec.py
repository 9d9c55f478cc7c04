"""The record by which a model family is known to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omniloom.families.config_fields import (
    THINKER_SUFFIX,
    ConfigSection,
    FamilyConfig,
    TalkerConfig,
    all_demands,
    reduce_layers,
)
from omniloom.families.cost import sample_cost
from omniloom.families.decoder import make_decoder
from omniloom.families.sharding import standard_sharding
from omniloom.keymap import KeyMap
from omniloom.models.audio import AudioTower
from omniloom.models.decoder import Decoder
from omniloom.models.fusion import OmniModel
from omniloom.models.talker import Talker
from omniloom.models.vision import VisionTower
from omniloom.options import ProcessorOptions
from omniloom.processors.chat import ChatProcessor
from omniloom.processors.chat_template import open_template
from omniloom.processors.clips import FamilyClips
from omniloom.processors.rendering import Renderer
from omniloom.processors.settings import TokenizerKind, load_tokenizer, read_extractors
from omniloom.processors.speech import SpeechLayout
from omniloom.processors.tower_inputs import TowerInputs
from omniloom.sharding import ShardingPlan
from omniloom.types import Kernels

OMNI = ("text", "image", "video", "audio")
SEEING = ("text", "image", "video")
COMPONENTS = (
    "vision",
    "vision.merger",
    "vision.deepstack",
    "audio",
    "audio.projector",
    "text",
    "text.router",
    "text.experts",
    "text.embed",
    "lm_head",
)
TALKER_COMPONENTS = ("talker", "talker.projection", "talker.codec_embed", "talker.code_predictor")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A family as data, and callables where data do not say it."""

    name: str
    model_type: str  # of config.json
    modalities: tuple[str, ...]  # all that the family has, text first
    parent: str | None = None  # the section of config.json that holds those of the parts; None: the file itself
    read_parts: Callable[[ConfigSection], FamilyConfig]  # that section -> dims
    key_map: Callable[[FamilyConfig], KeyMap]
    clips: type[FamilyClips]  # how its media are written as tokens
    tokenizer: TokenizerKind = "Qwen2Tokenizer"
    make_decoder: Callable[..., Decoder] = make_decoder  # of (config.text, kernel=, rule=, loss_chunk_tokens=)
    read_talker: Callable[[ConfigSection], TalkerConfig] | None = None  # the whole file -> dims; None: it cannot train
    make_talker: Callable[..., Talker] | None = None  # of (config.talker, kernel=, loss_chunk_tokens=)
    open_speech: Callable[[TalkerConfig, Path, Any], SpeechLayout] | None = None  # of a checkpoint and its tokenizer
    # of (config.json, new voices by name with the ones they start from)
    add_speakers: Callable[[Mapping[str, Any], Mapping[str, str]], dict[str, Any]] | None = None

    def read_config(self, config_json: Mapping[str, Any], *, speaks: bool = False) -> FamilyConfig:
        """Dims from config.json, of the talker only if the model `speaks`.

        Raises: ValueError listing everything that is missing or cannot be.
        """
        section = whole = ConfigSection(values=config_json)
        if self.parent is not None and not str(config_json.get("model_type")).endswith(THINKER_SUFFIX):
            section = section.section(self.parent)
        config = self.read_parts(section)
        token_ids = {name: section.field(name, name.replace("_id", "_index")) for name in self.clips.tokens()}
        if speaks:
            if self.read_talker is None:
                raise ValueError(f"{self.name} has no talker that can be trained; remove the rules of policy for it")
            config = replace(config, talker=self.read_talker(whole))
        section.check(self.model_type)
        section.check_demands(self.model_type, all_demands(config))
        return replace(config, token_ids=token_ids)

    def reduce_config(
        self,
        config_json: Mapping[str, Any],
        *,
        text: int | None = None,
        vision: int | None = None,
        audio: int | None = None,
    ) -> dict[str, Any]:
        """config.json of a model with so many layers of each component; None keeps all. Raises: see `reduce_layers`."""
        counts = {"text": text, "vision": vision, "audio": audio}
        return reduce_layers(config_json, self.parent, {name: n for name, n in counts.items() if n is not None})

    def build(
        self,
        config: FamilyConfig,
        *,
        modalities: tuple[str, ...] | None = None,
        kernels: Kernels | None = None,
        loss_chunk_tokens: int | None = None,
    ) -> OmniModel:
        """The model on the current default device, weights not yet read, with the towers of `modalities`.

        None builds all that the family has.
        """
        wanted = self.modalities if modalities is None else modalities
        kernels = kernels or Kernels()
        sees, hears = "image" in wanted or "video" in wanted, "audio" in wanted
        audio, talker = config.audio if hears else None, config.talker
        return OmniModel(
            vision=VisionTower(config.vision, kernel=kernels.vision) if sees else None,
            audio=None if audio is None else AudioTower(audio, kernel=kernels.audio),
            text=self.make_decoder(
                config.text,
                kernel=kernels.text,
                rule=kernels.delta_rule,
                loss_chunk_tokens=loss_chunk_tokens,
                **({} if talker is None else {"speech_layer": talker.accept_hidden_layer}),
            ),
            talker=None
            if talker is None or self.make_talker is None
            else self.make_talker(talker, kernel=kernels.text, loss_chunk_tokens=loss_chunk_tokens),
        )

    def make_processor(
        self, checkpoint_dir: str | Path, config: FamilyConfig, options: ProcessorOptions | None = None
    ) -> ChatProcessor:
        """A checkpoint's processor. Raises: ValueError where the checkpoint lacks a file or a field."""
        directory, options = Path(checkpoint_dir), ProcessorOptions() if options is None else options
        tokenizer = load_tokenizer(directory, config.text.vocab_size, self.tokenizer)
        towers = TowerInputs(
            vision=config.vision,
            audio=config.audio,
            cost=partial(sample_cost, config.text, config.vision, config.audio),
            settings=read_extractors(directory, options, config.vision, config.audio),
            options=options,
        )
        media = self.clips(
            towers,
            tokenizer,
            token_ids=config.token_ids,
            positions_per_second=config.positions_per_second,
            seconds_per_chunk=config.seconds_per_chunk,
        )
        renderer = Renderer(open_template(directory, options, tokenizer, media), options, tokenizer.eos_token)
        return ChatProcessor(
            tokenizer=tokenizer.backend_tokenizer,
            renderer=renderer,
            media=media,
            towers=towers,
            speech=None
            if config.talker is None or self.open_speech is None
            else self.open_speech(config.talker, directory, tokenizer),
        )

    def sharding(self, config: FamilyConfig) -> ShardingPlan:
        return standard_sharding(config)

    def component_of(self, parameter_name: str) -> str:
        """The policy component of one of our parameter names. Raises: ValueError for a name that belongs to none."""
        parts = parameter_name.split(".")
        if parts[0] == "text":
            if "moe" in parts and "shared" not in parts:
                return "text.experts" if "experts" in parts else "text.router"
            if parts[1] == "embed":
                return "text.embed"
            return "lm_head" if parts[1:3] == ["loss_head", "head"] else "text"
        if parts[0] in ("vision", "audio", "talker"):
            inner = ".".join(parts[:2])
            return inner if inner in (*COMPONENTS, *TALKER_COMPONENTS) else parts[0]
        raise ValueError(f"{parameter_name} belongs to no component; known: {', '.join(COMPONENTS)}")
