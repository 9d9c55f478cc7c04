"""The files for clusters are sound, and start the command with options and keys that there are."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from omniloom.tools.launch import Launch, find_place

FOLDER = Path(__file__).parents[2] / "recipes/clusters"
FILES = sorted(FOLDER.iterdir())
VALUES = {
    "$WORLD_SIZE": "4",
    "$RANK": "3",
    "$JOB_COMPLETION_INDEX": "3",
    "$MASTER_ADDR": "master",
    "$MASTER_PORT": "23456",
}
TASK = {  # of srun, as slurm.sbatch asks for it
    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NODEID": "3", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_for_a_cluster_can_be_read(path: Path) -> None:
    if path.suffix == ".yaml":
        assert all(document["kind"] for document in yaml.safe_load_all(path.read_text()))
    else:
        assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "torchrun.sh"], ids=lambda path: path.name)
def test_the_fourth_machine_starts_the_last_eight_ranks(path: Path) -> None:
    text = re.sub(r"\\?\n\s*", " ", path.read_text())
    (command,) = re.findall(r"omniloom train [^&\n]*?--(?:nproc 8(?! --)|rdzv-endpoint \S+)", text)
    for name, value in VALUES.items():
        command = command.replace(name, value)
    words = iter(shlex.split(command))
    options = {word: next(words) for word in words if word.startswith("--")}
    launch = Launch(
        nproc=int(options["--nproc"]),
        nnodes=int(options["--nnodes"]) if "--nnodes" in options else None,
        node_rank=int(options["--node-rank"]) if "--node-rank" in options else None,
        rdzv_endpoint=options.get("--rdzv-endpoint"),
    )
    job, _ = find_place(launch, TASK if path.suffix == ".sbatch" else {"RANK": "3", "WORLD_SIZE": "4"})
    assert job is not None
    assert (job.first, job.count, job.world) == (24, 8, 32)
