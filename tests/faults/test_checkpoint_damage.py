"""Damage to checkpoints: kills inside a save, flipped bytes, truncation, hostile pickles, full disks, two runs."""

import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from omniloom.checkpoint import stored as stored_checkpoints
from omniloom.checkpoint.dcp import Saver
from omniloom.checkpoint.run_lock import run_lock
from omniloom.checkpoint.stored import (
    METADATA_NAME,
    checksum,
    find_latest,
    load_tensors,
    open_stored,
    read_marker,
    read_metadata,
    seal,
)

STATE = {"model.a": torch.arange(6.0).reshape(2, 3), "model.b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def run(tmp_path):
    saver = Saver(tmp_path, keep=5)
    for step in (1, 2, 3):
        saver.save(step, {name: tensor + step for name, tensor in STATE.items()}, {"step": step})
    return tmp_path


def loaded(stored):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    load_tensors(stored, tensors)
    return tensors


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "extras.json", "COMMITTED"])
def test_one_flipped_byte_anywhere_makes_the_one_before_the_newest(run, name):
    path = run / "checkpoints" / "step_00000003" / name
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), min(12, len(whole))):
        flip(path, place)
        stored, notes = find_latest(run)
        path.write_bytes(whole)
        assert stored.step == 2
        assert any("step_00000003 is damaged" in note for note in notes)
        assert torch.equal(loaded(stored)["model.a"], STATE["model.a"] + 2)


def test_a_truncated_file_is_said_with_its_sizes(run):
    path = run / "checkpoints" / "step_00000003" / "__0_0.distcp"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    stored, notes = find_latest(run)
    assert stored.step == 2
    assert f"__0_0.distcp has {size - 1} bytes instead of {size}" in notes[0]
    path.unlink()
    assert "No such file" in find_latest(run)[1][0]


def test_a_directory_without_the_marker_never_counts(run):
    (run / "checkpoints" / "step_00000003" / "COMMITTED").unlink()
    stored, notes = find_latest(run)
    assert stored.step == 2
    assert "step_00000003 was not completed and is ignored" in notes[0]
    with pytest.raises(ValueError, match="no complete checkpoint here"):
        open_stored(run / "checkpoints" / "step_00000003")


def test_a_checkpoint_that_its_run_names_while_it_is_looked_for_is_found(run, monkeypatch):
    committed = run / "checkpoints" / "step_00000003"
    stale = ([committed.with_suffix(".partial")], [], [])  # seen before its save gave it its name
    listings = iter([stale, stored_checkpoints.list_committed(run / "checkpoints")])
    monkeypatch.setattr(stored_checkpoints, "list_committed", lambda root: next(listings))
    assert find_latest(run)[0].step == 3


def test_when_all_are_damaged_the_run_does_not_start_over_in_silence(run):
    for directory in (run / "checkpoints").glob("step_*"):
        flip(directory / "__0_0.distcp", 50)
    with pytest.raises(ValueError, match="none of 3 checkpoints is whole"):
        find_latest(run)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


class Getattr:
    def __reduce__(self):
        return (getattr, (torch.Tensor, "numpy"))


def remark(directory):
    """Give the directory a marker that matches its present files, as an attacker would."""
    marker = json.loads((directory / "COMMITTED").read_text())
    for name, item in marker["files"].items():
        item |= {"bytes": (directory / name).stat().st_size, "crc32": checksum(directory / name)}
    (directory / "COMMITTED").write_text(json.dumps(seal(marker)))


def test_nothing_in_the_metadata_is_executed(run, tmp_path):
    directory = run / "checkpoints" / "step_00000003"
    for hostile in (Payload(tmp_path / "owned"), Getattr(), torch.nn.Linear):
        (directory / METADATA_NAME).write_bytes(pickle.dumps(hostile))
        remark(directory)
        with pytest.raises(ValueError, match=r"\.metadata is refused: it asks for"):
            open_stored(directory)
    assert not (tmp_path / "owned").exists()


def test_nothing_in_a_tensor_file_is_executed(run, tmp_path):
    directory = run / "checkpoints" / "step_00000003"
    stored = open_stored(directory)
    offset = 0
    with (directory / "__0_0.distcp").open("wb") as stream:
        torch.save(Payload(tmp_path / "owned"), stream)
        offset = stream.tell()
    for place in stored.metadata.storage_data.values():
        object.__setattr__(place, "offset", 0)
        object.__setattr__(place, "length", offset)
    with pytest.raises(ValueError, match="a file holds something that is no tensor"):
        loaded(stored)
    assert not (tmp_path / "owned").exists()


