"""What ends a run before its last step: signals and the time limit, and `stopped.json`, which tells a scheduler why.

Under torchrun the exit code of a rank becomes the agent's 1, so the file is what a scheduler can rely on. Knows no step
and no other rank: the trainer asks for `reason` after each step and agrees on it with the others.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from omniloom.checkpoint.files import write_json
from omniloom.exit_codes import INTERRUPTED, STOPPED_EARLY

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what Slurm's --signal=USR1 warns with
SAME_KEY_SECONDS = 0.25  # a Ctrl-C that reaches a rank twice, from the terminal and from its launcher, is one
STOPPED = "stopped.json"


class StopWanted(Exception):
    """A rank was asked to stop where work may be left undone; raised on all ranks alike."""


class StopRequest:
    """Whether this rank was asked to stop, by a signal or by the time limit. Used as a context manager.

    A thread reads signals from Python's wake-up descriptor, since a main thread that waits in a collective runs no
    handler: a second Ctrl-C must end the process even then. Outside of the main thread signals stay as they are.
    """

    def __init__(self, time_limit_minutes: float | None, say: Callable[[str], None]) -> None:
        self._limit_minutes, self._say = time_limit_minutes, say
        self._deadline = math.inf  # until the clock is started
        self._signal: str | None = None
        self._interrupted: float | None = None  # when the first Ctrl-C came

    def start_clock(self) -> None:
        """The time limit counts from here."""
        if self._limit_minutes is not None:
            self._deadline = time.monotonic() + 60 * self._limit_minutes

    @property
    def reason(self) -> str | None:
        """The name of the first signal that came, or "time limit"; None as long as the run is to go on."""
        return self._signal or ("time limit" if time.monotonic() > self._deadline else None)

    def __enter__(self) -> StopRequest:
        self._previous = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        receiving, self._sending = os.pipe()
        os.set_blocking(self._sending, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._sending, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _do_nothing) for number in STOP_SIGNALS}
        threading.Thread(target=self._watch, args=(receiving,), name="stop-signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        os.close(self._sending)  # the thread comes to the end of its pipe

    def _watch(self, receiving: int) -> None:
        while received := os.read(receiving, 1):
            number = received[0]
            if number in STOP_SIGNALS:
                self._note(signal.Signals(number))
        os.close(receiving)

    def _note(self, number: signal.Signals) -> None:
        now, first = time.monotonic(), self._interrupted
        if number == signal.SIGINT:
            if first is not None and now - first > SAME_KEY_SECONDS:
                os._exit(INTERRUPTED)
            self._interrupted = first or now
        if self._signal is None:
            self._signal = number.name
            again = "; Ctrl-C again leaves at once, without saving" if number == signal.SIGINT else ""
            self._say(f"{number.name}: stopping after the step under way{again}")


def write_stopped(run_dir: Path, *, reason: str, step: int) -> None:
    """Say in `stopped.json` why the run is not over and how many steps are done and saved."""
    record = {"reason": reason, "step": step, "exit_code": STOPPED_EARLY, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(run_dir / STOPPED, record, indent=None)


def _do_nothing(_number: int, _frame: object) -> None:
    """A handler must be set for a signal to reach the wake-up descriptor."""
