"""score: one loss a row, one path whatever it contains, and no overrides that it would not use."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from omniloom import cli
from omniloom.config import ConfigError
from omniloom.models.fusion import OmniModel
from omniloom.tools.report import write_report
from omniloom.tools.score import score_file, score_rows
from omniloom.tools.tiny import make_tiny

WORDS = ("model.dtype=float32", "data.workers=0", "data.pack_tokens=128")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_vl", tmp_path_factory.mktemp("score") / "model")


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", ["a, b.jsonl", "a #1.jsonl", "[a].jsonl", "{1,2}.jsonl", "'q'.jsonl", "yes.jsonl"])
def test_the_data_is_one_path_whatever_it_contains(model: Path, tmp_path: Path, name: str) -> None:
    rows = write(tmp_path / name, {"id": 1, "query": "q", "response": "r"})
    scores, bad = score_rows(model, rows, WORDS)
    assert ([score["id"] for score in scores], bad) == (["1"], [])


@pytest.mark.parametrize(
    "override",
    ["train.learning_rate=1", "policy.text.freeze=true", "model.path=x", "model.adapter=x", "data.train=x",
     "data.split=0.1", "parallel.shard=2", "checkpoint.every=3", "log.every=2", "train={steps: 3}"],
)  # fmt: skip
def test_an_override_that_scoring_does_not_use_is_refused_by_name(model: Path, override: str) -> None:
    name = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{name}: score does not use it; it takes model.modalities, .*data.audio.*"):
        score_rows(model, "rows.jsonl", [override])


def test_no_data_is_said(model: Path) -> None:
    with pytest.raises(ValueError, match="no data to score: name at least one file"):
        score_rows(model, [])


def test_a_wrong_name_is_told_from_one_of_no_use(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.vidio: unknown key; did you mean data\.video\?"):
        score_rows(model, "rows.jsonl", ["data.vidio.fps=1"])


def test_nothing_scored_is_no_success(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"query": "<image>", "response": "r", "images": ["gone.png"]}
    rows = write(tmp_path / "rows.jsonl", gone, {"what": 1})
    monkeypatch.setattr("sys.argv", ["omniloom", "score", str(model), str(rows), *WORDS])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    written = capsys.readouterr()
    assert stop.value.code == 2
    assert written.out == ""
    assert f"{rows}:1: image: " in written.err
    assert written.err.splitlines()[-1] == f"error: none of the 2 rows of {rows} could be scored"
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1500])  # its header is whole
    cut = {**gone, "images": ["cut.jpg"]}
    with pytest.raises(ValueError, match="none of the 1 rows"):
        score_file(model, write(rows, cut), WORDS)
    score_file(model, write(rows, gone, cut, {"query": "q", "response": "r"}), WORDS)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_terminal_without_utf8_ends_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write(tmp_path / "rows.jsonl", {"id": "q⟦é", "query": "q", "response": "r"})
    written = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["omniloom", "score", str(model), str(rows), *WORDS])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert written.getvalue().startswith(rb'{"id": "q\u27e6\xe9", "num_loss_tokens": ')


def test_short_memory_is_one_message(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write(tmp_path / "rows.jsonl", {"query": "q", "response": "r"})
    monkeypatch.setattr(sys, "argv", ["omniloom", "score", str(model), str(rows), *WORDS])
    monkeypatch.setattr(OmniModel, "encode", lambda *_: torch.empty(2**55))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    error, note = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert "tried to allocate" in error
    assert note.startswith("memory is short: lower data.pack_tokens")


def test_the_worst_rows_are_told_with_words_and_media_and_shown_in_the_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    rows = [{"id": f"r{n}", "query": f"q{n} <image>", "response": "yes " * n, "images": ["a.png"]} for n in (1, 4, 9)]
    file = write(tmp_path / "rows.jsonl", *rows)
    every, _ = score_rows(model, file, WORDS)
    by_loss = sorted(every, key=lambda score: -score["loss"])
    found, _ = score_rows(model, file, WORDS, worst=2)
    assert [line["id"] for line in found] == [score["id"] for score in by_loss[:2]]
    assert found[0]["media"] == [str(tmp_path / "a.png")]
    assert found[0]["question"].startswith("q")
    assert found[0]["expected"].startswith("yes")
    assert found[0]["source"].startswith(f"{file}:")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"model: {{path: {model}}}")
    (run / "worst_rows.jsonl").write_text(json.dumps(found[0]))
    page = write_report(run).read_text()
    assert "Rows of the highest loss" in page
    assert f"{file}:" in page
    assert 'src="data:image/' in page


def test_several_data_sets_are_scored_as_each_alone_and_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [write(tmp_path / folder / "rows.jsonl", {"id": 1, "query": folder, "response": "r"},
                  {"id": 2, "query": f"{folder} {folder}", "response": "no"}) for folder in ("a", "lr=3")]  # fmt: skip
    (shards := tmp_path / "shards").mkdir()
    for number in (1, 2):
        write(shards / f"part-{number}.jsonl", {"id": f"s{number}", "query": "q", "response": str(number)})
    given = [str(sets[0]), str(shards), *WORDS, str(shards / "part-*.jsonl"), "lr=3/rows.jsonl"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["omniloom", "score", str(model), *given])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    alone = [score for path in (sets[0], shards, shards / "part-*.jsonl", sets[1])
             for score in score_rows(model, path, WORDS)[0]]  # fmt: skip
    names = ["rows.jsonl"] * 2 + ["shards"] * 2 + ["part-*.jsonl"] * 2 + ["rows.jsonl.3"] * 2
    assert [score.pop("data_set") for score in found] == names
    assert [score["id"] for score in found] == ["1", "2", "s1", "s2", "s1", "s2", "1", "2"]
    assert [score["loss"] for score in found] == pytest.approx([score["loss"] for score in alone], rel=1e-5)
