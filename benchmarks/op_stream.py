"""What a step costs an accelerator, counted without one: kernels, bytes and FLOPs of its operations, by phase and kind.

    python benchmarks/op_stream.py                       # all rows, whole models; under ten minutes
    python benchmarks/op_stream.py --small --json FILE   # two layers of each part; what the test compares
    python benchmarks/op_stream.py --only "4B" --operations 12

The real step of one of eight ranks runs on a device that computes nothing (tests/device), and each operation that
reaches the device is given the time that a roofline allows it: the larger of its bytes over the memory's speed and its
FLOPs over a share of the peak. Weights are gathered and gradients reduced beside the rest, so a phase takes as long as
the longer of the two; rows that go to experts and back are waited for. What the roofline assumes of an H200 stands in
`Roofline`. MFU is that of the log: the model's FLOPs, recompute not counted, over time and peak. The figures repeat to
the digit and show what a change is worth; they are no measurement.

Each step is made twice: eagerly, and with compiled blocks (`memory.compile: true`), whose kernels are those that
Inductor's lowering and its scheduling for Triton make of each graph (tests/device/compiled.py). What is fused costs
the bytes that Inductor says. It supposes the best: a kernel moves a buffer once, even if it gathers each row eight
times. All other kernels, in blocks and outside of them, cost what they cost eagerly.

Kept bytes are those of the tensors that autograd saves per decoder layer in a 16K pack, weights left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the fake device lies among the tests

from omniloom.families.cost import audio_flops, decoder_flops, vision_flops
from omniloom.ops.delta_rule import GROUP, rule_by_chunks, rule_by_chunks_backward
from omniloom.ops.torch_operators import count_graphs
from omniloom.parallel.staging import to_device
from omniloom.run.opening import Workshop
from omniloom.training.flops import TrainingWork
from omniloom.types import Extent, PackedBatch, Segments
from tests.device.cases import FROZEN_TOWERS, LORA
from tests.device.compiled import Launch, install_inductor, launching
from tests.device.fake_device import Record, install
from tests.device.steps import Case, Content, make_pack, open_case, run_case

PACK_TOKENS, RANKS = 16384, 8
# half of the tokens are of pictures, half have a loss
CONTENT = Content(num_samples=4, grid=(1, 64, 64), pictures=2, mel_frames=0, answer=0.5)
KEPT = {"Qwen3-VL-4B": "dense 4B", "Qwen3-Omni-30B-A3B": "30B MoE"}


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    model: str
    layers: Mapping[str, int | None] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    parallel: Mapping[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    compiles_small: bool = True  # False where other rows have blocks of its kinds


ROWS = (
    Row(name="Qwen3-VL-4B full, no recompute", model="Qwen3-VL-4B"),
    Row(
        name="Qwen3-Omni-30B-A3B LoRA, full recompute",
        model="Qwen3-Omni-30B-A3B",
        policy=LORA,
        recompute="full",
        compiles_small=False,
    ),
    Row(name="Qwen3-Omni-30B-A3B LoRA, no recompute", model="Qwen3-Omni-30B-A3B", policy=LORA, compiles_small=False),
    Row(
        name="Qwen3-Omni-30B-A3B LoRA, full recompute, experts divided by 8",
        model="Qwen3-Omni-30B-A3B",
        policy=LORA,
        parallel={"expert": 8},
        recompute="full",
    ),
    Row(
        name="Qwen3-Omni-30B-A3B, 12 layers full, towers frozen",
        model="Qwen3-Omni-30B-A3B",
        layers={"text": 12},
        policy=FROZEN_TOWERS,
    ),
    Row(name="Qwen2.5-Omni-7B full, no recompute", model="Qwen2.5-Omni-7B", compiles_small=False),
    Row(name="Qwen3.5-4B full, no recompute", model="Qwen3.5-4B"),
    Row(
        name="Qwen3.5-35B-A3B, 12 layers full, tower frozen",
        model="Qwen3.5-35B-A3B",
        layers={"text": 12},
        policy={"vision": {"freeze": True}},
        compiles_small=False,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """One H200 as it is assumed to be: the published dense peak in bfloat16, and what share of it kernels reach."""

    peak: float = 989e12  # FLOP/s
    bandwidth: float = 3.6e12  # bytes/s, three quarters of what is published
    link: float = 3.6e11  # bytes/s out of one of eight devices, four fifths of NVLink's
    shares: Mapping[str, float] = field(
        default_factory=lambda: {
            "product": 0.70,
            "product in float32": 0.70 * 67 / 989,  # without tensor cores, as PyTorch has it by default
            "grouped": 0.50,
            "attention": 0.36,
            "attention backward": 0.30,
        }
    )
    least_seconds: float = 2.2e-6  # of any kernel
    sort_passes: int = 8
    # flash attention starts a block for every 128 rows of the longest segment, head and segment, empty ones too
    attention_rows: int = 128
    idle_block_seconds: float = 0.5e-6 / (2 * 132)  # two at a time on each of 132 multiprocessors


@dataclass(kw_only=True)
class Cost:
    kernels: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, other: Cost) -> None:
        self.kernels += other.kernels
        self.bytes += other.bytes
        self.flops += other.flops
        self.seconds += other.seconds


# ---------------------------------------------------------------------------------------- one operation

GEMMS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "matmul": (0, 1)}
OPENED: Mapping[str, Callable[..., Any]] = {
    "linear_attention": rule_by_chunks,
    "linear_attention_backward": rule_by_chunks_backward,
}
GATHERS = {"index", "index_select", "embedding", "gather"}  # of a table no more is read than is taken
SCATTERS = {"index_put_", "index_add", "index_copy", "index_add_", "index_copy_", "scatter_", "scatter_add_"}
FUSED = "fused"  # the kind of what a compiler made one kernel of
WRITES_ONLY = {"copy_", "fill_", "zero_"}
FREE = ("empty", "new_empty", "detach", "device", "is_pinned", "_unsafe_view", "set_", "resize_", "lift_fresh")
COLLECTIVES = ("allgather", "reduce_scatter", "alltoall", "all_to_all", "allreduce", "broadcast")


class Meter:
    """Adds up what the operations of a step cost, by phase, kind and name."""

    def __init__(self, roofline: Roofline, segments: Mapping[tuple[int, int], list[int]]) -> None:
        self.roofline, self.segments = roofline, segments
        self.costs: dict[tuple[str, str, str], Cost] = defaultdict(Cost)
        self._first_backward: int | None = None
        self._opened: dict[tuple[Any, ...], list[tuple[str, str, Cost]]] = {}
        self._compiled = False  # whether a compiled graph is at work, whose kernels were counted as it began

    def __call__(self, record: Record, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if record.phase == "opening" or (self._compiled and _name(func) not in OPENED):
            return
        phase = self._phase(record.phase)
        for part, kind, cost in self._parts(func, args, kwargs, out):
            self.costs[phase, kind, part].add(cost)

    def backend(self, record: Record) -> Callable[..., Any]:
        """Compiles blocks so that the kernels of their graphs are added."""
        return partial(launching, rows=record.rows, on_launches=partial(self._launched, record))

    @contextlib.contextmanager
    def _launched(self, record: Record, launches: Sequence[Launch]) -> Iterator[None]:
        """The call of a compiled graph: what is fused costs the bytes that Inductor says, the rest what it costs."""
        phase = self._phase(record.phase)
        for launch in launches:
            if launch.operation is None:
                seconds = max(launch.bytes / self.roofline.bandwidth, self.roofline.least_seconds)
                parts = [(launch.names, FUSED, Cost(kernels=1, bytes=launch.bytes, seconds=seconds))]
            else:  # those that are made of many are counted as they are called
                parts = [] if launch.names in OPENED else self._parts(*launch.operation)
            for part, kind, cost in parts:
                self.costs[phase, kind, part].add(cost)
        self._compiled = True
        try:
            yield
        finally:
            self._compiled = False

    def _parts(self, func: Any, args: tuple, kwargs: dict, out: Any) -> list[tuple[str, str, Cost]]:
        """Name, kind and cost of an operation, of those that one of ours is made of, or none if it is free."""
        name = _name(func)
        if func.is_view or name.startswith(FREE):
            return []
        if name not in OPENED:
            return [(name, *self._cost(func, name, args, kwargs, out))]
        key = (name, *(each.shape for each in args))
        if key not in self._opened:
            groups = args[0].shape[0] // GROUP  # each is made of the same
            with _Inside(self) as inside:
                OPENED[name](*(each[: max(1, len(each) // groups)] for each in args))
            self._opened[key] = groups * inside.parts
        return self._opened[key]

    def _phase(self, phase: str) -> str:
        if phase != "backward":
            self._first_backward = None
            return phase
        task = torch._C._current_graph_task_id()
        if task == -1:  # what starts it
            return "decoder backward"
        if self._first_backward is None:
            self._first_backward = task
        return "decoder backward" if task == self._first_backward else "towers backward"

    def _cost(self, func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> tuple[str, Cost]:
        roofline, moved = self.roofline, sum(_traffic(func, name, args, kwargs, out))
        if any(part in name for part in COLLECTIVES):
            sent = moved / 2 * (RANKS - 1) / RANKS
            kind = "exchanges" if "all_to_all" in name else "collectives"
            return kind, Cost(kernels=1, bytes=sent, seconds=sent / roofline.link)
        kind, flops, idle = "element by element", 0.0, 0.0
        if name in GEMMS:
            left, right = (args[place] for place in GEMMS[name])
            kind = "product in float32" if left.dtype == torch.float32 else "product"
            flops = 2.0 * left.numel() * right.shape[-1]
        elif name == "convolution":
            kind, flops = "product", 2.0 * out.numel() * args[1][0].numel()
        elif name == "convolution_backward":
            kind, flops = "product", 4.0 * args[0].numel() * args[2][0].numel()
        elif name in ("_grouped_mm", "grouped_mm"):
            left, right = args[:2]
            kind, flops = "grouped", 2.0 * left.shape[0] * left.shape[1] * right.shape[-1]
        elif "flash_attention" in name:
            kind, flops, idle = self._attention(name, args)
        seconds = max(moved / roofline.bandwidth, roofline.least_seconds)
        if flops:
            seconds = max(seconds, flops / roofline.peak / roofline.shares[kind]) + idle
        if name == "sort":
            seconds *= roofline.sort_passes
        return kind, Cost(kernels=1, bytes=moved, flops=flops, seconds=seconds)

    def _attention(self, name: str, args: tuple) -> tuple[str, float, float]:
        """Kind, FLOPs over the pairs that see each other, and what empty blocks cost."""
        backward = "backward" in name
        tensors = [each for each in args if isinstance(each, Tensor)]
        q, bounds = tensors[int(backward)], next(each for each in tensors if each.dtype == torch.int32)
        lengths = self.segments[q.shape[0], bounds.shape[0]]
        causal = any(each is True for each in args)
        flops = 4.0 * q.shape[1] * q.shape[2] * sum(length**2 for length in lengths) * (0.5 if causal else 1.0)
        rows = self.roofline.attention_rows
        used = sum(-(-length // rows) for length in lengths)
        idle = (bounds.shape[0] - 1) * -(-max(lengths) // rows) - used
        idle_seconds = idle * q.shape[1] * self.roofline.idle_block_seconds
        return ("attention backward", 2.5 * flops, idle_seconds) if backward else ("attention", flops, idle_seconds)


class _Inside(TorchDispatchMode):
    """Has the operations counted that an operation of ours is made of."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.parts: list[tuple[str, str, Cost]] = []

    def __torch_dispatch__(self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        out, name = func(*args, **(kwargs or {})), _name(func)
        if not func.is_view and not name.startswith(FREE):
            self.parts.append((name, *self.meter._cost(func, name, args, kwargs or {}, out)))
        return out


def _name(func: Any) -> str:
    return str(func._schema.name.split("::")[1])


def _traffic(func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> Iterator[float]:
    """Bytes read and written: whatever goes in, is changed in place or comes out. What is only written is not read."""
    results = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
    changed: list[Tensor] = []
    given: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name) if argument.kwarg_only or place >= len(args) else args[place]
        tensors = [each for each in tree_leaves(value) if isinstance(each, Tensor)]
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += tensors
            if argument.is_out or name in WRITES_ONLY:
                continue
        given += tensors
    written = changed or results
    if name == "all_gather_copy_in":  # its results are the whole buffer, of which it fills this rank's part
        written = given = tree_leaves(args[0])
    if name in GATHERS:
        yield 2.0 * sum(map(_bytes, written)) + sum(_bytes(each) for each in given[1:])
        return
    if name in SCATTERS:
        rows = sum(_bytes(each) for each in given[1:])
        yield 2.0 * rows + (0.0 if changed else 2.0 * sum(map(_bytes, written)))
        return
    if name == "_embedding_bag":
        yield _bytes(results[0]) * (1 + prod(args[1].shape) / results[0].shape[0])
        return
    if name.startswith(("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")):
        given = []
    yield float(sum(map(_bytes, given)) + sum(map(_bytes, written)))


def _bytes(tensor: Tensor) -> int:
    """Of memory that is touched: repeats by a stride of zero are not."""
    return (
        prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.element_size()
    )


# ---------------------------------------------------------------------------------------- one row


def measure(row: Row, device: torch.device, *, small: bool) -> dict[str, Any]:
    """One row of the table: what its step costs, and under `compiled` what it costs with compiled blocks."""
    compiles = row.compiles_small or not small
    return {
        "name": row.name,
        **_measure(row, device, small=small, compiled=False),
        "compiled": _measure(row, device, small=small, compiled=True) if compiles else None,
    }


def _measure(row: Row, device: torch.device, *, small: bool, compiled: bool) -> dict[str, Any]:
    few = {"text": 2, "vision": 2, "audio": 2}
    layers = few if small else {"text": None, "vision": None, "audio": None, **row.layers}
    if small and row.model.startswith("Qwen2.5"):
        layers = {**few, "vision": 8}  # one of them sees whole frames
    case = Case(
        model=row.model,
        layers=layers,
        world_size=RANKS,
        policy=row.policy,
        parallel=row.parallel,
        memory={"recompute": row.recompute},
        pack_tokens=PACK_TOKENS,
    )
    graphs = count_graphs()
    with tempfile.TemporaryDirectory() as directory:
        workshop = open_case(case, Path(directory))
        meter = Meter(Roofline(), _segments(make_pack(workshop.family, PACK_TOKENS, CONTENT)))
        run_case(case, workshop, device, CONTENT, meter, meter.backend if compiled else None)
    torch.compiler.reset()  # a run compiles the blocks of one model
    return {**_sum_up(meter, row, workshop), "graphs": count_graphs() - graphs}


def _sum_up(meter: Meter, row: Row, workshop: Workshop) -> dict[str, Any]:
    phases: dict[str, dict[str, Cost]] = {}
    operations: dict[str, Cost] = defaultdict(Cost)
    for (phase, kind, name), cost in meter.costs.items():
        phases.setdefault(phase, {}).setdefault(kind, Cost()).add(cost)
        operations[f"{phase}: {name}"].add(cost)
    seconds = sum(_phase_seconds(kinds) for kinds in phases.values())
    work = TrainingWork(decoder_weights="text" not in row.policy, towers=not row.policy)
    flops = 1e6 * work.megaflops([_extent(workshop)])
    return {
        "seconds": seconds,
        "mfu": flops / seconds / Roofline().peak,
        "kernels": sum(cost.kernels for kinds in phases.values() for cost in kinds.values()),
        "bytes": sum(cost.bytes for kinds in phases.values() for cost in kinds.values()),
        "phases": {phase: {kind: asdict(cost) for kind, cost in kinds.items()} for phase, kinds in phases.items()},
        "operations": {name: asdict(cost) for name, cost in operations.items()},
    }


def _phase_seconds(kinds: Mapping[str, Cost]) -> float:
    sent = kinds["collectives"].seconds if "collectives" in kinds else 0.0
    return max(sent, sum(cost.seconds for kind, cost in kinds.items() if kind != "collectives"))


def _segments(batch: PackedBatch) -> dict[tuple[int, int], list[int]]:
    """Lengths of the segments that are not empty, by the number of rows and of bounds."""
    found: dict[tuple[int, int], list[int]] = {}
    sources: list[Segments | None] = [batch.segments]
    if batch.vision is not None:
        sources += [batch.vision.segments, batch.vision.window_segments]
    if batch.audio is not None:
        sources.append(batch.audio.segments)
    for segments in sources:
        if segments is not None:
            lengths = [high - low for low, high in pairwise(segments.bounds)]
            key = (sum(lengths), segments.cu_seqlens.shape[0])
            assert found.get(key, lengths) == lengths, f"two kinds of segments look alike: {key}"
            found[key] = lengths
    return found


def _extent(workshop: Workshop) -> Extent:
    """What the log would count for the pack."""
    family, length = workshop.family, (PACK_TOKENS - 64) // CONTENT.num_samples
    decoder = decoder_flops(family.text, length, int(length * CONTENT.answer))
    towers = CONTENT.pictures * vision_flops(family.vision, CONTENT.grid)
    if CONTENT.mel_frames and getattr(family, "audio", None) is not None:
        towers += audio_flops(family.audio, CONTENT.mel_frames)
    return Extent(
        num_tokens=length,
        num_loss_tokens=0,
        weight_sum=0.0,
        cost=CONTENT.num_samples * (decoder + towers) // 10**6,
        tower_cost=CONTENT.num_samples * towers // 10**6,
    )


# ---------------------------------------------------------------------------------------- what autograd keeps


def kept_bytes(model_name: str, device: torch.device) -> int:
    """Bytes of unique storages that autograd keeps for one decoder layer, weights left out."""
    totals = []
    for num_layers in (1, 2):
        case = Case(model=model_name, layers={"text": num_layers, "vision": 1, "audio": 1}, pack_tokens=PACK_TOKENS)
        with tempfile.TemporaryDirectory() as directory:
            workshop = open_case(case, Path(directory))
        batch = make_pack(workshop.family, PACK_TOKENS, Content(pictures=0, mel_frames=0))
        totals.append(_kept_bytes(workshop, batch, device))
    return totals[1] - totals[0]


def _kept_bytes(workshop: Workshop, batch: PackedBatch, device: torch.device) -> int:
    saved: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"):
        model = workshop.build().to(torch.bfloat16)
    with Record(device=device):
        model.to_empty(device=device)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        on_device = to_device(batch, device)
        rows = model.encode(on_device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.decode(on_device, rows)
    return sum(saved.values())


# ---------------------------------------------------------------------------------------- the table


def show(results: Mapping[str, Any], num_operations: int) -> str:
    """Markdown."""
    lines = ["| step | time, s | MFU | kernels | GB | compiled, s | MFU | kernels | GB |", f"|{'---|' * 9}"]
    for row in results["rows"]:
        cells = [f"{part['seconds']:.4f} | {part['mfu']:.1%} | {part['kernels']:,} | {part['bytes'] / 1e9:,.1f}"
                 if part else "| | |" for part in (row, row["compiled"])]  # fmt: skip
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    lines += ["", "| decoder layer | GB kept for backward |", "|---|---|"]
    lines += [f"| {KEPT[name]} | {count / 1e9:.3f} |" for name, count in results["kept"].items()]
    for row in results["rows"]:
        lines += ["", f"**{row['name']}**", "", *_show_phases(row, num_operations)]
    return "\n".join(lines)


def _show_phases(row: Mapping[str, Any], num_operations: int) -> list[str]:
    lines = [f"| phase | kind | {' | '.join(2 * ('kernels', 'GB', 'TFLOP', 'ms'))} |", f"|{'---|' * 10}"]
    compiled = row["compiled"] or {"phases": {}, "operations": {}}
    for phase, kinds in row["phases"].items():
        others = compiled["phases"].get(phase, {})
        for kind in {**kinds, **others}:
            lines.append(f"| {phase} | {kind} | {_cells(kinds.get(kind))} | {_cells(others.get(kind))} |")
    for part in (row, compiled):
        dearest = sorted(part["operations"].items(), key=lambda item: -item[1]["seconds"])[:num_operations]
        for name, cost in dearest:
            cells = f"{_cells(cost)} | | | |" if part is row else f"| | | | {_cells(cost)}"
            lines.append(f"| {name} | | {cells} |")
    return lines


def _cells(cost: Mapping[str, float] | None) -> str:
    if cost is None:
        return " | | | "
    figures = (cost["bytes"] / 1e9, cost["flops"] / 1e12, 1e3 * cost["seconds"])
    return " | ".join([f"{cost['kernels']:,}", *(f"{figure:,.2f}" for figure in figures)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two layers of each part")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--operations", type=int, default=0, help="also list that many operations of each row")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    device = install("fake")
    install_inductor(device)
    results = {
        "rows": [measure(row, device, small=options.small) for row in ROWS if options.only in row.name],
        "kept": {name: kept_bytes(name, device) for name in KEPT},
    }
    if options.json is not None:
        text = json.dumps({**results, "rows": [_without_operations(row) for row in results["rows"]]}, indent=1) + "\n"
        options.json.write_text(text, encoding="utf-8")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(f"commit {commit.stdout.strip()}, torch {torch.__version__}{', two layers of each part' * options.small}\n")
    print(show(results, options.operations))


def _without_operations(row: Mapping[str, Any]) -> dict[str, Any]:
    left = {key: value for key, value in row.items() if key != "operations"}
    return {**left, "compiled": _without_operations(row["compiled"])} if row.get("compiled") else left


if __name__ == "__main__":
    main()
