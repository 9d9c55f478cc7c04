"""How Qwen2.5-Omni may be sharded."""

from __future__ import annotations

from omniloom.families.qwen2_5_omni.config import Qwen25OmniConfig
from omniloom.families.sharding import standard_sharding
from omniloom.sharding import ShardingPlan


def sharding(config: Qwen25OmniConfig) -> ShardingPlan:
    return standard_sharding(vision=config.vision, audio=config.audio, text=config.text)
