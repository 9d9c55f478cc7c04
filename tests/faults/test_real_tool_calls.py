"""Tool calls on real rows: train on them through `omniloom train`, and transformers' `generate` makes the calls.

Rows are the shortest of `glaive_toolcall_zh_100.json` and the tool-call example of the guides with a real sound in the
place of its own. Skipped where they are not at hand (`../shared`); nothing of them is copied here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from omniloom.config import DataConfig
from omniloom.data.sources import open_sources
from omniloom.tools.generate import Sampling, answer, load_model, open_reader, read_prompts
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines

SHARED = Path(__file__).parents[3] / "shared"
GLAIVE = SHARED / "real" / "glaive_toolcall_zh_100.json"
GUIDE = SHARED / "guides" / "qwen3_omni_later_guide.zh.md"
NUM_ROWS, STEPS = 8, 160
pytestmark = [
    pytest.mark.full,  # `test_four_tasks.py` has calls that it writes itself
    pytest.mark.skipif(not (GLAIVE.is_file() and GUIDE.is_file()), reason="the real rows are not at hand"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A folder with `glaive.json`, `guide.json`, and `calls.json`: the same rows up to their first tool call."""
    folder = tmp_path_factory.mktemp("rows")
    glaive = [row for row in json.loads(GLAIVE.read_text()) if any(t["from"] == "function_call" for t in _turns(row))]
    glaive = sorted(glaive, key=lambda row: len(json.dumps(row)))[:NUM_ROWS]
    text = GUIDE.read_text()
    inside = text.index("register_vaccine_appointment")
    guide = json.loads(text[text.rindex("\n{\n", 0, inside) : text.index("\n}\n", inside) + 3])
    assert isinstance(guide["audios"], str)  # and no placeholder: as the guide prints it
    guide["audios"] = str(SHARED / "real" / "mllm_demo_data" / "3.flac")
    calls = []
    for row in (*glaive, guide):
        turns, named = _turns(row), "conversations" if "conversations" in row else "messages"
        calls.append({**row, named: turns[: 1 + next(i for i, turn in enumerate(turns) if _is_call(turn))]})
    for name, of_file in (("glaive", glaive), ("guide", [guide]), ("calls", calls)):
        (folder / f"{name}.json").write_text(json.dumps(of_file, ensure_ascii=False))
    return folder


def _turns(row):
    return row.get("conversations") or row["messages"]


def _is_call(turn):
    return turn.get("from") == "function_call" or turn.get("role") == "tool_call"


@pytest.fixture(scope="module")
def trained(rows, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "run"
    words = [
        f"model.path={make_tiny('qwen3_omni', tmp_path_factory.mktemp('model') / 'model')}",
        f"data.train={rows / 'glaive.json'},{rows / 'guide.json'}",
        "data.unplaced_media=front",
        "data.allow_outside_media_dir=true",
        "data.pack_tokens=2048",
        "data.workers=1",
        "model.dtype=float32",
        f"train.run_dir={run_dir}",
        f"train.steps={STEPS}",
        "train.packs_per_step=2",
        "train.learning_rate=8e-3",
        "train.warmup_steps=5",
        "checkpoint.every=0",
        "log.tensorboard=false",
    ]
    command = [sys.executable, "-m", "omniloom.cli", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_tool_calls_are_learnt_and_made(rows, trained) -> None:
    metrics = read_lines(trained / "metrics.jsonl")
    assert sum(line["num_bad_samples"] for line in metrics) == 0
    assert metrics[-1]["loss"] < 0.05
    data = DataConfig(unplaced_media="front", allow_outside_media_dir=True)
    reader = open_reader(trained / "hf", data, open_sources((str(rows / "calls.json"),)))
    processor = reader.processor
    model, sampling = load_model(trained / "hf"), Sampling(max_new_tokens=250)
    answers = answer(model, processor.tokenizer, read_prompts(reader), sampling)
    for row, said in zip(json.loads((rows / "calls.json").read_text()), answers, strict=True):
        turn = _turns(row)[-1]
        wanted = turn.get("value") or turn["content"]
        call = said.removeprefix("<tool_call>").removesuffix("</tool_call>")
        assert json.loads(call) == json.loads(wanted.removeprefix("<tool_call>").removesuffix("</tool_call>"))
