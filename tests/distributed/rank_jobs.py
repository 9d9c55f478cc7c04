"""Starts the ranks of a test's job in processes of their own."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

# by the server that forks the ranks, once: imported by each rank they would cost more than many a case
PRELOADED = ["omniloom.parallel.pipeline", "omniloom.run.opening", "omniloom.tools.tiny"]


def run_ranks(body: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """`body(rank, num_ranks, port, *arguments)` as so many processes; returns when all are through."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    start_processes(body, (num_ranks, port, *arguments), nprocs=num_ranks, start_method="forkserver")
