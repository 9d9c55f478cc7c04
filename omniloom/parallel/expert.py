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

from omniloom.ops.gated_experts import Copies
from omniloom.ops.grouped_gemm import gather_copies, group_multiple, sort_by_group, sum_copies
from omniloom.ops.linear_map import LinearMap
from omniloom.parallel.collectives import all_to_all_rows, exchange_sizes, sum_over_group


class ExpertDispatch(nn.Module):
    """Sends each row to the ranks of its experts and brings the results home.

    Rank r of `group` holds experts `[r * E / n, (r + 1) * E / n)`. Rows leave sorted by expert, with their weights, and
    come back weighed: what is left is a sum, for whose backward nothing is kept, so that a recomputing backward ends at
    the experts. One all-to-all of counts, one copy of them to the host, and per direction two all-to-alls of rows and
    one of weights, all over `group`.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.group = group

    def forward(
        self, hidden: Tensor, expert_index: Tensor, expert_weights: Tensor, experts: Callable[..., Tensor]
    ) -> Tensor:
        """hidden [T, C] local, expert_index and expert_weights [T, K] -> weighted sums [T, C]."""
        slot, row, counts = sort_by_group(expert_index.flatten(), self.num_experts)
        here, sizes, num_rows = exchange_sizes(counts.view(self.group.size(), -1), self.group)
        rows = gather_copies(hidden, slot, row.view_as(expert_index))
        weights = gather_copies(expert_weights.view(-1, 1), slot, row[:, None])
        rows, weights = (all_to_all_rows(each, sizes, num_rows, self.group) for each in (rows, weights))
        local_expert = torch.arange(here.shape[1], device=hidden.device).repeat(here.shape[0])
        local_expert = local_expert.repeat_interleave(here.flatten(), output_size=num_rows)
        multiple = group_multiple(hidden.device.type, hidden.dtype)
        local_slot, local_row, local_counts = sort_by_group(local_expert, here.shape[1], multiple)
        copies = Copies(local_slot, local_row[:, None], weights)
        computed = experts(rows, local_counts.cumsum(0).to(torch.int32), copies)
        computed = all_to_all_rows(computed, sizes, slot.shape[0], self.group, returns=True)
        return sum_copies(computed, slot, row.view_as(expert_index))


class LocalWeights(nn.Module):
    """Wraps the experts' products: takes this rank's experts out of stacked weights that are spread over ranks."""

    def __init__(self, product: nn.Module) -> None:
        super().__init__()
        self.product = product

    def forward(self, tokens: Tensor, gate_up: LinearMap, down: LinearMap, *others: Any) -> Tensor:
        """tokens [N, C] of local experts; maps of all experts, or of local ones; offsets int32 [E / n], copies."""
        return self.product(tokens, _local(gate_up), _local(down), *others)


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
