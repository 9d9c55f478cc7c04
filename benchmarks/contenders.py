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
LORA_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train. `precision`: float32; mixed (bfloat16 products, float32 weights); bf16 (weights too)."""

    loop: Literal["omniloom", "transformers"]
    precision: Literal["float32", "mixed", "bf16"]
    num_threads: int
    num_warmup_steps: int
    rows_per_batch: int = 0  # transformers: padded rows of one forward pass
    grouped_by_length: bool = False
    experts: Literal["grouped_mm", "eager", ""] = ""  # "" for models without experts
    lora: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        if self.loop == "omniloom":
            return f"omniloom {self.precision}{compiled}"
        order = "length-grouped" if self.grouped_by_length else "shuffled"
        what = ["transformers", *(["peft"] if self.lora else []), self.precision]
        experts = f", {self.experts}" if self.experts else ""
        return f"{' '.join(what)}{experts}, {self.rows_per_batch} {order} rows{compiled}"


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
    num_trained: int  # parameters


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

    def result(
        self, setting: Setting, *, num_steps: int, useful: int, computed: int, loss: float, trained: int
    ) -> Result:
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
            num_trained=trained,
        )


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


# ---------------------------------------------------------------------------------------- omniloom


def train_omniloom(prepared: Path, setting: Setting) -> Result:
    """Our step as `run/trainer.py` takes it: packs of equal length through run_packs, clipping, fused AdamW."""
    from omniloom.config import load_config
    from omniloom.parallel.degrees import resolve_degrees
    from omniloom.parallel.encoder_pool import EncoderPool
    from omniloom.parallel.gradients import clip_gradients
    from omniloom.parallel.mesh import build_layout, close_distributed, init_distributed
    from omniloom.parallel.step import Objective, run_packs
    from omniloom.run.opening import build_model, build_optimizer, load_weights, open_workshop

    dtype = {"float32": "float32", "mixed": "bf16"}[setting.precision]
    words = [f"model.path={prepared / 'checkpoint'}", f"model.dtype={dtype}", f"memory.compile={setting.compiled}"]
    words += [f"train.betas={BETAS[0]},{BETAS[1]}", f"train.epsilon={EPSILON}"]
    config = load_config(None, words + (lora_words(prepared) if setting.lora else []))
    workshop = open_workshop(config)
    ranks = init_distributed()
    layout = build_layout(resolve_degrees(config.parallel, ranks.world_size, packs_per_step=1), ranks)
    model, policies = build_model(workshop, layout)
    load_weights(workshop, model)
    pool = EncoderPool(layout, workshop.spec.sharding(workshop.family), "group")
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = build_optimizer(workshop, dict(model.named_parameters()), policies, layout.device)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    meter, totals = Meter(), {"useful": 0, "computed": 0}
    loss_sum = weight_sum = 0.0
    files = sorted((prepared / "packs").glob("*.pt"))
    for step, file in enumerate(files):
        packs = torch.load(file, weights_only=False)  # our own file
        weights = sum(float(pack.batch.loss_weights.double().sum()) for pack in packs)
        objective = Objective(coefficients={"text": 1.0}, weight_sums={"text": weights, "router": float(len(packs))})
        timed = step >= setting.num_warmup_steps
        with meter if timed else nullcontext():
            optimizer.zero_grad()
            terms = run_packs(model, [pack.batch for pack in packs], layout, objective, pool)
            clip_gradients(optimizer, CLIP_NORM, layout.device)
            optimizer.step()
        if timed:
            totals["useful"] += sum(pack.stats.num_tokens for pack in packs)
            totals["computed"] += sum(pack.batch.input_ids.numel() for pack in packs)
            loss_sum, weight_sum = loss_sum + float(terms.sums["text"]), weight_sum + weights
    close_distributed()
    totals["trained"] = sum(parameter.numel() for parameter in parameters.values())
    num_timed = len(files) - setting.num_warmup_steps
    return meter.result(setting, num_steps=num_timed, loss=loss_sum / weight_sum, **totals)


def lora_words(prepared: Path) -> list[str]:
    """Adapters on the decoder's attention, everything else frozen."""
    config = json.loads((prepared / "checkpoint" / "config.json").read_text())
    others = ["vision", *(["audio"] if "omni" in config["model_type"] else [])]
    if not config.get("tie_word_embeddings"):
        others.append("lm_head")
    return [
        f"policy.text.lora.rank={LORA_RANK}",
        f"policy.text.lora.alpha={2 * LORA_RANK}",
        "policy.text.lora.modules=[q_proj, k_proj, v_proj, o_proj]",
        *(f"policy.{name}.freeze=true" for name in others),
    ]


def architecture(prepared: Path) -> str:
    """transformers' class for the part of a checkpoint that answers in text."""
    from omniloom.tools.generate import TEXT_CLASSES

    name = json.loads((prepared / "checkpoint" / "config.json").read_text())["architectures"][0]
    return TEXT_CLASSES.get(name, name)


# ---------------------------------------------------------------------------------------- transformers


def train_transformers(prepared: Path, setting: Setting) -> Result:
    """A plain loop over transformers' own model: padded rows, its own loss, a step of as many rows as ours."""
    import transformers

    model = getattr(transformers, architecture(prepared)).from_pretrained(
        prepared / "checkpoint",
        dtype=torch.bfloat16 if setting.precision == "bf16" else torch.float32,
        attn_implementation="sdpa",
        **({"experts_implementation": setting.experts} if setting.experts else {}),
    )
    if setting.lora:
        from peft import LoraConfig, get_peft_model

        attention = r"model\.(language_model\.)?layers\.\d+\.self_attn\.[qkvo]_proj"
        model = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=attention))
    model.train()
    if setting.compiled:  # blocks, as ours; batches are of unlike lengths
        for name, layers in model.named_modules():
            for layer in layers if name.endswith(("layers", "blocks")) else ():
                layer.compile(dynamic=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True)
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
            torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
        if timed:
            totals["useful"] += sum(int(batch["attention_mask"].sum()) for batch in batches)
            totals["computed"] += sum(batch["input_ids"].numel() for batch in batches)
            loss_sum, num_labels = loss_sum + float(sum(losses)) * wanted, num_labels + wanted
    totals["trained"] = sum(parameter.numel() for parameter in trained)
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
