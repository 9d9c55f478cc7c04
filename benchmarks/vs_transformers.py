"""Our training step against transformers' on the same checkpoint and the same rows of mixed length and media.

    python benchmarks/vs_transformers.py                      # the whole comparison on this machine's CPU
    python benchmarks/vs_transformers.py --quick              # our loop and transformers' likely best
    python benchmarks/vs_transformers.py --family qwen3_vl --lora   # another model; adapters, against peft

Each contender is a process of its own (`contenders.py`), one after another; with `--rounds` all of them in turn several
times, and each counts with its fastest round, the one that other work on the machine disturbed least. Printed for each:
useful tokens per second (tokens of rows, padding not counted), the share of what the decoder computed that was padding,
peak resident memory, model FLOPs over the matmul peak that this machine reaches in the same precision. Ratios compare
our loop with the best of transformers' settings of the same precision.

Features are computed once, by our processor, for both; the step alone is timed. With `--end-to-end` the real command,
`omniloom train`, runs on the same files too: decoding, packing and feature extraction included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from contenders import Result, Setting
from mixed_rows import write_rows
from padding import write_padded_steps

from omniloom.config import Config, load_config
from omniloom.data.rows import RowReader
from omniloom.run.opening import Workshop, open_workshop
from omniloom.run.rows import open_data, open_planner, open_rows
from omniloom.tools.tiny import make_tiny
from omniloom.training.flops import TrainingWork, measure_matmul_peak, model_flops_utilisation
from omniloom.types import Example, PlannedSample, StepPlan

PACK_TOKENS, PACKS_PER_STEP, NUM_ROWS = 4096, 3, 600
DTYPES = {"float32": torch.float32, "mixed": torch.bfloat16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The checkpoint, and the timed rows as both loops want them."""

    directory: Path
    rows_file: Path
    steps: tuple[list[Example], ...]
    token_ids: dict[str, int]
    pack_fill: float
    timed_megaflops: float  # forward and backward, of the timed rows


@dataclass(frozen=True, kw_only=True)
class Line:
    """A contender's figures as they are printed."""

    setting: Setting
    result: Result
    tokens_per_second: float
    padding_share: float
    peak_share: float  # model FLOPs per second over the matmul peak in the same precision


def prepare(directory: Path, *, family: str, lora: bool, num_warmup_steps: int, num_steps: int) -> Prepared:
    """Write checkpoint, media and rows; plan, encode and collate what will be trained."""
    make_tiny(family, directory / "checkpoint", size="20m")
    rows_file = write_rows(directory / "data", num_rows=NUM_ROWS, audio="omni" in family)
    work = TrainingWork(decoder_weights=not lora, towers=not lora)
    config = load_config(None, [*config_words(directory, rows_file), f"train.steps={num_warmup_steps + num_steps}"])
    workshop = open_workshop(config)
    reader, plans = _plan(config, workshop)
    (directory / "packs").mkdir()
    steps = []
    for plan in plans:
        packs = [reader.load(pack, None, {}, lambda row: None) for pack in plan.packs]
        torch.save(packs, directory / "packs" / f"step_{plan.step:03d}.pt")
        steps.append([_encode(reader, sample) for pack in plan.packs for sample in pack.samples])
    return Prepared(
        directory=directory,
        rows_file=rows_file,
        steps=tuple(steps),
        token_ids=_token_ids(workshop),
        pack_fill=_fill(plans),
        timed_megaflops=work.megaflops(
            sample.extent for plan in plans[num_warmup_steps:] for pack in plan.packs for sample in pack.samples
        ),
    )


def config_words(directory: Path, rows_file: Path) -> list[str]:
    return [
        f"model.path={directory / 'checkpoint'}",
        f"data.train={rows_file}",
        f"data.pack_tokens={PACK_TOKENS}",
        f"train.packs_per_step={PACKS_PER_STEP}",
    ]


def _plan(config: Config, workshop: Workshop) -> tuple[RowReader, list[StepPlan]]:
    source, _ = open_data(config.data, config.train.seed)
    reader = open_rows(workshop, source, cache=False)()
    planner = open_planner(workshop, source, lambda rows: reader.measure(rows, {}, lambda row: None))
    plans = []
    while (plan := planner.next_step()) is not None:
        plans.append(plan)
    planner.close()
    return reader, plans


def _encode(reader: RowReader, sample: PlannedSample) -> Example:
    """One row as tensors, the same that went into its pack."""
    example = reader.encode_row(sample)
    normalised = reader.processor.towers.normalised  # transformers takes pixels as numbers
    vision = (replace(clip, patches=normalised((clip.patches, None))[0]) for clip in example.vision)
    return replace(example, vision=tuple(vision))


