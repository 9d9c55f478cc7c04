"""Several data sets in one run: their shares, and what metrics, evaluation and report say of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniloom.config import ConfigError, config_to_dict, load_config
from omniloom.run.trainer import run
from omniloom.tools.report import write_report
from omniloom.tools.tiny import make_tiny


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixture")
    make_tiny("qwen3_vl", folder / "model")
    for name, count in (("talk", 60), ("code", 20)):
        rows = [{"query": f"{name} {n}?", "response": f"{n}."} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def tree(*sets: dict[str, Any], **train: Any) -> dict[str, Any]:
        paths = [{**one, "path": str(folder / one["path"])} for one in sets]
        return {
            "model": {"path": str(folder / "model"), "modalities": ["text"], "dtype": "float32"},
            "data": {"train": paths, "pack_tokens": 256, "workers": 0, "window": 16},
            "train": {"run_dir": str(folder / "run"), "packs_per_step": 1, **train},
            "checkpoint": {"export": False, "every": 0},
            "log": {"tensorboard": False},
        }

    return tree


def test_each_set_is_counted_and_evaluated_by_its_name(tree: Callable[..., dict[str, Any]]) -> None:
    talk = {"path": "talk.jsonl", "name": "talk", "weight": 1, "split": 0.1}
    config = load_config(tree(talk, {"path": "code.jsonl", "weight": 3, "split": 0.25}, epochs=1))
    assert load_config(config_to_dict(config)) == config
    lines = []
    assert run(config, lines.append) == 0
    counts = {name: sum(line.samples_of[name] for line in lines) for name in ("talk", "code.jsonl")}
    assert counts == {"talk": 17, "code.jsonl": 52}  # of 54 + 15 rows that are not held out
    last = json.loads((Path(config.train.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["num_samples.talk"] == lines[-1].samples_of["talk"]
    evaluated = json.loads((Path(config.train.run_dir) / "evaluations.jsonl").read_text().splitlines()[-1])
    losses = {name: evaluated[f"eval_set_loss.{name}"] for name in ("talk", "code.jsonl")}
    assert min(losses.values()) < evaluated["eval_loss"] < max(losses.values())
    page = write_report(Path(config.train.run_dir)).read_text()
    assert "code.jsonl 75" in page


def test_weights_are_set_for_all_or_none(tree: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.1\.weight: not set, while other data sets have one"):
        load_config(tree({"path": "talk.jsonl", "weight": 1}, {"path": "code.jsonl"}))
