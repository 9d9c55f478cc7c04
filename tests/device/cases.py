"""Which steps are made on a fake device."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tests.device.steps import Case

LORA = {
    "text": {"lora": {"rank": 16, "dtype": "bf16"}},
    "lm_head": {"freeze": True},
    "text.embed": {"freeze": True},
    "vision": {"freeze": True},
    "audio": {"freeze": True},
}
FROZEN_TOWERS = {"vision": {"freeze": True}, "audio": {"freeze": True}}
FULL = {"recompute": "full"}
OFFLOADED = {"offload_activations": True, "offload_optimizer": True}
OMNI, VL_MOE = "Qwen3-Omni-30B-A3B", "Qwen3-VL-30B-A3B"

FAST: Mapping[str, Case] = MappingProxyType(
    {
        "one_rank": Case(model="Qwen3-VL-4B"),
        "fsdp_full_recompute": Case(model="Qwen3-VL-4B", world_size=8, rank=3, memory=FULL, evaluates=True),
        "hsdp": Case(model="Qwen3-VL-4B", world_size=8, rank=1, num_packs=2, parallel={"replicate": 2}),
        "experts": Case(model=OMNI, world_size=64, rank=9, parallel={"expert": 8}, evaluates=True),
        "context_experts_full_recompute": Case(
            model=OMNI, world_size=16, rank=5, parallel={"context": 2, "expert": 8}, memory=FULL
        ),
        "context_tensor_experts": Case(
            model=OMNI, world_size=16, rank=5, parallel={"context": 4, "tensor": 2, "expert": 4}
        ),
        "lora_full_recompute": Case(model=OMNI, world_size=8, memory=FULL, policy=LORA),
        "quantized": Case(model=OMNI, policy=LORA, quantize="nf4"),
        "pipeline4_tensor2_experts": Case(
            model=OMNI,
            layers={"text": 8, "vision": 2, "audio": 2},
            world_size=64,
            rank=37,
            parallel={"pipeline": 4, "pipeline_layers": [2, 2, 2, 2], "tensor": 2, "expert": 8},
            memory=FULL,
            num_packs=4,
        ),
        "selective": Case(model="Qwen3-VL-4B", memory={"recompute": "selective", "loss_chunk_tokens": 1024}),
        **{
            f"selective_experts_{count}": Case(
                model=OMNI, world_size=8, parallel={"expert": count}, memory={"recompute": "selective"}
            )
            for count in (1, 8)
        },
        "offloaded": Case(model="Qwen3-VL-4B", world_size=8, memory=OFFLOADED, train={"optimizer_states": "8bit"}),
    }
)
SLOW: Mapping[str, Case] = MappingProxyType(
    {
        **{
            f"vl_235b_of_{world}": Case(
                model="Qwen3-VL-235B-A22B",
                layers={"text": 8, "vision": 2},
                world_size=world,
                rank=world - 30,
                parallel={"pipeline": 4, "pipeline_layers": [2, 2, 2, 2], "tensor": 4, "expert": 8},
                memory=FULL,
                num_packs=4,
            )
            for world in (128, 512)
        },
        "tensor8": Case(model=OMNI, world_size=8, rank=3, parallel={"tensor": 8}, memory=FULL, evaluates=True),
        "lora": Case(model=OMNI, world_size=8, policy=LORA),
        "interleaved": Case(
            model="Qwen3-VL-4B",
            layers={"text": 4, "vision": 2},
            world_size=2,
            parallel={"pipeline": 2, "pipeline_schedule": "interleaved", "pipeline_layers": [1, 1, 1, 1]},
            num_packs=4,
        ),
        "tensor": Case(model="Qwen3-VL-4B", world_size=8, rank=3, parallel={"tensor": 4}),
        "context": Case(model=OMNI, world_size=8, rank=3, parallel={"context": 8}),
        "experts_over_tensor": Case(model=OMNI, world_size=8, rank=3, parallel={"tensor": 8, "expert": 8}),
        "ring": Case(model="Qwen3-VL-4B", world_size=8, rank=5, parallel={"context": {"ulysses": 2, "ring": 4}}),
        "shared_pool": Case(
            model=OMNI,
            world_size=8,
            rank=7,
            parallel={"encoder_pool": "data"},
            memory={"recompute": 2},
            num_packs=2,
        ),
        "hsdp_omni": Case(model="Qwen2.5-Omni-7B", world_size=8, rank=1, num_packs=2, parallel={"replicate": 2}),
        "frozen_towers": Case(model=OMNI, world_size=8, policy=FROZEN_TOWERS),
        "experts_of_vl": Case(model=VL_MOE, world_size=8, parallel={"expert": 8}, memory=FULL, evaluates=True),
        "windows": Case(model="Qwen2.5-VL-3B", layers={"text": 2, "vision": 9}, memory=FULL, evaluates=True),
        "hybrid_experts_512": Case(model=OMNI, world_size=512, rank=511, parallel={"replicate": 2, "expert": 128}),
        "experts_512": Case(model=OMNI, world_size=512, rank=300, parallel={"expert": 8}, memory=FULL),
        **{
            f"context_experts_{world}": Case(
                model=OMNI, world_size=world, rank=rank, parallel={"context": 8, "expert": 8}, memory=FULL
            )
            for world, rank in ((8, 5), (64, 13), (512, 101))  # whose part of a pack has its share of answers
        },
        **{
            f"{name}_{world}": Case(model="Qwen3-VL-4B", world_size=world, rank=world - 2, num_packs=2, parallel=axes)
            for name, axes in (("fsdp", {}), ("hsdp", {"replicate": 4}))
            for world in (64, 512)
        },
        **{
            f"tiny_{family}": Case(model=family, pack_tokens=1024, memory=FULL, evaluates=True)
            for family in (
                "qwen3_omni",
                "qwen2_5_omni",
                "qwen3_vl",
                "qwen3_vl_moe",
                "qwen2_5_vl",
                "qwen3_5",
                "qwen3_5_moe",
            )
        },
        "muon": Case(model=OMNI, world_size=8, parallel={"expert": 4}, train={"optimizer": "muon"}),
    }
)
CASES: Mapping[str, Case] = MappingProxyType({**FAST, **SLOW})
