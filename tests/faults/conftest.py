"""One tiny checkpoint for all tests of faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omniloom.tools.tiny import make_tiny

TEXT = "thinker_config.text_config"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    sizes = {f"{TEXT}.num_hidden_layers": 1, f"{TEXT}.num_experts": 2, f"{TEXT}.num_experts_per_tok": 1}
    return make_tiny("qwen3_omni", tmp_path_factory.mktemp("tiny") / "model", num_words=300, overrides=sizes)


def write_rows(path: Path, num_rows: int) -> Path:
    """Text rows of several lengths, about 20 to 40 tokens each."""
    rows = []
    for n in range(num_rows):
        answer = {"role": "assistant", "content": f"It is {n}, " + "yes " * (n % 6)}
        rows.append({"id": str(n), "messages": [{"role": "user", "content": f"What is {n}?"}, answer]})
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def words(tmp_path, checkpoint) -> list[str]:
    """A command that trains on text alone, a few milliseconds a step; tests append what they want otherwise."""
    return [
        *(f"model.path={checkpoint}", "model.modalities=[text]", "model.dtype=float32"),
        *(f"data.train={write_rows(tmp_path / 'rows.json', 90)}", "data.pack_tokens=128", "data.workers=0"),
        *(f"data.cache_dir={tmp_path / 'cache'}", "data.window=16"),
        *(f"train.run_dir={tmp_path / 'run'}", "train.packs_per_step=1", "train.learning_rate=1e-3"),
        *("checkpoint.every=1", "checkpoint.export=false", "log.tensorboard=false"),
    ]