def _token_ids(workshop: Workshop) -> dict[str, int]:
    config = workshop.config_json.get("thinker_config", workshop.config_json)
    video = config.get("video_token_id", config.get("video_token_index"))
    return {"video": video, "pad": config.get("text_config", config).get("pad_token_id") or 0}


def _fill(plans: Sequence[StepPlan]) -> float:
    tokens = sum(sample.extent.num_tokens for plan in plans for pack in plan.packs for sample in pack.samples)
    return tokens / (PACK_TOKENS * sum(len(plan.packs) for plan in plans))


# ---------------------------------------------------------------------------------------- running


def settings(options: argparse.Namespace) -> list[Setting]:
    """Ours, then transformers' with every batch size, order and experts implementation."""
    shared = {"num_threads": options.threads, "num_warmup_steps": options.warmup_steps, "lora": options.lora}
    compiled = (False, True) if options.compile else (False,)
    has_experts = options.family in ("qwen3_omni", "qwen3_vl_moe", "qwen3_5_moe")
    implementations = (("grouped_mm",) if options.quick else ("grouped_mm", "eager")) if has_experts else ("",)
    chosen = []
    for precision in options.precisions:
        if precision != "bf16":
            chosen += [Setting(loop="omniloom", precision=precision, compiled=how, **shared) for how in compiled]
        for experts in implementations:
            for grouped in (True,) if options.quick else (False, True):
                for rows in options.rows_per_batch:
                    chosen += [
                        Setting(
                            loop="transformers",
                            precision=precision,
                            rows_per_batch=rows,
                            grouped_by_length=grouped,
                            experts=experts,
                            compiled=how,
                            **shared,
                        )
                        for how in compiled
                    ]
    return chosen


def run(prepared: Prepared, setting: Setting, peak: float) -> Line:
    """One contender in a process of its own. Raises: RuntimeError with what it wrote, if it fails."""
    padded = prepared.directory / "padded"
    if setting.loop == "transformers":
        write_padded_steps(
            padded,
            prepared.steps[: setting.num_warmup_steps],
            prepared.steps[setting.num_warmup_steps :],
            rows_per_batch=setting.rows_per_batch,
            grouped_by_length=setting.grouped_by_length,
            token_ids=prepared.token_ids,
        )
    given = json.dumps({"prepared": str(prepared.directory), "setting": asdict(setting)})
    script = Path(__file__).with_name("contenders.py")
    done = subprocess.run([sys.executable, str(script), given], capture_output=True, text=True)
    shutil.rmtree(padded, ignore_errors=True)
    words = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not words:
        raise RuntimeError(f"{setting.name} failed with code {done.returncode}:\n{done.stderr[-3000:]}")
    result = Result(**json.loads(words[0].removeprefix("RESULT ")))
    return Line(
        setting=setting,
        result=result,
        tokens_per_second=result.useful_tokens / result.seconds,
        padding_share=1 - result.useful_tokens / result.computed_tokens,
        peak_share=model_flops_utilisation(prepared.timed_megaflops, result.seconds, peak, 1),
    )


def run_end_to_end(prepared: Prepared, options: argparse.Namespace) -> dict[str, float]:
    """`omniloom train` on the files themselves: its own figures, averaged over the steps after the warm-up."""
    run_dir = prepared.directory / "run"
    words = config_words(prepared.directory, prepared.rows_file)
    words += [f"train.steps={options.warmup_steps + options.steps}", f"train.run_dir={run_dir}", "model.dtype=float32"]
    words += ["data.workers=1", "checkpoint.every=0", "checkpoint.export=false", "log.tensorboard=false"]
    command = [sys.executable, "-m", "omniloom.cli", "train", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][options.warmup_steps :]
    seconds = sum(line["step_seconds"] for line in lines)
    return {
        "tokens_per_second": sum(line["num_tokens"] for line in lines) / seconds,
        "data_wait_fraction": sum(line["data_wait_fraction"] * line["step_seconds"] for line in lines) / seconds,
        "pack_fill": sum(line["pack_fill"] for line in lines) / len(lines),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
    }


# ---------------------------------------------------------------------------------------- telling


