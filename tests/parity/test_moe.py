"""A layer's experts with a shared one beside them, against transformers' module."""

from __future__ import annotations

import torch

from omniloom.models.moe import MoE, SharedExpert

HIDDEN, INNER, SHARED = 16, 12, 20


def test_a_gated_shared_expert_equals_transformers() -> None:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=SHARED,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    reference = Qwen2MoeSparseMoeBlock(config)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    shared = SharedExpert(hidden_size=HIDDEN, intermediate_size=SHARED, activation="silu")
    ours = MoE(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        activation="silu",
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        shared=shared,
    )
    pairs = {
        "router.weight": "gate.weight",
        "experts.gate_up": "experts.gate_up_proj",
        "experts.down": "experts.down_proj",
        "shared.gate.weight": "shared_expert_gate.weight",
        **{
            f"shared.mlp.{name}.weight": f"shared_expert.{name}.weight"
            for name in ("gate_proj", "up_proj", "down_proj")
        },
    }
    assert pairs.keys() == dict(ours.named_parameters()).keys()
    assert set(pairs.values()) == dict(reference.named_parameters()).keys()
    for name, theirs in pairs.items():
        ours.get_parameter(name).data = reference.get_parameter(theirs).detach().clone()
    hidden = torch.randn(9, HIDDEN)
    found, _, _ = ours(hidden, torch.zeros(9, dtype=torch.bool))
    wanted = reference(hidden[None])[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(wanted)
    found.backward(upstream)
    wanted.backward(upstream)
    for name, theirs in pairs.items():
        expected = reference.get_parameter(theirs).grad
        torch.testing.assert_close(ours.get_parameter(name).grad, expected, rtol=1e-4, atol=1e-4)
