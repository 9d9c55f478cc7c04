"""Qwen3-VL out of the shared parts."""

from __future__ import annotations

from omniloom.families.qwen3_vl.config import Qwen3VLConfig
from omniloom.families.spec import SEEING
from omniloom.models.fusion import OmniModel, compose
from omniloom.types import Kernels


def build(
    config: Qwen3VLConfig,
    *,
    modalities: tuple[str, ...] = SEEING,
    kernels: Kernels | None = None,
    loss_chunk_tokens: int | None = None,
) -> OmniModel:
    return compose(
        vision=config.vision,
        audio=None,
        text=config.text,
        modalities=modalities,
        kernels=kernels,
        loss_chunk_tokens=loss_chunk_tokens,
    )