def describe(lines: Sequence[Line], prepared: Prepared, peaks: dict[str, float], options: argparse.Namespace) -> str:
    """The result as Markdown."""
    heard = "audio, " if "omni" in options.family else ""
    out = [
        f"# Training step against transformers, {datetime.date.today().isoformat()}",
        "",
        f"Command: `python benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`  ",
        f"Machine: {machine()}, {options.threads} threads; load average when started {options.load:.1f}  ",
        f"Versions: torch {torch.__version__}, transformers {_version('transformers')}, commit {_commit()}  ",
        f"Model: {options.family}, 20M parameters, " + ("LoRA on attention" if options.lora else "all trained") + "  ",
        f"Rows: {sum(map(len, prepared.steps))} of text, image, {heard}video; {options.steps} timed steps of "
        f"{PACKS_PER_STEP} packs of {PACK_TOKENS} tokens, pack fill {prepared.pack_fill:.3f}; fastest of "
        f"{options.rounds} rounds each  ",
        "Matmul peak: " + ", ".join(f"{name} {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items()),
        "",
        "| loop | useful tokens/s | per CPU second | padding | of matmul peak | peak memory MB | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        result = line.result
        out.append(
            f"| {result.name} | {line.tokens_per_second:.0f} | {result.useful_tokens / result.cpu_seconds:.0f} | "
            f"{line.padding_share:.1%} | {line.peak_share:.1%} | {result.peak_memory_bytes / 1e6:.0f} | "
            f"{result.loss:.4f} |"
        )
    return "\n".join([*out, "", *_ratios(lines)]) + "\n"


def _ratios(lines: Sequence[Line]) -> list[str]:
    out = []
    for ours in (line for line in lines if line.setting.loop == "omniloom"):
        rivals = [
            line
            for line in lines
            if line.setting.loop == "transformers"
            and line.setting.precision in (ours.setting.precision, "bf16")
            and (line.setting.precision != "bf16" or ours.setting.precision == "mixed")
        ]
        if rivals:
            best = max(rivals, key=lambda line: line.tokens_per_second)
            speed = ours.tokens_per_second / best.tokens_per_second
            memory = ours.result.peak_memory_bytes / best.result.peak_memory_bytes
            out.append(f"{ours.result.name} over {best.result.name}: speed {speed:.2f}, peak memory {memory:.2f}  ")
    return out


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--family",
        default="qwen3_omni",
        choices=["qwen3_omni", "qwen2_5_omni", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe"],
    )
    parser.add_argument("--lora", action="store_true", help="train adapters only; transformers with peft")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--rounds", type=int, default=1, help="times that each contender runs")
    parser.add_argument("--warmup-steps", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", default=["float32", "mixed"], choices=list(DTYPES))
    parser.add_argument("--rows-per-batch", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--quick", action="store_true", help="of transformers only grouped_mm and length-grouped rows")
    parser.add_argument("--compile", action="store_true", help="each contender with compiled blocks too")
    parser.add_argument("--end-to-end", action="store_true", help="also run `omniloom train` on the files")
    parser.add_argument("--out", type=Path, help="write PATH.md and, with the raw numbers, PATH.json")
    options = parser.parse_args()
    options.load = os.getloadavg()[0]
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    peaks = {name: measure_matmul_peak(torch.device("cpu"), DTYPES[name], seconds=2) for name in options.precisions}
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(
            Path(folder),
            family=options.family,
            lora=options.lora,
            num_warmup_steps=options.warmup_steps,
            num_steps=options.steps,
        )
        rounds: dict[str, list[Line]] = {}
        for _ in range(options.rounds):
            for setting in settings(options):
                line = run(prepared, setting, peaks[setting.precision])
                rounds.setdefault(setting.name, []).append(line)
                print(f"{setting.name}: {line.tokens_per_second:.0f} useful tokens/s", file=sys.stderr, flush=True)
        lines = [max(of_one, key=lambda line: line.tokens_per_second) for of_one in rounds.values()]
        text = describe(lines, prepared, peaks, options)
        end_to_end = run_end_to_end(prepared, options) if options.end_to_end else None
    if end_to_end is not None:
        text += (
            f"\n`omniloom train`, float32, data included: {end_to_end['tokens_per_second']:.0f} useful tokens/s, "
            f"waited for data {end_to_end['data_wait_fraction']:.1%}, pack fill {end_to_end['pack_fill']:.3f}, "
            f"peak memory {end_to_end['peak_memory_bytes'] / 1e6:.0f} MB\n"
        )
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
        raw = {
            "rounds": {name: [asdict(line) for line in of_one] for name, of_one in rounds.items()},
            "end_to_end": end_to_end,
            "matmul_peak": peaks,
        }
        options.out.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
