"""Whole runs on a GPU, as the command line starts them: the curve of a CPU, compiled, adapters, resumed, repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines

STEPS = 6
Train = Callable[..., list[float]]


@pytest.fixture(scope="module")
def train(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs `omniloom train` into a folder of its own and returns the losses of all steps."""
    folder = tmp_path_factory.mktemp("runs")
    models = {family: make_tiny(family, folder / family) for family in ("qwen3_omni", "qwen3_vl")}
    rows = "".join(json.dumps({"query": f"{n}?", "response": f"It is {n}."}) + "\n" for n in range(64))
    (folder / "rows.jsonl").write_text(rows)

    def train(name: str, *words: str, on_cpu: bool = False, family: str = "qwen3_omni") -> list[float]:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
        command = [
            *(sys.executable, "-m", "omniloom.cli", "train", f"model.path={models[family]}", "model.modalities=text"),
            *(f"data.train={folder / 'rows.jsonl'}", "data.pack_tokens=128", "data.workers=0"),
            *(f"train.run_dir={folder / name}", f"train.steps={STEPS}", "train.packs_per_step=2"),
            *("train.learning_rate=1e-3", "train.schedule=constant", "log.tensorboard=false", *words),
        ]
        done = subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return [line["loss"] for line in read_lines(folder / name / "metrics.jsonl")]

    return train


@pytest.mark.parametrize("family", ["qwen3_omni", "qwen3_vl"])
def test_the_curve_is_that_of_a_cpu(train: Train, family: str) -> None:
    words = ("model.dtype=float32", "checkpoint.export=false")
    here, there = (
        train(f"{family}_{place}", *words, family=family, on_cpu=on_cpu)
        for place, on_cpu in (("device", False), ("cpu", True))
    )
    assert here == pytest.approx(there, rel=1e-4)
    assert here[-1] < here[0]


def test_a_compiled_run_draws_the_same_curve(train: Train) -> None:
    words = ("checkpoint.export=false",)
    assert train("compiled", *words, "memory.compile=true") == pytest.approx(train("eager", *words), rel=2e-2)


def test_a_deterministic_run_repeats_and_resumes_to_the_bit(train: Train) -> None:
    words = ("train.deterministic=true", "checkpoint.export=false", "checkpoint.every=3")
    whole = train("whole", *words)
    assert train("again", *words) == whole
    train("resumed", *words, "train.steps=3")
    assert train("resumed", *words) == whole


def test_adapters_train_and_are_written(train: Train) -> None:
    losses = train("lora", "policy.text.lora.rank=4", "policy.lm_head.freeze=true")
    assert losses[-1] < losses[0]


def test_a_finished_run_exports_what_transformers_opens(train: Train, tmp_path_factory: pytest.TempPathFactory) -> None:
    import transformers

    train("exported", family="qwen3_vl")
    directory = next(tmp_path_factory.getbasetemp().glob("runs*/exported/hf"))
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
