"""Two ranks with different working directories, as on two nodes: one run directory for all, or a refusal by all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BODY = """
import errno, fcntl, json, sys
import torch.distributed as dist
from omniloom.checkpoint.run_lock import hold_run_lock

def without_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")

dist.init_process_group("gloo")
said = []
for run_dir, locks in (("runs/a", True), (sys.argv[1], True), (sys.argv[1], False)):
    if not locks:
        fcntl.lockf = without_locks
    try:
        with hold_run_lock(run_dir):
            said.append("held")
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]], str]:
    """What each rank was told of a relative directory, of an absolute one, and of one without locks; and the log."""
    folder = tmp_path_factory.mktemp("nodes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    ranks = []
    for rank in range(2):
        (folder / f"node_{rank}").mkdir()
        command = [sys.executable, "-c", BODY, str(folder / "shared")]
        options = {"cwd": folder / f"node_{rank}", "env": {**shared, "RANK": str(rank)}}
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options))
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return folder, [json.loads(out) for out, _ in outputs], outputs[0][1]


def test_a_directory_that_not_all_ranks_see_is_refused_by_all_and_says_where_each_looked(said) -> None:
    folder, told, _ = said
    assert told[0][0] == told[1][0]
    assert told[0][0].startswith("train.run_dir=runs/a is not one directory for all ranks: what rank 0 on ")
    assert f"wrote in {folder}/node_0/runs/a is not seen by rank 1 on " in told[0][0]
    assert f" in {folder}/node_1/runs/a. Name a directory that all nodes share" in told[0][0]
    assert not (folder / "node_1" / "runs").exists()


def test_one_that_all_see_is_held_and_nothing_is_left_in_it(said) -> None:
    folder, told, _ = said
    assert [rank[1] for rank in told] == ["held", "held"]
    assert os.listdir(folder / "shared") == ["run.lock"]


def test_a_file_system_without_locks_is_warned_of_once_and_the_run_goes_on(said) -> None:
    _, told, log = said
    assert [rank[2] for rank in told] == ["held", "held"]
    assert log.count("offers no locks (No locks available)") == 1
