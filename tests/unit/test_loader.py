"""Loading with workers, dying workers, failures after planning, and the stream that the training loop reads."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from omniloom.data.agreement import PlanningRanks, RanksStopped, report_pack, settle
from omniloom.data.extent_cache import ExtentCache, extent_key, fingerprint_of
from omniloom.data.loader import Loader
from omniloom.data.planner import PlanError, Planner
from omniloom.data.rows import RowFault, RowReader, SourceReader
from omniloom.data.sources import Sources
from omniloom.data.stream import BadSampleFile, StepStream
from omniloom.data.worker import receive_result, send_result
from omniloom.data.worker_pool import PoolClosed
from omniloom.types import (
    IGNORE_LABEL,
    AudioBatch,
    BadSample,
    ClipGeometry,
    Conversation,
    DecodedClip,
    Example,
    Extent,
    MediaHeader,
    MediaSource,
    PackPlan,
    Part,
    PlannedSample,
    RunError,
    SampleError,
    Segments,
    StepPlan,
    Turn,
    VisionBatch,
    VisionClip,
)
from tests.plan_config import plan_config
from tests.unit.rank_threads import Rendezvous, run_on_ranks

PACK_TOKENS = 256
NUM_ROWS = 120


class Numbers:
    """Rows that are their own numbers; every fifth has an image. Some behave badly when loaded, or kill."""

    def __init__(self, *, broken=(), deadly=(), unreadable=(), marks: str | None = None, once: bool = False) -> None:
        self.broken, self.deadly, self.unreadable = broken, deadly, unreadable
        self.marks, self.once = marks, once

    def __len__(self) -> int:
        return NUM_ROWS

    def locate(self, row: int) -> tuple[str, int]:
        return "numbers.jsonl", row + 1

    def read_row(self, row: int):
        if row in self.unreadable:
            raise SampleError("messages", "not a conversation")
        if row in self.deadly:
            mark = Path(self.marks) / str(row)
            if not (self.once and mark.exists()):
                with mark.open("a") as handle:
                    handle.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
        return {"row": row}, *self.locate(row)


def parse(row, file, line) -> Conversation:
    number = row["row"]
    parts = [Part(kind="text", text=f"{number}")]
    if number % 5 == 0:
        parts.append(Part(kind="image", media=MediaSource(path=f"{number}.png")))
    return Conversation(id=f"row {number}", source=f"{file}:{line}", turns=(Turn(role="user", parts=tuple(parts)),))


def number_of(conversation: Conversation) -> int:
    return int(conversation.turns[0].parts[0].text)


class NumberProcessor:
    num_code_groups = 0  # no talker

    def measure(self, conversation, headers, clips=None) -> Extent:
        number = number_of(conversation)
        tokens = 12 + number * 7 % 60
        clips = (ClipGeometry(kind="image", num_tokens=2, grid_thw=(1, 2, 4)),) * len(headers)
        return Extent(num_tokens=tokens, num_loss_tokens=tokens // 2, weight_sum=tokens / 2, cost=tokens, clips=clips)

    def shrink(self, conversation, headers, max_tokens):
        return None

    def encode(self, conversation, clips, decoded) -> Example:
        number = number_of(conversation)
        tokens = 12 + number * 7 % 60
        generator = torch.Generator().manual_seed(number)
        labels = torch.full((tokens,), IGNORE_LABEL)
        labels[: tokens // 2] = number
        vision = tuple(
            VisionClip(
                patches=torch.full((8, 64), float(clip.pixels.mean()) if clip is not None else -1.0),
                grid_thw=(1, 2, 4),
                token_index=torch.tensor([3, 4]),
            )
            for clip in decoded
        )
        return Example(
            id=conversation.id,
            input_ids=torch.randint(1, 99, (tokens,), generator=generator),
            labels=labels,
            loss_weights=(labels != IGNORE_LABEL).float(),
            position_ids=torch.arange(tokens).expand(3, -1).contiguous(),
            vision=vision,
        )

    def collate_vision(self, clips) -> VisionBatch:
        patches = torch.cat([*(clip.patches for clip in clips), torch.zeros(4, 64)])
        length = len(patches)
        return VisionBatch(
            patches=patches,
            segments=Segments.from_lengths([length]),
            rotary_index=torch.zeros(length, 2, dtype=torch.int64),
            interpolation_index=torch.zeros(length, 0, dtype=torch.int64),
            interpolation_weights=torch.zeros(length, 0),
            token_index=torch.cat([torch.empty(0, dtype=torch.int64), *(clip.token_index for clip in clips)]),
        )

    def collate_audio(self, clips) -> AudioBatch | None:
        return None


def decode(broken, media: MediaSource, clip: ClipGeometry) -> DecodedClip:
    number = int(media.path.removesuffix(".png"))
    if number in broken:
        raise SampleError("images[0]", "truncated file")
    return DecodedClip(pixels=np.full((4, 4, 3), number, dtype=np.uint8))


def open_rows(processor=None, **behaviour) -> RowReader:
    source = Numbers(**behaviour)
    reader = SourceReader(
        parse=parse,
        read_header=lambda media, kind: MediaHeader(kind=kind, width=4, height=4),
        decode=partial(decode, source.broken),
        processor=processor or NumberProcessor(),
    )
    return RowReader(source=Sources((source,), ("numbers",)), readers=(reader,), pack_tokens=PACK_TOKENS)


def refuse_to_open() -> RowReader:
    raise ValueError("model.path: no tokenizer in runs/nothing")


def sample(row: int, rows: RowReader | None = None) -> PlannedSample:
    extent = (rows or open_rows()).measure([row], {}, lambda row: None)[0]
    return PlannedSample(row=row, epoch=0, extent=extent, weight_scale=0.5)


def origin_of(row: int) -> tuple[str, int]:
    return "numbers", row + 1


def make_stream(loader: Loader, *, state=None, bad_samples=None, num_rows=NUM_ROWS, **changes) -> StepStream:
    options = {"pack_tokens": PACK_TOKENS, "packs_per_step": 4, "window": 64, "max_bad_fraction": 0.5, **changes}
    planner = Planner(
        rows_per_source=(num_rows,), config=plan_config(**options), measure=loader.measure, locate=Numbers().locate
    )
    if state is not None:
        planner.load_state_dict(state)
    return StepStream(planner, loader, bad_samples=bad_samples)


def tensors_of(pack) -> dict:
    batch = pack.batch
    return {
        **{name: getattr(batch, name) for name in ("input_ids", "labels", "loss_weights", "position_ids")},
        "cu_seqlens": batch.segments.cu_seqlens,
        "patches": batch.vision.patches,
        "token_index": batch.vision.token_index,
    }


def summary(step) -> tuple:
    """All that must not depend on how a step was loaded."""
    return (
        step.plan,
        step.agreement.weight_sums["text"],
        step.agreement.bad,
        [(pack.index, pack.batch.sample_ids) for pack in step.packs],
        [{name: value.tolist() for name, value in tensors_of(pack).items()} for pack in step.packs],
    )


# ---------------------------------------------------------------------------------------- transfer


def test_tensors_of_all_kinds_survive_the_way_between_processes():
    value = {
        "large": torch.randn(300, 50),
        "small": torch.arange(3),
        "bfloat16": torch.randn(2000).bfloat16(),
        "bool": torch.rand(5000) > 0.5,
        "empty": torch.empty(0, 7, dtype=torch.int64),
        "scalar": torch.tensor(2.5),
        "strided": torch.randn(70, 90).t(),
        "one of a column": torch.arange(12).view(3, 4)[1:2, 2],  # contiguous, its stride is 4
        "other": ("text", 3, None),
    }
    ours, theirs = multiprocessing.Pipe()
    descriptors = len(os.listdir("/proc/self/fd"))
    sent = [value, {"no": "tensor"}]
    for one in sent:
        send_result(theirs, one)
    found = receive_result(ours, ours.recv()[1])
    for name in value:
        if name == "other":
            assert found[name] == value[name]
        else:
            assert found[name].dtype == value[name].dtype
            assert torch.equal(found[name], value[name]), name
    found["large"][0, 0] = 7.0  # writable
    found["small"][0] = 7
    assert receive_result(ours, ours.recv()[1]) == sent[1]
    assert len(os.listdir("/proc/self/fd")) == descriptors  # however many packs are held at once


def test_results_need_no_room_in_the_shared_memory_folder():
    """Containers often give it 64 MiB; what did not fit went through a pipe in silence."""
    ours, theirs = multiprocessing.Pipe()
    before = set(Path("/dev/shm").iterdir())
    send_result(theirs, torch.zeros(10_000))
    assert set(Path("/dev/shm").iterdir()) == before
    assert receive_result(ours, ours.recv()[1]).shape == (10_000,)


# ---------------------------------------------------------------------------------------- workers


@pytest.fixture(scope="module")
def inline_steps() -> list:
    with make_stream(Loader(open_rows, workers=0), epochs=1.0) as stream:
        return [summary(step) for step in stream]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_count_does_not_change_batches(workers, inline_steps):
    with make_stream(Loader(open_rows, workers=workers), epochs=1.0) as stream:
        assert [summary(step) for step in stream] == inline_steps


def test_all_rows_are_loaded_once_per_epoch(inline_steps):
    ids = [name for step in inline_steps for pack in step[3] for name in pack[1]]
    assert sorted(ids) == sorted(f"row {number}" for number in range(NUM_ROWS))


def test_resuming_after_any_step_continues_with_the_same_batches(inline_steps):
    states = []
    with make_stream(Loader(open_rows, workers=0), epochs=1.0) as stream:
        states.append(stream.state_dict())
        for _ in stream:
            states.append(json.loads(json.dumps(stream.state_dict())))
    assert len(states) == len(inline_steps) + 1
    for done, state in enumerate(states):
        with make_stream(Loader(open_rows, workers=0), epochs=1.0, state=state) as stream:
            assert [summary(step) for step in stream] == inline_steps[done:]


def test_a_step_larger_than_the_data_loads_its_filled_packs_alone():
    with make_stream(Loader(open_rows, workers=0), epochs=1.0, packs_per_step=1000) as stream:
        (step,) = stream
    filled = [pack for pack in step.plan.packs if pack.samples]
    assert len(step.plan.packs) == 1000
    assert [pack.index for pack in step.packs] == [pack.index for pack in filled]
    assert step.agreement.stats.num_samples == sum(len(pack.samples) for pack in filled) - len(step.agreement.bad)


def test_close_leaves_no_process_behind():
    stream = make_stream(loader := Loader(open_rows, workers=2), epochs=50.0)
    next(stream)
    pids = loader.pids
    assert pids
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 10  # in the middle of a run, with packs on their way
    assert not loader.pids
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with pytest.raises(PoolClosed):
        loader.submit(PackPlan(index=0, samples=())).result()


KILLED_SCRIPT = """
import json, sys, time
from test_loader import Loader, make_stream, open_rows

