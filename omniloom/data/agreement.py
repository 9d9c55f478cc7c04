"""What ranks tell each other about data: failures, stops, and the weight sums that were really loaded.

Owns the meaning of those messages; the all-gather itself (`exchange`) is handed in, one per thread that uses it, so
that the order of calls is the same on all ranks. Knows no process group.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omniloom.data.collate import blank_samples, sample_weight_sums
from omniloom.data.rows import count_samples
from omniloom.types import ROUTER, TEXT, BadSample, Extent, LoadedPack, PackPlan, PackStats, RunError, StepPlan

Exchange = Callable[[Any], list[Any]]  # all-gather of one picklable object per rank, in rank order

STOPPED = "stopped"  # the failure of a rank that only wants to end


class RanksStopped(RunError):
    """A rank could not go on, or wanted to end, and told the others. `wanted` where nothing was wrong."""

    def __init__(self, message: str, *, wanted: bool) -> None:
        super().__init__(message)
        self.wanted = wanted


def gather(exchange: Exchange, value: Any, *, failure: str | None = None) -> list[Any]:
    """All ranks' values, in rank order, or the same exception on all ranks if one of them failed.

    Raises: RanksStopped.
    """
    gathered = exchange((failure, value))
    failures = [(rank, text) for rank, (text, _) in enumerate(gathered) if text is not None]
    for rank, text in failures:
        if text != STOPPED:
            raise RanksStopped(f"rank {rank}: {text}" if len(gathered) > 1 else text, wanted=False)
    if failures:
        raise RanksStopped(f"rank {failures[0][0]} ended the run", wanted=True)
    return [value for _, value in gathered]


@dataclass(frozen=True, kw_only=True)
class PlanningRanks:
    """The ranks that plan together, seen from one of them: each measures its share, all compare their plans."""

    exchange: Exchange = lambda value: [value]
    rank: int = 0
    world_size: int = 1
    node: str = field(default_factory=platform.node)

    def measure(
        self, rows: list[int], measure: Callable[[list[int]], list[Extent | BadSample]]
    ) -> list[Extent | BadSample]:
        """What `measure` says of all rows, in their order. Raises: what it raises here, RanksStopped on other ranks."""
        gathered = self.share(lambda: measure(rows[self.rank :: self.world_size]), "measure its share of a window")
        measured: list[Any] = [None] * len(rows)
        for rank, part in enumerate(gathered):
            measured[rank :: self.world_size] = part
        if self.world_size > 1:
            self._refuse_unlike_nodes([row for row in measured if isinstance(row, BadSample) and row.missing])
        return measured

    def share(self, work: Callable[[], Any], what: str) -> list[Any]:
        """What `work` gives on each rank, in rank order. Raises: what it raises here, RanksStopped on other ranks."""
        own, fault = None, None
        try:
            own = work()
        except (ValueError, OSError, RuntimeError) as error:
            fault = error
        failure = None if fault is None else f"could not {what}: {fault}"
        try:
            return gather(self.exchange, own, failure=failure)
        except RanksStopped as stopped:
            raise fault or stopped from None

    def _refuse_unlike_nodes(self, bad: Sequence[BadSample]) -> None:
        """Raises: ValueError on all ranks for a file that some nodes have and others lack: no fault of its row."""
        if not bad:
            return
        found = gather(self.exchange, (self.node, [os.path.exists(row.missing) for row in bad]))
        for number, row in enumerate(bad):
            have = {node for node, there in found if there[number]}
            lack = sorted({node for node, _ in found} - have)
            if have and lack:
                raise ValueError(
                    f"{row.missing} is missing on {', '.join(lack)} and is there on {', '.join(sorted(have))} "
                    f"({row.file}:{row.line}: {row.field}); copy the data to every node"
                )

    def compare(self, plan: Callable[[], Any]) -> None:
        """Raises: ValueError unless every rank made the same plan; `plan()` gives it as JSON."""
        if self.world_size == 1:
            return
        digests = gather(self.exchange, hashlib.sha256(json.dumps(plan(), sort_keys=True).encode()).hexdigest())
        if len(set(digests)) > 1:
            groups = {text: [rank for rank, other in enumerate(digests) if other == text] for text in set(digests)}
            raise ValueError(
                "ranks planned different packs from the same rows: "
                + "; ".join(f"ranks {ranks} have {text[:12]}" for text, ranks in sorted(groups.items()))
                + ". Check that all machines have the same config and the same version of every package"
            )

    def say_stopped(self) -> None:
        """Answer a rank that waits in its next exchange: there is none."""
        try:
            gather(self.exchange, None, failure=STOPPED)
        except RuntimeError:  # RanksStopped from all who stopped, or a rank that is gone: this is the end either way
            return


@dataclass(frozen=True, kw_only=True)
class StepAgreement:
    """What one step really holds, the same on every rank."""

    # by loss, the denominator of its mean over the step; ROUTER's are packs with a sample that could be loaded
    weight_sums: Mapping[str, float]
    bad: tuple[BadSample, ...]  # samples of this step that could not
    stats: PackStats  # sums over the step's packs


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What one rank found in one pack."""

    index: int
    weight_sums: Mapping[str, tuple[float, ...]]  # per loss, per sample
    bad: tuple[tuple[int, BadSample], ...]  # by the sample's position in the pack
    media: Any = None  # what ranks that share the towers' work must know of it


