"""The walks at the start of docs/architecture.md: which files a sample and a parameter pass, by what runs and sees."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import omniloom
from omniloom.checkpoint.hf import gather_full
from omniloom.config import load_config
from omniloom.keymap import KeyMap, Rule
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.mesh import build_layout, close_distributed, init_distributed
from omniloom.run import trainer
from omniloom.run.opening import build_model, load_weights, open_workshop
from omniloom.run.results import export_model
from omniloom.run.trained_media import TrainedMedia
from omniloom.tools.tiny import make_tiny
from omniloom.types import Conversation, Example, LoadedPack, PackedBatch

PACKAGE = Path(omniloom.__file__).parent
NOT_COUNTED = {"types.py", "config.py", "options.py"}
MOST_FILES_OF_A_SAMPLE = 20
MOST_FILES_OF_A_PARAMETER = 12
DOCUMENT = PACKAGE.parent / "docs" / "architecture.md"


def files_that_see(sees: Callable[[Any], bool], work: Callable[[], None]) -> set[str]:
    """Files of the package with a function that holds, in a local variable, or returns something that `sees` knows."""
    found: set[str] = set()
    prefix = f"{PACKAGE}/"

    def look(frame: FrameType | None, returned: Any = None) -> None:
        if frame is None or not frame.f_code.co_filename.startswith(prefix):
            return
        file = frame.f_code.co_filename[len(prefix) :]
        if file not in found and file not in NOT_COUNTED and any(map(sees, [*frame.f_locals.values(), returned])):
            found.add(file)

    def profile(frame: FrameType, event: str, argument: object) -> None:
        look(frame, argument if event == "return" else None)
        if event == "call":
            look(frame.f_back)  # in the middle of its loop

    threading.setprofile(profile)  # of the threads that will be started
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {file for file in found if file not in NOT_COUNTED and not file.endswith("__init__.py")}


def listed_files(walk: str) -> set[str]:
    section = DOCUMENT.read_text(encoding="utf-8").partition(f"**{walk}")[2].partition("\n\n")[0]
    return set(re.findall(r"^\d+\. `([^`]+)`", section, flags=re.MULTILINE))


def test_a_sample_passes_twenty_files_at_most_from_its_file_to_its_loss(tmp_path: Path) -> None:
    """A row of text, by its words, its turns, its tensors and its hidden rows; `ops` are the layers' arithmetic."""
    make_tiny("qwen3_vl", tmp_path / "model")
    word, pack_tokens = "zebra", 307  # found nowhere else
    row = {"id": word, "query": f"a {word}?", "response": f"a {word}."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    options = {"train.steps": 1, "train.packs_per_step": 1, "data.workers": 0, "data.pack_tokens": pack_tokens}
    options |= {"checkpoint.every": 0, "checkpoint.export": "false", "log.tensorboard": "false"}
    paths = {"model.path": "model", "data.train": "rows.jsonl", "train.run_dir": "run"}
    words = [
        *(f"{key}={tmp_path / name}" for key, name in paths.items()),
        *(f"{key}={v}" for key, v in options.items()),
    ]

    def sees(value: Any) -> bool:
        if isinstance(value, str | bytes):
            return (word if isinstance(value, str) else word.encode()) in value
        if isinstance(value, Conversation | Example):
            return value.id == word
        if isinstance(value, PackedBatch):
            return word in value.sample_ids
        if isinstance(value, LoadedPack):
            return sees(value.batch)
        if isinstance(value, dict):
            return value.get("id") == word
        if isinstance(value, list | tuple):
            return len(value) < 20 and any(map(sees, value))
        return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[:1] == (pack_tokens,)

    files = files_that_see(sees, lambda: trainer.run(load_config(None, words)))
    files = {file for file in files if not file.startswith("ops/")}
    assert files == listed_files("A sample")
    assert len(files) <= MOST_FILES_OF_A_SAMPLE


def test_a_parameter_passes_twelve_files_at_most_from_safetensors_to_export(tmp_path: Path) -> None:
    make_tiny("qwen3_omni", tmp_path / "model")
    # in bfloat16, so that it is sharded
    config = load_config(None, [f"model.path={tmp_path / 'model'}", "model.dtype=bf16"])
    names = {"text.layers.0.attention.q_proj.weight", "thinker.model.layers.0.self_attn.q_proj.weight"}
    rules = {re.sub(r"layers\.0", "layers.{i}", name) for name in names}
    tensors: list[torch.Tensor] = []

    def sees(value: Any) -> bool:
        if isinstance(value, str):
            return value in names
        if isinstance(value, KeyMap):
            return sees(value.rules)
        if isinstance(value, list | tuple):  # of rules, for any layer
            return any(isinstance(rule, Rule) and rule.ours in rules for rule in value)
        return isinstance(value, torch.Tensor) and any(value is tensor for tensor in tensors)

    def walk() -> None:
        workshop = open_workshop(config)
        model, _ = build_model(workshop, layout)
        parameters = dict(model.named_parameters())
        tensors.extend(parameters[name] for name in names if name in parameters)
        load_weights(workshop, model)
        gather = gather_full(parameters)
        export_model(workshop, tmp_path / "hf", list(parameters), gather, media=TrainedMedia(), say=print)

    layout = build_layout(Degrees(), init_distributed(timeout_seconds=30))
    try:
        files = files_that_see(sees, walk)
    finally:
        close_distributed()
    listed = listed_files("A parameter")
    assert files == {file.replace("<family>", "qwen3_omni") for file in listed}
    assert len(files) <= MOST_FILES_OF_A_PARAMETER
