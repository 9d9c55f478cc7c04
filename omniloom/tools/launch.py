"""Ranks without torchrun: start those of this machine, pass signals on, end together, and say whose fault it was.

Under torchrun (LOCAL_RANK is set), as a task of Slurm's that is a rank itself, or with one rank nothing is started and
the verb runs here. A rank is `python -m omniloom.tools.launch DESCRIPTOR VERB ...` and ends when the pipe at that
descriptor does, since the launcher has died in whatever way; the first one has the launcher's standard input, which may
be data. Ranks of other machines are met at the store that rank 0 keeps; that one of them is gone is noticed by the
ranks themselves.
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import IO

from omniloom.exit_codes import HUNG, LOST_RANK

GRACE_SECONDS = 20.0  # between asking ranks to stop and killing them
SLURM_PORTS = range(20000, 30000)  # of a job without --rdzv-endpoint, by its number


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the command line says of ranks; None is what it leaves open."""

    nproc: int | None = None  # ranks of this machine
    nnodes: int | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None  # HOST:PORT on the machine of node 0

    @property
    def given(self) -> list[str]:
        return ["--" + name.replace("_", "-") for name, value in vars(self).items() if value is not None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The ranks that are here, `first` to `first + count - 1` of `world`, and where all of them meet."""

    first: int
    count: int
    world: int
    host: str
    port: int

    def environment(self, local_rank: int) -> dict[str, str]:
        """What torch's `env://` rendezvous and the choice of a device read, of one of the ranks here."""
        values = {"RANK": self.first + local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": self.world}
        values |= {"LOCAL_WORLD_SIZE": self.count, "MASTER_PORT": self.port}
        return {"MASTER_ADDR": self.host, **{name: str(value) for name, value in values.items()}}


def launch_or_join(
    run: Callable[[], int], arguments: list[str], launch: Launch, check_world: Callable[[int], object]
) -> int:
    """Call `run` here, or start this machine's ranks with these arguments. Returns the exit code; raises ValueError.

    `check_world` is told the number of ranks before any is started, and raises ValueError where it does not do.
    """
    job, local_rank = find_place(launch, os.environ)
    if job is None:
        return run()
    check_world(job.world)
    if local_rank is None:
        return _launch(arguments, job)
    os.environ.update(job.environment(local_rank))
    return run()


def find_place(launch: Launch, environment: Mapping[str, str]) -> tuple[Job | None, int | None]:
    """The job whose ranks are to be started here; or one that this process is a rank of, and which of its machine.

    No job: this process is a rank already, or the only one. Raises: ValueError for what does not go together.
    """
    for name, value in vars(launch).items():
        if isinstance(value, int) and value < (name != "node_rank"):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: expected at least {int(name != 'node_rank')}, got {value}")
    if "LOCAL_RANK" in environment or ("RANK" in environment and not launch.given):
        if launch.given:
            raise ValueError(
                f"{', '.join(launch.given)} is for ranks that are started from here, but torchrun already started them "
                "(RANK and LOCAL_RANK are set); leave it out"
            )
        if "RANK" in environment and (rank := _number(environment, "RANK")) >= _number(environment, "WORLD_SIZE"):
            raise ValueError(f"RANK: expected less than WORLD_SIZE={environment['WORLD_SIZE']}, got {rank}")
        return None, None
    if launch.nnodes is None and _number(environment, "SLURM_STEP_NUM_TASKS", "1") > 1:
        return _join_slurm(launch, environment)
    if launch.nnodes is None and "SLURM_STEP_ID" not in environment and _number(environment, "SLURM_NNODES", "1") > 1:
        raise ValueError(
            f"Slurm gave this job {environment['SLURM_NNODES']} machines, but the command was started on one of them "
            "alone; put `srun --ntasks-per-node=1` before it, with --nproc for a machine's ranks, or say --nnodes 1"
        )
    return _of_options(launch), None


def _of_options(launch: Launch) -> Job | None:
    count, nnodes = launch.nproc or 1, launch.nnodes or 1
    if launch.node_rank is not None and launch.node_rank >= nnodes:
        raise ValueError(f"--node-rank: expected 0 to {nnodes - 1} of --nnodes {nnodes}, got {launch.node_rank}")
    if nnodes == 1 and launch.rdzv_endpoint is None:
        return Job(first=0, count=count, world=count, host="127.0.0.1", port=_free_port()) if count > 1 else None
    if lacking := [name for name in ("nnodes", "nproc", "node_rank", "rdzv_endpoint") if getattr(launch, name) is None]:
        raise ValueError(
            f"{' '.join('--' + name.replace('_', '-') for name in lacking)}: not given; for several machines say on "
            "each --nnodes N, --nproc K for its ranks, --node-rank with its number from 0, and --rdzv-endpoint "
            "HOST:PORT with a free port of machine 0, the same everywhere"
        )
    host, port = _split_endpoint(launch.rdzv_endpoint or "")
    return Job(first=(launch.node_rank or 0) * count, count=count, world=nnodes * count, host=host, port=port)


def _split_endpoint(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--rdzv-endpoint: expected HOST:PORT, as gpu-01:29500, got {endpoint!r}")
    return host.strip("[]"), int(port)


def _join_slurm(launch: Launch, environment: Mapping[str, str]) -> tuple[Job | None, int | None]:
    """As one task of a step of Slurm's: a machine's launcher where --nproc says so, else a rank."""
    tasks, nodes = _number(environment, "SLURM_STEP_NUM_TASKS"), _number(environment, "SLURM_STEP_NUM_NODES")
    if launch.rdzv_endpoint is None:
        number = _number(environment, "SLURM_JOB_ID") + _number(environment, "SLURM_STEP_ID")
        endpoint = f"{first_node(_word(environment, 'SLURM_STEP_NODELIST'))}:{SLURM_PORTS[number % len(SLURM_PORTS)]}"
        launch = replace(launch, rdzv_endpoint=endpoint)
    if launch.nproc is not None:
        if tasks != nodes:
            raise ValueError(
                f"--nproc starts the ranks of a machine, but srun started {tasks} tasks on {nodes}; leave --nproc out, "
                "and each task is a rank, or give srun --ntasks-per-node=1"
            )
        return _of_options(replace(launch, nnodes=nodes, node_rank=_number(environment, "SLURM_NODEID"))), None
    if launch.node_rank is not None:
        raise ValueError("--node-rank: Slurm numbers the machines of this step (SLURM_NODEID is set); leave it out")
    host, port = _split_endpoint(launch.rdzv_endpoint or "")
    rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    name = "SLURM_STEP_TASKS_PER_NODE"  # as "8(x4)": of the first machine
    count = _number({name: re.split(r"[(,]", _word(environment, name))[0]}, name)
    job = Job(first=rank, count=count, world=tasks, host=host, port=port)
    return replace(job, first=job.first - local_rank), local_rank


def _word(environment: Mapping[str, str], name: str, usual: str = "") -> str:
    """A variable that a launcher sets. Raises: ValueError."""
    if not (found := environment.get(name, usual)):
        raise ValueError(f"{name}: not set, though others of the same launcher are; start through srun or torchrun")
    return found


def _number(environment: Mapping[str, str], name: str, usual: str = "") -> int:
    if not (found := _word(environment, name, usual)).isdecimal():
        raise ValueError(
            f"{name}: expected a whole number, got {found!r}; it is the launcher's to set (srun, torchrun)"
        )
    return int(found)


def first_node(nodes: str) -> str:
    """The first name of a list of Slurm's, as `gpu[003-006,009],login`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else nodes


def _launch(arguments: list[str], job: Job) -> int:
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // job.count)), **os.environ}
    ranks: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes] | None] = []
    lifeline, _ = os.pipe()  # whose other end goes with this process
    for local_rank in range(job.count):
        log = None if local_rank == 0 else tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-m", "omniloom.tools.launch", str(lifeline), *arguments]
        ranks.append(
            subprocess.Popen(
                command,
                env={**environment, **job.environment(local_rank)},
                stdin=None if local_rank == 0 else subprocess.DEVNULL,
                pass_fds=[lifeline],
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
    return _explain([process.returncode for process in ranks], logs, ended_here, job.first)


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


def _explain(codes: list[int], logs: list[IO[bytes] | None], ended_here: set[int], first_rank: int = 0) -> int:
    """Say what the first rank here, whose words went to the terminal, has not said. Returns the exit code."""
    failed = [rank for rank, code in enumerate(codes) if code != 0 and rank not in ended_here]
    at_fault = [rank for rank in failed if codes[rank] != LOST_RANK] or failed
    if not at_fault:
        return 0
    first = at_fault[0]
    if codes[first] < 0:
        print(f"error: rank {first_rank + first} was ended by {signal.Signals(-codes[first]).name}", file=sys.stderr)
    log = logs[first]
    if log is not None:
        log.seek(0)
        text = log.read().decode(errors="replace").strip()
        if text:
            print(f"rank {first_rank + first}: " + "\n".join(text.splitlines()[-20:]), file=sys.stderr)
    return _shell_code(codes[first])


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_launcher(lifeline: int) -> None:
    """The pipe reaches its end when the launcher is gone, however it went."""
    os.read(lifeline, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_launcher, args=(int(sys.argv.pop(1)),), daemon=True).start()
    from omniloom.cli import main

    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        # all is written and closed: threads of gloo that are still ending would abort an interpreter that ends, too
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
