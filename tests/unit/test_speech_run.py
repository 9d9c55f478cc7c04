"""A run that trains the talker alone: its losses, its export, its resumption and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import omniloom
from omniloom.tools.tiny import make_tiny, tiny_config
from omniloom.training.metrics import read_lines

GROUPS = tiny_config("qwen3_omni")["talker_config"]["num_code_groups"]
FRAMES = (3, 5, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of which the first asks about a picture and the last is not spoken."""
    folder = tmp_path_factory.mktemp("speech")
    make_tiny("qwen3_omni", folder / "model")
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for number, frames in enumerate(FRAMES):
        codes = torch.randint(0, 30, (GROUPS, frames), generator=generator).tolist()
        answer = {"role": "assistant", "content": f"It is number {number}.", "speech": codes, "speaker": "Chelsie"}
        rows.append({"messages": [{"role": "user", "content": "Which one?"}, answer]})
    Image.new("RGB", (48, 40), "red").save(folder / "red.png")
    rows[0]["messages"][0]["content"] += "<image>"
    rows[0]["images"] = ["red.png"]
    rows.append({"messages": [{"role": "user", "content": "Still?"}, {"role": "assistant", "content": "Still."}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(folder: Path, name: str, **options: dict[str, Any]) -> Path:
    run_dir = folder / name
    config: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": [str(folder / "rows.jsonl")], "pack_tokens": 512, "workers": 0, "shuffle": False},
        "train": {"run_dir": str(run_dir), "steps": 2, "packs_per_step": 1, "learning_rate": 1e-2},
        "policy": {"talker": {"freeze": False}},
        "log": {"tensorboard": False},
    }
    for section, more in options.items():
        config[section] = config.get(section, {}) | more
    assert omniloom.train(config) == 0
    return run_dir


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def test_the_first_losses_are_those_of_score_and_only_the_talker_changes(folder: Path) -> None:
    run_dir = train(folder, "run")
    scores, bad = omniloom.score(folder / "model", folder / "rows.jsonl", ["model.dtype=float32"])
    assert not bad
    spoken = [score for score in scores if "loss_code0" in score]
    assert tuple(score["num_code_frames"] for score in spoken) == FRAMES
    first, second = read_lines(run_dir / "metrics.jsonl")
    labels = [frames + 1 for frames in FRAMES]  # and the end
    code0 = sum(score["loss_code0"] * size for score, size in zip(spoken, labels, strict=True)) / sum(labels)
    codes = sum(score["loss_codes"] * size for score, size in zip(spoken, FRAMES, strict=True)) / sum(FRAMES)
    assert first["loss"] == first["code0_loss"] == pytest.approx(code0, rel=1e-5)
    assert first["codes_loss"] == pytest.approx(codes, rel=1e-5)
    assert second["loss"] < first["loss"]
    before, after = weights(folder / "model"), weights(run_dir / "hf")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("talker.") for name in changed)
    assert any(name.startswith("talker.code_predictor.") for name in changed)


def test_a_run_of_the_talker_goes_on_bit_for_bit(folder: Path) -> None:
    run_of = {steps: {"steps": steps, "schedule": "constant", "packs_per_step": 1, "epochs": None} for steps in (1, 2)}
    train(folder, "parted", train=run_of[1])
    parted, whole = (train(folder, name, train=run_of[2]) for name in ("parted", "whole"))
    found, expected = ([line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (parted, whole))
    assert found == expected
    one, other = weights(parted / "hf"), weights(whole / "hf")
    assert all(torch.equal(one[name], other[name]) for name in other)
