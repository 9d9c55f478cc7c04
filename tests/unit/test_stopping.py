"""What asks a run to stop is heard once, by name; a second Ctrl-C ends the process whatever its main thread does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omniloom.exit_codes import INTERRUPTED, STOPPED_EARLY
from omniloom.run.stopping import SAME_KEY_SECONDS, STOP_SIGNALS, StopRequest, StopWanted, write_stopped


def wait_for_reason(stop: StopRequest) -> str | None:
    deadline = time.monotonic() + 5
    while stop.reason is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return stop.reason


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_asks_to_stop_by_its_name_and_handlers_come_back(number: signal.Signals) -> None:
    before, said = signal.getsignal(number), []
    with StopRequest(None, said.append) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert wait_for_reason(stop) == number.name
        assert said[0].startswith(f"{number.name}: stopping after the step under way")
    assert signal.getsignal(number) == before


DEADLOCKED = """
import ctypes
from omniloom.run.stopping import StopRequest

with StopRequest(None, lambda words: print(words, flush=True)):
    mutex = ctypes.create_string_buffer(64)  # as PTHREAD_MUTEX_INITIALIZER
    print("ready", flush=True)
    for _ in range(2):  # as a collective whose peer is gone: nothing of Python runs in this thread any more
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_the_second_ctrl_c_ends_a_process_whose_main_thread_is_held_in_native_code() -> None:
    process = subprocess.Popen([sys.executable, "-c", DEADLOCKED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # at once: one keystroke that arrived twice
    assert "Ctrl-C again leaves at once" in process.stdout.readline()
    time.sleep(2 * SAME_KEY_SECONDS)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == INTERRUPTED
    process.stdout.close()


WAITING = """
import ctypes, sys, threading
from omniloom import cli
from omniloom.tools import launch

def wait(*_):  # as for the ranks of another machine
    threading.Timer(0.2, lambda: print("ready", flush=True)).start()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

launch.launch_or_join = wait
sys.argv = ["omniloom", "train", "model.path=m"]
cli.main()
"""


def test_ctrl_c_ends_a_run_that_has_not_begun_and_waits_in_native_code() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(10) == -signal.SIGINT
    finally:
        process.kill()
        process.stdout.close()


def test_the_time_limit_counts_from_the_first_step() -> None:
    with StopRequest(1e-9, print) as stop:
        assert stop.reason is None
        stop.start_clock()
        assert wait_for_reason(stop) == "time limit"


def test_what_stopped_a_run_is_a_file_for_its_scheduler(tmp_path: Path) -> None:
    write_stopped(tmp_path, reason="SIGUSR1", step=12)
    record = json.loads((tmp_path / "stopped.json").read_text())
    assert {key: record[key] for key in ("reason", "step", "exit_code")} == {
        "reason": "SIGUSR1", "step": 12, "exit_code": 75}  # fmt: skip
    assert os.listdir(tmp_path) == ["stopped.json"]


def test_an_error_that_waited_is_told_beside_the_one_that_ends_the_run() -> None:
    stop = StopRequest(None, print)
    assert stop.attempt(lambda: 1 // 0) is None
    assert stop.reason == "ZeroDivisionError: integer division or modulo by zero"
    assert stop.is_wanted()
    with pytest.raises(ValueError, match="could not save") as told, stop:
        raise ValueError("could not save step 3")
    assert told.value.__notes__ == ["before that: ZeroDivisionError: integer division or modulo by zero"]


def test_an_error_after_the_last_agreement_is_raised_at_the_end() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest(None, print) as stop:
        stop.attempt(lambda: 1 // 0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_error_of_what_all_ranks_take_part_in_waits_on_a_lone_rank_alone() -> None:
    alone = StopRequest(None, print)
    assert alone.compute(lambda: 7, "in step 1") == 7
    assert alone.compute(lambda: 1 // 0, "in step 2") is None
    assert isinstance(alone.fault, ZeroDivisionError)
    assert alone.fault.__notes__ == ["in step 2"]

    one_of_two = StopRequest(None, print, lambda value: [value, None])
    with pytest.raises(ZeroDivisionError) as told:  # the other one waits in a collective, and would for ever
        one_of_two.compute(lambda: 1 // 0, "in step 2")
    assert told.value.__notes__ == ["in step 2"]
    assert one_of_two.fault is None

    def stops() -> None:
        raise StopWanted

    assert one_of_two.compute(stops, "in an evaluation") is None
    assert one_of_two.fault is None


@pytest.mark.parametrize(("step", "words"), [(0, "step 0; "), (3, "step 3, which is saved; ")])
def test_a_run_that_stops_says_what_is_saved(tmp_path: Path, step: int, words: str) -> None:
    said = []
    with StopRequest(1e-9, said.append) as stop:
        stop.start_clock()
        assert wait_for_reason(stop) == "time limit"
        assert stop.leave(tmp_path, step, "none") == STOPPED_EARLY
    assert said == [f"time limit: stopped after {words}checkpoint.resume=auto goes on from there"]
    assert json.loads((tmp_path / "stopped.json").read_text())["step"] == step
