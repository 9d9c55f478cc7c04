"""What planning costs and gives: start-up and memory of large files, fill and cost spread of packs, later epochs' rate.

    OMP_NUM_THREADS=1 python benchmarks/data_plan.py [ROWS ...]
    OMP_NUM_THREADS=1 python benchmarks/data_plan.py --shards [SAMPLES]

Times are of this process's CPU alone, so that a busy machine changes them little; memory is the peak of a process that
does nothing else. Costs are those of Qwen3-Omni-30B-A3B's own sizes.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: published configs lie among the tests

from omniloom.config import DataConfig, load_config
from omniloom.data.loader import Loader
from omniloom.data.planner import Planner
from omniloom.data.sources import open_sources
from omniloom.families.cost import sample_cost
from omniloom.families.registry import find_spec
from omniloom.run.opening import open_workshop
from omniloom.run.rows import open_planner, open_rows, open_run
from omniloom.tools.tiny import make_tiny
from omniloom.types import ClipGeometry, Extent, PlannedSample
from tests.parity.published_configs import PUBLISHED

ROWS = (1_000_000, 10_000_000)
PACK_TOKENS = 16_384


def measure_start(path: str) -> None:
    """Print what opening a file of rows and planning its first step takes, twice. In a process of its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, extent = {}, Extent(num_tokens=500, num_loss_tokens=50, weight_sum=50.0, cost=500, clips=())
    for name in ("first", "again"):
        start = time.process_time()
        rows = open_sources([path], DataConfig(scratch=f"{path}.scratch"))
        found[f"{name}_open_seconds"] = time.process_time() - start
        start = time.process_time()
        planner = Planner(
            rows_per_source=rows.sizes,
            config=load_config({"data": {"pack_tokens": 8192}, "train": {"steps": 2}}),
            measure=lambda wanted, rows=rows: [extent for row in wanted if rows.read_row(row)],
            locate=rows.locate,
        )
        assert planner.next_step() is not None
        found[f"{name}_plan_seconds"] = time.process_time() - start
        planner.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(found | {"more_megabytes_at_peak": (peak - before) / 1000, "rows": len(rows)}))


