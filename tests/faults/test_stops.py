"""Whatever stops a run, the same command goes on from there; what must not go on ends with one clear line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omniloom.checkpoint.dcp import RNG
from omniloom.checkpoint.stored import find_latest, load_tensors, open_stored
from omniloom.exit_codes import HUNG, STOPPED_EARLY
from omniloom.training.metrics import read_lines
from tests.faults.test_kills import (
    assert_each_row_once,
    assert_same_end,
    children_of,
    tensors_of,
    with_values,
)
from tests.run_server import ROOT, Hook, read_events, wait_for


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run_dir / "metrics.jsonl")]


def newest_step(run_dir: Path) -> int:
    stored, _ = find_latest(run_dir)
    return stored.step if stored is not None else 0


def partials(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob("*.partial"))


# ---------------------------------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(("num_ranks", "name"), [(1, "SIGINT"), (2, "SIGTERM")])
def test_a_signal_to_any_rank_leaves_a_checkpoint_from_which_the_run_goes_on(
    server, words, tmp_path, num_ranks, name
) -> None:
    words = with_values(words, train__epochs="1", checkpoint__every="0", train__packs_per_step=str(num_ranks))
    expected = tmp_path / "expected"
    assert set(server.run(with_values(words, train__run_dir=str(expected)), expected, num_ranks=num_ranks).wait()) == {
        0
    }
    hook = Hook(step=3, action="signal", target=name, rank=num_ranks - 1)
    memory = Hook(step=1, action="allocate", target="900_000_000", rank=num_ranks - 1)
    stopped = server.run(words, tmp_path, num_ranks=num_ranks, hooks=[hook, memory])
    assert set(stopped.wait()) == {STOPPED_EARLY}, stopped.tail()
    peaks = [line["peak_memory_bytes"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert peaks[3] - peaks[0] > 400_000_000  # the largest of any rank
    record = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert record["reason"] == name
    assert record["step"] == newest_step(tmp_path / "run")
    assert record["step"] in (4, 5)  # after the step under way when the signal came, or the next
    assert f"{name}: stopped after step {record['step']}" in stopped.log()
    assert set(server.run(words, tmp_path, num_ranks=num_ranks).wait()) == {0}
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert_same_end(tmp_path / "run", expected)
    assert_each_row_once(tmp_path, num_rows=90)


def test_a_time_limit_stops_and_the_same_command_goes_on(server, words, tmp_path) -> None:
    words = with_values(words, train__steps="4", checkpoint__every="0", train__time_limit_minutes="1e-9")
    for step in range(1, 5):
        run = server.run(words, tmp_path)
        assert run.wait() == [STOPPED_EARLY], run.tail()
        assert newest_step(tmp_path / "run") == step
    assert server.run(words, tmp_path).wait() == [0]
    assert [event["step"] for event in read_events(tmp_path)] == [0, 1, 2, 3]


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "omniloom.cli", "train")
OURS = (sys.executable, "-m", "omniloom.cli", "train", "--nproc", "2")


@pytest.mark.parametrize(
    ("launcher", "number", "code"), [(OURS, signal.SIGUSR1, STOPPED_EARLY), (TORCHRUN, signal.SIGINT, 1)]
)
def test_a_launcher_passes_a_signal_on_and_its_ranks_save(words, tmp_path, launcher, number, code) -> None:
    """torchrun signals the whole group, data workers among them, and has no exit code but 1: the file tells why."""
    words = with_values(words, train__steps="2000", train__packs_per_step="2", checkpoint__every="0", data__workers="1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = ("--master-port", str(probe.getsockname()[1])) if launcher is TORCHRUN else ()
    command = [*launcher[:3], *port, *launcher[3:], *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: losses(tmp_path / "run") or process.poll() is not None, "a step")
    process.send_signal(number)
    said = process.communicate()[1]
    assert launcher is TORCHRUN or said == ""
    assert process.returncode == code, said
    record = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert record["reason"] == number.name
    assert record["step"] == newest_step(tmp_path / "run") > 0


# ---------------------------------------------------------------------------------------- resuming


def test_other_ranks_and_workers_go_on_with_the_same_losses(server, words, tmp_path) -> None:
    words = with_values(words, train__packs_per_step="2", train__schedule="constant", train__steps="8")
    expected = tmp_path / "expected"
    assert server.run(with_values(words, train__run_dir=str(expected)), expected).wait() == [0]
    counts = (("3", 2, "0"), ("6", 1, "1"), ("8", 2, "0"))
    for steps, num_ranks, workers in counts:
        run = server.run(with_values(words, train__steps=steps, data__workers=workers), tmp_path, num_ranks=num_ranks)
        assert set(run.wait()) == {0}, run.tail()
    assert [event["rows"] for event in read_events(tmp_path)] == [event["rows"] for event in read_events(expected)]
    # sums over ranks round differently, nothing else may differ
    assert losses(tmp_path / "run") == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.parametrize("damage", [pytest.param("truncated", marks=pytest.mark.full), "flipped"])
def test_a_damaged_newest_checkpoint_costs_one_step_and_is_said(server, words, tmp_path, damage) -> None:
    words = with_values(words, train__schedule="constant")
    expected = tmp_path / "expected"
    of_six = with_values(words, train__steps="6")
    assert server.run(with_values(of_six, train__run_dir=str(expected)), expected).wait() == [0]
    assert server.run(with_values(words, train__steps="4"), tmp_path).wait() == [0]
    largest = max((tmp_path / "run/checkpoints/step_00000004").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    run = server.run(of_six, tmp_path)
    assert run.wait() == [0], run.tail()
    assert "step_00000004 is damaged" in run.log()
    assert "resumed after step 3" in run.log()
    assert_same_end(tmp_path / "run", expected)


# ---------------------------------------------------------------------------------------- numbers that are not finite


@pytest.fixture
def poisoned(words, tmp_path, checkpoint) -> tuple[list[str], int]:
    """A run in which one row, and no other, has a token whose embedding is NaN. Returns words and that row."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    model = shutil.copytree(checkpoint, tmp_path / "model")
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows[25]["messages"][0]["content"] = "What is ÿ?"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    token = Tokenizer.from_file(str(model / "tokenizer.json")).encode("ÿ").ids[-1]
    name = "thinker.model.embed_tokens.weight"
    shard = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][token] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    return with_values(
        words, model__path=str(model), data__shuffle="false", train__steps="10", checkpoint__keep="20"
    ), 25


