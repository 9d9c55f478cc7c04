"""Local ranks without torchrun: start N processes, pass signals on, end together, and say whose fault it was.

Under torchrun (RANK is set) or with one rank nothing is started and the verb runs here. A rank is `python -m
omniloom.tools.launch VERB ...`; its standard input is a pipe from the launcher, so that it ends when the launcher dies
in whatever way.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO

from omniloom.exit_codes import HUNG, LOST_RANK

GRACE_SECONDS = 20.0  # between asking ranks to stop and killing them


def launch_or_join(run: Callable[[], int], arguments: list[str], nproc: int | None) -> int:
    """Call `run` here, or start `nproc` local ranks with these arguments. Returns the exit code. Raises: ValueError."""
    if nproc is not None and nproc < 1:
        raise ValueError(f"--nproc: expected at least 1, got {nproc}")
    if "RANK" in os.environ:
        if nproc is not None:
            raise ValueError("--nproc starts ranks of its own, but torchrun already did (RANK is set); leave it out")
        return run()
    if nproc in (None, 1):
        return run()
    assert nproc is not None
    return _launch(arguments, nproc)


def _launch(arguments: list[str], nproc: int) -> int:
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)),
        **os.environ,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes] | None] = []
    for rank in range(nproc):
        log = None if rank == 0 else tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-m", "omniloom.tools.launch", *arguments]
        ranks.append(
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C reaches ranks through here alone, and so once
            )
        )
        logs.append(log)

    def forward(number: int, _frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    forwarded = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, forward) for number in forwarded}
    try:
        ended_here = _wait_for_all(ranks)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return _explain([process.returncode for process in ranks], logs, ended_here)


def _wait_for_all(ranks: list[subprocess.Popen[bytes]]) -> set[int]:
    """Wait for all; once one fails the others get a grace period. Returns the ranks that were ended from here."""
    deadline = math.inf
    ended: set[int] = set()
    while alive := [rank for rank, process in enumerate(ranks) if process.poll() is None]:
        failed = [process.returncode for process in ranks if process.returncode not in (None, 0)]
        if failed and deadline == math.inf:
            deadline = time.monotonic() + (1.0 if HUNG in failed else GRACE_SECONDS)
            if min(failed) < 0:  # who stops by itself (time limit, bad input) leaves the others to do so, too
                ended.update(alive)
                for rank in alive:
                    ranks[rank].terminate()
        if time.monotonic() > deadline:
            ended.update(alive)
            for rank in alive:
                ranks[rank].kill()
        time.sleep(0.05)
    return ended


def _explain(codes: list[int], logs: list[IO[bytes] | None], ended_here: set[int]) -> int:
    """Say what rank 0, whose words went to the terminal, has not said. Returns the exit code of the job."""
    failed = [rank for rank, code in enumerate(codes) if code != 0 and rank not in ended_here]
    at_fault = [rank for rank in failed if codes[rank] != LOST_RANK] or failed
    if not at_fault:
        return 0
    first = at_fault[0]
    if codes[first] < 0:
        print(f"error: rank {first} was ended by {signal.Signals(-codes[first]).name}", file=sys.stderr)
    log = logs[first]
    if log is not None:
        log.seek(0)
        text = log.read().decode(errors="replace").strip()
        if text:
            print(f"rank {first}: " + "\n".join(text.splitlines()[-20:]), file=sys.stderr)
    return _shell_code(codes[first])


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_launcher() -> None:
    """The pipe on standard input reaches its end when the launcher is gone, however it went."""
    os.read(0, 1)  # the bare descriptor: a buffered reader's lock would be in the way of an orderly exit
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    from omniloom.cli import main

    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        # all is written and closed: threads of gloo that are still ending would abort an interpreter that ends, too
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
