"""Pipeline parallelism: the decoder's layers divided into stages, and the packs of a step passed along them.

A stage is the family's own decoder with fewer parts; a rank holds one stage, or with interleaving several that lie
`pipeline` apart. The order of work is that of torch.distributed.pipelining's 1F1B and interleaved schedules; it is
carried out here, since the library's stages keep a step's gradients whole instead of sharded, demand that the rows
between all stages need gradients, and take nothing but tensors through a stage. Knows of the decoder what `Decoder`
says.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, permutations
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from omniloom.config import ParallelConfig
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.fsdp import set_all_reduce, shard_root
from omniloom.parallel.mesh import Layout
from omniloom.parallel.staging import map_tensors
from omniloom.sharding import ShardingPlan
from omniloom.types import ROUTER, TEXT, LossTerms, PackedBatch, TowerRows


class Decoder(Protocol):
    """What is cut: a module whose parts may be absent, called with the rows that an earlier part hands on."""

    embed: nn.Module | None
    layers: nn.ModuleDict  # by global index
    loss_head: nn.Module | None

    def __call__(
        self, batch: PackedBatch, media: TowerRows, hidden: Tensor | None = None, *, want: Any = "loss"
    ) -> Any: ...


# ---------------------------------------------------------------------------------------- who has which layers


def split_layers(plan: ShardingPlan, degrees: Degrees) -> tuple[int, ...]:
    """How many layers each stage has: what the config says, else so that the busiest rank has least to do.

    The first stage has the embedding, the last the head. Raises: ValueError for a list that is no such division.
    """
    num_layers, num_stages = len(plan.layer_costs), degrees.num_stages
    if num_layers < num_stages:
        fewer = ", or fewer parallel.stages_per_rank" * (degrees.stages_per_rank > 1)
        raise ValueError(
            f"parallel.pipeline: {num_layers} layers do not make {num_stages} stages; choose at most "
            f"{max(1, num_layers // degrees.stages_per_rank)}{fewer}"
        )
    if given := degrees.pipeline_layers:
        if len(given) != num_stages or sum(given) != num_layers or min(given) < 1:
            example = [num_layers // num_stages + (index < num_layers % num_stages) for index in range(num_stages)]
            raise ValueError(
                f"parallel.pipeline_layers: {list(given)} are {sum(given)} layers in {len(given)} stages; expected "
                f"{num_stages} numbers of at least 1 that add up to {num_layers}, as {example}, or null"
            )
        return given
    costs = (plan.layer_costs, plan.embed_cost, plan.head_cost)
    sizes = _balance(*costs, num_stages)
    return sizes if degrees.stages_per_rank == 1 else _even_ranks(*costs, sizes, degrees.pipeline)


def _even_ranks(
    costs: Sequence[float], first: float, last: float, sizes: tuple[int, ...], num_ranks: int
) -> tuple[int, ...]:
    """Give layers of one stage to another, one at a time, while that makes the busiest rank, or else the next ones and
    then the costliest stages, cheaper: a rank whose last stage has the head takes fewer layers in its others."""

    def burden(sizes: Sequence[int]) -> tuple[list[float], list[float]]:
        ends = list(accumulate(sizes, initial=0))
        stages = [sum(costs[start:end]) for start, end in pairwise(ends)]
        stages[0], stages[-1] = stages[0] + first, stages[-1] + last
        ranks = [sum(stages[rank::num_ranks]) for rank in range(num_ranks)]
        return sorted(ranks, reverse=True), sorted(stages, reverse=True)

    while True:
        moved = [
            tuple(size - (stage == giver) + (stage == taker) for stage, size in enumerate(sizes))
            for giver, taker in permutations(range(len(sizes)), 2)
            if sizes[giver] > 1
        ]
        best = min(moved, key=burden, default=sizes)
        if burden(best) >= burden(sizes):
            return sizes
        sizes = best


def _balance(costs: Sequence[float], first: float, last: float, num_stages: int) -> tuple[int, ...]:
    """Cut a row of costs into consecutive parts, none empty, so that the largest sum is least; by dynamic programming.

    `first` and `last` come on top of the first and the last part.
    """
    before = [first]
    for cost in costs:
        before.append(before[-1] + cost)
    before[-1] += last
    before[0] = 0.0
    nowhere: tuple[float, tuple[int, ...]] = (float("inf"), ())
    best = [(0.0, nowhere[1])] + [nowhere] * len(costs)
    for stage in range(1, num_stages + 1):
        ends = range(stage, len(costs) + 1)
        best = [nowhere] * stage + [
            min(
                (max(best[start][0], before[end] - before[start]), (*best[start][1], end - start))
                for start in range(stage - 1, end)
            )
            for end in ends
        ]
    return best[-1][1]


def layer_owners(plan: ShardingPlan, degrees: Degrees) -> tuple[int, ...]:
    """The pipeline rank of each layer."""
    if degrees.pipeline == 1:
        return (0,) * len(plan.layer_costs)
    sizes = split_layers(plan, degrees)
    return tuple(stage % degrees.pipeline for stage, size in enumerate(sizes) for _ in range(size))


def cut_decoder(text: Decoder, owners: Sequence[int], layout: Layout) -> None:
    """Leave this rank's layers in `text`, in place, the embedding on the first rank and the head on the last."""
    rank = layout.pipeline_rank
    own = [layer for layer, owner in enumerate(owners) if owner == rank]
    _keep(text, own, has_embed=rank == 0, has_head=rank == layout.degrees.pipeline - 1)


