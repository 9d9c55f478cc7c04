"""What long packs cost four ranks of a ring: peak memory and time of a step, of many samples and of one.

    python benchmarks/long_packs.py                      # gloo on this machine's CPU; the tables of docs/memory.md
    python benchmarks/long_packs.py --scale 64           # packs a 64th as long, a look

A step is one pack of text, forward and backward, in float32, through a model of two layers with two query heads and one
key-value head, which four ranks cannot divide by heads. Each row is a job of its own. Peak memory is beyond what a rank
held once the model was there.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

import torch
from layout_model import Size, make_config, make_pack
from layouts import describe_commit, describe_machine, make_model, place, run

from omniloom.config import ContextConfig
from omniloom.families.config_fields import FamilyConfig
from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.parallel.device import peak_memory_bytes, synchronize
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.mesh import close_distributed
from omniloom.parallel.step import Objective, run_packs
from omniloom.types import PackedBatch, Segments

SIZE = Size(hidden=32, heads=2, layers=2, experts=4, expert_hidden=16, tower_hidden=32, tower_layers=1, vocab_size=256)
RING4, ULYSSES2_RING2 = ContextConfig(ring=4), ContextConfig(ulysses=2, ring=2)


@dataclass(frozen=True, kw_only=True)
class Long:
    """A pack's length, its longest sample, and who shares it."""

    num_tokens: int
    longest: int
    context: ContextConfig

    def lengths(self) -> list[int]:
        """Four of the longest samples, or the one there is room for; the rest of 64 tokens to an eighth of them."""
        draw, lengths = random.Random(0), [self.longest] * min(4, self.num_tokens // self.longest)
        while (free := self.num_tokens - sum(lengths)) > 0:
            lengths.append(min(free, int(64 * (max(self.longest // 512, 1)) ** draw.random())))
        draw.shuffle(lengths)
        return lengths


ROWS = (
    Long(num_tokens=2**20, longest=2**15, context=RING4),
    Long(num_tokens=2**20, longest=2**15, context=ULYSSES2_RING2),
    Long(num_tokens=2**17, longest=2**17, context=RING4),
)


def long_pack(config: FamilyConfig, lengths: list[int]) -> PackedBatch:
    pack, segments = make_pack(config, seed=0, num_tokens=sum(lengths)), Segments.from_lengths(lengths)
    starts = torch.tensor([0, *accumulate(lengths[:-1])])
    positions = torch.arange(sum(lengths)) - starts.repeat_interleave(torch.tensor(lengths))
    return replace(pack, segments=segments, position_ids=positions.expand(3, -1).contiguous())


def measure(rank: int, port: int, row: Long, out: str) -> None:
    layout = place({"context": row.context}, port, rank)
    config = make_config(SIZE)
    model = make_model(config, layout, {"context": row.context})
    pool = EncoderPool(layout, SPEC.sharding(config), "group")
    packs = pool.plan([long_pack(config, row.lengths())])
    sums = {"text": float(row.num_tokens * layout.data_world), "router": float(layout.data_world)}
    before, begin = peak_memory_bytes(layout.device), time.perf_counter()
    run_packs(model, packs, layout, Objective(coefficients={"text": 1.0}, weight_sums=sums), pool)
    synchronize(layout.device)
    found = {"peak": peak_memory_bytes(layout.device) - before, "seconds": time.perf_counter() - begin}
    everyone = layout.exchange(found)
    if layout.is_first:
        torch.save(everyone, out)
    layout.barrier()
    close_distributed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=1, help="packs and samples so many times shorter")
    scale = parser.parse_args().scale
    print(f"commit {describe_commit()}; {describe_machine()}\n")
    print("| tokens of a pack | samples | longest | parallel.context | MiB a rank, largest | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for given in ROWS:
        row = replace(given, num_tokens=given.num_tokens // scale, longest=given.longest // scale)
        found = run(measure, row)
        mib, seconds = (max(each[name] for each in found) for name in ("peak", "seconds"))
        cells = (
            row.num_tokens,
            len(row.lengths()),
            row.longest,
            asdict(row.context),
            f"{mib / 2**20:.0f}",
            f"{seconds:.0f}",
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
