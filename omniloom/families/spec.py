"""The record by which a model family is known to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from omniloom.keymap import KeyMap
from omniloom.models.fusion import OmniModel
from omniloom.sharding import ShardingPlan
from omniloom.types import Kernels


class Build(Protocol):
    def __call__(
        self,
        config: Any,
        *,
        modalities: tuple[str, ...] = ...,
        kernels: Kernels | None = ...,
        loss_chunk_tokens: int | None = ...,
    ) -> OmniModel: ...


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
    build: Build
    key_map: Callable[[Any], KeyMap]
    sharding: Callable[[Any], ShardingPlan]
    component_of: Callable[[str], str]  # parameter name -> component
    make_processor: Callable[..., Any]  # (checkpoint_dir, config, options) -> ChatProcessor


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
