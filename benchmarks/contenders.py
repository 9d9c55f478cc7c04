"""The training loops that `vs_transformers.py` compares, each run as a process of its own: `contenders.py JSON`.

Both train the same checkpoint on the same rows, encoded once by our processor and kept in files. What is timed is the
training step alone: forward, backward, clipping, optimizer. Batches are made beforehand and read between steps, so that
neither loop pays for data, and memory holds one step's batches at a time.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from omniloom.types import IGNORE_LABEL

LEARNING_RATE, BETAS, EPSILON, CLIP_NORM = 1e-5, (0.9, 0.95), 1e-8, 1.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train. `precision`: float32; mixed (bfloat16 products, float32 weights); bf16 (weights too)."""

    loop: Literal["omniloom", "transformers"]
    precision: Literal["float32", "mixed", "bf16"]
    num_threads: int
    num_warmup_steps: int
    rows_per_batch: int = 0  # transformers: padded rows of one forward pass
    grouped_by_length: bool = False
    experts: Literal["grouped_mm", "eager", ""] = ""

    @property
    def name(self) -> str:
        if self.loop == "omniloom":
            return f"omniloom {self.precision}"
        order = "length-grouped" if self.grouped_by_length else "shuffled"
        return f"transformers {self.precision}, {self.experts}, {self.rows_per_batch} {order} rows"


@dataclass(frozen=True, kw_only=True)
class Result:
    name: str
    num_steps: int
    useful_tokens: int  # of rows, not of padding
    computed_tokens: int  # what the decoder was given
    seconds: float
    cpu_seconds: float  # of all threads; less disturbed by other processes than the clock
    loss: float  # mean over answer tokens of the timed steps
    peak_memory_bytes: int  # most that was resident from the first step on, libraries included
    resident_before_bytes: int  # model and optimizer made, no step taken


class Meter:
    """Adds up time over the timed steps, and knows the most memory that was resident since it was made."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        self.resident_before = _resident("VmRSS")

    def __enter__(self) -> Meter:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]

    def result(self, setting: Setting, *, num_steps: int, useful: int, computed: int, loss: float) -> Result:
        return Result(
            name=setting.name,
            num_steps=num_steps,
            useful_tokens=useful,
            computed_tokens=computed,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            loss=loss,
            peak_memory_bytes=_resident("VmHWM"),
            resident_before_bytes=self.resident_before,
        )


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


# ---------------------------------------------------------------------------------------- omniloom


def train_omniloom(prepared: Path, setting: Setting) -> Result:
    """Our step as `train.py` takes it: packs of equal length through forward_backward, clipping, fused AdamW."""
    from omniloom.build import build_model, load_weights, open_workshop
    from omniloom.config import load_config
    from omniloom.parallel.encoder_pool import EncoderPool
    from omniloom.parallel.gradients import clip_gradients
    from omniloom.parallel.mesh import build_layout, close_distributed, init_distributed, resolve_degrees
    from omniloom.parallel.step import Objective, forward_backward
    from omniloom.training.optimizer import build_optimizer

    dtype = {"float32": "float32", "mixed": "bf16"}[setting.precision]
    config = load_config(None, [f"model.path={prepared / 'checkpoint'}", f"model.dtype={dtype}"])
    workshop = open_workshop(config)
    ranks = init_distributed()
    layout = build_layout(resolve_degrees(config.parallel, ranks.world_size, packs_per_step=1), ranks)
    model, policies = build_model(workshop, layout)
    load_weights(workshop, model)
    pool = EncoderPool(layout, workshop.spec.sharding(workshop.family), "group")
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(parameters.items(), policies, betas=BETAS, epsilon=EPSILON)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    meter, totals = Meter(), {"useful": 0, "computed": 0}
    loss_sum = weight_sum = 0.0
    files = sorted((prepared / "packs").glob("*.pt"))
    for step, file in enumerate(files):
        packs = torch.load(file, weights_only=False)  # our own file
        weights = sum(pack.weight_sum for pack in packs)
        objective = Objective(weight_sum=weights, num_packs=len(packs))
        timed = step >= setting.num_warmup_steps
        with meter if timed else nullcontext():
            optimizer.zero_grad()
            losses = [forward_backward(model, pack.batch, layout, objective, pool).loss_sum for pack in packs]
            clip_gradients(parameters.values(), CLIP_NORM, layout.device)
            optimizer.step()
        if timed:
            totals["useful"] += sum(pack.stats.num_tokens for pack in packs)
            totals["computed"] += sum(pack.batch.input_ids.numel() for pack in packs)
            loss_sum, weight_sum = loss_sum + float(sum(losses)), weight_sum + weights
    close_distributed()
    num_timed = len(files) - setting.num_warmup_steps
    return meter.result(setting, num_steps=num_timed, loss=loss_sum / weight_sum, **totals)


# ---------------------------------------------------------------------------------------- transformers


def train_transformers(prepared: Path, setting: Setting) -> Result:
    """A plain loop over transformers' thinker: padded rows, its own loss, a step of as many rows as ours."""
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

    model = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        prepared / "checkpoint",
        dtype=torch.bfloat16 if setting.precision == "bf16" else torch.float32,
        attn_implementation="sdpa",
        experts_implementation=setting.experts,
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True
    )
    meter, totals = Meter(), {"useful": 0, "computed": 0}
    loss_sum, num_labels = 0.0, 0
    files = sorted((prepared / "padded").glob("*.pt"))
    for step, file in enumerate(files):
        batches = torch.load(file)
        # every position but the first of a row is predicted by the one before it
        wanted = sum(int((batch["labels"][:, 1:] != IGNORE_LABEL).sum()) for batch in batches)
        timed, losses = step >= setting.num_warmup_steps, []
        with meter if timed else nullcontext():
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "mixed"):
                    loss = model(**batch, use_cache=False, num_items_in_batch=wanted).loss
                loss.backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
        if timed:
            totals["useful"] += sum(int(batch["attention_mask"].sum()) for batch in batches)
            totals["computed"] += sum(batch["input_ids"].numel() for batch in batches)
            loss_sum, num_labels = loss_sum + float(sum(losses)) * wanted, num_labels + wanted
    num_timed = len(files) - setting.num_warmup_steps
    return meter.result(setting, num_steps=num_timed, loss=loss_sum / num_labels, **totals)


def main() -> None:
    given = json.loads(sys.argv[1])
    setting = Setting(**given["setting"])
    torch.set_num_threads(setting.num_threads)
    torch.manual_seed(0)
    train = train_omniloom if setting.loop == "omniloom" else train_transformers
    print("RESULT " + json.dumps(asdict(train(Path(given["prepared"]), setting))))


if __name__ == "__main__":
    main()
