"""Checkpoints of several ranks: any layout resumes any other, exports are the same bytes, one rank's fault is all's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_ranks import published_shapes
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).with_name("checkpoint_ranks.py")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """All scenarios, run once: a folder each, and what their ranks said."""
    directory = tmp_path_factory.mktemp("ranks")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in published_shapes().items()}
    (directory / "layouts" / "model").mkdir(parents=True)
    save_file(tensors, directory / "layouts" / "model" / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    return directory, result.stderr[-4000:]


def test_any_layout_resumes_any_other_and_exports_the_same_bytes(outcome):
    directory, said = outcome
    directory = directory / "layouts"
    assert (directory / "passed").exists(), said
    exported = {
        name: (directory / f"hf_{name}" / "model.safetensors").read_bytes()
        for name in ("plain", "fsdp", "mixed", "strided")
    }
    assert exported["plain"] == exported["fsdp"] == exported["mixed"] == exported["strided"]
    source = load_file(directory / "model" / "model.safetensors")
    written = load_file(directory / "hf_plain" / "model.safetensors")
    assert torch.equal(written["talker.weight"], source["talker.weight"])
    assert not torch.equal(written["thinker.embed.weight"], source["thinker.embed.weight"])


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_the_next_save_works(outcome):
    assert (outcome[0] / "failing_rank" / "passed").exists(), outcome[1]


def test_all_ranks_fall_back_to_the_same_checkpoint_whoever_sees_the_damage(outcome):
    assert (outcome[0] / "damaged_file" / "passed").exists(), outcome[1]


def test_a_save_into_directories_that_not_all_ranks_see_never_counts(outcome):
    assert (outcome[0] / "parted_directories" / "passed").exists(), outcome[1]


def test_what_a_rank_killed_inside_a_save_leaves_never_counts(outcome):
    assert (outcome[0] / "killed_rank" / "passed").exists(), outcome[1]
