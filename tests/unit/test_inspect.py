"""check, preview and plan show what training would read."""

from __future__ import annotations

import re

import pytest

from omniloom.tools.inspect import check_config, preview_rows, show_plan
from omniloom.tools.tiny import make_tiny
from tests.mixed_rows import write_rows


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("inspect")
    model = make_tiny("qwen3_omni", folder / "model")
    return [
        *(f"model.path={model}", f"data.train={write_rows(folder)}", "data.pack_tokens=256", "data.workers=0"),
        *("train.packs_per_step=2", "data.max_bad_fraction=0.2", "data.image.max_pixels=4096"),
    ]


def test_check_counts_good_and_bad_rows(words, capsys) -> None:
    check_config([*words, "policy.vision.freeze=true"])
    printed = capsys.readouterr().out
    assert "24 rows, of the first 24: 23 good, 1 bad; format messages" in printed
    assert "missing.png" in printed
    built, trainable = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:parameters|trainable)", printed))
    assert 0 < trainable < built


def test_check_refuses_what_a_run_would_refuse(words) -> None:
    with pytest.raises(ValueError, match="did you mean vision"):
        check_config([*words, "policy.visoin.freeze=true"])


def test_preview_brackets_exactly_what_trains(words, capsys) -> None:
    preview_rows(words, 3)
    text, image, sound = capsys.readouterr().out.split("── ")[1:]
    assert re.search(r"assistant\n⟦It is number 0, <\|im_end\|>⟧", text)
    assert text.count("⟦") == 1
    assert re.search(r"<\|vision_start\|><\|image_pad\|>\*\d+<\|vision_end\|>Row 1", image)
    assert re.search(r"<\|audio_start\|><\|audio_pad\|>\*\d+<\|audio_end\|>Row 2", sound)


def test_plan_prints_a_line_per_pack_and_covers_every_good_row(words, capsys) -> None:
    show_plan([*words, "train.epochs=1"], 99)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert sum(int(line[2]) for line in lines) == 23
    assert all(int(line[3]) <= 256 for line in lines)
