"""The record by which a model family is known to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from omniloom.families.decoder import DecoderConfig, make_decoder
from omniloom.families.sharding import standard_sharding
from omniloom.keymap import KeyMap
from omniloom.models.audio import AudioTower, AudioTowerConfig
from omniloom.models.decoder import Decoder
from omniloom.models.fusion import OmniModel
from omniloom.models.vision import VisionTower, VisionTowerConfig
from omniloom.sharding import ShardingPlan
from omniloom.types import Kernels

if TYPE_CHECKING:
    from omniloom.processors.chat import ChatProcessor


class FamilyConfig(Protocol):
    """What all families' configs have; the rest is their own."""

    @property
    def vision(self) -> VisionTowerConfig: ...
    @property
    def audio(self) -> AudioTowerConfig | None: ...
    @property
    def text(self) -> DecoderConfig: ...


class ReduceConfig(Protocol):
    def __call__(
        self,
        config_json: Mapping[str, Any],
        *,
        text: int | None = ...,
        vision: int | None = ...,
        audio: int | None = ...,
    ) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A family: callables over its own frozen config, which nobody else looks into."""

    name: str
    model_type: str  # of config.json
    architectures: tuple[str, ...]
    modalities: tuple[str, ...]  # all that the family has, text first
    components: tuple[str, ...]  # the policy's names, whether built or not
    read_config: Callable[[Mapping[str, Any]], Any]  # config.json -> the family's config
    reduce_config: ReduceConfig  # config.json of fewer layers
    key_map: Callable[[Any], KeyMap]
    make_processor: Callable[..., ChatProcessor]  # of (checkpoint_dir, config, options)
    make_decoder: Callable[..., Decoder] = make_decoder  # of (config.text, kernel=, loss_chunk_tokens=)

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
        audio = config.audio if hears else None
        return OmniModel(
            vision=VisionTower(config.vision, kernel=kernels.vision) if sees else None,
            audio=None if audio is None else AudioTower(audio, kernel=kernels.audio),
            text=self.make_decoder(config.text, kernel=kernels.text, loss_chunk_tokens=loss_chunk_tokens),
        )

    def component_of(self, parameter_name: str) -> str:
        """The policy component of one of our parameter names. Raises: ValueError for a name that belongs to none."""
        return component_of(parameter_name)

    def sharding(self, config: FamilyConfig) -> ShardingPlan:
        return standard_sharding(vision=config.vision, audio=config.audio, text=config.text)


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


OMNI = ("text", "image", "video", "audio")
SEEING = ("text", "image", "video")
SEEING_COMPONENTS = tuple(name for name in COMPONENTS if not name.startswith("audio"))


def component_of(parameter_name: str) -> str:
    """The policy component of one of our parameter names, for models out of the shared parts.

    Raises: ValueError for a name that belongs to none.
    """
    parts = parameter_name.split(".")
    if parts[0] == "text":
        if "moe" in parts and "shared" not in parts:
            return "text.experts" if "experts" in parts else "text.router"
        if parts[1] == "embed":
            return "text.embed"
        return "lm_head" if parts[1:3] == ["loss_head", "head"] else "text"
    if parts[0] in ("vision", "audio"):
        inner = ".".join(parts[:2])
        return inner if inner in COMPONENTS else parts[0]
    raise ValueError(f"{parameter_name} belongs to no component; known: {', '.join(COMPONENTS)}")
