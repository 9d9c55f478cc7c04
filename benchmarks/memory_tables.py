"""What optimizers and recompute cost in memory and time, measured on this machine's CPU: three tables of Markdown.

    python benchmarks/memory_tables.py [optimizer | recompute | base]

Optimizers step all weights of a random Qwen3-Omni of 20M parameters with random gradients; states on the host are
copied, though host and device share their memory here. Recompute: forward and backward of one pack of that model with
pictures and sound, float32. Kept are the storages that live on when the layers have run; what offloading moved is not
among them. Each row is a process of its own; its peak is what it has resident beyond what it had before. Base: what a
whole LoRA run of a random Qwen3-VL of 411M parameters has resident at its fullest, by what holds the frozen weights.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: packs are made among the tests

import omniloom
from omniloom.config import load_config
from omniloom.parallel.device import HostCopies, choose_device
from omniloom.parallel.fsdp import match_modules
from omniloom.parallel.optimizer import ShardedOptimizer
from omniloom.parallel.recompute import OffloadingCall, recompute_layers
from omniloom.run.opening import apply_policy, build_optimizer, open_workshop
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import StepMetrics
from tests.device.steps import Content, make_pack

PACK_TOKENS, ROUNDS, ROOTS, CPU = 4096, 3, ("text", "vision", "audio"), torch.device("cpu")
CONTENT = Content(num_samples=4, grid=(1, 32, 32), pictures=1, mel_frames=800)
STATES = [(name, states) for name in ("adamw", "muon") for states in ("float32", "bf16", "8bit")]
OPTIMIZERS = [*((*each, False) for each in STATES), ("adamw", "float32", True)]
# how, parts of the model, offload
RECOMPUTE = [
    *((how, ROOTS, False) for how in ("none", "selective", "full", 2, 3)),
    *(("full", ("text",), False), ("full", ROOTS[1:], False), ("none", (), True), ("full", ROOTS, True)),
]
TRAINING = {
    "train.steps": 1,
    "train.packs_per_step": 1,
    "train.learning_rate": 1e-4,
    "memory.recompute": "full",
    "policy.text.lora.rank": 16,
    "data.workers": 0,
    "log.tensorboard": False,
}
BASES = [("float32", "null"), ("float32", "nf4"), ("bf16", "null"), ("bf16", "nf4")]  # model.dtype, model.quantize
MID_SIZE = {  # a decoder of 26 layers of 15.7M
    "text_config.head_dim": 64,
    "text_config.hidden_size": 1024,
    "text_config.intermediate_size": 4096,
    "text_config.num_attention_heads": 16,
    "text_config.num_key_value_heads": 8,
    "text_config.num_hidden_layers": 26,
    "text_config.rope_scaling.mrope_section": [12, 10, 10],
    "vision_config.out_hidden_size": 1024,
}


class Living(TorchDispatchMode):
    """Knows the storages that operations made, and how many bytes of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        storages = [each.untyped_storage() for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.found |= {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        return out


class CountedCopies(HostCopies):
    moved = 0

    def put(self, tensor: Tensor, host: Tensor) -> None:
        super().put(tensor, host)
        self.moved += host.nbytes


def open_model(checkpoint: str, *words: str):  # type: ignore[no-untyped-def]
    choose_device(0)  # which sets up the allocator
    workshop = open_workshop(load_config(None, [f"model.path={checkpoint}", "model.dtype=float32", *words]))
    model, generator = workshop.build(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return workshop, model, apply_policy(workshop, model)


def measure_optimizer(checkpoint: str, name: str, states: str, offload: bool) -> list[str]:
    words = (f"train.optimizer={name}", f"train.optimizer_states={states}")
    workshop, model, policies = open_model(checkpoint, *words)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = build_optimizer(workshop, dict(model.named_parameters()), policies, CPU)
    if offload:
        groups = [{**group, "orthogonal": False} for group in optimizer.param_groups]
        given = {"betas": (0.9, 0.95), "epsilon": 1e-8, "states": states, "compute_dtype": torch.float32}
        optimizer = ShardedOptimizer(groups, copies=HostCopies(CPU), **given)
    peak, seconds = measure(optimizer.step)
    size = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    numbers = sum(parameter.numel() for parameter in model.parameters())
    where = "on the host" if offload else ""
    return [f"{name} {states} {where}", *_mb(size), f"{size / numbers:.2f}", *_mb(peak - size), f"{seconds:.3f}"]


def measure_recompute(checkpoint: str, how: str | int, parts: tuple[str, ...], offload: bool) -> list[str]:
    workshop, model, _ = open_model(checkpoint)
    pack, copies, living = make_pack(workshop.family, PACK_TOKENS, CONTENT), CountedCopies(CPU), Living()
    blocks = list(match_modules(model, workshop.spec.sharding(workshop.family).blocks))
    for root in parts:
        recompute_layers(getattr(model, root), how, routes=root == "text")  # type: ignore[arg-type]
    for root in ROOTS if offload else ():
        getattr(model, root).call = OffloadingCall(getattr(model, root).call, copies)
    peak, seconds = measure(lambda: model(pack).sums["text"].backward())
    marks: dict[str, list[int]] = {root: [] for root in ROOTS}
    weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}

    def mark(root: str, *_: object) -> None:
        held = (size for storage, size in living.found.items() if not storage.expired() and storage not in weights)
        marks[root].append(sum(held) - copies.moved)

    copies.moved, layers = 0, {root: [name for name in blocks if name.startswith(f"{root}.")] for root in ROOTS}
    for root, names in layers.items():
        model.get_submodule(names[0]).register_forward_pre_hook(partial(mark, root))
        model.get_submodule(names[-1]).register_forward_hook(partial(mark, root))
    with living:
        terms = model(pack)
    kept = [(after - before) / len(layers[root]) for root, (before, after) in marks.items()]
    del terms
    of = "" if parts == ROOTS or how == "none" else f" of {', '.join(parts)}"
    return [f"{how}{of}{', offloaded' if offload else ''}", *_mb(*kept, peak), f"{seconds:.2f}"]


def make_base(folder: str) -> None:
    make_tiny("qwen3_vl", Path(folder, "mid"), overrides=MID_SIZE, max_shard_size="100MB")
    row = {"query": "How many?", "response": "They are forty."}
    Path(folder, "rows.jsonl").write_text("\n".join(json.dumps(row) for _ in range(40)))


def measure_base(folder: str, dtype: str, quantize: str) -> list[str]:
    model, rows, run = Path(folder, "mid"), Path(folder, "rows.jsonl"), Path(folder, f"{dtype}_{quantize}")
    of_this = {"model.path": model, "data.train": rows, "train.run_dir": run, "data.pack_tokens": 32}
    words = [f"{key}={value}" for key, value in {**of_this, **TRAINING}.items()]
    before, peaks, seconds = _resident("VmRSS"), [], []

    def note(metrics: StepMetrics) -> None:
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        seconds.append(metrics.step_seconds)

    omniloom.train(
        omniloom.load_config(None, [*words, f"model.dtype={dtype}", f"model.quantize={quantize}"]), on_step=note
    )
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    name = dtype if quantize == "null" else f"{quantize}, the rest {dtype}"
    return [name, *_mb(before, peaks[-1] - before, whole - before), f"{min(seconds):.2f}"]


def measure(call: Callable[[], object]) -> tuple[float, float]:
    """Bytes that the first call has resident at its fullest beyond what was there; seconds of the fastest later one."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before, seconds = _resident("VmRSS"), []
    call()
    peak = _resident("VmHWM") - before
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return peak, min(seconds)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _mb(*sizes: float) -> list[str]:
    return [f"{size / 1e6:.1f}" for size in sizes]


TABLES: dict[str, tuple[str, list[tuple], Callable[..., list[str]]]] = {
    "optimizer": (
        "states, MB | bytes a parameter | besides at the fullest, MB | seconds",
        OPTIMIZERS,
        measure_optimizer,
    ),
    "base": ("before the run, MB | training, beyond that | with the export | seconds a step", BASES, measure_base),
    "recompute": ("kept of a decoder layer, MB | vision | audio | peak, MB | seconds", RECOMPUTE, measure_recompute),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        checkpoint = str(make_tiny("qwen3_omni", Path(folder) / "model", size="20m"))
        for name in sys.argv[1:] or TABLES:
            title, settings, how = TABLES[name]
            print(f"\n| {name} | {title} |\n{'|---' * (title.count('|') + 2)}|")
            if name == "base":
                pool.apply(make_base, (folder,))  # in a process of its own, whose memory counts in no row
            for setting in settings:
                where = folder if name == "base" else checkpoint
                print(f"| {' | '.join(pool.apply(how, (where, *setting)))} |", flush=True)


if __name__ == "__main__":
    main()
