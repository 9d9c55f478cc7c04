"""Talking with what was trained: several turns, media by path, words as they come, settings of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import omniloom
from omniloom.checkpoint.files import read_json
from omniloom.tools import chat as chat_module
from omniloom.tools.chat import HELP, chat
from omniloom.tools.generate import Prompt, Sampling
from omniloom.tools.tiny import make_tiny
from omniloom.tools.trained_model import trained_model
from tests.unit.media_files import picture

GREEDY = Sampling()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has stopped after its last step but one: its model is in a checkpoint alone."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "rows.json").write_text(json.dumps([{"query": f"q{n}", "response": f"r{n}"} for n in range(4)]))
    words = [
        *(f"model.path={make_tiny('qwen3_vl', folder / 'model')}", f"data.train={folder / 'rows.json'}"),
        *("data.workers=0", "data.pack_tokens=64", "train.steps=2", "train.packs_per_step=1", "model.dtype=float32"),
        *("train.learning_rate=1e-2", f"train.run_dir={folder / 'run'}", "log.tensorboard=false"),
        *("data.image.max_pixels=3136", "data.image.min_pixels=1024", "data.system=Be brief."),
    ]
    assert omniloom.train(omniloom.load_config(None, words)) == 0
    return folder / "run"


def test_a_run_is_its_newest_model_with_its_settings_of_media(run_dir: Path) -> None:
    with trained_model(run_dir) as (finished, config):
        assert finished == str(run_dir / "hf")
        assert (config.data.image.max_pixels, config.data.system, config.data.train) == (3136, "Be brief.", ())
    with trained_model(run_dir / "hf") as (exported, config):
        assert (exported, config.data.image.max_pixels) == (str(run_dir / "hf"), 3136)
    done = (run_dir / "finished.json").rename(run_dir / "finished.aside")  # the run goes on: hf/ may be old
    try:
        with trained_model(run_dir) as (newest, config):
            assert newest.startswith(f"{run_dir}/.export_")
            assert config.data.image.max_pixels == 3136
            shards = [path.name for path in Path(newest).glob("*.safetensors")]
            assert all((Path(newest) / name).read_bytes() == (run_dir / "hf" / name).read_bytes() for name in shards)
            assert shards
        assert not Path(newest).exists()
    finally:
        done.rename(run_dir / "finished.json")


def test_turns_media_and_settings_reach_the_model_which_is_loaded_once(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture(0, 40, 40)).save(tmp_path / "a b.png")
    asked: list[Prompt] = []
    answer, loads = chat_module.answer, []
    load = chat_module.load
    monkeypatch.setattr(chat_module, "load", lambda workshop: loads.append(1) or load(workshop))

    def note(model, tokenizer, prompts, sampling, *, streamer):
        asked.append((tokenizer.decode(prompts[0].inputs["input_ids"][0].tolist()), prompts[0]))
        return answer(model, tokenizer, prompts, sampling, streamer=streamer)

    monkeypatch.setattr(chat_module, "answer", note)
    lines = ["hello", f"/image '{tmp_path / 'a b.png'}'", "what is <image>?", "/reset"]
    lines += ["/audio none.wav", "again", "/quit", "x"]
    pieces: list[str] = []
    chat(run_dir, {}, lines=lines, write=pieces.append, sampling=Sampling(max_new_tokens=4))
    assert len(loads) == 1
    assert len(asked) == 3
    first, second, third = (text for text, _ in asked)
    assert "Be brief." in first
    assert first.count("Be brief.") == second.count("Be brief.") == 1
    said = "".join(pieces).splitlines()[0]
    assert "hello" in second
    assert said.strip() in second
    assert "what is <image>?" in second
    assert "pixel_values" in asked[1][1].inputs
    assert "pixel_values" not in asked[0][1].inputs
    assert "hello" not in third
    assert "again" in third
    assert "none.wav: no such file" in "".join(pieces)
    assert len(pieces) > 6  # in pieces, as they come


def test_what_cannot_be_attached_or_obeyed_is_said(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pieces: list[str] = []
    chat(run_dir, {"image": [tmp_path / "bad.png"]}, lines=["look", "/help"], write=pieces.append, sampling=GREEDY)
    assert pieces[0].startswith("not asked: ")
    assert "bad.png" in pieces[0]
    assert pieces[1] == f"{HELP}\n"


def test_drawing_follows_its_seed_and_odd_options_are_refused(run_dir: Path) -> None:
    def drawn(seed: int) -> str:
        return omniloom.generate(run_dir, "say", max_new_tokens=12, temperature=2.0, top_k=40, seed=seed)

    assert drawn(1) == drawn(1)
    assert len({drawn(1), drawn(2), omniloom.generate(run_dir, "say", max_new_tokens=12)}) > 1
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"top_p": 0.9}):
        with pytest.raises(ValueError, match=r"--top-p"):
            Sampling(**options)


def test_training_goes_on_from_a_run(run_dir: Path, tmp_path: Path) -> None:
    words = [
        *(f"model.path={run_dir}", f"data.train={run_dir.parent / 'rows.json'}", "policy.text.lora.rank=2"),
        *("data.workers=0", "data.pack_tokens=64", "train.steps=1", "train.packs_per_step=1", "model.dtype=float32"),
        *(f"train.run_dir={tmp_path / 'next'}", "log.tensorboard=false", "checkpoint.export=false"),
    ]
    assert omniloom.train(omniloom.load_config(None, words)) == 0
    base = read_json(tmp_path / "next" / "adapter" / "adapter_config.json")["base_model_name_or_path"]
    assert base == str(run_dir / "hf")
    own = omniloom.load_config(None, [*words[:-3], f"train.run_dir={run_dir}"])
    with pytest.raises(ValueError, match="--overwrite would remove"):
        omniloom.train(own, overwrite=True)


def test_a_run_is_read_from_elsewhere_than_it_was_started(run_dir: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_dir, tmp_path / "run")
    config, starts = run / "config.yaml", run / "starts.jsonl"
    config.write_text(config.read_text().replace(str(run_dir.parent / "model"), "model"))
    start = json.loads(starts.read_text())
    with pytest.raises(ValueError, match="no such model directory: model"):
        omniloom.export(run, tmp_path / "out")
    starts.write_text(json.dumps(start | {"folder": str(run_dir.parent)}) + "\n")
    omniloom.export(run, tmp_path / "out")
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert shards
    assert all(shard.read_bytes() == (run_dir / "hf" / shard.name).read_bytes() for shard in shards)
