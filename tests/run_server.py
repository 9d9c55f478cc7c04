"""Starts training runs by forking a process that has everything imported: a run costs what it does, not torch's import.

`RunServer` is used by tests; started as a script, the module is the process that forks. Each run writes one line per
finished step to its events file: which rows were in it. `Hook`s let a run do something to itself at a given step.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAIT_SECONDS = 600.0  # a bound for machines with much else to do


@dataclass(frozen=True, kw_only=True)
class Hook:
    """What the process does to itself once a step is done. `step` counts from 0."""

    step: int
    action: str  # signal (named by `target`, to itself), stop (SIGSTOP), pause (wait for a signal), remove (a file),
    # allocate (bytes)
    target: str = ""
    rank: int = 0


@dataclass(kw_only=True)
class Run:
    """One started run, of one or several ranks."""

    server: RunServer
    pids: list[int]
    folder: Path
    codes: dict[int, int] = field(default_factory=dict)  # by rank

    def wait(self) -> list[int]:
        """Exit codes by rank; negative for signals."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                self.codes[rank] = self.server.ask({"wait": pid})["code"]
        return [self.codes[rank] for rank in range(len(self.pids))]

    def is_over(self, rank: int = 0) -> bool:
        if rank not in self.codes and (code := self.server.ask({"poll": self.pids[rank]})["code"]) is not None:
            self.codes[rank] = code
        return rank in self.codes

    def kill(self, rank: int = 0, number: int = signal.SIGKILL) -> None:
        if not self.is_over(rank):
            os.kill(self.pids[rank], number)

    def log(self, rank: int = 0) -> str:
        return (self.folder / f"log.{rank}").read_text()

    def tail(self, rank: int = 0) -> str:
        """The last lines of the log, for messages of tests."""
        return "\n".join(self.log(rank).splitlines()[-12:])


class RunServer:
    """The tests' side: asks the forking process for runs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.run_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        verb: str = "train",
        num_ranks: int = 1,
        hooks: Sequence[Hook] = (),
        file_bytes: int = 0,
        fsync_seconds: float = 0.0,
    ) -> Run:
        """Start `omniloom VERB WORDS`; logs and events go to `folder`.

        `file_bytes` bounds the files that it may write, `fsync_seconds` is how long its disk takes for each.
        """
        folder.mkdir(parents=True, exist_ok=True)
        environment: dict[str, str] = {}
        if num_ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
            environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        pids = []
        for rank in range(num_ranks):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
            request = {
                "words": [verb, *words],
                "environment": environment | ranks,
                "folder": str(folder),
                "rank": rank,
                "hooks": [asdict(hook) for hook in hooks if hook.rank == rank],
                "file_bytes": file_bytes,
                "fsync_seconds": fsync_seconds,
            }
            pids.append(self.ask(request)["pid"])
        return Run(server=self, pids=pids, folder=folder)

    def run(self, words: Sequence[str], folder: Path, **options: Any) -> Run:
        """Start and wait."""
        run = self.start(words, folder, **options)
        run.wait()
        return run

    def close(self) -> None:
        self._process.communicate()


def read_events(folder: Path) -> list[dict[str, Any]]:
    """One record per step that was done, in the order of doing, over all runs in this folder."""
    path = folder / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_for(condition: Any, what: str) -> None:
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.002)


# ---------------------------------------------------------------------------------------- the forking process


def _serve() -> None:
    import av  # noqa: F401 - imported here once for all runs
    from transformers import Qwen2Tokenizer  # noqa: F401

    import omniloom.families.qwen3_omni.processor
    import omniloom.run.trainer  # noqa: F401

    children: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "words" in request:
            pid = os.fork()
            if pid == 0:
                _run_forked(request)
            children.pop(pid, None)  # of an earlier run that had the same number
            answer = {"pid": pid}
        else:
            pid = request.get("wait", request.get("poll"))
            if pid not in children:
                done, status = os.waitpid(pid, 0 if "wait" in request else os.WNOHANG)
                if done:
                    children[pid] = os.waitstatus_to_exitcode(status)
            answer = {"code": children.get(pid)}
        print(json.dumps(answer), flush=True)


def _run_forked(request: dict[str, Any]) -> None:
    """Be a run: never returns."""
    code: Any = 1
    try:
        folder = Path(request["folder"])
        log = os.open(folder / f"log.{request['rank']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(request["environment"])
        if request["file_bytes"]:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead, as on a full disk
        if request["fsync_seconds"]:
            sync = os.fsync
            os.fsync = lambda handle: (time.sleep(request["fsync_seconds"]), sync(handle))[1]
        _observe_steps(folder, request["rank"], [Hook(**hook) for hook in request["hooks"]])
        sys.argv = ["omniloom", *request["words"]]
        from omniloom import cli

        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 - the log is where the test looks
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _observe_steps(folder: Path, rank: int, hooks: Sequence[Hook]) -> None:
    import torch

    from omniloom.run.trainer import Trainer

    take_step, save = Trainer._step, Trainer._save
    held = 0.0

    def observed_save(self: Any, step: int) -> None:
        nonlocal held
        begin = time.perf_counter()
        save(self, step)
        held = time.perf_counter() - begin

    def observed(self: Any, loaded: Any) -> Any:
        nonlocal held
        begin = time.perf_counter()
        result = take_step(self, loaded)
        seconds = time.perf_counter() - begin
        plan = loaded.plan
        # a step of these models draws nothing by itself, and ranks that the launcher starts are not observed
        draw = float(torch.rand(())) if "RANK" not in os.environ else None
        if rank == 0:
            rows = [[sample.epoch, sample.row] for pack in plan.packs for sample in pack.samples]
            # `held`: how long the save before this step stood in its way
            event = {"step": plan.step, "rows": rows, "draw": draw, "seconds": seconds, "held": held}
            line = json.dumps(event) + "\n"
            held = 0.0
            with (folder / "events.jsonl").open("ab", buffering=0) as stream:
                stream.write(line.encode())
        for hook in hooks:
            if hook.step == plan.step:
                _act(hook)
        return result

    Trainer._step, Trainer._save = observed, observed_save  # of this process only, which does nothing but this run


def _act(hook: Hook) -> None:
    if hook.action == "remove":
        Path(hook.target).unlink()
    elif hook.action == "signal":
        os.kill(os.getpid(), signal.Signals[hook.target])
    elif hook.action == "allocate":
        bytearray(b"1" * int(hook.target))
    elif hook.action == "pause":
        signal.pause()
    elif hook.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise AssertionError(hook.action)


if __name__ == "__main__":
    _serve()
