"""How Qwen3-VL may be sharded."""

from __future__ import annotations

from omniloom.families.qwen3_vl.config import Qwen3VLConfig
from omniloom.families.sharding import standard_sharding
from omniloom.sharding import ShardingPlan


def sharding(config: Qwen3VLConfig) -> ShardingPlan:
    return standard_sharding(vision=config.vision, audio=None, text=config.text)
