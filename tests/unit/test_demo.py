"""The demo goes through every verb and leaves what it promises; its accuracy is the full demo's to show."""

import json
from pathlib import Path

import pytest

from omniloom.tools.demo import DemoSize, run_demo
from omniloom.tools.demo_data import MODALITIES

SMALL = DemoSize(num_train=42, num_held_out=2, num_steps=4, num_checkpoints=2, num_curve=1, num_samples=4)


def test_a_small_demo_leaves_everything_that_the_full_one_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "demo"
    summary = run_demo(directory, SMALL)
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert summary["seconds"] > 0
    for key in ("accuracy", "accuracy_without_media"):
        assert list(summary[key]) == list(MODALITIES)
        assert all(0 <= share <= 1 for share in summary[key].values())
    assert set(summary["accuracy_frozen_frame"]) == {"video", "joint"}
    assert [point["step"] for point in summary["accuracy_by_step"]] == [2, 4]
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 4
    assert (directory / "hf" / "config.json").is_file()
    samples = [json.loads(line) for line in (directory / "answers" / "step_00000004.jsonl").read_text().splitlines()]
    assert {line["modality"] for line in samples} == {"image", "audio", "video", "audio+video"}
    assert all(line["question"].endswith("?") and Path(line["media"][0]).is_file() for line in samples)
    page = (directory / "report.html").read_text()
    assert page.count("data:image/") >= 4
    assert "cannot be read" not in page
    assert str(directory / "report.html") in capsys.readouterr().out


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no earlier demo"):
        run_demo(tmp_path, SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