stream = make_stream(loader := Loader(open_rows, workers=2), epochs=1000.0)
next(stream)
print(json.dumps(loader.pids), flush=True)
for _ in stream:
    time.sleep(0.05)
"""


def test_a_killed_training_script_without_a_guard_leaves_no_worker_behind(tmp_path):
    """Its workers never import it: they would train once more each, or die at once."""
    (tmp_path / "script.py").write_text(KILLED_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, env=environment, text=True
    ) as training:
        pids = json.loads(training.stdout.readline())
        assert len(pids) == 2
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        training.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if not alive:
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {alive}")


def test_closing_does_not_wait_for_a_window_to_be_measured_without_workers():
    class Slow(NumberProcessor):
        def measure(self, conversation, headers, clips=None):
            time.sleep(0.1 * (number_of(conversation) >= 64))  # in the second window, 5.6 s in all
            return super().measure(conversation, headers)

    stream = make_stream(Loader(lambda: open_rows(Slow()), workers=0), shuffle=False)
    next(stream)
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 4.0  # a task of 16 rows and the polling of queues are 1.8 s


class NumberBesides(Numbers):
    """Says a row's number only where the file `name` is there, by its relative path."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def read_row(self, row: int):
        return {"row": row + int(Path(self.name).read_text())}, *self.locate(row)


