"""What published models take and how fast they are, by estimate: by devices, pack length and memory.

    python benchmarks/plan_tables.py > docs/planning_tables.md       # some minutes
    python benchmarks/plan_tables.py --only 4B
    python benchmarks/plan_tables.py --counted                       # the table of docs/planning.md

Nothing is measured: each cell is the first of the layouts that `omniloom plan --gpus N --memory GIB` would rank, for a
step of 65,536 tokens a device, or one pack where that is more. Checkpoints here have headers and no bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: headers lie among the tests

from benchmarks.op_stream import PACK_TOKENS, RANKS, ROWS, Row
from omniloom.config import Config
from omniloom.parallel.degrees import resolve_degrees
from omniloom.run.footprint import ModelSizes
from omniloom.run.layouts import Candidate, list_candidates, order_of
from omniloom.run.step_time import Clock, Machine, StepTime
from tests.device.cases import LORA
from tests.device.steps import Case, open_case

GIB, TOKENS_PER_DEVICE = 2**30, 65536
LENGTHS = {"16K": 2**14, "64K": 2**16, "256K": 2**18, "1M": 2**20}
MEMORIES = (80, 141)
WHOLE = {"text": None, "vision": None, "audio": None}


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    model: str
    devices: tuple[int, ...]
    policy: Mapping[str, Any] = field(default_factory=dict)


MODELS = (
    Model(name="Qwen3-VL-4B, full", model="Qwen3-VL-4B", devices=(1, 8)),
    Model(name="Qwen3-VL-8B, full", model="Qwen3-VL-8B", devices=(1, 8)),
    Model(name="Qwen2.5-Omni-7B, full", model="Qwen2.5-Omni-7B", devices=(1, 8)),
    Model(name="Qwen3-Omni-30B-A3B, LoRA", model="Qwen3-Omni-30B-A3B", devices=(1, 8, 16, 64), policy=LORA),
    Model(name="Qwen3-Omni-30B-A3B, full", model="Qwen3-Omni-30B-A3B", devices=(1, 8, 16, 64)),
    Model(name="Qwen3-VL-235B-A22B, decoder", model="Qwen3-VL-235B-A22B", devices=(64, 128, 512),
          policy={"vision": {"freeze": True}}),
)  # fmt: skip


def show(model: Model, directory: Path) -> None:
    policy = {name: rule for name, rule in model.policy.items() if name != "audio" or "Omni" in model.model}
    opened = open_case(Case(model=model.model, layers=WHOLE, policy=policy), directory)
    sizes = ModelSizes(opened)
    print(f"\n## {model.name}\n")
    print("| GPUs | pack | packs | GB | layout | GiB | s/step | tokens/s/GPU | MFU |")
    print("|---|---|---|---|---|---|---|---|---|")
    for devices in model.devices:
        for word, length in LENGTHS.items():
            packs = max(1, devices * TOKENS_PER_DEVICE // length)
            machine = Machine(devices=min(devices, Machine().devices))
            sizes.config = with_packs(opened.config, length, packs)
            found = list(list_candidates(sizes, devices, Clock(sizes, machine), vary_memory=True))
            for memory in MEMORIES:
                cells = (str(devices), word, str(packs), str(memory), *describe(found, memory * 1e9, machine))
                print("| " + " | ".join(cells) + " |", flush=True)


def describe(found: list[Candidate], memory_bytes: float, machine: Machine) -> tuple[str, ...]:
    if not found:
        return "no layout divides model and packs", "", "", "", ""
    best = min(found, key=lambda candidate: order_of(candidate, memory_bytes))
    settings = {key.rpartition(".")[2]: value for key, value in best.settings().items()}
    layout = ", ".join(key if value == "true" else f"{key} {value}" for key, value in settings.items())
    total = f"{best.footprint.total / GIB:,.0f}"
    if not best.fits(memory_bytes):
        return f"does not fit; least: {layout}", total, "", "", ""
    time = best.time
    return layout, total, f"{time.seconds:.3g}", f"{time.tokens_per_second:,.0f}", f"{time.utilisation(machine):.1%}"


def with_packs(config: Config, length: int, packs: int) -> Config:
    data, train = replace(config.data, pack_tokens=length), replace(config.train, packs_per_step=packs)
    return replace(config, data=data, train=train)


def show_counted() -> None:
    """Step times against what `benchmarks/op_stream.py` counted: of whole models, or, of the rest, of two layers."""
    results = Path(__file__).parent / "results"
    whole, small = (
        {row["name"]: row for row in json.loads((results / f"op_stream_{name}.json").read_text())["rows"]}
        for name in ("after", "small")
    )
    print("| step | layers | counted, s | plan, s | plan / counted | MFU counted | MFU of plan |")
    print("|---|---|---|---|---|---|---|")
    for row in ROWS:
        counted = whole.get(row.name, small[row.name])
        machine, time = Machine(), planned(row, two_layers=row.name not in whole)
        layers = "two of each part" if row.name not in whole else str(row.layers.get("text") or "all")
        cells = (f"{counted['seconds']:.3f}", f"{time.seconds:.3f}", f"{time.seconds / counted['seconds']:.2f}",
                 f"{counted['mfu']:.1%}", f"{time.utilisation(machine):.1%}")  # fmt: skip
        print("| " + " | ".join((row.name, layers, *cells)) + " |", flush=True)


def planned(row: Row, *, two_layers: bool) -> StepTime:
    layers = dict.fromkeys(WHOLE, 2) if two_layers else {**WHOLE, **row.layers}
    case = Case(model=row.model, layers=layers, world_size=RANKS, policy=row.policy, parallel=row.parallel,
                pack_tokens=PACK_TOKENS, memory={"recompute": row.recompute})  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        opened = open_case(case, Path(directory))
        degrees = resolve_degrees(opened.config.parallel, RANKS, packs_per_step=RANKS)
        return Clock(ModelSizes(opened), Machine()).step(degrees, opened.config.memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--counted", action="store_true", help="step times against those of the counted op stream")
    options = parser.parse_args()
    if options.counted:
        show_counted()
        return
    print("# What models take, by estimate\n")
    print(
        "Made by `python benchmarks/plan_tables.py`; what is assumed and how exact it is: [planning.md](planning.md). "
        "Each line is the\nlayout with the least estimated step time that fits; GB is a device's memory, GiB what the "
        "fullest device holds."
    )
    for model in MODELS:
        if options.only in model.name:
            with tempfile.TemporaryDirectory() as directory:
                show(model, Path(directory))


if __name__ == "__main__":
    main()
