"""Fewer machines come back: the same command chooses another layout and goes on with the same rows."""

from __future__ import annotations

import pytest

from tests.faults.test_kills import with_values
from tests.faults.test_stops import losses
from tests.run_server import read_events


def test_two_ranks_go_on_from_four_in_a_layout_of_their_own(server, words, tmp_path) -> None:
    """Four ranks on two packs a step must share packs, two need not."""
    words = with_values(words, parallel="auto", train__packs_per_step="2", train__schedule="constant")
    expected = tmp_path / "expected"
    of_six = with_values(words, train__steps="6")
    assert server.run(with_values(of_six, train__run_dir=str(expected)), expected).wait() == [0]
    four = server.run(with_values(words, train__steps="3"), tmp_path, num_ranks=4)
    assert set(four.wait()) == {0}, four.tail()
    assert "layout shard 2 x " in four.log()
    two = server.run(of_six, tmp_path, num_ranks=2)
    assert set(two.wait()) == {0}, two.tail()
    assert "layout shard 2: " in two.log()
    assert "resumed after step 3" in two.log()
    assert [event["rows"] for event in read_events(tmp_path)] == [event["rows"] for event in read_events(expected)]
    assert losses(tmp_path / "run") == pytest.approx(losses(expected), rel=1e-5)