def open_besides(name: str) -> RowReader:
    rows = open_rows()
    return replace(rows, source=Sources((NumberBesides(name),), ("numbers",)))


def test_relative_paths_are_those_of_the_folder_in_which_workers_start_not_of_the_server(tmp_path, monkeypatch):
    Loader(open_rows, workers=1).close()  # the server of all workers runs in the folder of today
    for number in (0, 5):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "number").write_text(str(number))
        monkeypatch.chdir(folder)
        loader = Loader(partial(open_besides, "number"), workers=1)
        try:
            assert loader.measure([1]) == open_besides("number").measure([1], {}, lambda row: None)
            assert loader.measure([1]) == open_rows().measure([1 + number], {}, lambda row: None)
        finally:
            loader.close()


def test_killed_workers_are_replaced_and_nothing_is_lost(inline_steps):
    loader = Loader(open_rows, workers=2)
    found = []
    with make_stream(loader, epochs=1.0) as stream:
        for step in stream:
            found.append(summary(step))
            for pid in loader.pids:
                os.kill(pid, signal.SIGKILL)
    assert found == inline_steps


def test_a_row_that_kills_its_worker_once_is_read_again(tmp_path):
    loader = Loader(partial(open_rows, deadly=(7,), marks=str(tmp_path), once=True), workers=1)
    try:
        assert loader.measure(list(range(20))) == open_rows().measure(range(20), {}, lambda row: None)
    finally:
        loader.close()


