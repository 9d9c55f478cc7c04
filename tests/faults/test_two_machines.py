"""Two machines, each a network namespace with two ranks, joined by a virtual cable that can be pulled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omniloom.exit_codes import HUNG
from omniloom.training.metrics import read_lines
from tests.faults.test_kills import assert_same_end, children_of, with_values
from tests.run_server import ROOT, wait_for

ADDRESSES = ("10.213.7.1", "10.213.7.2")
TIMEOUT_SECONDS = 45  # of a busy machine, too
NUM_STEPS = 60


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Names of two namespaces whose interface is `cable`. Skips where they cannot be made."""
    names = tuple(f"omni{os.getpid()}{letter}" for letter in "ab")
    try:
        made = [ip("netns", "add", name) for name in names]
        ends = ("cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        made.append(ip("link", "add", *ends))
        for name, address in zip(names, ADDRESSES, strict=True):
            made += [ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")]
            made += [ip("-n", name, "link", "set", device, "up") for device in ("cable", "lo")]
        if failed := [done.stderr.strip() for done in made if done.returncode]:
            pytest.skip(f"network namespaces cannot be made here: {failed[0]}")
        yield names[0], names[1]
    except FileNotFoundError:
        pytest.skip("network namespaces cannot be made here: there is no ip command")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def start(machines: tuple[str, str], words: list[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    """`omniloom train` with two ranks on each machine; what machine n says goes to `log.n`."""
    nodes = []
    for number, name in enumerate(machines):
        command = [sys.executable, "-m", "omniloom.cli", "train", "--nproc", "2", "--nnodes", "2"]
        command += ["--node-rank", str(number), "--rdzv-endpoint", f"{ADDRESSES[0]}:29511", *words]
        log = (folder / f"log.{number}").open("wb")
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable"}
        inside = ["ip", "netns", "exec", name, *command]
        nodes.append(subprocess.Popen(inside, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
        log.close()
    return nodes


def wait_with(nodes: list[subprocess.Popen[bytes]], done: Callable[[], object], what: str) -> None:
    try:
        wait_for(done, what)
    finally:
        if not done():
            for node in nodes:
                node.kill()


def pull(machine: str, ranks: list[int]) -> None:
    """Pull a machine's cable. Its ranks stand still meanwhile, so that the run cannot end before it is done."""
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    ip("-n", machine, "link", "set", "cable", "down")
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)


@pytest.mark.full  # a minute or two, most of it waiting
def test_a_machine_that_is_cut_off_is_named_and_the_run_goes_on_bit_for_bit(server, words, machines, tmp_path) -> None:
    words = with_values(words, train__packs_per_step="4", train__steps=str(NUM_STEPS), checkpoint__every="5")
    expected, run_dir = tmp_path / "expected", tmp_path / "run"
    words = with_values(words, train__step_timeout_seconds=str(TIMEOUT_SECONDS))
    nodes = start(machines, words, tmp_path)
    saved = run_dir / "checkpoints" / "step_00000005" / "COMMITTED"
    wait_with(nodes, lambda: saved.is_file() or nodes[0].poll() is not None, "a checkpoint")
    pull(machines[1], children_of(nodes[1].pid))
    # what never stopped is trained while the ranks wait for one another
    done = server.run(with_values(words, train__run_dir=str(expected)), expected, num_ranks=4)
    assert set(done.wait()) == {0}, done.tail()
    wait_with(nodes, lambda: all(node.poll() is not None for node in nodes), "the end of both machines' ranks")
    said = [(tmp_path / f"log.{number}").read_text() for number in range(2)]
    assert [node.returncode for node in nodes] == [HUNG, HUNG], said
    assert f"error: no progress for {TIMEOUT_SECONDS} s: rank 2 at step" in said[0], said
    assert "and rank 3 at step" in said[0], said
    assert "does not answer; its process is stopped or its machine is gone" in said[0], said
    assert "rank 0, or the launcher on its machine, keeps the job's store and does not answer" in said[1], said
    assert 5 <= len(read_lines(run_dir / "metrics.jsonl")) < NUM_STEPS

    ip("-n", machines[1], "link", "set", "cable", "up")
    nodes = start(machines, words, tmp_path)
    wait_with(nodes, lambda: all(node.poll() is not None for node in nodes), "the end of the run")
    said = [(tmp_path / f"log.{number}").read_text() for number in range(2)]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert_same_end(run_dir, expected)
