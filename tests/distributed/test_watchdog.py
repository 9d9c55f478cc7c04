"""A rank that never arrives is named by those that wait for it, and the job ends within its limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from omniloom.exit_codes import HUNG

BODY = """
import sys, time
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.mesh import build_layout, init_distributed
from omniloom.parallel.watchdog import Watchdog

ranks = init_distributed(timeout_seconds=120)
layout = build_layout(Degrees(shard=2), ranks)
watchdog = Watchdog(ranks, timeout_seconds=float(sys.argv[1]))
watchdog.enter(5, "forward")
layout.barrier()
if ranks.rank == 1:
    watchdog.enter(6, "waiting for data")
    time.sleep(100)
watchdog.enter(7, "forward")
layout.barrier()
"""


def test_a_rank_stuck_in_its_data_ends_the_job_and_is_named(tmp_path: Path) -> None:
    body = tmp_path / "body.py"
    body.write_text(BODY)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["PYTHONPATH"] = str(Path(__file__).parents[2])
    start = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(body), "3"],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    reports = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert time.monotonic() - start < 60  # start-up included; the sleep alone is 100 s
    # whoever's limit passes first reports; the store, and with it the other's report, may end with rank 0
    assert HUNG in {rank.returncode for rank in ranks}, reports
    assert any("rank 1 is behind, at step 6" in report and "waiting for data" in report for report in reports), reports