def start_up(folder: Path, num_rows: int) -> dict[str, float]:
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for number in range(num_rows):
            file.write(f'{{"query": "What is {number}?", "response": "It is {number}, and no other number."}}\n')
    command = [sys.executable, __file__, "--start", str(path)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    path.unlink()
    return found


def draw_extents(num_rows: int) -> list[Extent]:
    """Sizes of rows that people fine-tune with: text, pictures of up to 1280 tokens, sounds of a minute, videos."""
    config = PUBLISHED["Qwen3-Omni-30B-A3B"].config
    family = find_spec(config).read_config(config)
    rng = np.random.default_rng(0)
    found = []
    for kind in rng.choice(4, size=num_rows, p=[0.45, 0.28, 0.17, 0.10]):
        tokens, clips = int(np.clip(rng.lognormal(5.5, 1.0), 20, 8000)), []
        if kind == 1:
            height, width = 2 * rng.integers(8, 36, 2)
            clips = [ClipGeometry(kind="image", num_tokens=int(height * width) // 4, grid_thw=(1, height, width))]
        elif kind == 2:
            frames = int(rng.integers(200, 6000))
            clips = [ClipGeometry(kind="audio", num_tokens=frames // 100 * 13, num_mel_frames=frames)]
        elif kind == 3:
            grids = int(rng.integers(4, 40))
            clips = [ClipGeometry(kind="video", num_tokens=grids * 88, grid_thw=(grids, 16, 22))]
        tokens += sum(clip.num_tokens for clip in clips)
        cost = sum(sample_cost(family.text, family.vision, family.audio, tokens, tokens // 4, clips))
        found.append(Extent(num_tokens=tokens, num_loss_tokens=tokens // 4, weight_sum=1.0, cost=cost, clips=()))
    return found


def pack_figures(num_rows: int = 20_000) -> dict[str, float]:
    """Fill of the packs of an epoch, and the heaviest pack against the mean: in each step, and of all."""
    extents = draw_extents(num_rows)
    planner = Planner(
        rows_per_source=(num_rows,),
        config=load_config({"data": {"pack_tokens": PACK_TOKENS}, "train": {"epochs": 1, "packs_per_step": 16}}),
        measure=lambda rows: [extents[row] for row in rows],
        locate=lambda row: ("rows", row),
    )
    start, steps = time.process_time(), []
    while (step := planner.next_step()) is not None:
        steps.append([[sample.extent for sample in pack.samples] for pack in step.packs])
    seconds, whole = time.process_time() - start, steps[:-1]  # the last one is filled up with empty packs
    fill = np.mean([sum(e.num_tokens for e in pack) for step in whole for pack in step]) / PACK_TOKENS
    costs = np.array([[sum(e.cost for e in pack) for pack in step] for step in whole])
    return {
        "fill": float(fill),
        "spread_in_a_step": float((costs.max(axis=1) / costs.mean(axis=1)).mean()),
        "largest_spread_in_a_step": float((costs.max(axis=1) / costs.mean(axis=1)).max()),
        "rows_per_second": num_rows / seconds,
    }


def later_epochs(folder: Path, num_pictures: int = 48) -> dict[str, float]:
    """Pictures per second and core, read and made into features, without `data.cache` and from it."""
    rng, rows = np.random.default_rng(0), []
    for number in range(num_pictures):
        coarse = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((1920, 1440)).save(folder / f"{number}.jpg", quality=90)
        rows.append({"query": "<image>What is it?", "response": "It.", "images": [f"{number}.jpg"]})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_tiny("qwen3_vl", folder / "model")
    data = {"train": [str(folder / "pictures.jsonl")], "image": {"max_pixels": 600_000}, "workers": 0}
    found = {}
    for name in ("without", "first", "second"):
        cached = {} if name == "without" else {"cache": str(folder / "cache")}
        config = load_config({"model": {"path": str(model)}, "data": data | cached})
        workshop = open_workshop(config)
        reader = open_rows(workshop, open_sources(config.data.train, config.data), cache=False)()
        start = time.process_time()
        for row, extent in enumerate(reader.measure(range(num_pictures), {}, lambda row: None)):
            reader.encode_row(PlannedSample(row=row, epoch=0, extent=extent, weight_scale=1.0))
        found[name] = num_pictures / (time.process_time() - start)
    return found


# ---------------------------------------------------------------------------------------- tar shards

SHARD_SAMPLES, PICTURE_EVERY = 10_000, 50


def write_shards(folder: Path, num_samples: int) -> None:
    """Text rows without an index beside them, of which one in fifty has a picture of 64 x 64."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 80, 40)).save(buffer, "jpeg")
    folder.mkdir()
    for first in range(0, num_samples, SHARD_SAMPLES):
        with tarfile.open(folder / f"{first:08d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD_SAMPLES, num_samples)):
                seen = number % PICTURE_EVERY == 0
                row = {"query": f"{'<image>' * seen}What is {number}?", "response": f"It is {number}."}
                parts = {"json": json.dumps(row | ({"images": ["0.jpg"]} if seen else {})).encode()}
                for suffix, data in {**parts, **({"0.jpg": buffer.getvalue()} if seen else {})}.items():
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def shard_tree(folder: Path) -> dict[str, dict[str, object]]:
    data = {"train": [str(folder / "shards")], "pack_tokens": 4096, "workers": 0, "scratch": str(folder / "scratch")}
    return {"model": {"path": str(folder / "model")}, "data": data}


def measure_loader(folder: Path) -> None:
    """Print the resident memory of a process that plans and loads an epoch of shards and does nothing else."""
    workshop, rows, _ = open_run(load_config(shard_tree(folder) | {"train": {"epochs": 1, "packs_per_step": 4}}))
    loader, seen, start = Loader(open_rows(workshop, rows, cache=False), workers=0), 0, time.process_time()
    planner = open_planner(workshop, rows, loader.measure)
    marks = [share for share in (1_000, 25_000, 50_000, 75_000, len(rows)) if share <= len(rows)]
    while (step := planner.next_step()) is not None:
        for pack in loader.load_in_order(step.packs):
            assert not pack.bad
        seen += sum(len(pack.samples) for pack in step.packs)
        while marks and seen >= marks[0]:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            seconds = time.process_time() - start
            print(json.dumps({"samples": marks.pop(0), "resident_mb": resident / 1e6, "cpu_seconds": seconds}))
    planner.close()
    loader.close()


def over_shards(folder: Path, num_samples: int) -> None:
    write_shards(folder / "shards", num_samples)
    make_tiny("qwen3_vl", folder / "model")
    train = shard_tree(folder)["data"] | {"train": json.dumps([str(folder / "shards")])}
    words = [f"data.{name}={value}" for name, value in train.items()]
    words += [f"model.path={folder / 'model'}", "model.dtype=float32", "train.steps=1", "checkpoint.export=false"]
    for name in ("first", "again"):  # with the index that the first has made
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        run = ["-m", "omniloom.cli", "train", *words, f"train.run_dir={folder / name}"]
        subprocess.run([sys.executable, *run], check=True, capture_output=True)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"a run of one step, {name}: {wall:.1f} s, {cpu:.1f} s of the processor", flush=True)
    subprocess.run([sys.executable, __file__, "--load-shards", str(folder)], check=True)


def main() -> None:
    if sys.argv[1:2] == ["--load-shards"]:
        measure_loader(Path(sys.argv[2]))
        return
    if sys.argv[1:2] == ["--shards"]:
        with tempfile.TemporaryDirectory() as directory:
            over_shards(Path(directory), int(sys.argv[2]) if sys.argv[2:] else 100_000)
        return
    if sys.argv[1:2] == ["--start"]:
        measure_start(sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        print("packs", pack_figures(), flush=True)
        print("pictures per second", later_epochs(Path(folder)), flush=True)
        for num_rows in map(int, sys.argv[1:]) if sys.argv[1:] else ROWS:
            print("start", start_up(Path(folder), num_rows), flush=True)


if __name__ == "__main__":
    main()
