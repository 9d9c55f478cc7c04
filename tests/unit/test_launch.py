"""The launcher ends with its ranks, says whose fault it was once, and returns that rank's code."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest

from omniloom.exit_codes import HUNG, LOST_RANK
from omniloom.tools.launch import _explain, _wait_for_all


def logs(*texts: str) -> list[io.BytesIO | None]:
    """What ranks from 1 on wrote; rank 0 writes to the terminal."""
    return [None, *(io.BytesIO(text.encode()) for text in texts)]


@pytest.mark.parametrize(
    ("codes", "texts", "code", "said"),
    [
        ([0, 0], ["a remark"], 0, ""),
        ([75, 75], [""], 75, ""),
        ([2, 2], ["error: same as rank 0"], 2, ""),
        ([LOST_RANK, 2], ["error: only here"], 2, "rank 1: error: only here\n"),
        ([LOST_RANK, LOST_RANK, -9], ["error: lost", ""], 137, "error: rank 2 was ended by SIGKILL\n"),
        ([LOST_RANK, 1], ["Traceback\nOops"], 1, "rank 1: Traceback\nOops\n"),
        ([1, LOST_RANK], ["error: lost"], 1, ""),
    ],
)
def test_only_what_rank_0_has_not_said_is_shown(codes, texts, code, said, capsys) -> None:
    assert _explain(codes, logs(*texts), ended_here=set()) == code
    assert capsys.readouterr().err == said


def test_a_rank_that_had_to_be_killed_is_not_at_fault(capsys) -> None:
    assert _explain([-9, HUNG], logs("error: rank 0 does not answer"), ended_here={0}) == HUNG
    assert capsys.readouterr().err == "rank 1: error: rank 0 does not answer\n"


def test_who_hangs_is_killed_soon_after_a_watchdog_has_ended_its_rank() -> None:
    start = time.monotonic()
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for code in ("import time; time.sleep(600)", "exit(124)")]
    assert _wait_for_all(ranks) == {0}
    assert time.monotonic() - start < 60
