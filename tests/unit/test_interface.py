"""The Python interface: what the verbs do, from a script as users write it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import omniloom
from omniloom.tools.tiny import make_tiny

SCRIPT = """
import sys
import omniloom

assert "torch" not in sys.modules
folder = sys.argv[1]
losses, ended = [], []
code = omniloom.train(
    {"model": {"path": folder + "/model", "dtype": "float32"},
      "data": {"train": [folder + "/rows.jsonl"], "workers": 1, "pack_tokens": 64},
      "train": {"run_dir": folder + "/run", "steps": 2, "packs_per_step": 1, "learning_rate": 1e-2},
      "checkpoint": {"export": False}, "log": {"tensorboard": False}},
    on_step=lambda metrics: losses.append(metrics.loss),
    on_end=lambda run_dir: ended.append(run_dir.name),
)
scores, bad = omniloom.score(folder + "/model", folder + "/rows.jsonl", ["data.workers=1", "data.pack_tokens=64"])
print(code, len(losses), losses[1] < losses[0], ended, [score["id"] for score in scores], bad)
"""


def test_an_unguarded_script_trains_and_scores(tmp_path: Path) -> None:
    make_tiny("qwen3_vl", tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "query": "q", "response": "r"}))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 2 True ['run'] ['a'] []"
    assert (tmp_path / "run" / "report.html").is_file()


def test_faults_of_a_dict_are_named_by_their_keys() -> None:
    with pytest.raises(ValueError, match=r"2 faults in the configuration:\n  - .*trian.*did you mean train\?"):
        omniloom.train({"trian": {}, "train": {"steps": 0}})
    assert omniloom.load_config({"train": {"steps": 3}}, ["train.seed=4"]).train.seed == 4


def test_one_path_is_as_good_as_a_list_of_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Sequence[str | Path]]] = []

    def answers(model: str, prompt: str, media: dict[str, Sequence[str | Path]], **options: object) -> list[dict]:
        asked.append(media)
        return [{"answer": "yes"}]

    monkeypatch.setattr("omniloom.tools.generate.answers", answers)
    for image in ("cat.png", Path("cat.png"), ["cat.png"]):
        assert omniloom.generate("model", "what?", image=image) == "yes"
    assert [[str(path) for path in media["image"]] for media in asked] == [["cat.png"]] * 3
