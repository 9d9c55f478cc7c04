"""Expert parallelism: each rank holds a share of the experts, and token rows travel to them and back.

Replaces the dispatch between router and experts and the products inside them. Every row that was sent to an
expert is computed; none is dropped. Knows of the model only the signatures of `moe.dispatch` and `experts.product`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from omniloom.ops.grouped_gemm import combine_copies, gather_copies, permute_rows, sort_by_group
from omniloom.ops.linear_map import LinearMap
from omniloom.parallel.collectives import all_to_all_rows, exchange_sizes, sum_over_group


class ExpertDispatch(nn.Module):
    """Sends each row to the ranks of its experts and brings the results home.

    Rank r of `group` holds experts `[r * E / n, (r + 1) * E / n)`. Rows leave sorted by expert, so what arrives from
    each rank is sorted too and one permutation by expert joins them. One all-to-all of counts, one copy of them to the
    host, and two all-to-alls of rows per direction, all over `group`.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.group = group

    def forward(
        self, hidden: Tensor, expert_index: Tensor, expert_weights: Tensor, experts: Callable[..., Tensor]
    ) -> Tensor:
        """hidden [T, C] local, expert_index and expert_weights [T, K] -> weighted sums [T, C]."""
        num_copies = expert_index.shape[1]
        order, inverse, counts = sort_by_group(expert_index.flatten(), self.num_experts)
        here, sizes, num_rows = exchange_sizes(counts.view(self.group.size(), -1), self.group)
        rows = all_to_all_rows(gather_copies(hidden, order, inverse, num_copies), sizes, num_rows, self.group)
        local_expert = torch.arange(here.shape[1], device=hidden.device).repeat(here.shape[0])
        local_expert = local_expert.repeat_interleave(here.flatten(), output_size=num_rows)
        gathered, scattered, local_counts = sort_by_group(local_expert, here.shape[1])
        computed = experts(permute_rows(rows, gathered, scattered), local_counts.cumsum(0).to(torch.int32))
        computed = permute_rows(computed, scattered, gathered)
        rows = all_to_all_rows(computed, sizes, order.shape[0], self.group, returns=True)
        return combine_copies(rows, expert_weights, order, inverse)


class LocalWeights(nn.Module):
    """Wraps the experts' products: takes this rank's experts out of stacked weights that are spread over ranks."""

    def __init__(self, product: nn.Module) -> None:
        super().__init__()
        self.product = product

    def forward(self, rows: Tensor, gate_up: LinearMap, down: LinearMap, *others: Any) -> Tensor:
        """rows [N, C] of local experts; maps of all experts, or of local ones; offsets int32 [E / n]."""
        return self.product(rows, _local(gate_up), _local(down), *others)


def _local(linear: LinearMap) -> LinearMap:
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in linear.parts]
    return LinearMap.of_parts(parts, linear.dropout)


class SumOverGroup(nn.Module):
    """Adds up what has no gradient over a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, shares: Tensor) -> Tensor:
        return sum_over_group(shares.detach(), self.group)
