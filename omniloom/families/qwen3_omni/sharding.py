"""How Qwen3-Omni may be sharded."""

from __future__ import annotations

from omniloom.families.qwen3_omni.config import Qwen3OmniConfig
from omniloom.families.sharding import standard_sharding
from omniloom.sharding import ShardingPlan


def sharding(config: Qwen3OmniConfig) -> ShardingPlan:
    return standard_sharding(vision=config.vision, audio=config.audio, text=config.text)
