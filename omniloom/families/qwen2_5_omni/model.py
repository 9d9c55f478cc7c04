"""Qwen2.5-Omni's thinker out of the shared parts."""

from __future__ import annotations

from omniloom.families.qwen2_5_omni.config import Qwen25OmniConfig
from omniloom.families.spec import OMNI
from omniloom.models.fusion import OmniModel, compose
from omniloom.types import Kernels


def build(
    config: Qwen25OmniConfig,
    *,
    modalities: tuple[str, ...] = OMNI,
    kernels: Kernels | None = None,
    loss_chunk_tokens: int | None = None,
) -> OmniModel:
    return compose(
        vision=config.vision,
        audio=config.audio,
        text=config.text,
        modalities=modalities,
        kernels=kernels,
        loss_chunk_tokens=loss_chunk_tokens,
    )