def _keep(text: Decoder, layers: Sequence[int], *, has_embed: bool, has_head: bool) -> None:
    for name in text.layers.keys() - set(map(str, layers)):
        del text.layers[name]
    if not has_embed:
        text.embed = None
    if not has_head:
        text.loss_head = None


# ---------------------------------------------------------------------------------------- in which order


class Action(NamedTuple):
    stage: int
    pack: int
    is_backward: bool


def order_of(rank: int, num_ranks: int, stages_per_rank: int, num_packs: int) -> list[Action]:
    """The forward and backward passes of one pipeline rank: 1F1B, or interleaved with several stages per rank.

    Sources: Narayanan et al. 2021 (arXiv 2104.04473), figures 3 and 4; rounds of unequal packs as in
    torch.distributed.pipelining's ScheduleInterleaved1F1B.
    """
    per_round = num_packs // max(1, num_packs // num_ranks)
    turns = [divmod(number // per_round, stages_per_rank) for number in range(num_packs * stages_per_rank)]

    def pass_of(number: int, local: int, *, is_backward: bool) -> Action:
        pack = turns[number][0] * per_round + number % per_round
        return Action(local * num_ranks + rank, pack, is_backward)

    forward = [pass_of(number, local, is_backward=False) for number, (_, local) in enumerate(turns)]
    backward = [
        pass_of(number, stages_per_rank - 1 - local, is_backward=True) for number, (_, local) in enumerate(turns)
    ]
    ahead = (num_ranks - 1 - rank) * (1 if stages_per_rank == 1 else 2) + (stages_per_rank - 1) * per_round
    ahead = min(ahead, len(forward))
    steady = [action for pair in zip(forward[ahead:], backward, strict=False) for action in pair]
    return [*forward[:ahead], *steady, *backward[len(forward) - ahead :]]


# ---------------------------------------------------------------------------------------- passing rows


class Message(NamedTuple):
    """Rows that arrive at a stage: hidden rows from the stage before it, or their gradient from the one behind it."""

    stage: int
    pack: int
    is_gradient: bool


class _Mail:
    """Rows to and from other pipeline ranks, each pair in the order in which the sender makes them.

    Each direction of a pair has a communicator to itself, so that neither waits for the other. (NCCL makes it at the
    first message, in a job that is bound to no device.)
    """

    def __init__(self, layout: Layout, like: Tensor, expected: Mapping[int, list[Message]]) -> None:
        """`like` has the shape and dtype of all rows; `expected` are the messages by the rank that sends them."""
        self._layout, self._like = layout, like
        self._expected = {source: iter(messages) for source, messages in expected.items()}
        self._posted: dict[Message, tuple[Tensor, dist.Work | None]] = {}
        self._sent: list[tuple[Tensor, dist.Work | None]] = []  # no work where a device computes nothing

    def send(self, rows: Tensor, target: int) -> None:
        rows = rows.contiguous()
        assert rows.shape == self._like.shape, f"rows {list(rows.shape)}, expected {list(self._like.shape)}"
        group = self._group(self._layout.pipeline_rank, target)
        self._sent = [each for each in self._sent if not _is_over(each[1])]  # rows of a step's every pack add up
        work = dist.isend(rows, group=group, group_dst=target)
        self._sent.append((rows, work))  # gloo and NCCL read it until the work is done

    def receive(self, wanted: Message, source: int) -> Tensor:
        while wanted not in self._posted:
            assert self._post(source), f"{wanted} never comes from pipeline rank {source}"
        rows, work = self._posted.pop(wanted)
        try:
            self._post(source)  # the next one, to arrive while this one is worked on
            if work is not None:
                work.wait()
        except RuntimeError as error:
            rank = dist.get_global_rank(self._group(source, self._layout.pipeline_rank), source)
            what = "the gradient of its rows" if wanted.is_gradient else "rows"
            error.add_note(f"stage {wanted.stage} waited for {what} of pack {wanted.pack} from rank {rank}")
            raise
        return rows

    def _post(self, source: int) -> bool:
        if (message := next(self._expected[source], None)) is None:
            return False
        rows, group = torch.empty_like(self._like), self._group(source, self._layout.pipeline_rank)
        self._posted[message] = rows, dist.irecv(rows, group=group, group_src=source)
        return True

    def _group(self, source: int, target: int) -> dist.ProcessGroup:
        group = self._layout.upward if source < target else self._layout.downward
        assert group is not None, "a layout without stages"
        return group

    def close(self) -> None:
        """Wait until all that was sent is gone."""
        for _, work in self._sent:
            if work is not None:
                work.wait()


def _is_over(work: dist.Work | None) -> bool:
    """Raises: RuntimeError where it failed."""
    if work is not None and not work.is_completed():
        return False
    if work is not None:
        work.wait()
    return True


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """What a stage keeps of a pack between its passes."""

    arrived: Tensor | None
    left: Tensor  # hidden rows, or the objective's share


class Pipeline:
    """This rank's stages, and how packs pass through all of them. Made once, collectively, before the first step."""

    def __init__(
        self, model: nn.Module, layout: Layout, plan: ShardingPlan, parallel: ParallelConfig, dtype: torch.dtype
    ) -> None:
        # rows that leave a stage with a router's loss are a view; nothing here or in the decoder writes into them
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        self.layout, self.plan, self.dtype = layout, plan, dtype
        self.num_ranks, self.rank = layout.degrees.pipeline, layout.pipeline_rank
        self.num_stages = layout.degrees.num_stages
        text = cast(nn.Module, model.text)
        sizes = split_layers(plan, layout.degrees)
        self.stages = {
            stage: _view(text, sum(sizes[:stage]), size, stage == 0, stage == self.num_stages - 1)
            for stage, size in enumerate(sizes)
            if stage % self.num_ranks == self.rank
        }
        for stage in self.stages.values():
            shard_root(stage, list(stage.layers.values()), layout.fsdp, layout, parallel, dtype)
        towers = any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("text."))
        trains = {stage: any(p.requires_grad for p in part.parameters()) for stage, part in self.stages.items()}
        known = {stage: does for part in layout.exchange(trains) for stage, does in part.items()}
        # whether the rows that arrive at a stage need a gradient: whether anything before it trains
        self.needs_gradient = [towers or any(known[before] for before in range(s)) for s in range(self.num_stages)]
        self.router_rows = tuple(i for i, is_routed in enumerate(plan.routed_layers) if is_routed)
        is_tied = any(len(group) > 1 for group in plan.groups)
        ends = {0: "embed", self.num_ranks - 1: "loss_head.head"}
        self.tied = (
            text.get_submodule(ends[self.rank]).get_parameter("weight") if is_tied and self.rank in ends else None
        )

    @property
    def counted_elsewhere(self) -> tuple[nn.Parameter, ...]:
        """Parameters that the first rank has too, whose gradient counts there."""
        return () if self.tied is None or self.rank == 0 else (self.tied,)

    # ------------------------------------------------------------------------------------ a step

    def run(
        self,
        packs: Sequence[tuple[PackedBatch, TowerRows]],
        share_of: Callable[[LossTerms], Tensor],
        on_action: Callable[[int], None] = lambda _: None,
    ) -> list[LossTerms]:
        """Forward and backward passes of all packs; the terms of each, of the stages here. Collective.

        Packs are this rank's tokens and the media rows that fill them, on the device; `share_of` gives the objective's
        share of the last stage's terms.
        """
        orders = [order_of(r, self.num_ranks, len(self.stages), len(packs)) for r in range(self.num_ranks)]
        mail = _Mail(self.layout, self._rows_like(packs[0][0]), self._expect(orders))
        pending: dict[tuple[int, int], _Pending] = {}
        terms: list[list[LossTerms]] = [[] for _ in packs]
        for stage, pack, is_backward in orders[self.rank]:
            on_action(pack)
            if is_backward:
                if self.layout.degrees.replicate > 1:
                    set_all_reduce(self.stages[stage].modules(), pack == len(packs) - 1)
                self._backward(stage, pack, pending.pop((stage, pack)), mail)
            else:
                arrived, made = self._forward(stage, pack, packs[pack], mail)
                # rows and the graph of the sums would hold the pack until the step is over
                terms[pack].append(replace(map_tensors(made, Tensor.detach), hidden=None))
                last = stage == self.num_stages - 1
                pending[stage, pack] = _Pending(arrived=arrived, left=share_of(made) if last else _handed(made))
                del arrived, made  # not to be alive with the next pack's
        self._sum_tied()
        mail.close()
        return [self.whole_terms(own) for own in terms]

    def _forward(
        self, stage: int, pack: int, inputs: tuple[PackedBatch, TowerRows], mail: _Mail, want: str = "loss"
    ) -> tuple[Tensor | None, Any]:
        arrived = None
        if stage > 0:
            arrived = mail.receive(Message(stage, pack, is_gradient=False), (stage - 1) % self.num_ranks)
            if torch.is_grad_enabled():
                arrived.requires_grad_(self.needs_gradient[stage])
        made = self.stages[stage](*inputs, arrived, want=want)
        if stage < self.num_stages - 1:
            mail.send(_handed(made).detach(), (stage + 1) % self.num_ranks)
        return arrived, made

    def _backward(self, stage: int, pack: int, pending: _Pending, mail: _Mail) -> None:
        if stage == self.num_stages - 1:
            if pending.left.requires_grad:
                pending.left.backward()
        elif self.needs_gradient[stage + 1]:
            gradient = mail.receive(Message(stage, pack, is_gradient=True), (stage + 1) % self.num_ranks)
            if pending.left.requires_grad:
                pending.left.backward(gradient)
        if stage > 0 and self.needs_gradient[stage]:
            assert pending.arrived is not None
            handed_back = pending.arrived.grad
            assert handed_back is not None, f"no gradient of the rows between stages {stage - 1} and {stage}"
            mail.send(handed_back, (stage - 1) % self.num_ranks)

    def _expect(self, orders: Sequence[Sequence[Action]]) -> dict[int, list[Message]]:
        """What comes here from each rank, in the order in which it is sent."""
        found: dict[int, list[Message]] = {}
        for source, order in enumerate(orders):
            for stage, pack, is_backward in order:
                target = stage - 1 if is_backward else stage + 1
                exists = 0 <= target < self.num_stages and (not is_backward or self.needs_gradient[stage])
                if exists and target % self.num_ranks == self.rank:
                    found.setdefault(source, []).append(Message(target, pack, is_gradient=is_backward))
        return found

    def _rows_like(self, batch: PackedBatch) -> Tensor:
        shape = (batch.input_ids.shape[0], self.plan.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=self.layout.device)

    def _sum_tied(self) -> None:
        """Add up the gradients of embedding and head, two copies of one parameter, on both."""
        if self.tied is None or self.tied.grad is None:
            return
        local = self.tied.grad.to_local() if isinstance(self.tied.grad, DTensor) else self.tied.grad
        other = self.num_ranks - 1 - self.rank
        theirs, own = torch.empty_like(local), local.clone()
        up, down = self.layout.upward, self.layout.downward
        # both meet upwards first: NCCL makes the communicator of a pair at its first message, and waits for the other
        if self.rank == 0:
            works = [dist.isend(own, group=up, group_dst=other), dist.irecv(theirs, group=down, group_src=other)]
        else:
            works = [dist.irecv(theirs, group=up, group_src=other), dist.isend(own, group=down, group_dst=other)]
        for work in works:
            if work is not None:
                work.wait()
        local += theirs

    def whole_terms(self, parts: Sequence[LossTerms]) -> LossTerms:
        """The terms of this rank's stages as those of a whole model: 0 for what other ranks have."""
        names = (TEXT, ROUTER) if self.router_rows else (TEXT,)
        zero = torch.zeros((), device=self.layout.device)
        sums = {
            name: sum((part.sums[name].detach() for part in parts if name in part.sums), start=zero) for name in names
        }
        if not self.router_rows:
            return LossTerms(sums=sums, expert_counts=torch.zeros(0, 0, dtype=torch.int64, device=zero.device))
        elsewhere = torch.zeros(self.plan.num_experts, dtype=torch.int64, device=zero.device)
        held = [name for stage in self.stages.values() for name in stage.layers]
        here = iter([counts for part in parts for counts in part.expert_counts.unbind()])
        rows = [next(here) if str(layer) in held else elsewhere for layer in self.router_rows]
        return LossTerms(sums=sums, expert_counts=torch.stack(rows))

    # ------------------------------------------------------------------------------------ without gradients

    def evaluate(self, batch: PackedBatch, media: TowerRows) -> LossTerms:
        """The terms of one pack, of the stages here. Collective."""
        return self.whole_terms(self._pass_through(batch, media, "loss"))

    def best_tokens(self, batch: PackedBatch, media: TowerRows) -> Tensor | None:
        """What the last stage finds likeliest; None on other ranks. Collective."""
        made = self._pass_through(batch, media, "best_tokens")
        return made[-1] if self.rank == self.num_ranks - 1 else None

    def _pass_through(self, batch: PackedBatch, media: TowerRows, want: str) -> list[Any]:
        arriving = [Message(stage, 0, is_gradient=False) for stage in self.stages if stage > 0]
        source = (self.rank - 1) % self.num_ranks
        mail = _Mail(self.layout, self._rows_like(batch), {source: arriving})
        made = [self._forward(stage, 0, (batch, media), mail, want)[1] for stage in self.stages]
        mail.close()
        return made

    def gather_from(self, parameters: Mapping[str, Tensor], gather: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """A `gather` that gives every rank the tensors of all stages; `gather` gives those that are here.

        Parameters of other stages are on meta. Collective, as what it returns is.
        """
        here = self.layout.exchange((self.rank, {name for name, value in parameters.items() if not value.is_meta}))
        holder: dict[str, int] = {}
        for rank, names in sorted(here, key=lambda item: -item[0]):
            holder |= dict.fromkeys(names, rank)
        everywhere = set.intersection(*(names for _, names in here))

        def gather_any(name: str) -> Tensor:
            value = parameters[name]
            full = torch.empty(value.shape, dtype=value.dtype) if value.is_meta else gather(name)
            if name not in everywhere:
                moved = full.to(self.layout.device)
                dist.broadcast(moved, group=self.layout.upward, group_src=holder[name])
                full = moved.cpu()
            return full

        return gather_any


def _handed(terms: LossTerms) -> Tensor:
    assert terms.hidden is not None, "a stage without a loss head hands on its rows"
    return terms.hidden


def _view(text: nn.Module, first: int, size: int, has_embed: bool, has_head: bool) -> Any:
    """A decoder of some of the parts of `text`, which both then hold."""
    children = {id(child): child for child in text.children() if not isinstance(child, nn.ModuleDict)}
    layers = cast(nn.ModuleDict, text.layers)
    stage: Any = copy.deepcopy(text, {**children, **{id(layer): layer for layer in layers.values()}})
    _keep(stage, range(first, first + size), has_embed=has_embed, has_head=has_head)
    return stage