def settle(
    step: StepPlan,
    packs: Sequence[LoadedPack],
    gathered: Sequence[Sequence[PackReport]],
    *,
    pack_means: bool = False,
) -> tuple[StepAgreement, tuple[LoadedPack, ...]]:
    """What all ranks reported of a step, and this rank's packs with every sample blanked that any could not load.

    `gathered` are the reports of each rank's packs. Where several ranks load the same pack (context and tensor groups,
    each decoding its share of the clips) a sample that failed on one of them becomes padding on all, and the pack
    counts once. With `pack_means` (train.loss=batch) the others of its pack are weighted up, so that the pack stays a
    mean over its labels. The same numbers on every rank.
    """
    failed: dict[int, dict[int, BadSample]] = {}
    sums: dict[int, Mapping[str, tuple[float, ...]]] = {}
    for report in (report for reports in gathered for report in reports):
        failed.setdefault(report.index, {}).update(report.bad)
        known = sums.setdefault(report.index, report.weight_sums)
        # a failure reports 0, the others what it is
        sums[report.index] = {name: tuple(map(max, known[name], own)) for name, own in report.weight_sums.items()}
    loaded = [pack for pack in step.packs if pack.index in sums]  # empty ones need not be
    missing = [pack.index for pack in step.packs if pack.samples and pack.index not in sums]
    assert not missing, f"no rank loaded packs {missing} of step {step.step}"
    good = {
        pack.index: [position for position in range(len(pack.samples)) if position not in failed[pack.index]]
        for pack in loaded
    }
    scales = {pack.index: _rescale(pack, good[pack.index]) if pack_means else 1.0 for pack in loaded}
    samples = [pack.samples[position] for pack in loaded for position in good[pack.index]]
    weight_sums = {TEXT: 0.0, ROUTER: float(sum(bool(positions) for positions in good.values()))}
    for index, positions in good.items():
        for name, own in sums[index].items():
            scale = scales[index] if name == TEXT else 1.0
            weight_sums[name] = sum((scale * own[position] for position in positions), weight_sums.get(name, 0.0))
    agreement = StepAgreement(
        weight_sums=weight_sums,
        bad=tuple(failed[pack.index][position] for pack in loaded for position in sorted(failed[pack.index])),
        stats=count_samples(samples),
    )
    return agreement, tuple(_blank(pack, failed[pack.index], scales.get(pack.index, 1.0)) for pack in packs)


def report_pack(pack: LoadedPack, media: Any = None) -> PackReport:
    starts = pack.batch.sample_bounds[:-1]
    positions = [position for position, start in enumerate(starts) if bool(pack.batch.is_padding[start])]
    return PackReport(
        index=pack.index,
        weight_sums=sample_weight_sums(pack.batch),
        bad=tuple(zip(positions, pack.bad, strict=True)),  # both in the order of the pack
        media=media,
    )


def _rescale(pack: PackPlan, good: list[int]) -> float:
    """What the planned 1 / (labels of the pack) must be multiplied by where samples failed after planning."""
    planned = sum(sample.extent.num_loss_tokens for sample in pack.samples)
    left = sum(pack.samples[position].extent.num_loss_tokens for position in good)
    return planned / left if left else 1.0


def _blank(pack: LoadedPack, failed: dict[int, BadSample], scale: float) -> LoadedPack:
    if len(failed) == len(pack.bad) and scale == 1.0:
        return pack
    batch = blank_samples(pack.batch, sorted(failed))
    if scale != 1.0:
        batch = replace(batch, loss_weights=(batch.loss_weights.double() * scale).float())
    bad = tuple(failed[position] for position in sorted(failed))
    return replace(pack, batch=batch, bad=bad)
