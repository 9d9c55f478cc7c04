"""Which steps are made on a fake device, and what is known of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tests.device.steps import Case

TO_DEVICE = "parallel/device.py:to_device"
INDEXES, BOUNDS = "parallel/encoder_pool.py:_on", "parallel/segments.py:_segments"
SIZES = "parallel/expert.py:ExchangeSizes.forward"

LORA = {
    "text": {"lora": {"rank": 16, "dtype": "bf16"}},
    "lm_head": {"freeze": True},
    "text.embed": {"freeze": True},
    "vision": {"freeze": True},
    "audio": {"freeze": True},
}
FROZEN_TOWERS = {"vision": {"freeze": True}, "audio": {"freeze": True}}


@dataclass(frozen=True, kw_only=True)
class Known:
    """A case and what it does today.

    Copies to the device, none from pinned memory, and gathers of experts that come after their layer's wait, are to
    become fewer: each number is exact, so that whoever lowers one lowers it here.
    """

    case: Case
    waits: Mapping[str, int] = field(default_factory=dict)
    copies: Mapping[str, int] = field(default_factory=dict)
    late_gathers: int = 0
    dtypes: tuple[str, ...] = ("torch.float32",)  # of gradients and optimizer states
    is_slow: bool = False


FULL = {"recompute": "full"}
OMNI, VL_MOE = "Qwen3-Omni-30B-A3B", "Qwen3-VL-30B-A3B"

CASES: Mapping[str, Known] = MappingProxyType(
    {
        "one_rank": Known(case=Case(model="Qwen3-VL-4B"), copies={TO_DEVICE: 13}),
        "fsdp_full_recompute": Known(
            case=Case(model="Qwen3-VL-4B", world_size=8, rank=3, memory=FULL, evaluates=True), copies={TO_DEVICE: 26}
        ),
        "hsdp": Known(
            case=Case(model="Qwen2.5-Omni-7B", world_size=8, rank=1, num_packs=2, parallel={"replicate": 2}),
            copies={TO_DEVICE: 40},
        ),
        "experts": Known(
            case=Case(model=OMNI, world_size=64, rank=9, parallel={"expert": 8}, evaluates=True),
            waits={SIZES: 4},
            copies={TO_DEVICE: 36},
            late_gathers=2,
        ),
        "context_experts_full_recompute": Known(
            case=Case(model=OMNI, world_size=16, rank=5, parallel={"context": 2, "expert": 8}, memory=FULL),
            waits={SIZES: 2},
            copies={TO_DEVICE: 18, INDEXES: 13, BOUNDS: 2},
            late_gathers=2,
        ),
        "lora_full_recompute": Known(
            case=Case(model=OMNI, world_size=8, memory=FULL, policy=LORA),
            copies={TO_DEVICE: 18},
            dtypes=("torch.bfloat16",),
        ),
        "shared_pool": Known(
            case=Case(
                model=OMNI,
                world_size=8,
                rank=7,
                parallel={"encoder_pool": "data"},
                memory={"recompute": 2},
                num_packs=2,
            ),
            copies={TO_DEVICE: 36, INDEXES: 26, BOUNDS: 4},
            is_slow=True,
        ),
        "frozen_towers": Known(
            case=Case(model=OMNI, world_size=8, policy=FROZEN_TOWERS), copies={TO_DEVICE: 18}, is_slow=True
        ),
        "experts_of_vl": Known(
            case=Case(model=VL_MOE, world_size=8, parallel={"expert": 8}, memory=FULL, evaluates=True),
            waits={SIZES: 4},
            copies={TO_DEVICE: 26},
            late_gathers=2,
            is_slow=True,
        ),
        "windows": Known(
            case=Case(model="Qwen2.5-VL-3B", layers={"text": 2, "vision": 9}, memory=FULL, evaluates=True),
            copies={TO_DEVICE: 28},
            is_slow=True,
        ),
        "hybrid_experts_512": Known(
            case=Case(model=OMNI, world_size=512, rank=511, parallel={"replicate": 2, "expert": 128}),
            waits={SIZES: 2},
            copies={TO_DEVICE: 18},
            late_gathers=2,
            is_slow=True,
        ),
        "context_experts_512": Known(
            case=Case(model=OMNI, world_size=512, rank=100, parallel={"context": 8, "expert": 8}, memory=FULL),
            waits={SIZES: 2},
            copies={TO_DEVICE: 18, INDEXES: 13, BOUNDS: 2},
            late_gathers=2,
            is_slow=True,
        ),
        **{
            f"tiny_{family}": Known(
                case=Case(model=family, pack_tokens=1024, memory=FULL, evaluates=True),
                copies={TO_DEVICE: copies},
                is_slow=True,
            )
            for family, copies in (
                ("qwen3_omni", 36),
                ("qwen2_5_omni", 40),
                ("qwen3_vl", 26),
                ("qwen3_vl_moe", 26),
                ("qwen2_5_vl", 28),
            )
        },
    }
)