def step_with(folder: Path, row: int) -> int:
    return next(event["step"] for event in read_events(folder) if [0, row] in event["rows"])


def test_a_loss_that_is_nan_stops_the_run_and_names_its_samples(server, poisoned, tmp_path) -> None:
    words, row = poisoned
    run = server.run(words, tmp_path)
    assert run.wait() == [1]
    step = len(read_events(tmp_path))
    report = json.loads((tmp_path / f"run/nonfinite_step_{step + 1:08}.json").read_text())
    (sample,) = [sample for sample in report["samples"] if sample["row"] == row + 1]
    assert sample["source"] == str(tmp_path / "rows.json")
    assert len(report["samples"]) < 8  # those of this step alone
    said = run.log().splitlines()[-1]
    assert said.startswith(f"error: step {step + 1}: loss nan"), run.tail()
    assert "earlier checkpoints are intact" in said
    assert "Traceback" not in run.log()
    assert newest_step(tmp_path / "run") == step


def test_skipping_a_nan_step_leaves_weights_and_moments_as_they_were(server, poisoned, tmp_path) -> None:
    words, row = poisoned
    run = server.run(with_values(words, train__nonfinite="skip"), tmp_path)
    assert run.wait() == [0], run.tail()
    step = step_with(tmp_path, row)
    assert f"warning: step {step + 1}: loss nan" in run.log()
    assert [number for number, loss in enumerate(losses(tmp_path / "run")) if not np.isfinite(loss)] == [step]
    before, after = (learnt_by(tmp_path / f"run/checkpoints/step_{number:08}") for number in (step, step + 1))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


