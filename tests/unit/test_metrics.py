"""metrics.jsonl survives crashes and resumes without repeating a step."""

import json
import resource
from dataclasses import asdict, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from omniloom.config import LogConfig
from omniloom.training.flops import TrainingWork, nominal_peak
from omniloom.training.metrics import (
    MetricsLog,
    Screen,
    SpikeDetector,
    StepFigures,
    StepMetrics,
    is_load_kept,
    read_lines,
)
from omniloom.training.trackers import open_trackers
from omniloom.types import Extent, RunError


def line(step: int) -> StepMetrics:
    numbers = dict.fromkeys(StepMetrics.__dataclass_fields__, 1)
    absent = ("other_losses", "evaluation", "expert_imbalance", "mfu_parts", "samples_of")
    numbers.update(step=step, **dict.fromkeys(absent))
    return StepMetrics(**numbers)


def test_utilisation_is_known_by_component(tmp_path) -> None:
    extents = [Extent(num_tokens=1, num_loss_tokens=1, weight_sum=1.0, cost=10, tower_cost=4)] * 2
    assert TrainingWork(decoder_weights=True, towers=False).by_component(extents) == {"decoder": 36, "towers": 8}
    assert TrainingWork(decoder_weights=False, towers=True).megaflops(extents) == 2 * (2 * 6 + 3 * 4)
    log = MetricsLog(tmp_path, first_step=0)
    log.write(replace(line(0), mfu_parts={"decoder": 0.3, "towers": 0.1}, mfu_of_nominal=None))
    log.close()
    (entry,) = read_lines(tmp_path / "metrics.jsonl")
    assert (entry["mfu_decoder"], entry["mfu_towers"]) == (0.3, 0.1)
    assert "mfu_parts" not in entry
    assert "mfu_of_nominal" not in entry


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA RTX A1000 Laptop GPU", None),
    ],
)
def test_the_nominal_peak_is_that_of_the_device(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nominal_peak(torch.device("cpu"), torch.bfloat16) is None
    named = SimpleNamespace(get_device_name=lambda device: name)
    monkeypatch.setattr(torch, "get_device_module", lambda device: named)
    assert nominal_peak(torch.device("cuda"), torch.bfloat16) == peak
    assert nominal_peak(torch.device("cuda"), torch.float32) is None
    monkeypatch.setattr(named, "get_device_name", lambda device: "another")
    assert nominal_peak(torch.device("cuda"), torch.bfloat16) is None


def test_resuming_drops_the_steps_that_will_be_taken_again(tmp_path) -> None:
    log = MetricsLog(tmp_path, first_step=0)
    for step in range(5):
        log.write(line(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the process died while writing
    log = MetricsLog(tmp_path, first_step=3)
    log.write(line(3))
    log.close()
    assert [entry["step"] for entry in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_lines_hold_the_documented_keys_and_no_nulls(tmp_path) -> None:
    trackers = open_trackers(LogConfig(), tmp_path, {})
    log = MetricsLog(tmp_path, first_step=0, trackers=trackers)
    log.write(line(0))
    log.close()
    trackers[0].close()
    entry = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert set(entry) == {key for key, value in asdict(line(0)).items() if value is not None}
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_spike_is_a_loss_three_times_the_usual_once_there_is_a_usual() -> None:
    spikes = SpikeDetector()
    assert spikes.check(100.0) is None  # nothing is usual yet
    assert not any(spikes.check(2.0) for _ in range(30))
    assert spikes.check(5.9) is None
    assert spikes.check(6.1) == 2.0
    assert spikes.check(float("nan")) is None
    assert spikes.check(6.1) == 2.0


def test_a_loss_learnt_by_heart_has_no_spikes() -> None:
    spikes = SpikeDetector()
    assert not any(spikes.check(0.001) for _ in range(30))
    assert spikes.check(0.02) is None
    assert spikes.check(0.2) == 0.001


def test_the_load_of_every_expert_is_kept_and_its_imbalance_averaged_over_layers(tmp_path) -> None:
    figures = StepFigures(losses={"text": 1.0}, grad_norm=1.0, learning_rate=1.0, expert_load=((6, 2), (4, 4)))
    assert figures.expert_imbalance == pytest.approx((6 / 4 + 1) / 2)
    log = MetricsLog(tmp_path, first_step=0)
    log.write(line(3), figures.expert_load)
    log.close()
    assert json.loads((tmp_path / "expert_load.jsonl").read_text()) == {"step": 3, "tokens": [[6, 2], [4, 4]]}


def test_a_long_run_keeps_few_lines_of_expert_load_and_the_same_after_a_resumption() -> None:
    kept = [step for step in range(100_000) if is_load_kept(step)]
    assert kept[:33] == list(range(33))
    assert len(kept) < 250  # of 40 KB each for 48 layers of 128 experts
    assert max(after / before for before, after in pairwise(kept[1:])) <= 2.0
    assert all(after - before <= before / 16 + 1 for before, after in pairwise(kept[32:]))


def test_going_on_reads_the_beginnings_of_lines_and_not_what_they_hold(tmp_path) -> None:
    """Lines that are no JSON further on: what is parsed whole would end at the first."""
    path = tmp_path / "expert_load.jsonl"
    path.write_text("".join(f'{{"step": {step}, "tokens": [[...]]}}\n' for step in range(6)) + '{"step": 6, "tok')
    MetricsLog(tmp_path, first_step=4).close()
    assert len(path.read_text().splitlines()) == 4
    MetricsLog(tmp_path, first_step=9).close()
    assert path.read_text().endswith('{"step": 3, "tokens": [[...]]}\n')


def test_a_step_that_measured_nothing_has_a_loss_of_null(tmp_path) -> None:
    trackers = open_trackers(LogConfig(), tmp_path, {})
    log = MetricsLog(tmp_path, first_step=0, trackers=trackers)
    log.write(replace(line(0), loss=None))
    log.close()
    trackers[0].close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_the_time_left_is_told_by_steps_alone(capsys) -> None:
    screen = Screen(enabled=True, total_steps=5, every=1)
    assert screen._eta(0.2, 1000.0) == "?"  # however long the opening and the first step took
    assert screen._eta(0.4, 1010.0) == "0:00:30"
    screen.step(replace(line(4), loss=None), progress=1.0)
    assert "loss none" in capsys.readouterr().out


def test_a_disk_that_is_full_is_one_clear_error(tmp_path) -> None:
    log = MetricsLog(tmp_path, first_step=0)
    log.write(line(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 9, hard))
    try:
        for _ in range(2):  # a part of the line fits; then nothing does
            with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: .*make room"):
                log.write(line(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    assert [entry["step"] for entry in read_lines(tmp_path / "metrics.jsonl")] == [0]
