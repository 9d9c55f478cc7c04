"""metrics.jsonl survives crashes and resumes without repeating a step."""

import json
import resource
from dataclasses import asdict

import pytest

from omniloom.training.metrics import MetricsLog, SpikeDetector, StepFigures, StepMetrics, read_metrics
from omniloom.types import RunError


def line(step: int) -> StepMetrics:
    numbers = dict.fromkeys(StepMetrics.__dataclass_fields__, 1)
    numbers.update(step=step, router_loss=None, evaluation=None, expert_imbalance=None)
    return StepMetrics(**numbers)


def test_resuming_drops_the_steps_that_will_be_taken_again(tmp_path) -> None:
    log = MetricsLog(tmp_path, first_step=0, tensorboard=False)
    for step in range(5):
        log.write(line(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the process died while writing
    log = MetricsLog(tmp_path, first_step=3, tensorboard=False)
    log.write(line(3))
    log.close()
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_lines_hold_the_documented_keys_and_no_nulls(tmp_path) -> None:
    log = MetricsLog(tmp_path, first_step=0, tensorboard=True)
    log.write(line(0))
    log.close()
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
    figures = StepFigures(loss=1.0, router_loss=0.0, grad_norm=1.0, learning_rate=1.0, expert_load=((6, 2), (4, 4)))
    assert figures.expert_imbalance == pytest.approx((6 / 4 + 1) / 2)
    log = MetricsLog(tmp_path, first_step=0, tensorboard=False, load_every=2)
    for step in range(4):
        log.write(line(step), figures.expert_load)
    log.close()
    lines = [json.loads(text) for text in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "tokens": [[6, 2], [4, 4]]} for step in (0, 2)]


def test_a_disk_that_is_full_is_one_clear_error(tmp_path) -> None:
    log = MetricsLog(tmp_path, first_step=0, tensorboard=False)
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
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [0]
