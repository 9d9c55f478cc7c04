"""`omniloom demo`: from nothing to a trained, exported, tested model and its report, in a few minutes on two cores.

Owns the order of the steps and the sizes of the demo's model and run. Every step is what its verb does: `tiny`,
`train`, `export`, `generate`, `report`. Accuracy is measured on the exported directories, by answers generated from
held-out files and from the same questions with the evidence taken away.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omniloom.checkpoint.files import write_json
from omniloom.config import Config, load_config
from omniloom.data.sources import open_sources
from omniloom.run.trainer import run
from omniloom.tools.demo_data import MODALITIES, DemoData, write_demo_data
from omniloom.tools.export import export_checkpoint
from omniloom.tools.generate import Prompt, Sampling, answer, load_model, one_thread, open_reader, read_prompts
from omniloom.tools.report import write_report
from omniloom.tools.tiny import make_tiny, quiet_transformers

ANSWER = Sampling(max_new_tokens=12)  # the longest has seven and its end


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much of everything; the default is the demo, tests take less."""

    num_train: int = 5000
    num_held_out: int = 108  # per modality: divisible by questions x answers, so that blind guessing is at chance
    num_steps: int = 480
    num_checkpoints: int = 6  # points of the accuracy curve
    num_curve: int = 36  # held-out rows per modality for each of them
    num_samples: int = 16  # answers shown in the report, the modalities taking turns


def run_demo(directory: str | Path, size: DemoSize | None = None) -> dict[str, Any]:
    """Do the whole demo in `directory`, print what happens, and return what `summary.json` holds.

    Raises: ValueError if `directory` holds something that is no earlier demo.
    """
    directory, size = Path(directory), size or DemoSize()
    _make_room(directory)
    with quiet_transformers(), one_thread():
        return _run_demo(directory, size)


def _run_demo(directory: Path, size: DemoSize) -> dict[str, Any]:
    start = time.monotonic()
    _say(start, "writing a tiny Qwen3-Omni and a small data set")
    make_tiny("qwen3_omni", directory / "tiny", size="demo")
    data = write_demo_data(directory / "data", num_train=size.num_train, num_held_out=size.num_held_out)
    config = demo_config(directory, data, size)
    _say(start, f"training {size.num_steps} steps")
    code = run(config)
    if code:
        raise SystemExit(code)
    _say(start, "answering questions about held-out files")
    prompts, tokenizer = _read_all_prompts(directory / "hf", config, data)
    summary = _test(directory / "hf", tokenizer, prompts, data)
    summary["num_held_out"] = size.num_held_out
    final = {"step": size.num_steps, **summary["accuracy"]}
    summary["accuracy_by_step"] = [*_accuracy_curve(directory, tokenizer, prompts, data, size), final]
    summary = {"seconds": round(time.monotonic() - start, 1), **summary}
    write_json(directory / "summary.json", summary)
    report = write_report(directory)
    _print_table(summary)
    _say(start, f"done; open {report}")
    return summary