def test_a_row_that_kills_every_worker_becomes_a_bad_sample_and_the_others_live(tmp_path):
    loader = Loader(partial(open_rows, deadly=(7, 11), marks=str(tmp_path)), workers=1)
    try:
        found = loader.measure(list(range(20)))
        assert [row for row, extent in enumerate(found) if isinstance(extent, BadSample)] == [7, 11]
        assert "ended the process" in found[7].reason
        pack = loader.submit(PackPlan(index=3, samples=(sample(6), sample(7), sample(8)))).result()
        assert [bad.line for bad in pack.bad] == [8]
        assert pack.batch.sample_ids == ("row 6", "numbers.jsonl:8", "row 8")
    finally:
        loader.close()
    assert (tmp_path / "7").read_text() == "xxxx"  # twice for each of the two tasks


def test_what_a_worker_cannot_build_is_said_in_the_training_process():
    loader = Loader(refuse_to_open, workers=1)
    try:
        with pytest.raises(ValueError, match="no tokenizer in runs/nothing"):
            loader.measure([0])
    finally:
        loader.close()


# ---------------------------------------------------------------------------------------- failures after planning


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_fail_after_planning_keep_their_slots_as_padding(workers, inline_steps, tmp_path):
    broken = (5, 40, 95)
    file = tmp_path / "bad_samples.jsonl"
    loader = Loader(partial(open_rows, broken=broken), workers=workers)
    with make_stream(loader, epochs=1.0, bad_samples=BadSampleFile(file, origin_of)) as stream:
        steps = list(stream)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(record["line"] for record in records) == [row + 1 for row in broken]
    assert records[0].items() >= {"file": "numbers.jsonl", "field": "images[0]", "reason": "truncated file"}.items()
    assert [step.plan for step in steps] == [step[0] for step in inline_steps]
    for step, whole in zip(steps, inline_steps, strict=True):
        lost = 0.0
        for pack, tensors in zip(step.packs, whole[4], strict=True):
            assert pack.batch.segments.cu_seqlens.tolist() == tensors["cu_seqlens"]
            bounds = tensors["cu_seqlens"]
            for position, planned in enumerate(step.plan.packs[pack.index % 4].samples):
                rows = slice(bounds[position], bounds[position + 1])
                if planned.row in broken:
                    assert pack.batch.is_padding[rows].all()
                    assert not pack.batch.loss_weights[rows].any()
                    lost += sum(tensors["loss_weights"][rows])
                else:
                    assert pack.batch.loss_weights[rows].tolist() == tensors["loss_weights"][rows]
        assert step.agreement.weight_sums["text"] == pytest.approx(whole[1] - lost)
        assert step.agreement.stats.num_samples == sum(len(p.samples) for p in step.plan.packs) - len(step.bad)


class FaultyProcessor(NumberProcessor):
    """Has a fault of its own at row 3, and refuses row 4 by name."""

    def measure(self, conversation, headers, clips=None):
        if number_of(conversation) == 3:
            raise ValueError("operands could not be broadcast together")
        if number_of(conversation) == 4:
            raise SampleError("videos", "too short")
        return super().measure(conversation, headers, clips)

    def encode(self, conversation, clips, decoded):
        self.measure(conversation, ())
        return super().encode(conversation, clips, decoded)


def open_faulty_rows() -> RowReader:
    return open_rows(FaultyProcessor())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_ours_ends_the_run_by_the_row_instead_of_making_it_a_bad_one(workers):
    loader = Loader(open_faulty_rows, workers=workers)
    try:
        assert [row.field for row in loader.measure([4])] == ["videos"]
        for call in (lambda: loader.measure([2, 3]), lambda: loader.submit(plan_of(2, 3)).result()):
            with pytest.raises(RowFault, match=r"numbers.jsonl:4: ValueError: operands could not .* report") as caught:
                call()
            assert "in measure" in "".join(traceback.format_exception(caught.value))  # where it happened
            assert not isinstance(caught.value, ValueError | RunError)  # which end a run without a traceback
    finally:
        loader.close()