def test_metadata_that_points_outside_its_directory_is_refused(run):
    directory = run / "checkpoints" / "step_00000003"
    marker = read_marker(directory)
    metadata = read_metadata(directory, marker)
    for place in metadata.storage_data.values():
        object.__setattr__(place, "relative_path", "../step_00000002/__0_0.distcp")
    (directory / METADATA_NAME).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"is refused: a tensor lies in '\.\./step_00000002"):
        read_metadata(directory, marker)


def test_the_thread_that_writes_has_the_accelerator_of_the_one_that_trains(tmp_path, monkeypatch):
    current, named = threading.local(), []
    current.index = 3
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_device_index", lambda: getattr(current, "index", 0))
        patch.setattr(torch.accelerator, "set_device_index", lambda index: setattr(current, "index", index))
        saver = Saver(tmp_path, asynchronous=True)
    monkeypatch.setattr(Saver, "_write", lambda *_: named.append(getattr(current, "index", 0)))
    saver.save(1, {}, {})
    saver.close()
    assert named == [3]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_clear_error_and_leaves_the_earlier_ones(run, asynchronous):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = Saver(run, keep=1, asynchronous=asynchronous)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses the write, as a full disk would
    try:
        with pytest.raises(ValueError, match=r"could not save step 4.*earlier checkpoints are intact"):  # noqa: PT012
            saver.save(4, {"model.a": torch.randn(100_000)}, {})
            saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    saver.save(5, {"model.a": torch.randn(100_000)}, {})
    saver.close()
    assert find_latest(run)[0].step == 5


def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="could not save step 1: Not a directory"):
        Saver(tmp_path).save(1, STATE, {})
    with pytest.raises(ValueError, match="cannot write the run directory"):
        run_lock(tmp_path / "checkpoints").__enter__()


# ---------------------------------------------------------------------------------------- processes

SAVING = """
    import os, sys, torch
    from omniloom.checkpoint.dcp import Saver
    from omniloom.checkpoint.stored import find_latest
    torch.set_num_threads(1)

    def save_until_killed(asynchronous):
        saver = Saver(sys.argv[1], keep=2, asynchronous=asynchronous)
        stored, _ = find_latest(sys.argv[1])
        step = stored.step if stored else 0
        while True:
            step += 1
            saver.save(step, {f"model.{i}": torch.full((50_000,), step + i) for i in range(8)}, {"step": step})

    print("ready", flush=True)
    for line in sys.stdin:  # one fork per line: importing torch takes longer than all the saving
        child = os.fork()
        if child == 0:
            save_until_killed(line.strip() == "True")
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_run_killed_at_random_moments_always_finds_a_whole_newest_checkpoint(tmp_path):
    rng = random.Random(0)
    newest = 0
    forker = start(SAVING, tmp_path)
    assert forker.stdout.readline() == "ready\n"
    pause = None  # seconds until a first save is whole, on this machine and now
    for trial in range(20):
        forker.stdin.write(f"{trial % 2 == 1}\n")
        forker.stdin.flush()
        child = int(forker.stdout.readline())
        if pause is None:
            started = time.monotonic()
            while not list(tmp_path.glob("checkpoints/step_*[0-9]/COMMITTED")):
                time.sleep(0.01)
            pause = time.monotonic() - started
        else:
            time.sleep(pause * (0.5 + 1.5 * rng.random()))
        os.kill(child, signal.SIGKILL)
        assert forker.stdout.readline() == "dead\n"
        stored, notes = find_latest(tmp_path)
        assert not [note for note in notes if "damaged" in note]
        assert (stored.step if stored else 0) >= newest, "a committed step was lost"
        newest = stored.step if stored else 0
        if stored is not None:
            assert stored.extras == {"step": newest}
            tensors = {f"model.{i}": torch.zeros(50_000, dtype=torch.int64) for i in range(8)}
            load_tensors(stored, tensors)
            assert all((tensors[f"model.{i}"] == newest + i).all() for i in range(8))
    forker.communicate()
    assert newest > 6  # it did save in between


def test_two_runs_in_one_directory_are_refused_until_the_first_ends_or_is_killed(tmp_path):
    holder = start(
        """
        import os, sys, time
        from omniloom.checkpoint.run_lock import run_lock
        with run_lock(sys.argv[1]):
            child = os.fork()  # a loader worker that outlives its parent must not keep the lock
            if child:
                print(child, flush=True)
            time.sleep(60)
        """,
        tmp_path / "run",
    )
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=rf"is in use by process {holder.pid} on .*set another train\.run_dir"):
            run_lock(tmp_path / "run").__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run_lock(tmp_path / "run"):
            assert f"process {os.getpid()} " in (tmp_path / "run" / "run.lock").read_text()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.communicate()
    with run_lock(tmp_path / "run"):
        pass
