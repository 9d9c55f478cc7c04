"""The planner's cost against measured time: of decoder and towers at several sizes, in published widths.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999 OMP_NUM_THREADS=1 python benchmarks/cost_model.py [MODEL ...]

A model of one decoder layer and two of each tower, its vocabulary divided by the layers left out, so that the head has
the share that it has in the whole; random weights, float32, one thread's own time; forward alone, as the cost counts
it, the least of some rounds in which all have their turns. The last column is time per cost over the geometric mean of
all parts of the model: were the cost exact and every product equally fast, all would be 1. The two variables have
memory kept when it is freed, as accelerators' allocators keep it: else the kernel's work on new pages is in the times.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: published configs lie among the tests

from omniloom.data.collate import collate
from omniloom.families.cost import sample_cost
from omniloom.families.registry import find_spec
from omniloom.processors.tower_batches import audio_batch, vision_batch
from omniloom.types import IGNORE_LABEL, AudioClip, ClipGeometry, Example, PackedBatch, VisionClip
from tests.parity.published_configs import PUBLISHED

TOKENS = (2048, 512, 8192)
GRIDS = ((1, 32, 32), (1, 64, 64), (1, 96, 96), (8, 24, 32), (16, 24, 32))
FRAMES = (500, 1500, 3000, 12000)
LABELLED = 4  # tokens to one that has a loss


def measure(name: str, rounds: int) -> None:
    config_json = PUBLISHED[name].config
    spec = find_spec(config_json)
    has = {"text": 1, "vision": 2} | ({"audio": 2} if "audio" in spec.modalities else {})
    whole, family = (spec.read_config(each) for each in (config_json, spec.reduce_config(config_json, **has)))
    vocab_size = whole.text.vocab_size // whole.text.num_hidden_layers
    family = replace(family, text=replace(family.text, vocab_size=vocab_size))
    model = spec.build(family).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)

    def cost(num_tokens: int, num_loss_tokens: int, clips: tuple[ClipGeometry, ...]) -> int:
        return sum(sample_cost(family.text, family.vision, family.audio, num_tokens, num_loss_tokens, clips))

    def batch_of(num_tokens: int, grid: tuple[int, int, int] | None = None, frames: int = 0) -> PackedBatch:
        vision, audio = (), ()
        if grid is not None:
            count = grid[0] * grid[1] * grid[2]
            rows = torch.arange(count // family.vision.spatial_merge_size**2)
            vision = (VisionClip(patches=torch.randn(count, family.vision.patch_dim), grid_thw=grid, token_index=rows),)
        if frames:
            sound = torch.randn(family.audio.num_mel_bins, frames)
            rows = torch.arange(family.audio.num_tokens(frames))
            audio = (AudioClip(features=sound, token_index=rows, longest_frames=frames),)
        ids, weights = torch.randint(0, 1000, (num_tokens,)), torch.zeros(num_tokens)
        weights[::LABELLED] = 1.0
        example = Example(
            id="x", input_ids=ids, labels=torch.where(weights > 0, ids, IGNORE_LABEL), loss_weights=weights,
            position_ids=torch.arange(num_tokens).expand(3, -1), vision=vision, audio=audio,
        )  # fmt: skip
        return collate(
            [example], pack_tokens=num_tokens, weight_scales=[1.0],
            collate_vision=lambda clips: vision_batch(clips, family.vision),
            collate_audio=lambda clips: audio_batch(clips, family.audio) if family.audio else None,
        )  # fmt: skip

    rows = model.encode(batch_of(LABELLED))
    works = {}
    for count in TOKENS:
        batch = batch_of(count)
        works[f"decoder, {count} tokens"] = (partial(model.decode, batch, rows), cost(count, count // LABELLED, ()))
    for grid in GRIDS:
        clip = ClipGeometry(kind="image", num_tokens=0, grid_thw=grid)
        works["vision, {} x {} x {} patches".format(*grid)] = (
            partial(model.vision, batch_of(8192, grid).vision), cost(0, 0, (clip,)),
        )  # fmt: skip
    for frames in FRAMES if "audio" in has else ():
        clip = ClipGeometry(kind="audio", num_tokens=0, num_mel_frames=frames)
        works[f"audio, {frames / 100:g} s"] = (
            partial(model.audio, batch_of(8192, None, frames).audio),
            cost(0, 0, (clip,)),
        )
    times: dict[str, float] = {}
    for _ in range(rounds):
        for label, (work, _) in works.items():
            start = time.process_time()
            work()
            times[label] = min(times.get(label, 1e9), time.process_time() - start)
    unit = geometric_mean(times[label] / megaflops for label, (_, megaflops) in works.items())
    for label, (_, megaflops) in works.items():
        speed = megaflops / 1000 / times[label]
        print(
            f"| {name} | {label} | {times[label]:.3f} | {speed:.0f} | {times[label] / megaflops / unit:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["Qwen3-VL-2B", "Qwen3-Omni-30B-A3B", "Qwen2.5-Omni-3B"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | part | seconds | GFLOP/s | time per cost |\n|---|---|---|---|---|")
    for name in options.models:
        measure(name, options.rounds)


if __name__ == "__main__":
    main()
