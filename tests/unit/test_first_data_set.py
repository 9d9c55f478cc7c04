"""What the README shows a new user, typed in an empty folder: the model learns the rows and answers as they say."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from omniloom import cli
from tests.unit.media_files import picture

PAGES = [Path(__file__).parents[2] / name for name in ("README.md", "docs/zh/README.md")]


def steps_of(page: Path) -> tuple[list[list[str]], str]:
    """The commands of the page's first data set, without its comments, and the rows between them."""
    (block,) = re.findall(r"```\n(omniloom tiny qwen3_vl tiny .*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    rows = re.search(r"<<'END'.*?\n(.*?)END\n", block, re.DOTALL)
    assert rows is not None
    lines = [shlex.split(line, comments=True) for line in block.replace(rows[0], "\n").splitlines()]
    return [line[1:] for line in lines if line[:1] == ["omniloom"]], rows[1]


def test_both_languages_show_the_same_commands() -> None:
    assert steps_of(PAGES[0]) == steps_of(PAGES[1])


def test_the_first_data_set_of_the_readme_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands, rows = steps_of(PAGES[0])
    (tmp_path / "rows.jsonl").write_text(rows)
    Image.fromarray(picture(1, 120, 160)).save(tmp_path / "cat.png")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n/reset\nAnd now?\n"))
    said = {}
    for words in commands:
        monkeypatch.setattr("sys.argv", ["omniloom", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out = capsys.readouterr()
        assert end.value.code == 0, out.err
        said[words[0]] = out.out
    assert list(said) == ["tiny", "check", "preview", "train", "chat", "report"]
    assert said["train"].startswith("starting the run in runs/train\n")
    assert said["chat"].splitlines() == ["A cat.", "A dog."]
