"""A voice that the checkpoint does not have: begun as another, trained by name, spoken by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import omniloom
from omniloom.checkpoint.files import read_json
from omniloom.config import Config, LoraConfig, ModelConfig, PolicyRule
from omniloom.families.qwen3_omni.talker import add_speakers
from omniloom.run.opening import open_workshop
from omniloom.tools.generate import Sampling
from omniloom.tools.speak import Voice, spoken_answers
from omniloom.tools.tiny import make_tiny, tiny_config
from omniloom.training.metrics import read_lines

ETHAN, ANNA = 111, 113
TRAINS = {"talker": PolicyRule(freeze=False)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voice")
    make_tiny("qwen3_omni", folder / "model")
    return folder


def rows_of(folder: Path, speaker: str) -> Path:
    answer = {"role": "assistant", "content": "It is so.", "speech": [[1, 2, 3]] * 4, "speaker": speaker}
    path = folder / f"{speaker}.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Is it?"}, answer]}))
    return path


def table(directory: Path) -> torch.Tensor:
    files = sorted(directory.glob("*.safetensors"))
    return next(w for f in files for n, w in load_file(f).items() if n == "talker.model.codec_embedding.weight")


def test_a_new_voice_begins_as_another_and_is_known_by_name_in_the_export(folder: Path) -> None:
    config: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model"), "dtype": "float32", "new_speakers": {"Anna": "Ethan"}},
        "data": {"train": [str(rows_of(folder, "anna"))], "pack_tokens": 128, "workers": 0},
        "train": {"run_dir": str(folder / "run"), "steps": 2, "packs_per_step": 1, "learning_rate": 1e-2},
        "policy": {"talker": {"freeze": False}},
        "log": {"tensorboard": False},
    }
    assert omniloom.train(config) == 0
    first = read_lines(folder / "run" / "metrics.jsonl")[0]
    (score,), _ = omniloom.score(folder / "model", rows_of(folder, "ethan"), ["model.dtype=float32"])
    assert first["loss"] == pytest.approx(score["loss_code0"], rel=1e-6)
    before, after = table(folder / "model"), table(folder / "run" / "hf")
    assert not torch.equal(after[ANNA], before[ANNA])
    assert (after[ANNA].float() - before[ETHAN].float()).abs().max() < 0.1 < before[ETHAN].float().abs().max()
    assert torch.equal(after[ETHAN], before[ETHAN])  # no row has it
    published, exported = (read_json(path / "config.json") for path in (folder / "model", folder / "run" / "hf"))
    published["talker_config"]["speaker_id"]["anna"] = ANNA
    assert exported == published
    voice = Voice(target=folder / "out.wav", speaker="ANNA", temperature=0, seconds=0.2)
    (line,) = spoken_answers(folder / "run", "Is it?", {}, voice, sampling=Sampling(max_new_tokens=3))
    assert line["num_code_frames"] == 2
    omniloom.export(folder / "run", folder / "exported")
    assert read_json(folder / "exported" / "config.json") == exported
    (again,), bad = omniloom.score(folder / "run", rows_of(folder, "anna"), ["model.dtype=float32"])
    assert not bad
    assert again["loss_code0"] < score["loss_code0"]


@pytest.mark.parametrize(
    ("new", "policy", "words"),
    [
        ({"anna": "bob"}, TRAINS, "new_speakers.anna: 'bob' is no voice; the checkpoint has chelsie, ethan, aiden"),
        ({"Ethan": "aiden"}, TRAINS, "new_speakers.Ethan: the checkpoint has this voice"),
        ({"anna": "ethan"}, {}, "new_speakers: no talker trains"),
        ({"anna": "ethan"}, {"talker": PolicyRule(lora=LoraConfig())}, "voices are rows of talker.codec_embed"),
    ],
)
def test_a_voice_that_cannot_be_begun_is_refused(
    folder: Path, new: dict[str, str], policy: dict[str, PolicyRule], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        open_workshop(Config(model=ModelConfig(path=str(folder / "model"), new_speakers=new), policy=policy))


def test_new_voices_take_ids_that_nothing_has_until_none_is_left() -> None:
    config = tiny_config("qwen3_omni")
    config["talker_config"]["codec_extra_id"] = ANNA
    config["talker_config"]["text_config"]["vocab_size"] = 116
    found = add_speakers(config, {"anna": "ethan", "ben": "chelsie"})["talker_config"]["speaker_id"]
    assert (found["anna"], found["ben"]) == (114, 115)
    assert "anna" not in config["talker_config"]["speaker_id"]
    with pytest.raises(ValueError, match=r"new_speakers\.carl: the talker has no id left"):
        add_speakers(config, {"anna": "ethan", "ben": "chelsie", "carl": "ethan"})