def test_a_run_none_of_whose_steps_counted_goes_on(server, poisoned, tmp_path) -> None:
    words, row = poisoned
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([rows[row]] * 20))
    words = with_values(words, train__nonfinite="skip", train__steps="3")
    run = server.run(words, tmp_path, hooks=[Hook(step=0, action="signal", target="SIGTERM")])
    assert run.wait() == [STOPPED_EARLY], run.tail()
    run = server.run(words, tmp_path)
    assert run.wait() == [0], run.tail()
    assert "resumed after step" in run.log()


def learnt_by(directory: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint, not the generators: an observed step draws."""
    stored = open_stored(directory)
    names = [name for name in stored.shapes if not name.startswith(RNG)]
    tensors = {name: torch.empty(stored.shapes[name], dtype=stored.dtype(name)) for name in names}
    load_tensors(stored, tensors)
    return tensors


def test_a_loss_far_above_the_usual_is_warned_of(server, words, tmp_path) -> None:
    usual, strange = ({"role": "assistant", "content": text} for text in ("yes " * 8, "ÿþ§ Ж 42 Ω ±"))
    rows = [{"messages": [{"role": "user", "content": "Say it."}, usual]}] * 140
    rows += [{"messages": [{"role": "user", "content": "Say it."}, strange]}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = with_values(
        words, data__shuffle="false", train__epochs="1", train__learning_rate="1e-2", checkpoint__every="0"
    )
    run = server.run(words, tmp_path)
    assert run.wait() == [0], run.tail()
    warned = [line for line in run.log().splitlines() if "spike" in line]
    assert warned, run.tail()
    assert f"at step {len(losses(tmp_path / 'run'))} " in warned[-1]


# ---------------------------------------------------------------------------------------- saving


def test_asynchronous_saving_holds_the_run_for_less_than_a_step(server, words, tmp_path) -> None:
    # the steps between two checkpoints take longer than to write one, on a fast machine too
    words = with_values(words, train__steps="41", train__packs_per_step="6", checkpoint__every="20")
    held, steps = {}, []
    for asynchronous in ("true", "false"):
        folder = tmp_path / asynchronous
        settings = {"train__run_dir": str(folder), "checkpoint__asynchronous": asynchronous}
        run = server.run(with_values(words, **settings), folder, fsync_seconds=0.05)  # a slow disk
        assert run.wait() == [0], run.tail()
        events = read_events(folder)
        held[asynchronous] = statistics.median(event["held"] for event in events if event.get("held"))
        steps += [event["seconds"] for event in events if "seconds" in event]
    assert held["true"] < statistics.median(steps) < held["false"], (held, steps)
    (saved, _), (saved_at_once, _) = tensors_of(tmp_path / "true"), tensors_of(tmp_path / "false")
    assert all(torch.equal(tensor, saved_at_once[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_disk_that_is_full_while_saving_is_one_message_and_costs_nothing_saved(
    server, words, tmp_path, num_ranks
) -> None:
    words = with_values(words, train__packs_per_step="2", train__schedule="constant")
    assert server.run(with_values(words, train__steps="2"), tmp_path).wait() == [0]
    run = server.run(with_values(words, train__steps="4"), tmp_path, num_ranks=num_ranks, file_bytes=100_000)
    assert set(run.wait()) == {2}, run.tail()
    said = run.log().splitlines()[-1]
    assert said.startswith("error: could not save step 3"), run.tail()
    assert "earlier checkpoints are intact" in said
    assert "Traceback" not in run.log()
    assert newest_step(tmp_path / "run") == 2
    assert not partials(tmp_path / "run")
    assert server.run(with_values(words, train__steps="4"), tmp_path).wait() == [0]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_second_run_in_the_same_directory_is_refused(server, words, tmp_path, num_ranks) -> None:
    words = with_values(words, train__packs_per_step="2")
    first = server.start(words, tmp_path / "first", hooks=[Hook(step=0, action="stop")])
    wait_for(lambda: read_events(tmp_path / "first") or first.is_over(), "the first run")
    second = server.run(words, tmp_path / "second", num_ranks=num_ranks)
    first.kill()
    first.wait()
    assert set(second.wait()) == {2}, second.tail()
    for rank in range(num_ranks):
        assert f"run is in use by process {first.pids[0]} on " in second.log(rank)
        assert "set another train.run_dir" in second.log(rank)
        assert "Traceback" not in second.log(rank)


# ---------------------------------------------------------------------------------------- hanging


def test_what_hangs_is_named_with_its_step_and_the_run_ends(server, words, tmp_path) -> None:
    """Three runs at once, since most of it is waiting: a stopped rank, the stopped rank 0, a stopped data worker."""
    words = with_values(words, train__packs_per_step="2", train__step_timeout_seconds="20", train__steps="2000")
    words = with_values(words, checkpoint__every="0")
    folders = [tmp_path / name for name in ("stopped_1", "stopped_0", "worker")]
    of = [with_values(words, train__run_dir=str(folder)) for folder in folders]
    runs = [
        server.start(of[rank_0], folders[rank_0], num_ranks=2, hooks=[Hook(step=2, action="stop", rank=1 - rank_0)])
        for rank_0 in (0, 1)
    ]
    runs.append(server.start(with_values(of[2], data__workers="1"), folders[2]))
    wait_for(lambda: len(read_events(folders[2])) > 2 or runs[2].is_over(), "the run with a worker")
    (worker,) = [worker for process in children_of(runs[2].pids[0]) for worker in children_of(process)]
    os.kill(worker, signal.SIGSTOP)
    begin = time.monotonic()
    waiting = {0: 0, 1: 1, 2: 0}  # run: the rank that is not stopped
    for number, rank in waiting.items():
        wait_for(lambda run=runs[number], rank=rank: run.is_over(rank), f"the end of run {number}")
    assert time.monotonic() - begin < 20 + 40  # the limit, the store's time to answer, and a busy machine
    for number in (0, 1):
        runs[number].kill(1 - waiting[number])
        codes = runs[number].wait()
        assert codes[waiting[number]] == HUNG, runs[number].tail(waiting[number])
    assert runs[2].wait() == [HUNG], runs[2].tail()
    os.kill(worker, signal.SIGKILL)

    by_stopped_1, by_stopped_0, by_worker = (runs[number].log(rank) for number, rank in waiting.items())
    assert "error: no progress for 20 s: rank 1 at step " in by_stopped_1
    assert "does not answer; its process is stopped" in by_stopped_1
    assert "rank 0, or the launcher on its machine, keeps the job's store and does not answer" in by_stopped_0
    assert "  rank 1: step 3, " in by_stopped_0 or "  rank 1: step 2, " in by_stopped_0
    assert "in 'waiting for data'" in by_worker


# ---------------------------------------------------------------------------------------- samples


def test_a_file_deleted_after_planning_costs_its_sample_on_all_ranks_and_is_listed(server, words, tmp_path) -> None:
    for n in range(24):
        picture = np.random.default_rng(n).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{n}.png")
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": f"It is {n}."}],
            "images": [f"{n}.png"],
        }
        for n in range(24)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = with_values(
        words,
        model__modalities="[text,image]",
        data__shuffle="false",
        data__pack_tokens="32",  # one row
        data__image__max_pixels="4096",
        data__prefetch_packs="1",
        data__max_bad_fraction="0.1",
        train__packs_per_step="2",
        train__epochs="1",
        checkpoint__every="0",
    )
    hook = Hook(step=0, action="remove", target=str(tmp_path / "19.png"))
    run = server.run(words, tmp_path, num_ranks=2, hooks=[hook])
    assert run.wait() == [0, 0], run.tail(0) + run.log(1)
    listed = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert len(listed) == 1
    assert "19.png" in json.dumps(listed)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(line["num_bad_samples"] for line in lines) == 1
    assert sum(line["num_samples"] for line in lines) == 23
    assert np.isfinite([line["loss"] for line in lines]).all()
