"""llava rows in the messages form say the same, and nothing is lost in silence."""

from __future__ import annotations

import json

import pytest

from omniloom.config import DataConfig
from omniloom.data.formats import parse_row, row_options
from omniloom.tools.convert import convert_file

ROWS = [
    {
        "id": "1",
        "image": "train2017/a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {"id": "2", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {
        "id": "3",
        "image": "train2017/gone.jpg",
        "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}],
    },
]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    (tmp_path / "coco" / "train2017" / "a.jpg").write_bytes(b"jpeg")
    (tmp_path / "llava.json").write_text(json.dumps(ROWS))
    return tmp_path


def test_converted_rows_are_the_same_conversations(source) -> None:
    target = source / "messages.jsonl"
    num_written, problems = convert_file("llava", source / "llava.json", target, media_dir=source / "coco")
    assert num_written == 2
    assert len(problems) == 1
    assert "gone.jpg does not exist" in problems[0]
    options = row_options(DataConfig(media_dir=str(source / "coco")))
    for raw, line in zip(ROWS[:2], target.read_text().splitlines(), strict=True):
        theirs = parse_row(raw, file="f", line=1, options=options)
        ours = parse_row(json.loads(line), file="f", line=1, options=options)
        assert ours.turns == theirs.turns


def test_nothing_is_overwritten_and_formats_are_named(source) -> None:
    with pytest.raises(ValueError, match="nothing is overwritten"):
        convert_file("llava", source / "llava.json", source / "llava.json")
    with pytest.raises(ValueError, match=r"unknown format 'lava'; expected one of .*llava"):
        convert_file("lava", source / "llava.json", source / "out.jsonl")