def plan_of(*rows: int) -> PackPlan:
    return PackPlan(index=0, samples=tuple(sample(row) for row in rows))


def test_an_example_of_another_length_than_planned_is_a_bad_sample():
    planned = sample(6)
    wrong = PlannedSample(row=8, epoch=2, extent=planned.extent, weight_scale=1.0)
    pack = open_rows().load(PackPlan(index=0, samples=(planned, wrong)), None, {}, lambda row: None)
    assert [(bad.line, bad.epoch, bad.field) for bad in pack.bad] == [(9, 2, "num_tokens")]


def test_only_the_clips_asked_for_are_decoded():
    plan = PackPlan(index=0, samples=(sample(5), sample(10)))
    pack = open_rows().load(plan, frozenset({(1, 0)}), {}, lambda row: None)
    assert pack.batch.vision.patches[:, 0].tolist() == [-1.0] * 8 + [10.0] * 8 + [0.0] * 4


def test_too_many_failures_after_planning_stop_the_run():
    loader = Loader(partial(open_rows, broken=tuple(range(0, NUM_ROWS, 5))), workers=0)
    with (
        make_stream(loader, epochs=1.0, max_bad_fraction=0.1) as stream,
        pytest.raises(PlanError, match=r"7 of 64 rows are bad, more than data.max_bad_fraction=0.1") as told,
    ):
        list(stream)
    assert str(told.value).endswith("All are listed in bad_samples.jsonl of the run directory.")


@pytest.mark.parametrize(("fraction", "num_steps"), [(0.4, 0), (0.5, 3)])
def test_a_sample_that_fails_to_load_counts_as_a_bad_row_however_few_there_are(tmp_path, fraction, num_steps):
    file = tmp_path / "bad_samples.jsonl"
    options = {"num_rows": 2, "packs_per_step": 1, "epochs": 3.0, "max_bad_fraction": fraction}
    stream = make_stream(
        Loader(partial(open_rows, broken=(0,)), workers=0), bad_samples=BadSampleFile(file, origin_of), **options
    )
    with stream:
        if num_steps:
            assert len(list(stream)) == num_steps
        else:
            with pytest.raises(
                PlanError, match=r"1 of 2 rows are bad[^\n]*\n  numbers.jsonl:1: images\[0\]: truncated"
            ):
                next(stream)
    assert len(file.read_text().splitlines()) == max(1, num_steps)  # a line per epoch


def test_failures_are_counted_over_a_resumption():
    """Six of both windows' 120 rows are as many as the share allows, however often the run was stopped between them."""
    options = {"packs_per_step": 1, "epochs": 1.0, "max_bad_fraction": 0.05, "shuffle": False}
    broken = (0, 5, 10, 65, 70, 75, 80)

    def steps_to_the_end(state):
        states = []
        with make_stream(Loader(partial(open_rows, broken=broken), workers=0), state=state, **options) as stream:
            steps = ((step.plan.step, stream.state_dict()) for step in stream)
            with pytest.raises(PlanError, match=r"7 of 120 rows are bad, more than data.max_bad_fraction=0.05"):
                states.extend(steps)
        return states

    whole = steps_to_the_end(None)
    assert whole[-1][1]["failures"]["in_epoch"] == 6
    for number, (_, state) in enumerate(whole[5:], 5):
        rest = steps_to_the_end(json.loads(json.dumps(state)))
        assert [step for step, _ in rest] == [step for step, _ in whole[number + 1 :]]


def test_bad_rows_are_written_once_however_often_the_run_is_resumed(tmp_path):
    file = tmp_path / "bad_samples.jsonl"
    unreadable = (3, 77)
    for _ in range(2):
        loader = Loader(partial(open_rows, unreadable=unreadable), workers=0)
        with make_stream(loader, epochs=2.0, bad_samples=BadSampleFile(file, origin_of)) as stream:
            list(stream)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((record["epoch"], record["line"]) for record in records) == [(0, 4), (0, 78), (1, 4), (1, 78)]


