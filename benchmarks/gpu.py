"""Four models on one GPU of 141 GB, each trained by omniloom and by transformers (+ peft) on the same packed rows.

    python benchmarks/gpu.py                          # under eight minutes; prints a table
    python benchmarks/gpu.py --json FILE --only LoRA
    python benchmarks/gpu.py --tiny                   # tiny models on whatever device is there: that it runs

Weights are drawn on the device: a checkpoint directory here has headers and no bytes. A trained parameter takes 16
bytes (float32 weight, gradient, two moments), so the decoders that would not fit keep the layers that `ROWS` states;
towers and 36 layers of the 4B would keep 70 GiB for backward (`omniloom plan`), so they are recomputed.
A step is one pack of 16,384 tokens, four samples of one length, half of the tokens of pictures, half with a loss;
transformers gets the same samples as a batch without padding. Both compute in bfloat16 over float32 weights (frozen
ones in bfloat16), and each runs in a process of its own. What is timed is forward, backward, clipping and optimizer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: packs and headers lie among the tests

from omniloom.config import load_config
from omniloom.families.registry import find_spec
from omniloom.parallel.degrees import resolve_degrees
from omniloom.parallel.device import choose_device, peak_memory_bytes, synchronize
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.gradients import clip_gradients
from omniloom.parallel.mesh import build_layout, close_distributed, init_distributed
from omniloom.parallel.staging import stage
from omniloom.parallel.step import Objective, run_packs
from omniloom.run.opening import build_model, build_optimizer, open_workshop
from omniloom.tools.generate import TEXT_CLASSES
from omniloom.tools.tiny import make_tiny
from omniloom.types import PackedBatch
from tests.device.cases import FROZEN_TOWERS, LORA
from tests.device.steps import Content, make_pack, write_headers
from tests.parity.published_configs import PUBLISHED

PACK_TOKENS, WARMUP_STEPS, TIMED_STEPS, LORA_RANK = 16384, 2, 5, 16
PLAIN_TOKENS = 1000  # ids below this are text in every vocabulary, the tiny ones' too
CONTENT = Content(num_samples=4, grid=(1, 64, 64), pictures=2, mel_frames=0, answer=0.5)
TINY_TOKENS, TINY_CONTENT = 1088, Content(num_samples=4, grid=(1, 8, 8), pictures=2, mel_frames=0, answer=0.5)
SECONDS = 110.0  # for one process; eight of them, most of which end much sooner


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    model: str
    family: str  # whose tiny checkpoint stands for the model in a trial
    layers: Mapping[str, int] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    recompute: str = "none"

    @property
    def adapts(self) -> bool:
        return self.policy is LORA


ROWS = (
    Row(name="Qwen3-VL-4B full, full recompute", model="Qwen3-VL-4B", family="qwen3_vl", recompute="full"),
    Row(
        name="Qwen3-Omni-30B-A3B LoRA, full recompute",
        model="Qwen3-Omni-30B-A3B",
        family="qwen3_omni",
        policy=LORA,
        recompute="full",
    ),
    Row(
        name="Qwen3-Omni-30B-A3B, 8 layers full, towers frozen",
        model="Qwen3-Omni-30B-A3B",
        family="qwen3_omni",
        layers={"text": 8},
        policy=FROZEN_TOWERS,
    ),
    Row(
        name="Qwen2.5-Omni-7B, 16 layers full",
        model="Qwen2.5-Omni-7B",
        family="qwen2_5_omni",
        layers={"text": 16},
        recompute="full",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    seconds: float  # of a step, the median
    tokens_per_second: float
    peak_gib: float
    losses: tuple[float, ...]


def prepare(row: Row, directory: Path, *, tiny: bool) -> None:
    """A checkpoint directory of the model, without weights."""
    if tiny:
        make_tiny(row.family, directory)
        return
    published = PUBLISHED[row.model].config
    spec = find_spec(published)
    write_headers(
        directory, spec.reduce_config(published, **{"text": None, "vision": None, "audio": None} | row.layers)
    )


def measure(step: Callable[[], torch.Tensor], device: torch.device, num_tokens: int) -> Result:
    seconds, losses = [], []
    for number in range(WARMUP_STEPS + TIMED_STEPS):
        synchronize(device)
        start = time.perf_counter()
        loss = step()
        synchronize(device)
        if number >= WARMUP_STEPS:
            seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    median = sorted(seconds)[len(seconds) // 2]
    peak = peak_memory_bytes(device) / 2**30
    return Result(seconds=median, tokens_per_second=num_tokens / median, peak_gib=peak, losses=tuple(losses))


def train_omniloom(row: Row, directory: Path, pack_tokens: int, content: Content) -> Result:
    tree = {
        "model": {"path": str(directory), "dtype": "bf16"},
        "data": {"pack_tokens": pack_tokens},
        "policy": dict(row.policy),
        "memory": {"recompute": row.recompute},
    }
    workshop = open_workshop(load_config(tree))
    ranks = init_distributed()
    layout = build_layout(resolve_degrees(workshop.config.parallel, 1, packs_per_step=1), ranks)
    model, policies = build_model(workshop, layout)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw(name, parameter)
    optimizer = build_optimizer(workshop, dict(model.named_parameters()), policies, layout.device)
    pool = EncoderPool(layout, workshop.spec.sharding(workshop.family), "group")
    (routed,) = pool.plan([drawn_pack(workshop.family, pack_tokens, content)])
    staged = stage(routed, layout.device, workshop.compute_dtype)
    num_labels = float((routed.loss_weights > 0).sum())
    objective = Objective(coefficients={"text": 1.0}, weight_sums={"text": num_labels, "router": 1.0})

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        terms = run_packs(model, [staged], layout, objective, pool)
        clip_gradients(optimizer, 1.0, layout.device)
        optimizer.step()
        return terms.sums["text"] / num_labels

    result = measure(step, layout.device, int((~routed.is_padding).sum()))
    close_distributed()
    return result


def draw(name: str, parameter: torch.Tensor) -> None:
    """Random values as those of a model at the start of its life; adapters begin at nothing."""
    if name.endswith("lora_b"):
        parameter.zero_()
    elif parameter.ndim > 1:
        parameter.normal_(0.0, 0.02)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def train_transformers(row: Row, directory: Path, pack_tokens: int, content: Content) -> Result:
    import transformers

    device = choose_device(0)
    config_json = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = transformers.AutoConfig.from_pretrained(directory)
    name = config_json["architectures"][0]
    config, name = getattr(config, "thinker_config", config), TEXT_CLASSES.get(name, name)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if row.adapts else torch.float32)
    with torch.device(device):
        model = getattr(transformers, name)(config)
    torch.set_default_dtype(torch.float32)
    if hasattr(config.get_text_config(), "num_experts"):
        model.set_experts_implementation("grouped_mm")
    if row.adapts:
        from peft import LoraConfig, get_peft_model

        targets = r".*model\.layers\.\d+\.self_attn\.[qkvo]_proj"
        experts = [".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"]
        adapters = LoraConfig(r=LORA_RANK, lora_alpha=32, target_modules=targets, target_parameters=experts)
        model = get_peft_model(model, adapters)
    elif row.policy is FROZEN_TOWERS:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("visual." not in key and "audio_tower." not in key)
    if row.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), fused=True)
    spec = find_spec(config_json)
    pack = drawn_pack(spec.read_config(config_json), pack_tokens, content)
    inputs = {key: value.to(device) for key, value in batch_of(pack, content, config).items()}

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss: torch.Tensor = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.detach()

    return measure(step, device, inputs["input_ids"].numel())


def drawn_pack(family: Any, pack_tokens: int, content: Content) -> PackedBatch:
    """The same for both loops: of tokens and pixels that are alike a router would send all to the same few experts."""
    pack, generator = make_pack(family, pack_tokens, content), torch.Generator().manual_seed(0)
    assert pack.vision is not None
    return replace(
        pack,
        input_ids=torch.randint(PLAIN_TOKENS, pack.input_ids.shape, generator=generator),
        vision=replace(pack.vision, patches=torch.randn(pack.vision.patches.shape, generator=generator)),
    )


def batch_of(pack: PackedBatch, content: Content, config: Any) -> dict[str, torch.Tensor]:
    """The samples of a pack as rows of a batch: no padding, since they are of one length."""
    assert pack.vision is not None
    num_tokens = int((~pack.is_padding).sum())
    rows = (content.num_samples, num_tokens // content.num_samples)
    image = next(getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name))
    input_ids = pack.input_ids.clone()
    input_ids[pack.vision.token_index] = image
    labels = torch.where(pack.labels >= 0, pack.labels, -100)  # already shifted, and shifted again: as many
    num_pictures = content.num_samples * content.pictures
    return {
        "input_ids": input_ids[:num_tokens].view(rows),
        "labels": labels[:num_tokens].view(rows),
        "attention_mask": torch.ones(rows, dtype=torch.int64),
        "position_ids": torch.arange(rows[1]).expand(3, *rows),
        "pixel_values": pack.vision.patches[: num_pictures * content.grid[0] * content.grid[1] * content.grid[2]],
        "image_grid_thw": torch.tensor([content.grid] * num_pictures),
    }


LOOPS = {"omniloom": train_omniloom, "transformers": train_transformers}


def run_one(row: Row, loop: str, *, tiny: bool) -> None:
    """In a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(row, Path(folder) / "model", tiny=tiny)
        tokens, content = (TINY_TOKENS, TINY_CONTENT) if tiny else (PACK_TOKENS, CONTENT)
        print("RESULT " + json.dumps(asdict(LOOPS[loop](row, Path(folder) / "model", tokens, content))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="tiny models in place of the published sizes")
    parser.add_argument("--one", nargs=2, metavar=("ROW", "LOOP"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_one(next(row for row in ROWS if row.name == given.one[0]), given.one[1], tiny=given.tiny)
        return
    table: dict[str, dict[str, Any]] = {}
    print("| model | loop | s a step | tokens/s | peak GiB | first and last loss |\n|---|---|---|---|---|---|")
    for row in (row for row in ROWS if given.only in row.name):
        for loop in LOOPS:
            command = [sys.executable, __file__, "--one", row.name, loop, *(["--tiny"] if given.tiny else [])]
            result = read_result(command)
            table.setdefault(row.name, {})[loop] = result
            if "fault" in result:
                print(f"| {row.name} | {loop} | {result['fault']} | | | |", flush=True)
                continue
            figures = f"{result['seconds']:.3f} | {result['tokens_per_second']:,.0f} | {result['peak_gib']:.1f}"
            first, last = result["losses"][0], result["losses"][-1]
            print(f"| {row.name} | {loop} | {figures} | {first:.3f}, {last:.3f} |", flush=True)
    if given.json:
        about = {"torch": torch.__version__, "pack_tokens": TINY_TOKENS if given.tiny else PACK_TOKENS}
        if torch.cuda.is_available():
            about["device"] = torch.cuda.get_device_name()
        given.json.write_text(json.dumps({"about": about, "rows": table}, indent=1), encoding="utf-8")


def read_result(command: list[str]) -> dict[str, Any]:
    """What a process measured, or what became of it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"fault": f"not done in {SECONDS:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    last = (done.stderr.strip() or "ended without a word").splitlines()[-1]
    return {"fault": "out of memory" if "out of memory" in done.stderr else last[:200]}


if __name__ == "__main__":
    main()
