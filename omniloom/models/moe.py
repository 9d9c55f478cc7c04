"""Mixture of experts: the router's choice, stacked experts, and what brings tokens to them.

`dispatch`, `experts.product` and `reduce_counts` have no parameters: expert parallelism replaces the first two,
parallelism over tokens the last. Everything is computed from the router's one choice, so a recomputing backward that
keeps it cannot send a token elsewhere.

Padding rows take experts in turn, so that they crowd none, and their results are left out by selection: multiplying by
zero would let through what grouped GEMM leaves uninitialised (NaN x 0 is NaN).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniloom.models.layers import GatedMLP, Linear
from omniloom.ops.gated_experts import Copies, gated_experts
from omniloom.ops.grouped_gemm import group_multiple, sort_by_group
from omniloom.ops.linear_map import LinearMap


class Router(nn.Module):
    """Softmax over all experts in float32, then the K most probable."""

    def __init__(self, *, hidden_size: int, num_experts: int, num_experts_per_tok: int, norm_topk_prob: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, C] -> probabilities float32 [T, E], expert_index int64 [T, K], expert_weights [T, K]."""
        probabilities = F.linear(hidden, self.weight).softmax(dim=-1, dtype=torch.float32)
        expert_index = probabilities.detach().topk(self.num_experts_per_tok, dim=-1).indices
        expert_weights = probabilities.gather(1, expert_index)
        if self.norm_topk_prob:
            expert_weights = expert_weights / expert_weights.sum(dim=-1, keepdim=True)
        return probabilities, expert_index, expert_weights.to(hidden.dtype)


def count_experts(expert_index: Tensor, is_padding: Tensor, num_experts: int) -> Tensor:
    """Valid tokens sent to each expert: expert_index [T, K], is_padding [T] -> int64 [E]."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=expert_index.device)
    valid = (~is_padding[:, None]).expand_as(expert_index).to(torch.int64)
    return counts.scatter_add_(0, expert_index.flatten(), valid.flatten())


def load_balancing_loss(counts: Tensor, probability_sums: Tensor, num_experts_per_tok: int) -> Tensor:
    """E x sum over experts of (choices per token) x (mean probability), float32; 0 where there is no token.

    Linear in `probability_sums` float32 [E]: with `counts` int64 [E] of the whole pack, the sums of some of its tokens
    give their part of the loss.
    Source: Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6, for K choices per token as in transformers.
    """
    num_tokens = (counts.sum() / num_experts_per_tok).clamp(min=1.0)  # an empty pack
    return counts.shape[0] * ((counts / num_tokens) * (probability_sums / num_tokens)).sum()


class _Cleared(torch.autograd.Function):
    """Rows with those of padding at zero. Saves nothing, so that a recomputing backward need not come this far."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, is_padding: Tensor) -> Tensor:
        ctx.is_padding = is_padding  # the batch's own, which outlives the step
        return rows.masked_fill(is_padding[:, None], 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.masked_fill(ctx.is_padding[:, None], 0.0), None


class LocalCounts(nn.Module):
    """Expert counts of the whole pack from those of the rows here: the same, where all rows are here."""

    def forward(self, counts: Tensor) -> Tensor:
        """int64 [E] -> int64 [E]."""
        return counts


class ExpertsProduct(nn.Module):
    """All experts' feed-forwards as a module without parameters, so that weights may be shards."""

    def forward(self, tokens: Tensor, gate_up: LinearMap, down: LinearMap, offsets: Tensor, copies: Copies) -> Tensor:
        """As `ops.gated_experts`: tokens [T, C], offsets int32 [E] -> the weighted sums of their copies [T, C]."""
        return gated_experts(tokens, gate_up, down, offsets, copies)


class Experts(nn.Module):
    """All experts of a layer, their weights stacked along a first dim, each a gated feed-forward."""

    def __init__(self, *, num_experts: int, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        if activation != "silu":
            raise ValueError(f"hidden_act {activation!r} of a model with experts is not supported; expected silu")
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.product = ExpertsProduct()

    def forward(self, tokens: Tensor, offsets: Tensor, copies: Copies, draw_key: Tensor | None = None) -> Tensor:
        """tokens [T, C], offsets int32 [E] where each expert's sorted copies end -> their weighted sums [T, C]."""
        return self.product(tokens, LinearMap(self.gate_up), LinearMap(self.down), offsets, copies)


class LocalDispatch(nn.Module):
    """Brings each row to its experts and back, all experts being here."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(
        self, hidden: Tensor, expert_index: Tensor, expert_weights: Tensor, experts: Callable[..., Tensor]
    ) -> Tensor:
        """hidden [T, C], expert_index and expert_weights [T, K] -> weighted sums [T, C]."""
        multiple = group_multiple(hidden.device.type, hidden.dtype)
        slot, row, counts = sort_by_group(expert_index.flatten(), self.num_experts, multiple)
        copies = Copies(slot, row.view_as(expert_index), expert_weights)
        return experts(hidden, counts.cumsum(0).to(torch.int32), copies)


class SharedExpert(nn.Module):
    """A feed-forward that every token takes beside its experts, weighed by a gate of its own."""

    def __init__(self, *, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.mlp = GatedMLP(hidden_size=hidden_size, intermediate_size=intermediate_size, activation=activation)
        self.gate = Linear(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor, draw_key: Tensor | None = None) -> Tensor:
        """hidden [T, C] -> [T, C]."""
        return self.gate(hidden, draw_key).sigmoid() * self.mlp(hidden, draw_key)


class MoE(nn.Module):
    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool,
        shared: SharedExpert | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.router = Router(
            hidden_size=hidden_size,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            norm_topk_prob=norm_topk_prob,
        )
        self.reduce_counts = LocalCounts()
        self.dispatch = LocalDispatch(num_experts)
        self.experts = Experts(
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activation=activation,
        )
        self.shared = shared

    def forward(
        self, hidden: Tensor, is_padding: Tensor, draw_key: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, C], is_padding bool [T] -> [T, C], router loss float32 [], counts of these rows int64 [E]."""
        probabilities, expert_index, expert_weights = self.router(hidden)
        counts = count_experts(expert_index, is_padding, self.num_experts)
        probability_sums = probabilities.masked_fill(is_padding[:, None], 0.0).sum(dim=0)
        router_loss = load_balancing_loss(self.reduce_counts(counts), probability_sums, expert_index.shape[1])
        shared = None if self.shared is None else self.shared(hidden, draw_key)  # before what backward need not repeat
        in_turn = torch.arange(expert_index.numel(), device=hidden.device).view_as(expert_index) % self.num_experts
        expert_index = torch.where(is_padding[:, None], in_turn, expert_index)
        out = self.dispatch(hidden, expert_index, expert_weights, partial(self.experts, draw_key=draw_key))
        out = _Cleared.apply(out, is_padding)
        return out if shared is None else out + shared, router_loss, counts
