"""A checkpoint larger than a process may use loads over several ranks, since each reads only its own slices."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from large_checkpoint_ranks import WORLD
from safetensors.torch import load_file, save_file

from omniloom.checkpoint.hf import CHUNK_BYTES
from omniloom.tools.tiny import make_tiny

SCRIPT = Path(__file__).with_name("large_checkpoint_ranks.py")
MIB = 2**20
VOCAB_SIZE, EXPERT_HIDDEN = 524_288, 6_144  # one embedding is twice what is read at a time
SLACK = 32 * MIB  # headers, names, what the allocator keeps


def enlarge(directory: Path) -> None:
    """Widen vocabulary and experts of a tiny checkpoint in place, in float32: some 360 MiB."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    text = config["thinker_config"]["text_config"]
    widths = {text["vocab_size"]: VOCAB_SIZE}
    expert_widths = {text["moe_intermediate_size"]: EXPERT_HIDDEN}
    text |= {"vocab_size": VOCAB_SIZE, "moe_intermediate_size": EXPERT_HIDDEN}
    path.write_text(json.dumps(config))
    files = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        wider = expert_widths if ".mlp.experts." in name else widths
        shape = [wider.get(size, size) for size in tensor.shape]
        if name.startswith("thinker.") and shape != list(tensor.shape):
            tensors[name] = torch.empty(shape).uniform_(generator=generator)
        else:
            tensors[name] = tensor.float()
    for file in files:
        file.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank saw."""
    directory = tmp_path_factory.mktemp("large")
    model = make_tiny("qwen3_omni", directory / "model")
    enlarge(model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(directory), str(model), str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    (model / "model.safetensors").unlink()  # pytest keeps its folders for a while
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((directory / f"rank_{rank}.json").read_text()) for rank in range(WORLD)]


def test_checkpoint_is_larger_than_what_each_rank_may_use(found: list[dict]) -> None:
    for rank in found:
        assert rank["num_bytes"] > 300 * MIB
        assert not rank["fits"]


def test_every_rank_loads_its_own_slices_under_that_limit(found: list[dict]) -> None:
    for rank in found:
        assert not rank["wrong"]
        assert rank["held"] < 1.02 * rank["num_bytes"] / WORLD


def test_no_rank_ever_holds_more_than_its_slices_and_one_chunk(found: list[dict]) -> None:
    for rank in found:
        assert rank["grown"] < rank["held"] + CHUNK_BYTES + SLACK
        assert rank["grown"] < rank["num_bytes"] / 1.5