def demo_config(directory: Path, data: DemoData, size: DemoSize) -> Config:
    """The run's config; saved beside the run as `config.yaml`, it trains the same model again."""
    changes = {
        "model.path": directory / "tiny",
        "data.train": json.dumps([str(data.train)]),
        "data.eval": json.dumps([str(path) for path in data.held_out.values()]),
        "train.run_dir": directory,
        "train.steps": size.num_steps,
        "train.warmup_steps": min(50, size.num_steps // 4),
        "train.eval_every": max(1, size.num_steps // 3),
        "train.eval_answers": size.num_samples,
        "checkpoint.every": size.num_steps // size.num_checkpoints,
        "checkpoint.keep": size.num_checkpoints,
    }
    return load_config(Path(__file__).with_name("demo.yaml"), [f"{key}={value}" for key, value in changes.items()])


def _make_room(directory: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / "tiny" / "config.json").is_file() or not (directory / "data" / "train.jsonl").is_file():
        raise ValueError(f"{directory} holds something that is no earlier demo; name another directory or empty it")
    shutil.rmtree(directory)


# ---------------------------------------------------------------------------------------- accuracy


def _read_all_prompts(model_dir: Path, config: Config, data: DemoData) -> tuple[dict[Path, list[Prompt]], Any]:
    """The prompts of every held-out file and control by file, and the tokenizer for their answers."""
    controls = [path for files in data.controls.values() for path in files.values()]
    source = open_sources(tuple(str(path) for path in [*data.held_out.values(), *controls]))
    reader = open_reader(model_dir, config.data, source)
    by_file: dict[Path, list[Prompt]] = {}
    for prompt in read_prompts(reader):
        by_file.setdefault(Path(prompt.file), []).append(prompt)
    return by_file, reader.processor.tokenizer


def _test(model_dir: Path, tokenizer: Any, prompts: Mapping[Path, Sequence[Prompt]], data: DemoData) -> dict[str, Any]:
    """Accuracy with media and under every control."""
    model = load_model(model_dir)

    def ask(path: Path) -> list[str]:
        return answer(model, tokenizer, prompts[path], ANSWER)

    answers = {name: ask(path) for name, path in data.held_out.items()}
    controls = {
        control: {name: _share_right(prompts[path], ask(path)) for name, path in files.items()}
        for control, files in data.controls.items()
    }
    return {
        "accuracy": {name: _share_right(prompts[data.held_out[name]], words) for name, words in answers.items()},
        "accuracy_without_media": controls["blank"],
        "accuracy_frozen_frame": controls["frozen"],
        "accuracy_muted": controls["muted"],
        "chance": data.chance,
        "accuracy_by_question": {
            name: _by_question(prompts[data.held_out[name]], words) for name, words in answers.items()
        },
    }


def _share_right(prompts: Sequence[Prompt], answers: Sequence[str]) -> float:
    return fmean(words == prompt.expected for prompt, words in zip(prompts, answers, strict=True))


def _by_question(prompts: Sequence[Prompt], answers: Sequence[str]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for prompt, words in zip(prompts, answers, strict=True):
        right.setdefault(prompt.question, []).append(words == prompt.expected)
    return {question: fmean(hits) for question, hits in right.items()}


def _accuracy_curve(
    directory: Path,
    tokenizer: Any,
    prompts: Mapping[Path, Sequence[Prompt]],
    data: DemoData,
    size: DemoSize,
) -> list[dict[str, float]]:
    """Accuracy of every checkpoint but the last, exported one after another, on part of the held-out rows."""
    points: list[dict[str, float]] = []
    for checkpoint in sorted((directory / "checkpoints").glob("step_*"))[:-1]:
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            export_checkpoint(checkpoint, Path(scratch) / "hf", say=lambda words: None)
            model = load_model(Path(scratch) / "hf")
        point: dict[str, float] = {"step": int(checkpoint.name.removeprefix("step_"))}
        for name, path in data.held_out.items():
            asked = prompts[path][: size.num_curve]
            point[name] = _share_right(asked, answer(model, tokenizer, asked, ANSWER))
        points.append(point)
    return points


# ---------------------------------------------------------------------------------------- screen


def _say(start: float, text: str) -> None:
    print(f"[{time.monotonic() - start:4.0f} s] {text}", flush=True)


def _print_table(summary: Mapping[str, Any]) -> None:
    columns = ("accuracy", "accuracy_without_media", "accuracy_frozen_frame", "accuracy_muted", "chance")
    titles = ("right", "blank", "frozen", "muted", "chance")
    print(f"{'held out':10}" + "".join(f"{title:>9}" for title in titles))
    for name in MODALITIES:
        cells = [f"{summary[column][name]:9.3f}" if name in summary[column] else f"{'':9}" for column in columns]
        print(f"{name:10}" + "".join(cells))