def test_bad_rows_of_an_array_on_one_line_are_all_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(Numbers, "locate", lambda self, row: ("numbers.json", 1))
    file = tmp_path / "bad_samples.jsonl"
    loader = Loader(partial(open_rows, unreadable=(3, 77), broken=(40,)), workers=0)
    with make_stream(loader, epochs=1.0, bad_samples=BadSampleFile(file, origin_of)) as stream:
        list(stream)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((record["line"], record["row"]) for record in records) == [(1, 4), (1, 41), (1, 78)]


def test_a_record_that_a_kill_cut_off_takes_no_other_with_it(tmp_path):
    file = tmp_path / "bad_samples.jsonl"
    bad = [BadSample(file="a", line=1, field="x", reason=reason, row=row) for row, reason in enumerate("\u2028bcd")]
    BadSampleFile(file, origin_of).append(tuple(bad[:2]))
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    resumed = BadSampleFile(file, origin_of)
    resumed.append((bad[0], bad[2]))
    resumed.append((bad[1], bad[3]))
    records = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    assert [record["row"] for record in records] == [1, 3, 2, 4]
    assert [record["reason"] for record in records] == ["\u2028", "c", "b", "d"]


def test_bad_rows_that_stop_the_run_are_written_before_it_ends(tmp_path):
    file = tmp_path / "bad_samples.jsonl"
    loader = Loader(partial(open_rows, unreadable=tuple(range(0, 120, 3))), workers=0)
    with (
        make_stream(loader, max_bad_fraction=0.1, bad_samples=BadSampleFile(file, origin_of)) as stream,
        pytest.raises(PlanError),
    ):
        next(stream)
    assert len(file.read_text().splitlines()) > 5


# ---------------------------------------------------------------------------------------- several ranks


