"""Every layout against FSDP on the same four ranks: tokens per second, peak memory, bytes moved, encoder balance.

    python benchmarks/layouts.py --output results.md            # gloo on this machine's CPU; NCCL where it has 4 GPUs
    python benchmarks/layouts.py --small --only fsdp4 context4  # a look

A step is one pack per model-parallel group, forward, backward, clipping and AdamW, in float32; a layout whose context
and tensor ranks are c works on packs c times as long, made of samples equally long, so that every layout does the same
work on the same number of tokens; but for rings, whose packs are one sample each, since others move nothing. Each
layout is a job of its own, so that its peak memory is its own.

Bytes are what the collectives of one step make a rank send, mean over ranks, counted from the payloads of every c10d
call that the step dispatches. They are compared with the volumes of `theory`.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import bubbles
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from layout_model import SAMPLE_TOKENS, Size, make_config, make_pack
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from omniloom.checkpoint.hf import local_region
from omniloom.config import ContextConfig, MemoryConfig, ParallelConfig
from omniloom.families.config_fields import FamilyConfig
from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.models.fusion import OmniModel
from omniloom.parallel.apply import apply_parallelism, materialize
from omniloom.parallel.collectives import group_of, return_rows, send_rows
from omniloom.parallel.degrees import Degrees, resolve_degrees
from omniloom.parallel.device import peak_memory_bytes, synchronize
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.gradients import clip_gradients
from omniloom.parallel.mesh import Layout, build_layout, close_distributed, init_distributed
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.ring import ring_attention, ring_attention_backward
from omniloom.parallel.segments import ATTENTION_SCALE
from omniloom.parallel.step import Objective, encode_share, run_packs

WORLD = 4
OPENED = {
    "ring_attention": ring_attention,
    "ring_attention_backward": ring_attention_backward,
    "all_to_all_rows": send_rows,
    "all_to_all_rows_back": return_rows,
}
MIB = 2**20
FLOAT_BYTES = 4

LAYOUTS: dict[str, dict] = {
    "fsdp4": {},
    "hsdp2x2": {"replicate": 2},
    "fsdp2_context2": {"context": 2},
    "context4": {"context": 4},
    "fsdp2_expert2": {"expert": 2},
    "expert4": {"expert": 4},
    "context2_expert2": {"context": 2, "expert": 2},
    "context4_expert4": {"context": 4, "expert": 4},
    "hsdp2_expert2": {"replicate": 2, "expert": 2},
    "hsdp2_context2": {"replicate": 2, "context": 2},
    "pipeline2_fsdp2": {"pipeline": 2},
    "pipeline4": {"pipeline": 4},
    "interleaved2_fsdp2": {"pipeline": 2, "pipeline_schedule": "interleaved"},
    "fsdp2_tensor2": {"tensor": 2},
    "tensor4": {"tensor": 4},
    "context2_tensor2": {"context": 2, "tensor": 2},
    "tensor2_expert4": {"tensor": 2, "expert": 4},
    "pipeline2_tensor2": {"pipeline": 2, "tensor": 2},
    "fsdp2_ring2": {"context": ContextConfig(ring=2)},  # packs of these are one sample each
    "ring4": {"context": ContextConfig(ring=4)},
    "ulysses2_ring2": {"context": ContextConfig(ulysses=2, ring=2)},
}
LARGE = Size(hidden=2048, heads=32, layers=48, experts=128, expert_hidden=768, vocab_size=151936)  # a published decoder
POOLS: dict[str, tuple[dict, bool]] = {  # layout, with a pool
    "fsdp4, no pool": ({}, False),
    "fsdp4, encoder_pool data": ({"encoder_pool": "data"}, True),
    "context4, encoder_pool group": ({"context": 4}, True),
}


# ---------------------------------------------------------------------------------------- bytes


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends, by axis, from the arguments of every c10d call. The calls go through unchanged.

    An all-gather of shards s over n ranks sends (n - 1) s, a reduce-scatter of f sends (n - 1) / n f, an all-reduce
    twice that: what a ring sends, and the least that bandwidth-optimal algorithms can. An all-to-all sends all rows
    but those that stay.
    """

    def __init__(self, axes: dict[str, str]) -> None:
        super().__init__()
        self.axes = axes  # group name -> axis, for groups of one purpose
        self.sent: dict[str, float] = defaultdict(float)
        self.num_calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in OPENED:  # an operation as a whole, whose messages are else not seen
            with self:
                return OPENED[name](*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._count(name, args)
        elif func.namespace == "_c10d_functional" and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            assert name == "all_reduce", f"no formula for the collective {name}; add one to SentBytes"
            tensor, group_name = args[0], args[-1]
            n = group_of(group_name).size()
            self._add(self.axes.get(group_name, "shard"), 2 * (n - 1) / n * tensor.numel() * tensor.element_size())
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in ("barrier", "recv_"):
            return
        if name in ("allreduce_", "send"):
            tensors, box = args[0], args[1]
        elif name == "allgather_":
            tensors, box = args[1], args[2]
        else:
            tensors, box = [args[1]], args[2]
        group = dist.ProcessGroup.unbox(box)
        n, payload = group.size(), sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        axis = self.axes.get(group.group_name, "all ranks")
        if name == "_allgather_base_":
            axis, sent = axis if "tensor" in axis else "shard", (n - 1) * payload
        elif name == "allgather_":
            axis, sent = "host plans", (n - 1) * payload
        elif name == "_reduce_scatter_base_":
            axis, sent = axis if "tensor" in axis else "shard", (n - 1) / n * payload
        elif name == "allreduce_":
            sent = 2 * (n - 1) / n * payload
        elif name == "send":
            sent = float(payload)
        elif name == "alltoall_base_":
            splits, rows = args[4], args[1].shape[0]
            stays = splits[group.rank()] / rows if splits and rows else 1 / n
            sent = payload * (1 - stays)
        else:
            raise AssertionError(f"no formula for the collective {name}; add one to SentBytes")
        self._add(axis, sent)

    def _add(self, axis: str, sent: float) -> None:
        self.sent[axis] += sent
        self.num_calls[axis] += 1


Sizes = tuple[float, float, float, float]


def theory(config: FamilyConfig, degrees: Degrees, sizes: Sizes, num_tokens: int) -> dict[str, float]:
    """Bytes that a rank has to send per step, float32, by axis, of one pack of text, or as many as there are stages.

    `sizes` are parameters of the towers, of the experts, of all else as FSDP divides it (of a divided matrix a tensor
    rank's part), and of the latter what tensor ranks hold alike, the mean over ranks; `num_tokens` are the rank's own
    of a pack. Under a pipeline the decoder's are gathered for every pack, and the rows between two stages
    and their gradient sent once for each.

    Sources: shard, 3 (n - 1) / n x parameters (two all-gathers, one reduce-scatter), ZeRO, arXiv 1910.02054 section 7;
    replicate, an all-reduce of the shard's gradients, arXiv 2304.11277; context, an all-to-all of q, k, v and the
    output per layer and direction, DeepSpeed Ulysses, arXiv 2309.14509, with key-value heads as often as they are
    repeated; expert, each row to each of its experts and back, per direction, where a share of (n - 1) / n leaves
    (which is the mean over ranks whatever the router prefers), GShard, arXiv 2006.16668; tensor, around attention and
    around the embedding and the loss a gathering and a scattering of rows in each direction, arXiv 2205.05198, with
    what the loss is told beside its rows and the gradients of what all ranks hold; ring, of one sample as long as the
    pack, keys and values in each direction and their gradients, of which a causal sample needs 3/4, arXiv 2311.09431.
    """
    towers, experts, dense, alike = sizes
    text, packs = config.text, degrees.pipeline
    inner = degrees.shard * degrees.context
    whole, n = inner * degrees.tensor, degrees.tensor

    def away(ranks: int) -> float:
        return (ranks - 1) / ranks

    kv_heads = math.lcm(text.num_key_value_heads // n, degrees.ulysses) * n
    heads = 2 * text.num_attention_heads + 2 * kv_heads
    layers, k = text.num_hidden_layers, text.num_experts_per_tok
    volumes = {
        "shard": 3
        * (
            away(whole * packs) * towers
            + packs * (away(inner) * dense + away(whole // degrees.expert) * experts / degrees.expert)
        ),
        "replicate": 2 * away(degrees.replicate) * ((towers + experts) / whole + dense / inner),
        "pipeline": 2 * (degrees.num_stages - 1) * num_tokens * text.hidden_size,  # of all packs, the mean over ranks
        # of all packs and the stages that are here, the mean over ranks
        "ulysses": 2 * layers * num_tokens * text.head_dim * heads * away(degrees.ulysses),
        "ring": 3 * layers * 0.75 * (degrees.ring - 1) * num_tokens * 2 * kv_heads * text.head_dim / n,
        "expert": 4 * layers * num_tokens * k * text.hidden_size * away(degrees.expert),
        "tensor": (n - 1) * num_tokens * (4 * layers + 4) * text.hidden_size
        # token numbers, labels (int64) and weights; normaliser and logit of the label, of all rows, and their gradient
        + (n - 1) * num_tokens * (2 + 2 + 1)
        + (n - 1) * n * num_tokens * 2
        + packs * 2 * away(n) * alike / inner,
    }
    if n == degrees.world:  # one group serves both
        volumes["shard and tensor"] = volumes.pop("shard") + volumes.pop("tensor")
    return {axis: FLOAT_BYTES * volume for axis, volume in volumes.items() if volume}


# ---------------------------------------------------------------------------------------- one rank


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank reports of a layout."""

    seconds: list[float]  # per timed step, wall clock
    peak_bytes: int  # beyond what the process held before it made the model
    sent: dict[str, float]
    num_calls: dict[str, int]
    sizes: Sizes  # parameters that are here, or shards of which are, as `theory` takes them


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What one rank reports of encoding a batch."""

    segment_cost: int
    num_clips: int  # decoded here
    seconds: float
    wall_seconds: float


def place(parallel: dict, layout_port: int, rank: int) -> Layout:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(layout_port),
    )
    ranks = init_distributed(timeout_seconds=300)
    return build_layout(resolve_degrees(ParallelConfig(**parallel), WORLD, packs_per_step=WORLD), ranks)


def make_model(config: FamilyConfig, layout: Layout, parallel: dict) -> OmniModel:
    with torch.device("meta"):
        model = SPEC.build(config)
    apply_parallelism(
        model,
        layout,
        SPEC.sharding(config),
        parallel=ParallelConfig(**parallel),
        memory=MemoryConfig(),
        compute_dtype=torch.float32,
    )
    materialize(model, layout.device)
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random shards; replicas get equal values, since name and place of a shard are the seed."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        local, region = parameter.to_local(), local_region(parameter)
        generator = torch.Generator(local.device).manual_seed(zlib.crc32(f"{name} {region}".encode()))
        if parameter.ndim == 1:
            local.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            # embeddings of size 1, so that tokens, not what attention adds to a whole sample, decide the routing
            spread = {2: math.prod(parameter.shape[1:]) ** -0.5, 3: 0.03}.get(parameter.ndim, 0.1)
            local.normal_(0.0, 1.0 if "embed" in name else spread, generator=generator)


def measure_layout(rank: int, port: int, size: Size, parallel: dict, num_steps: int, out: str) -> None:
    layout = place(parallel, port, rank)
    config = make_config(size)
    num_packs, num_tokens = layout.degrees.pipeline, size.tokens_per_rank * layout.degrees.sharers
    sample_tokens = SAMPLE_TOKENS if layout.degrees.ring == 1 else num_tokens
    packs = [
        make_pack(
            config, seed=num_packs * layout.data_rank + number, num_tokens=num_tokens, sample_tokens=sample_tokens
        )
        for number in range(num_packs)
    ]
    before = peak_memory_bytes(layout.device)
    model = make_model(config, layout, parallel)
    pool = EncoderPool(layout, SPEC.sharding(config), "group")
    packs, pipeline = pool.plan(packs), None
    if num_packs > 1:
        pipeline = Pipeline(model, layout, SPEC.sharding(config), ParallelConfig(**parallel), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    objective = Objective(
        coefficients={"text": 1.0},
        weight_sums={"text": float(WORLD * size.tokens_per_rank), "router": float(layout.data_world * num_packs)},
    )

    def step() -> None:
        optimizer.zero_grad()
        run_packs(model, packs, layout, objective, pool, pipeline)
        clip_gradients(optimizer, 1.0, layout.device)
        optimizer.step()

    with SentBytes(axes_of(layout)) as counter:
        step()
    seconds = []
    for _ in range(num_steps):
        layout.barrier()
        begin = time.perf_counter()
        step()
        synchronize(layout.device)
        layout.barrier()
        seconds.append(time.perf_counter() - begin)
    peak = peak_memory_bytes(layout.device) - before
    parameters = dict(model.named_parameters())
    counts = {name: p.numel() // num_parts(p) for name, p in parameters.items()}
    alike = sum(
        p.numel()
        for p in parameters.values()
        if "tensor" in (p.device_mesh.mesh_dim_names or ()) and p.requires_grad and num_parts(p) == 1
    )
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    towers = sum(count for name, count in counts.items() if not name.startswith("text."))
    measured = Measured(
        seconds=seconds,
        peak_bytes=peak,
        sent=dict(counter.sent),
        num_calls=dict(counter.num_calls),
        sizes=(towers, experts, sum(counts.values()) - experts - towers, alike),
    )
    report(layout, measured, out)


def num_parts(parameter: DTensor) -> int:
    """Of how many tensor ranks each holds a part."""
    mesh = parameter.device_mesh
    if "tensor" not in (mesh.mesh_dim_names or ()):
        return 1
    axis = mesh.mesh_dim_names.index("tensor")
    return mesh.size(axis) if parameter.placements[axis].is_shard() else 1


def axes_of(layout: Layout) -> dict[str, str]:
    axes = {}
    if layout.degrees.replicate > 1:
        axes[layout.fsdp.get_group("replicate").group_name] = "replicate"
        if layout.expert is not None:
            axes[layout.expert_fsdp.get_group("replicate").group_name] = "replicate"
    if layout.expert is not None:
        axes[layout.expert.get_group().group_name] = "expert"
    if layout.tensor is not None:
        is_all = layout.degrees.tensor == layout.world_size
        axes[layout.tensor.get_group().group_name] = "shard and tensor" if is_all else "tensor"
    if layout.ulysses_group is not None:
        axes[layout.ulysses_group.group_name] = "ulysses"
    if layout.ring_group is not None:
        axes[layout.ring_group.group_name] = "ring"
    for group in (layout.upward, layout.downward):
        if group is not None:
            axes[group.group_name] = "pipeline"
    return axes


def measure_encoding(rank: int, port: int, size: Size, parallel: dict, with_pool: bool, out: str) -> None:
    """The towers' forward pass of a step in which rank 0 has loaded all the video."""
    layout = place(parallel, port, rank)
    config = make_config(size)
    num_tokens = 2 * size.video_rows  # the same in all packs
    pack = make_pack(
        config, seed=layout.data_rank, num_tokens=num_tokens, videos=(size.video_grid,) * 2 if rank == 0 else ()
    )
    model = make_model(config, layout, parallel)
    scope = ParallelConfig(**parallel).encoder_pool
    pool = EncoderPool(layout, SPEC.sharding(config), scope) if with_pool else None
    if pool is not None:
        (pack,) = pool.plan([pack])
    with torch.no_grad():
        encode_share(model, [pack], layout, pool)
        layout.barrier()
        begin, own = time.perf_counter(), time.thread_time()
        share = encode_share(model, [pack], layout, pool)
        synchronize(layout.device)
        own_seconds, wall = time.thread_time() - own, time.perf_counter() - begin
    bounds = share.media.vision.segments.bounds
    lengths = np.diff(bounds)[:-1]  # without the null segment
    encoded = Encoded(
        segment_cost=int((lengths + lengths * lengths // ATTENTION_SCALE).sum()),
        num_clips=2 if rank == 0 else 0,
        # a rank's own work is its thread's, since ranks share cores and wait for each other; a GPU's is the wall's
        seconds=own_seconds if layout.device.type == "cpu" else wall,
        wall_seconds=wall,
    )
    report(layout, encoded, out)


def report(layout: Layout, found: Measured | Encoded, out: str) -> None:
    everyone = layout.exchange(asdict(found))
    if layout.is_first:
        torch.save(everyone, out)
    layout.barrier()
    close_distributed()


# ---------------------------------------------------------------------------------------- tables


def run(body, *arguments) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.pt"
        # forked, so that torch is imported once; this process itself must touch neither devices nor threads before
        multiprocessing.start_processes(body, (port, *arguments, str(out)), nprocs=WORLD, start_method="fork")
        return torch.load(out, weights_only=False)


def layout_tables(size: Size, names: list[str], num_steps: int) -> list[str]:
    config = make_config(size)
    speed = [
        "| layout | tokens/s, slowest step | fastest step | against fsdp4 | peak MiB, largest rank | against fsdp4 |",
        "|---|---|---|---|---|---|",
    ]
    moved = ["| layout | axis | calls | MiB sent per rank | theory | ratio |", "|---|---|---|---|---|---|"]
    base: tuple[float, float] | None = None
    for name in names:
        degrees = resolve_degrees(ParallelConfig(**LAYOUTS[name]), WORLD, packs_per_step=WORLD)
        found = run(measure_layout, size, LAYOUTS[name], num_steps)
        # a step lasts as long as its slowest rank
        seconds = sorted(max(times) for times in zip(*(rank["seconds"] for rank in found), strict=True))
        num_tokens = WORLD * size.tokens_per_rank
        rate = num_tokens / seconds[-1]
        peak = max(rank["peak_bytes"] for rank in found) / MIB
        base = (num_tokens / seconds[0], peak) if base is None and name == "fsdp4" else base
        best = num_tokens / seconds[0]
        against = (f"{best / base[0]:.2f}", f"{peak / base[1]:.2f}") if base else ("", "")
        speed.append(f"| {name} | {rate:.0f} | {best:.0f} | {against[0]} | {peak:.0f} | {against[1]} |")
        print(speed[-1], flush=True)
        sizes = tuple(sum(rank["sizes"][part] for rank in found) / WORLD for part in range(4))
        expected = theory(config, degrees, sizes, size.tokens_per_rank)
        for axis in sorted({axis for rank in found for axis in rank["sent"]} | set(expected)):
            sent = sum(rank["sent"].get(axis, 0.0) for rank in found) / WORLD
            if not sent and axis not in expected:
                continue
            calls = max(rank["num_calls"].get(axis, 0) for rank in found)
            of_theory = f"{expected[axis] / MIB:.3f} | {sent / expected[axis]:.4f}" if axis in expected else "- | -"
            moved.append(f"| {name} | {axis} | {calls} | {sent / MIB:.3f} | {of_theory} |")
            print(moved[-1], flush=True)
    with torch.device("meta"):
        counts = {name: p.numel() for name, p in SPEC.build(config).named_parameters()}
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    head = (
        f"Model: {sum(counts.values()) / 1e6:.1f}M parameters, {experts / 1e6:.1f}M of them experts; "
        f"{size.tokens_per_rank} tokens per rank and step, text only (towers run on their null segment)."
    )
    return [head, "", *speed, "", *moved]


def pool_table(size: Size) -> list[str]:
    lines = [
        "| case | clips decoded, by rank | segment cost, by rank | largest / mean | encoder s, by rank "
        "| largest / mean | wall s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (parallel, with_pool) in POOLS.items():
        found = run(measure_encoding, size, parallel, with_pool)
        costs, seconds = ([rank[key] for rank in found] for key in ("segment_cost", "seconds"))
        lines.append(
            f"| {name} | {listed([rank['num_clips'] for rank in found], '{}')} | {listed(costs, '{}')} "
            f"| {WORLD * max(costs) / sum(costs):.2f} | {listed(seconds, '{:.2f}')} "
            f"| {WORLD * max(seconds) / sum(seconds):.2f} | {max(rank['wall_seconds'] for rank in found):.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def listed(values: list, style: str) -> str:
    return ", ".join(style.format(value) for value in values)


def describe_machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    ranks = "gloo, one thread per rank" if device is None else f"{device.type}, one device per rank"
    return f"{os.cpu_count()}-core {platform.machine()} CPU, {memory:.0f} GiB; {ranks}; torch {torch.__version__}"


def describe_commit() -> str:
    here = Path(__file__).parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="markdown file to write")
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--small", action="store_true", help="a model of a few million parameters")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after the one whose bytes are counted")
    parser.add_argument("--tokens-per-rank", type=int, help="a multiple of 128")
    arguments = parser.parse_args()
    size = Size.small() if arguments.small else Size()
    if arguments.tokens_per_rank:
        size = Size(**{**asdict(size), "tokens_per_rank": arguments.tokens_per_rank})
    pools, layouts = pool_table(size), layout_tables(size, arguments.only, arguments.steps)
    lines = [
        "# Layouts against FSDP on the same four ranks",
        "",
        f"- {datetime.datetime.now(datetime.UTC).date()}, commit {describe_commit()}",
        f"- command: `python benchmarks/layouts.py {' '.join(sys.argv[1:])}`",
        f"- machine: {describe_machine()}; load average while measuring {os.getloadavg()[1]:.0f}",
        "",
        *layouts,
        "",
        f"Encoders: the towers' forward pass where rank 0 has loaded two videos of "
        f"{' x '.join(map(str, size.video_grid))} patches and the others none.",
        "",
        *pools,
        "",
        "Stages, counted: ranks waiting in a step, and the balance of 48 layers with a vocabulary of 152 thousand.",
        "",
        *bubbles.tables(SPEC.sharding(make_config(LARGE))),
    ]
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
