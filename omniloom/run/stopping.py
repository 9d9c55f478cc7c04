"""What ends a run before its last step: signals, the time limit and errors beside the steps, and `stopped.json`.

Under torchrun the exit code of a rank becomes the agent's 1, so the file tells a scheduler of signals and the limit.
Knows no step: the trainer asks after each, and agrees with the other ranks in the sums of the step itself.
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
from typing import Any, TypeVar

from omniloom.checkpoint.files import write_json
from omniloom.exit_codes import INTERRUPTED, LOST_RANK, STOPPED_EARLY
from omniloom.types import RunError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what Slurm's --signal=USR1 warns with
SAME_KEY_SECONDS = 0.25  # a Ctrl-C that reaches a rank twice, from the terminal and from its launcher, is one
STOPPED = "stopped.json"
T = TypeVar("T")


class StopWanted(Exception):
    """A rank was asked to stop where work may be left undone; raised on all ranks alike."""


class LostRankError(RunError):
    """Another rank is gone, for a reason that it tells itself."""

    exit_code = LOST_RANK


class StopRequest:
    """Whether this rank is to stop, by a signal, the time limit or an error that can wait. Used as a context manager.

    A thread reads signals from Python's wake-up descriptor, since a main thread that waits in a collective runs no
    handler: a second Ctrl-C must end the process even then. Outside of the main thread signals stay as they are.
    `exchange` gives every rank's value to every rank; None where there is one.
    """

    def __init__(
        self,
        time_limit_minutes: float | None,
        say: Callable[[str], None],
        exchange: Callable[[Any], list[Any]] | None = None,
    ) -> None:
        self._limit_minutes, self._say, self._is_alone = time_limit_minutes, say, exchange is None
        self._exchange: Callable[[Any], list[Any]] = exchange or (lambda value: [value])
        self._deadline = math.inf  # until the clock is started
        self._signal: str | None = None
        self.fault: Exception | None = None  # the first one, to be raised once all is saved
        self._interrupted: float | None = None  # when the first Ctrl-C came

    def start_clock(self) -> None:
        """The time limit counts from here."""
        if self._limit_minutes is not None:
            self._deadline = time.monotonic() + 60 * self._limit_minutes

    @property
    def reason(self) -> str | None:
        """The error, the name of the first signal that came, or "time limit"; None as long as the run is to go on."""
        if self.fault is not None:
            return f"{type(self.fault).__name__}: {self.fault}"
        return self._signal or ("time limit" if time.monotonic() > self._deadline else None)

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Do what goes on beside the steps: an error in it, which leaves the state whole, stops the run as signals do.

        None where it failed. `work` must not wait for other ranks, which learn of the error when they next agree.
        """
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            self.note(error)
            return None

    def compute(self, work: Callable[[], T], where: str) -> T | None:
        """Do what all ranks take part in and what changes no weights, as gradients and evaluations do.

        None where they were asked to stop meanwhile (StopWanted), and where a rank that is alone failed, which then
        costs no more than `attempt`. Raises: an error with several ranks, whose others wait in a collective.
        """
        try:
            return work()
        except StopWanted:
            return None
        except Exception as error:
            error.add_note(where)
            if not self._is_alone:
                raise
            self.note(error)
            return None

    def note(self, error: Exception) -> None:
        """Stop for an error that this rank has already met."""
        self.fault = self.fault or error

    def is_wanted(self) -> bool:
        """Whether any rank is to stop. Collective."""
        return any(self._exchange(self.reason))

    def has_failed(self) -> bool:
        """Whether any rank is to stop for an error alone. Collective."""
        return any(self._exchange(self.fault is not None))

    def leave(self, run_dir: Path | None, step: int, resume: str) -> int:
        """Say why the run is not over after so many steps, which are saved, and in `stopped.json` of the first rank's
        `run_dir`. Returns the exit code. Collective.

        Raises: the error that is why; LostRankError on ranks that have none.
        """
        told = self._exchange((self.reason, self.fault is not None))
        faults = [f"rank {rank} ended the run: {reason}" for rank, (reason, is_fault) in enumerate(told) if is_fault]
        reason = next(reason for reason, _ in told if reason)
        if run_dir is not None and not faults:
            write_stopped(run_dir, reason=reason, step=step)
        self._exchange(None)  # a launcher may end all ranks as soon as one has ended
        goes_on = "the same command goes" if resume == "auto" else "checkpoint.resume=auto goes"
        where = f"stopped after step {step}{', which is saved' * bool(step)}; {goes_on} on from there"
        if faults:
            error = self.fault or LostRankError(faults[0])
            if step:
                error.add_note(where)
            raise error
        self._say(f"{reason}: {where}")
        return STOPPED_EARLY

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
        """Raises: an error that came too late for `leave`, as of what is written when all steps are done."""
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_descriptor)
            os.close(self._sending)  # the thread comes to the end of its pipe
        if self.fault is None or error is self.fault:
            return
        if error is None:
            raise self.fault
        error.add_note(f"before that: {type(self.fault).__name__}: {self.fault}")  # as of a save that was to come first

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