def run_ranks(
    world_size: int, body, *, data_world=None, packs_per_step=4, behaviours=None, clips_of=None, **changes
) -> list:
    """`body(stream)` on every rank; returns what each gives back, or the exception it raised."""
    planning, agreeing = Rendezvous(world_size), Rendezvous(world_size)
    results: list = [None] * world_size
    data_world = data_world or world_size

    def run(rank: int) -> None:
        behaviour = behaviours[rank] if behaviours else {}
        loader = Loader(partial(open_rows, **behaviour), workers=0)
        options = {"pack_tokens": PACK_TOKENS, "window": 64, "max_bad_fraction": 0.5, "epochs": 1.0, **changes}
        planner = Planner(
            rows_per_source=(NUM_ROWS,),
            config=plan_config(packs_per_step=packs_per_step, **options),
            measure=loader.measure,
            locate=Numbers().locate,
            ranks=PlanningRanks(exchange=planning.exchange(rank), rank=rank, world_size=world_size),
        )
        stream = StepStream(
            planner,
            loader,
            data_rank=rank * data_world // world_size,
            data_world=data_world,
            exchange=agreeing.exchange(rank),
            **({"clips_of": partial(clips_of, rank)} if clips_of else {}),
        )
        try:
            results[rank] = body(stream)
        except (ValueError, RuntimeError) as error:
            results[rank] = error
        finally:
            stream.close()

    run_on_ranks(run, world_size)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_agree_and_together_load_what_one_rank_loads(world_size, inline_steps):
    results = run_ranks(world_size, list)
    for number, whole in enumerate(inline_steps):
        steps = [steps[number] for steps in results]
        assert {step.agreement.weight_sums["text"] for step in steps} == {whole[1]}
        packs = {pack.index: tensors_of(pack) for step in steps for pack in step.packs}
        for (index, _), tensors in zip(whole[3], whole[4], strict=True):
            assert {name: value.tolist() for name, value in packs[index].items()} == tensors
        assert {len(step.packs) for step in steps} == {-(-4 // world_size)}
    assert {len(steps) for steps in results} == {len(inline_steps)}


def test_a_sample_that_fails_on_one_rank_of_a_group_is_padding_on_all_and_counts_once():
    broken = {"broken": (5, 40)}
    alone = run_ranks(1, list, behaviours=[broken])[0]
    ours, theirs = run_ranks(2, list, data_world=1, behaviours=[broken, {}])
    assert sum(len(step.agreement.bad) for step in ours) == 2
    for step, other, single in zip(ours, theirs, alone, strict=True):
        assert step.agreement.weight_sums == other.agreement.weight_sums == single.agreement.weight_sums
        assert step.agreement.bad == other.agreement.bad == single.agreement.bad
        for pack, twin in zip(step.packs, other.packs, strict=True):
            assert torch.equal(pack.batch.loss_weights, twin.batch.loss_weights)
            assert torch.equal(pack.batch.is_padding, twin.batch.is_padding)


def test_ranks_of_a_group_decode_each_clip_once_and_agree_on_what_none_of_them_saw_alone():
    def choose(rank, plan):
        clips = [(number, 0) for number, planned in enumerate(plan.samples) if planned.extent.clips]
        return frozenset(clips[rank::2])

    behaviour = {"broken": (5, 40, 95)}
    alone = run_ranks(1, list, behaviours=[behaviour])[0]
    groups = run_ranks(2, list, data_world=1, behaviours=[behaviour] * 2, clips_of=choose)
    failed_on = [sum(len(pack.bad) for step in steps for pack in step.packs) for steps in groups]
    assert failed_on == [3, 3]  # each knows of all, whoever tried to decode
    for single, ours, theirs in zip(alone, *groups, strict=True):
        assert ours.agreement.weight_sums == theirs.agreement.weight_sums == single.agreement.weight_sums
        assert ours.agreement.bad == single.agreement.bad
        for pack, first, second in zip(single.packs, ours.packs, theirs.packs, strict=True):
            assert torch.equal(first.batch.is_padding, pack.batch.is_padding)
            assert torch.equal(second.batch.loss_weights, pack.batch.loss_weights)
            # -1 is what the fake makes of a clip that it does not decode
            values = [patches[patches > 0].tolist() for patches in (b.batch.vision.patches for b in (first, second))]
            assert sorted(values[0] + values[1]) == sorted(
                pack.batch.vision.patches[pack.batch.vision.patches > 0].tolist()
            )


def test_ranks_that_stop_early_at_different_speeds_all_end():
    for num_steps in (1, 2):
        begin = time.monotonic()

        def body(stream, num_steps=num_steps):
            time.sleep(0.2 * stream._assign.keywords["data_rank"])
            return [next(stream).plan.step for _ in range(num_steps)]

        assert run_ranks(3, body, packs_per_step=3, window=16, epochs=4.0) == [list(range(num_steps))] * 3
        assert time.monotonic() - begin < 15  # well under the barrier's timeout: nobody waited for a missing rank


def test_a_rank_that_cannot_load_stops_all_with_its_reason():
    class Defect(RuntimeError):
        pass

    def body(stream):
        if stream._assign.keywords["data_rank"] == 1:

            def submit(plan, decode_clips=None):
                raise Defect("a bug in a processor")

            stream._loader.submit = submit
        return list(stream)

    first, second = run_ranks(2, body)
    assert isinstance(first, RanksStopped)
    assert "rank 1: Defect: a bug in a processor" in str(first)
    assert isinstance(second, Defect)


def test_agreement_counts_what_is_left():
    rows = open_rows(broken=(5,))
    plans = (
        PackPlan(index=0, samples=(sample(5), sample(6))),
        PackPlan(index=1, samples=(sample(5),)),
        PackPlan(index=2, samples=()),
    )
    step = StepPlan(step=0, packs=plans, rows_planned=3)
    packs = [rows.load(plan, None, {}, lambda row: None) for plan in plans]
    agreement, _ = settle(step, packs, [[report_pack(pack) for pack in packs]])
    assert agreement.weight_sums["router"] == 1
    assert agreement.weight_sums["text"] == 0.5 * (sample(6).extent.num_tokens // 2)
    assert agreement.stats.num_samples == 1
    assert agreement.stats.num_images == 0
    assert len(agreement.bad) == 2


def test_a_pack_that_lost_samples_is_still_a_mean_where_the_loss_is_a_mean_of_packs():
    behaviour = {"broken": (5, 40, 95)}
    alone = run_ranks(1, list, behaviours=[behaviour], loss="batch")[0]
    shared = run_ranks(2, list, data_world=1, behaviours=[behaviour, {}], loss="batch")  # the second knows by the first
    divided = run_ranks(2, list, behaviours=[behaviour] * 2, loss="batch")
    assert sum(len(step.bad) for step in alone) == 3
    for number, step in enumerate(alone):
        for pack in step.packs:
            # float32 weights of at most some hundred labels
            assert float(pack.batch.loss_weights.double().sum()) == pytest.approx(
                1.0 if pack.batch.loss_weights.any() else 0.0, abs=1e-5
            )
        assert step.agreement.weight_sums["text"] == pytest.approx(step.agreement.weight_sums["router"], abs=1e-5)
        assert step.agreement.weight_sums["text"] == pytest.approx(
            sum(float(pack.batch.loss_weights.double().sum()) for pack in step.packs), rel=1e-6
        )
        for steps in (*shared, *divided):
            assert steps[number].agreement.weight_sums["text"] == step.agreement.weight_sums["text"]
            for pack in steps[number].packs:
                twin = next(other for other in step.packs if other.index == pack.index)
                assert torch.equal(pack.batch.loss_weights, twin.batch.loss_weights)


# ---------------------------------------------------------------------------------------- extent cache


EXTENT = Extent(
    num_tokens=90,
    num_loss_tokens=7,
    weight_sum=0.1 + 0.2,
    clips=(
        ClipGeometry(kind="video", num_tokens=8, grid_thw=(2, 4, 4), frame_indices=(0, 1, 2, 3), duration_seconds=2.04),
    ),
)


def test_cache_gives_back_what_was_put_also_to_others(tmp_path):
    ours, theirs = ExtentCache(tmp_path / "cache"), ExtentCache(tmp_path / "cache")
    ours.put({"a": EXTENT})
    assert theirs.get("a") == EXTENT
    assert theirs.get("b") is None
    theirs.put({"b": EXTENT})
    assert ours.get("b") == EXTENT


def test_broken_cache_is_made_anew(tmp_path, caplog):
    (tmp_path / "extents.sqlite").write_bytes(b"this is no database, " * 500)
    cache = ExtentCache(tmp_path)
    assert cache.get("a") is None
    cache.put({"a": EXTENT})
    assert cache.get("a") == EXTENT
    assert "is broken" in caplog.text


def test_cache_entry_that_was_changed_on_disk_is_not_believed(tmp_path):
    cache = ExtentCache(tmp_path)
    cache.put({"a": EXTENT})
    cache._connect().execute("UPDATE extents SET value = replace(value, '90', '91')")
    assert cache.get("a") is None


def test_cache_that_cannot_be_written_costs_a_warning_only(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = ExtentCache(tmp_path / "file")
    cache.put({"a": EXTENT})
    assert cache.get("a") is None
    assert caplog.text.count("is not used") == 1


def test_cache_key_follows_row_media_and_processor(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"1234")

    def conversation(text="hello", **names):
        media = MediaSource(path=str(image), data=None)
        parts = (Part(kind="text", text=text), Part(kind="image", media=media))
        return Conversation(**{"id": "x", "source": "f:1", **names}, turns=(Turn(role="user", parts=parts),))

    key = extent_key(conversation(), "p")
    assert extent_key(conversation(id="y", source="g:2"), "p") == key
    assert extent_key(conversation("other"), "p") != key
    assert extent_key(conversation(), "q") != key
    os.utime(image, ns=(1, 1))
    assert extent_key(conversation(), "p") != key
    image.unlink()
    assert extent_key(conversation(), "p") is None


def test_cached_rows_are_not_measured_again(tmp_path):
    class Counting(NumberProcessor):
        calls = 0

        def measure(self, conversation, headers, clips=None):
            self.calls += 1
            return super().measure(conversation, headers)

    def reader(processor):
        return replace(open_rows(processor), cache=ExtentCache(tmp_path))

    text_rows = [row for row in range(30) if row % 5]  # images of this fake do not exist, so those are not cached
    first, second = Counting(), Counting()
    found = reader(first).measure(text_rows, {}, lambda row: None)
    assert reader(second).measure(text_rows, {}, lambda row: None) == found
    assert (first.calls, second.calls) == (len(text_rows), 0)


def test_packs_load_in_order_whatever_is_ahead(inline_steps):
    plans = [pack for step in inline_steps for pack in step[0].packs]
    loader = Loader(open_rows, workers=2)
    try:
        loaded = list(loader.load_in_order(plans, prefetch_packs=3))
    finally:
        loader.close()
    assert [pack.index for pack in loaded] == [plan.index for plan in plans]


def test_fingerprint_follows_checkpoint_files_and_options(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    found = fingerprint_of(tmp_path, "options")
    assert fingerprint_of(tmp_path, "options") == found
    assert fingerprint_of(tmp_path, "other options") != found
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert fingerprint_of(tmp_path, "options") != found
