"""Operators of PyTorch without a public name take and give what is relied on: a release may change them unsaid."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from omniloom.ops import torch_operators
from omniloom.ops.torch_operators import count_graphs
from omniloom.parallel.collectives import group_of

SCHEMAS = {
    torch_operators.rms_norm: "(Tensor input, int[] normalized_shape, Tensor? weight, float? eps) -> (Tensor, Tensor)",
    torch_operators.rms_norm_backward: "(Tensor grad_out, Tensor input, int[] normalized_shape, Tensor rstd, "
    "Tensor? weight, bool[2] output_mask) -> (Tensor, Tensor)",
    torch_operators.cpu_attention: "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, "
    "*, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)",
    torch_operators.cpu_attention_backward: "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, float dropout_p, bool is_causal, *, Tensor? attn_mask=None, float? scale=None) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    torch_operators.flash_attention: "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None, "
    "Tensor? block_table=None, int? num_splits=None) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, "
    "Tensor unused, Tensor debug_attn_mask)",
    torch_operators.flash_attention_backward: "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)",
}


@pytest.mark.parametrize("operator", SCHEMAS, ids=str)
def test_an_operator_takes_and_gives_what_is_relied_on(operator: torch._ops.OpOverloadPacket) -> None:
    schema = str(operator.default._schema)
    assert schema[schema.index("(") :] == SCHEMAS[operator]


def test_lists_of_tensors_are_normed_in_the_dtype_asked_for() -> None:
    tensors = [torch.full((4,), 3.0, dtype=torch.bfloat16), torch.ones(1)]
    norms = torch_operators.foreach_norm(tensors, 2, dtype=torch.float32)
    assert [(norm.item(), norm.dtype) for norm in norms] == [(6.0, torch.float32), (1.0, torch.float32)]


def test_a_group_is_found_by_its_name_and_graphs_are_counted() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        assert group_of(dist.group.WORLD.group_name) is dist.group.WORLD
    finally:
        dist.destroy_process_group()
    assert isinstance(count_graphs(), int)
