"""One rank of the job that runs many layouts and compares each with a single model without any parallelism.

Started by `test_layouts.py`; four ranks, gloo, CPU. Each reference of one step is computed by one rank, those of many
by rank 0, which writes the comparison.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_omni import Dims, family_config, make_config, make_model, make_pack, random_weights
from torch.distributed.tensor import DTensor

from omniloom.config import LoraConfig, MemoryConfig, ParallelConfig
from omniloom.families.config_fields import FamilyConfig
from omniloom.families.registry import spec_named
from omniloom.families.spec import ModelSpec
from omniloom.models.fusion import OmniModel
from omniloom.ops.linear_map import keyed_seed
from omniloom.parallel.apply import apply_parallelism, compile_blocks, materialize
from omniloom.parallel.degrees import Degrees, resolve_degrees
from omniloom.parallel.device import HostCopies
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.fsdp import match_modules
from omniloom.parallel.gradients import clip_gradients, gradient_norm
from omniloom.parallel.mesh import Layout, Ranks, build_layout, close_distributed, init_distributed
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.recompute import OffloadingCall
from omniloom.parallel.shares import local_shape
from omniloom.parallel.step import Objective, run_packs
from omniloom.sharding import ShardingPlan
from omniloom.training.lora import install_lora
from omniloom.types import PackedBatch

LOSS_BOUND = 1e-5  # DESIGN: rounding of float32 sums taken in another order
GRADIENT_BOUND = 1e-4
ROUTER_COEFFICIENT = 0.05
PACK_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, its packs, and what is frozen."""

    dims: Dims = field(default_factory=Dims)
    family: str = ""  # its tiny checkpoint's dims, in place of `dims`
    frozen: tuple[str, ...] = ()
    seed: int = 0
    shares_decoding: bool = False  # each rank of a group loads its own clips only
    holds_values: bool = False  # sharded from full values instead of from meta
    pack_tokens: int = PACK_TOKENS
    num_samples: int = 3  # of a pack
    num_packs: int = 4
    adapted: bool = False  # adapters on the decoder's layers
    dora: bool = False
    dropout: float = 0.3  # of the adapters; draws by row, so that layouts that divide a pack's rows need 0

    @property
    def spec(self) -> ModelSpec:
        return spec_named(self.family or "qwen3_omni")

    @property
    def config(self) -> FamilyConfig:
        return family_config(self.family) if self.family else make_config(self.dims)

    def build(self) -> OmniModel:
        """On the current default device, values undefined; adapted, frozen in part."""
        model = make_model(self.config, self.spec)
        if self.adapted:
            for adapter in install_lora(model, self.settings_of_adapters(model)):
                model.get_parameter(adapter.base).requires_grad_(False)
        freeze(model, self.frozen)
        return model

    def settings_of_adapters(self, model: OmniModel) -> dict[str, LoraConfig]:
        """On attention and experts of the decoder; DoRA knows no experts."""
        settings = LoraConfig(rank=2, alpha=4.0, dropout=self.dropout, dora=self.dora)
        names = [name for name, _ in model.named_parameters() if name.startswith("text.layers")]
        return dict.fromkeys((n for n in names if "_proj" in n or ("experts" in n and not self.dora)), settings)

    def weights(self) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            model = self.build()
        return random_weights(model, self.seed)

    def packs(self, share: tuple[int, int] = (0, 1)) -> list[PackedBatch]:
        """Full, without images, without any media, and empty: each data rank has to cope with what it gets."""
        kinds: list[dict] = [
            {"images": ((1, 4, 4), (2, 4, 6), (1, 2, 2)), "audio_frames": (20, 47, 3)},
            {"audio_frames": (7,)},
            {},
            {"empty": True},
        ]
        return [
            replace(
                make_pack(
                    self.config,
                    seed=100 * self.seed + i,
                    pack_tokens=self.pack_tokens,
                    num_samples=self.num_samples,
                    share=share,
                    **kind,
                ),
                draw_key=keyed_seed(self.seed, i),
            )
            for i, kind in enumerate((2 * kinds)[: self.num_packs])
        ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How far a layout is from the reference, relative."""

    loss_error: float
    router_error: float
    norm_error: float
    gradient_errors: dict[str, float]
    missing: tuple[str, ...]
    sensitivity: float = 0.0  # the reference's

    @property
    def worst(self) -> tuple[float, str]:
        return max((error, name) for name, error in self.gradient_errors.items())

    def check(self, record_property: Callable[[str, object], None]) -> None:
        """What a layout computes is what one rank does, but for rounding.

        Some models, those with a delta rule above all, make more of it than the bounds: theirs is a small multiple of
        what the last bit of the weights makes.
        """
        record_property("loss error", self.loss_error)
        record_property("gradient error", self.worst[0])
        record_property("sensitivity", self.sensitivity)
        assert self.sensitivity < 1e-2, "choose another seed: rounding hides what a layout may do wrong"
        assert not self.missing, f"no gradient at all for {self.missing[:3]}"
        assert self.loss_error < LOSS_BOUND
        assert self.router_error < LOSS_BOUND
        assert self.norm_error < max(LOSS_BOUND, self.sensitivity)
        assert self.worst[0] < max(GRADIENT_BOUND, 3 * self.sensitivity), (self.worst, self.sensitivity)


@dataclass(frozen=True, kw_only=True)
class Reference:
    loss: float
    router_loss: float
    norm: float
    gradients: dict[str, torch.Tensor]
    objective: Objective
    sensitivity: float = 0.0  # the most that a gradient changes where all weights do in their last bit

    def gradient_error(self, name: str, found: torch.Tensor) -> float:
        """How far a gradient is from ours, relative."""
        # a key bias shifts all scores of a query alike: its gradient is zero but for what rounding leaves of the terms
        # that cancel, so it is measured against those of the key weights
        like = name.replace("k_proj.bias", "k_proj.weight")
        scale = max(self.gradients[like].norm().item(), 1e-6 * self.norm)
        return ((found - self.gradients[name]).norm() / scale).item()


def freeze(model: torch.nn.Module, prefixes: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)


def make_reference(case: Case) -> OmniModel:
    """A plain model, nothing sharded."""
    model, weights = case.build(), case.weights()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    return model


def run_reference(case: Case) -> Reference:
    model = make_reference(case)
    reference = _run_plain(model, case)
    generator = torch.Generator().manual_seed(case.seed)
    for parameter in model.parameters():
        up = torch.randint(0, 2, parameter.shape, generator=generator)
        parameter.data *= 1 + torch.finfo(torch.float32).eps * (2 * up - 1)
        parameter.grad = None
    changed = _run_plain(model, case).gradients
    return replace(reference, sensitivity=max(reference.gradient_error(*each) for each in changed.items()))


def _run_plain(model: OmniModel, case: Case) -> Reference:
    packs = case.packs()
    weight_sum = sum(float(pack.loss_weights.double().sum()) for pack in packs)
    objective = Objective(
        coefficients={"text": 1.0, "router": ROUTER_COEFFICIENT},
        weight_sums={"text": weight_sum, "router": float(case.num_packs - case.num_packs // 4)},
    )
    loss = router_loss = 0.0
    for pack in packs:
        terms = model(replace(pack, loss_scales=objective.scales))
        objective.of_pack(terms).backward()
        loss += terms.sums["text"].item() / weight_sum
        router_loss += float(terms.sums.get("router", 0.0))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    return Reference(loss=loss, router_loss=router_loss, norm=norm, gradients=gradients, objective=objective)


def run_references(cases: Iterable[Case], ranks: Ranks, path: str) -> dict[Case, Reference]:
    """Of all cases on every rank, each computed by one; they meet in files beside `path`."""
    ordered = sorted(cases, key=repr)
    for number in range(ranks.rank, len(ordered), ranks.world_size):
        torch.save(run_reference(ordered[number]), f"{path}.{number}")
    dist.barrier()
    return {case: torch.load(f"{path}.{number}", weights_only=False) for number, case in enumerate(ordered)}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model in its layout, with the weights of the case."""

    model: OmniModel
    layout: Layout
    pool: EncoderPool
    pipeline: Pipeline | None
    packs: list[PackedBatch]  # this rank's

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What this rank holds, by the name that it has in a whole model."""
        return dict(own_parameters(self.model))

    @property
    def repeated(self) -> Collection[torch.nn.Parameter]:
        return () if self.pipeline is None else self.pipeline.counted_elsewhere

    def step(self, objective: Objective) -> list[float]:
        """Gradients of one step; returns loss and router loss summed over all ranks."""
        sums = run_packs(self.model, self.packs, self.layout, objective, self.pool, self.pipeline).sums
        totals = torch.stack([sums["text"] / objective.weight_sums["text"], sums["router"]])
        return self.layout.sum_over_ranks(totals).tolist()


def own_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """A last stage's head that is the embedding has the embedding's name."""
    names = dict(model.named_parameters())
    tied = model.text.embed is None and getattr(model, "is_tied", False)
    for name, parameter in names.items():
        yield "text.embed.weight" if tied and name == "text.loss_head.head.weight" else name, parameter


class Layouts:
    """Makes each layout once: process groups have threads of their own, and dozens of layouts would have hundreds.

    Leaving and joining again in one process is no way out: DTensor caches what it learnt of a mesh, group names
    included, and equal meshes of two jobs are one to it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._layouts: dict[Degrees, Layout] = {}

    def get(self, parallel: ParallelConfig, plan: ShardingPlan) -> tuple[Layout, EncoderPool]:
        degrees = resolve_degrees(parallel, self.ranks.world_size, packs_per_step=8)
        if degrees not in self._layouts:
            self._layouts[degrees] = build_layout(degrees, self.ranks)
        layout = self._layouts[degrees]
        for mesh in (layout.fsdp, layout.tower_fsdp, layout.expert_fsdp):
            for group in mesh.get_all_groups():
                options = group._get_backend(torch.device("cpu")).options
                assert options._timeout == self.ranks.timeout, "collectives of FSDP would give up before the job does"
        return layout, EncoderPool(layout, plan, parallel.encoder_pool)


def set_up(case: Case, parallel: ParallelConfig, memory: MemoryConfig, layouts: Layouts) -> Setup:
    plan, weights = case.spec.sharding(case.config), case.weights()
    layout, pool = layouts.get(parallel, plan)
    if case.holds_values:
        model = make_reference(case)
    else:
        with torch.device("meta"):
            model = case.build()
    settings = {"parallel": parallel, "memory": replace(memory, compile=False), "compute_dtype": torch.float32}
    apply_parallelism(model, layout, plan, **settings)
    if memory.compile is True:  # graphs as for a compiler, which would take minutes to build them; of the decoder alone
        compile_blocks(model, plan.blocks[-1:], "aot_eager")
    if memory.offload_activations:  # what a run on the CPU leaves out
        for name in match_modules(model, plan.layer_calls):
            call = OffloadingCall(model.get_submodule(name), HostCopies(layout.device), least_bytes=0)
            model.set_submodule(name, call)
    model.is_tied = case.config.text.tie_word_embeddings
    for name, parameter in model.named_parameters():
        name = "text.embed.weight" if model.is_tied and name == "text.loss_head.head.weight" else name
        local, whole = getattr(parameter, "to_local", lambda own=parameter: own)(), tuple(parameter.shape)
        assert tuple(local.shape) == local_shape(name, whole, plan, layout.degrees, layout.rank), name
    if not case.holds_values:
        materialize(model, layout.device)
        load(model, weights)
    share = (layout.group_rank, layout.group_size) if case.shares_decoding else (0, 1)
    pipeline = None
    if layout.degrees.pipeline > 1:
        pipeline = Pipeline(model, layout, plan, parallel, torch.float32)
    return Setup(
        model=model,
        layout=layout,
        pool=pool,
        pipeline=pipeline,
        packs=pool.plan(case.packs(share)[layout.data_rank :: layout.data_world]),
    )


def run_layout(
    case: Case, parallel: ParallelConfig, memory: MemoryConfig, layouts: Layouts, reference: Reference
) -> Outcome:
    setup = set_up(case, parallel, memory, layouts)
    loss, router_loss = setup.step(reference.objective)
    norm = gradient_norm(setup.model.parameters(), setup.layout.device, setup.repeated).item()
    parameters, errors, missing = setup.parameters, {}, []
    for name in reference.gradients:
        if name not in parameters:  # another stage's
            continue
        gradient = parameters[name].grad
        if gradient is None:
            missing.append(name)
            continue
        errors[name] = reference.gradient_error(name, gradient.full_tensor())
    known = setup.layout.exchange((errors, missing))
    missing = [name for _, lacking in known for name in lacking]
    errors = {name: max(own.get(name, 0.0) for own, _ in known) for name in reference.gradients}
    assert set().union(*(own for own, _ in known)) | set(missing) == set(reference.gradients)
    return Outcome(
        loss_error=abs(loss - reference.loss) / abs(reference.loss),
        router_error=abs(router_loss - reference.router_loss) / (abs(reference.router_loss) or 1.0),
        norm_error=abs(norm - reference.norm) / reference.norm,
        gradient_errors=errors,
        missing=tuple(missing),
        sensitivity=reference.sensitivity,
    )


def train(setup: Setup, objective: Objective, num_steps: int) -> list[float]:
    """Losses of so many steps on the same packs."""
    optimizer = torch.optim.AdamW(setup.model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        losses.append(setup.step(objective)[0])
        clip_gradients(optimizer, 1.0, setup.layout.device, setup.repeated)
        optimizer.step()
    return losses


def train_reference(case: Case, objective: Objective, num_steps: int) -> list[float]:
    model, packs = make_reference(case), case.packs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        terms = [model(replace(pack, loss_scales=objective.scales)) for pack in packs]
        sum(objective.of_pack(term) for term in terms).backward()
        losses.append(sum(term.sums["text"].item() for term in terms) / objective.weight_sums["text"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


def load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give every shard its part of the full values, without communication."""
    for name, parameter in own_parameters(model):
        if not isinstance(parameter, DTensor):  # a lone rank
            parameter.data.copy_(weights[name])
            continue
        local = parameter.to_local()
        offsets, sizes = _box(parameter)
        part = weights[name][tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        with torch.no_grad():
            local.copy_(part)


def _box(parameter: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offsets, sizes


NUM_STEPS = 20
TRAINED = ("context2_expert2", "pool_of_all_hsdp_context2", "context2_tensor2")


def run_job(
    rank: int, world_size: int, port: int, cases: dict[str, tuple], result: str, trained: tuple[str, ...] = TRAINED
) -> None:
    """Body of one process. `cases`: name -> (Case, ParallelConfig, MemoryConfig); those `trained` take steps, too."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    layouts = Layouts(init_distributed(timeout_seconds=300))
    outcomes: dict[str, Outcome] = {}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    references = run_references({case for case, _, _ in cases.values()}, layouts.ranks, result)
    for name, (case, parallel, memory) in cases.items():
        outcomes[name] = run_layout(case, parallel, memory, layouts, references[case])
    expected: dict[Case, list[float]] = {}
    for name in filter(cases.__contains__, trained):
        case, parallel, memory = cases[name]
        objective = references[case].objective
        found = train(set_up(case, parallel, memory, layouts), objective, NUM_STEPS)
        if rank == 0:
            if case not in expected:
                expected[case] = train_reference(case, objective, NUM_STEPS)
            curves[name] = found, expected[case]
    if rank == 0:
        torch.save((outcomes, curves), Path(result))
    close_distributed()


def _end_with_parent() -> None:
    """A killed test leaves no ranks behind that wait for each other and load the machine."""
    multiprocessing.parent_process().join()
    os._exit(1)
