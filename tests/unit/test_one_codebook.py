"""Qwen2.5-Omni's talker in rows and in a run: what it takes, what it refuses, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import omniloom
from omniloom.config import Config, ModelConfig
from omniloom.families.qwen2_5_omni.spec import SPEC
from omniloom.parallel.apply import check_plan
from omniloom.parallel.degrees import Degrees
from omniloom.run.opening import open_workshop
from omniloom.tools.check import check_config
from omniloom.tools.tiny import make_tiny, tiny_config
from omniloom.training.metrics import read_lines

FRAMES = (3, 5, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows without media, of which the last is not spoken."""
    folder = tmp_path_factory.mktemp("one_codebook")
    make_tiny("qwen2_5_omni", folder / "model")
    rows = [row(f"number {n}", list(range(7 * n, 7 * n + frames))) for n, frames in enumerate(FRAMES)]
    rows.append({"messages": [{"role": "user", "content": "still?"}, {"role": "assistant", "content": "yes"}]})
    write(folder, rows)
    return folder


def row(answer: str, speech: Any, **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": answer, "speech": speech, **message}
    return {"messages": [{"role": "user", "content": "which one?"}, said]}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_only_the_talker_of_one_codebook_changes_and_begins_with_the_losses_of_score(folder: Path) -> None:
    config = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": [str(folder / "rows.jsonl")], "pack_tokens": 512, "workers": 0, "shuffle": False},
        "train": {"run_dir": str(folder / "run"), "steps": 2, "packs_per_step": 1, "learning_rate": 1e-2},
        "policy": {"talker": {"freeze": False}},
        "log": {"tensorboard": False},
    }
    assert omniloom.train(config) == 0
    scores, bad = omniloom.score(folder / "model", folder / "rows.jsonl", ["model.dtype=float32"])
    assert not bad
    spoken = [score for score in scores if "loss_code0" in score]
    assert tuple(score["num_code_frames"] for score in spoken) == FRAMES
    assert all("loss_codes" not in score for score in spoken)
    labels = [frames + 1 for frames in FRAMES]  # and the end
    code0 = sum(score["loss_code0"] * size for score, size in zip(spoken, labels, strict=True)) / sum(labels)
    first, second = read_lines(folder / "run" / "metrics.jsonl")
    assert first["loss"] == first["code0_loss"] == pytest.approx(code0, rel=1e-5)
    assert "codes_loss" not in first
    assert second["loss"] < first["loss"]
    before, after = weights(folder / "model"), weights(folder / "run" / "hf")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"talker.thinker_to_talker_proj.bias", "talker.model.layers.0.self_attn.q_proj.bias"} <= changed
    assert all(name.startswith("talker.") for name in changed)
    assert (folder / "run" / "hf" / "spk_dict.pt").read_bytes() == (folder / "model" / "spk_dict.pt").read_bytes()


def test_a_file_of_sound_is_refused_with_the_reason_and_codes_must_be_of_its_codebook(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "sound.wav").write_bytes(b"RIFF1234WAVE")
    rows = [
        row("a", "sound.wav"),
        row("a", [[1, 2], [3, 4]]),
        row("a", [1, 65]),
        row("a", [1], speaker="Aiden"),
        row("a", [64], speaker="ETHAN"),
    ]
    scores, bad = omniloom.score(folder / "model", write(tmp_path, rows), ["model.dtype=float32"])
    assert [one.reason for one in bad] == [
        "expected codes as a list or a .npy file, got another kind of file; what makes codes of recordings for "
        "Qwen2.5-Omni was never published, so its talker trains on codes alone that you have",
        "expected codes of 1 groups, all of as many frames, got 2 groups of 2 frames",
        "codes must be from 0 to 64, those of the codebooks, got 1 to 65",
        "unknown speaker 'Aiden'; the checkpoint knows ethan, chelsie",
    ]
    assert [score["num_code_frames"] for score in scores] == [1]


def test_voices_that_are_damaged_are_said_and_new_ones_refused(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (folder / "model").iterdir():
        (model / file.name).symlink_to(file)
    (model / "spk_dict.pt").unlink()
    family = open_workshop(Config(model=ModelConfig(path=str(model))), speaks=True).family
    torch.save({"anna": {"cond": 1}}, model / "spk_dict.pt")
    with pytest.raises(ValueError, match=r"spk_dict\.pt: expected voices by name, each with a bos_token"):
        SPEC.make_processor(model, family)
    (model / "spk_dict.pt").write_bytes(b"not a dict")
    with pytest.raises(ValueError, match=r"spk_dict\.pt: expected voices by name, each with a bos_token"):
        SPEC.make_processor(model, family)
    named = Config(model=ModelConfig(path=str(model), new_speakers={"anna": "ethan"}))
    with pytest.raises(ValueError, match="voices of qwen2_5_omni are not among its talker's weights"):
        open_workshop(named, speaks=True)


@pytest.mark.parametrize("name", ["tensor", "pipeline"])
def test_a_dense_talker_is_not_divided(name: str) -> None:
    plan = SPEC.sharding(SPEC.read_config(tiny_config("qwen2_5_omni"), speaks=True))
    with pytest.raises(ValueError, match=rf"parallel\.{name}: 2, but a talker is not divided so yet"):
        check_plan(plan, Degrees(**{name: 2}))


def test_check_says_that_no_vocoder_here_makes_sound_of_such_codes(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write(tmp_path, [row("a", [1, 2], recording="a.wav")])
    words = [f"model.path={folder / 'model'}", f"data.train={data}", "data.pack_tokens=256", "data.workers=0"]
    check_config([*words, f"train.run_dir={tmp_path / 'run'}", "policy.talker.freeze=false"])
    assert "1 rows of codes, and no vocoder here that makes sound of them" in capsys.readouterr().out
