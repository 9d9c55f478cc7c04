"""Sentences learnt by heart: a thinker learns the words, then the talker alone their sound; transformers says both."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import MimiConfig, MimiModel

import omniloom
from omniloom.config import Config, ModelConfig
from omniloom.run.opening import open_workshop
from omniloom.tools.check_speech import open_vocoder
from omniloom.tools.convert_speech import convert_speech
from omniloom.tools.generate import Sampling
from omniloom.tools.report import write_report
from omniloom.tools.speak import Voice, spoken_answers
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines
from tests.unit.media_files import write_audio

SENTENCES = (
    *("The kettle sings.", "Rain came at noon.", "Nine boats left.", "He paints doors.", "Snow is quiet."),
    *("Turn left here.", "She counts to ten.", "Bread was warm.", "Who rang twice?", "Our train is late."),
)
RATE = 24_000


def make_codec(folder: Path) -> Path:
    """A random codec of codebooks as large as the tiny model's."""
    torch.manual_seed(1)
    small = {"hidden_size": 16, "intermediate_size": 16, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = MimiConfig(num_filters=4, num_quantizers=4, codebook_size=64, upsample_groups=16, **small, **heads)
    MimiModel(config).eval().save_pretrained(folder)
    return folder


def recording(number: int, seconds: float) -> np.ndarray:
    """A glide with noise, another for each number: float32 at RATE."""
    time, rng = np.arange(int(seconds * RATE)) / RATE, np.random.default_rng(number)
    pitch = 150 + 60 * number + 200 * np.sin(2 * np.pi * (1 + number % 4) * time)
    glide = np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
    return (0.4 * glide + 0.1 * rng.standard_normal(len(time))).astype(np.float32)


def write_rows(folder: Path, num_rows: int, seconds: float) -> Path:
    """Rows of codes that a codec made of recordings."""
    rows = []
    for number, sentence in enumerate(SENTENCES[:num_rows]):
        sound = recording(number, seconds * (1 + number % 3 / 4))
        write_audio(folder / f"{number}.wav", "pcm_s16le", RATE, sound[None])
        answer = {"role": "assistant", "content": sentence, "speech": f"{number}.wav"}
        answer["speaker"] = ["Ethan", "Chelsie", "Aiden"][number % 3]
        rows.append({"messages": [{"role": "user", "content": f"Say number {number}."}, answer]})
    (folder / "recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codec = make_codec(folder / "codec")
    target = folder / "spoken.jsonl"
    assert convert_speech(folder / "recorded.jsonl", target, codec, num_groups=4) == (num_rows, [])
    return target


def train(folder: Path, name: str, model: Path, steps: int, **sections: dict[str, Any]) -> Path:
    config: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "dtype": "float32", "modalities": ["text"]},
        "data": {"train": [str(folder / "spoken.jsonl")], "pack_tokens": 1024, "workers": 0},
        "train": {"run_dir": str(folder / name), "steps": steps, "packs_per_step": 1, "learning_rate": 1e-2},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False},
    }
    for section, more in sections.items():
        config[section] = config.get(section, {}) | more
    assert omniloom.train(config) == 0
    return folder / name


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("num_rows", "seconds", "steps"),
    [(3, 0.3, 120), pytest.param(10, 0.8, 500, marks=pytest.mark.full)],
)
def test_sentences_learnt_by_heart_are_said_as_recorded(
    tmp_path: Path, num_rows: int, seconds: float, steps: int
) -> None:
    rows = write_rows(tmp_path, num_rows, seconds)
    model = make_tiny("qwen3_omni", tmp_path / "model", num_words=300)
    thinker = train(tmp_path, "words", model, 60) / "hf"
    held_out = {"data": {"eval": [str(rows)]}, "policy": {"talker": {"freeze": False}}}
    run = train(tmp_path, "sounds", thinker, steps, **held_out)
    metrics = read_lines(run / "metrics.jsonl")
    (evaluation,) = read_lines(run / "evaluations.jsonl")
    assert [evaluation[f"eval_code_accuracy.{group}"] for group in range(4)] == [1.0] * 4, metrics[-1]
    voice = Voice(target=tmp_path / "said", temperature=0, seconds=3)
    lines = list(spoken_answers(run, None, {}, voice, data=rows, sampling=Sampling(max_new_tokens=24)))
    assert [line["answer"] for line in lines] == list(SENTENCES[:num_rows])
    assert [line["num_code_frames"] for line in lines] == [line["expected_frames"] for line in lines]
    assert [line["code_match"] for line in lines] == [1.0] * num_rows
    before, after = weights(thinker), weights(run / "hf")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("talker.") for name in changed)
    vocoder = open_vocoder(open_workshop(Config(model=ModelConfig(path=str(model)))).checkpoint)  # as it was published
    for row, line in zip(map(json.loads, rows.read_text().splitlines()), lines, strict=True):
        codes = torch.from_numpy(np.load(tmp_path / row["messages"][1]["speech"]).astype(np.int64))
        with torch.no_grad():
            expected = vocoder.chunked_decode(codes[None]).flatten().numpy()
        with wave.open(line["speech"]) as file:
            said = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32767
        np.testing.assert_allclose(said, expected.clip(-1, 1), atol=2e-4)  # 16 bits
    page = write_report(run).read_text()
    assert page.count("spectrogram, 80 Hz to 8 kHz") == page.count("data:audio/wav") == num_rows
    assert "100 % of the codes match" in page or "100% of the codes match" in page
