"""A practitioner's four tasks from files to an answer, with nothing but documented commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniloom import cli
from omniloom.run.best import read_evaluations
from omniloom.tools.tiny import make_tiny
from tests.unit.media_files import picture, tone, write_audio, write_video

Task = tuple[str, list[str], list[str], str]  # family, words for train, for generate, an evaluation's figure


def images_as_sharegpt(folder: Path) -> Task:
    rows = []
    for n in range(6):
        Image.fromarray(picture(n, 56, 56)).save(folder / f"{n}.png")
        turns = [{"from": "human", "value": "<image>What is it?\nA. red\nB. blue"}, {"from": "gpt", "value": "A"}]
        rows.append({"conversations": turns, "images": [f"{n}.png"]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return "qwen3_vl", ["data.train=rows.json"], ["What is it?", "--image", "0.png"], "eval_choice"


def speech_in_a_csv(folder: Path) -> Task:
    lines = ["audio,text"]
    for n in range(6):
        write_audio(folder / f"{n}.wav", "pcm_s16le", 16000, tone(6000 + 500 * n, 16000))
        lines.append(f'{n}.wav,"Hello, number {n}."')
    (folder / "speech.csv").write_text("\n".join(lines) + "\n")
    words = ["data.train=speech.csv", "data.attr.audios=audio", "data.attr.response=text"]
    return "qwen3_omni", words, ["Transcribe.", "--audio", "0.wav"], "eval_wer"


def lectures_with_sound(folder: Path) -> Task:
    for n in range(4):
        write_video(folder / f"{n}.mp4", sound=tone(16000, 16000), sound_rate=16000)
    rows = [{"query": "<video>What is said?", "response": f"It is {n}.", "videos": [f"{n}.mp4"]} for n in range(4)]
    (folder / "lectures.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["data.train=lectures.jsonl", "data.video.use_audio=true", "data.video.max_pixels=3136", "data.video.fps=2"]
    return "qwen3_omni", words, ["What is said?", "--video", "0.mp4"], "eval_exact_match"


def tool_calls(folder: Path) -> Task:
    tool = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
    rows = []
    for city in ("Rome", "Oslo", "Lima", "Kyiv"):
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        asked = {"role": "user", "content": f"And in {city}?"}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        rows.append({"messages": [asked, answer], "tools": [{"type": "function", "function": tool}]})
    (folder / "calls.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "qwen3_vl", ["data.train=calls.jsonl"], ["And in Bonn?"], "eval_tool_calls"


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(images_as_sharegpt, marks=pytest.mark.full),
        speech_in_a_csv,
        pytest.param(lectures_with_sound, marks=pytest.mark.full),
        pytest.param(tool_calls, marks=pytest.mark.full),
    ],
    ids=lambda prepare: prepare.__name__,
)
def test_from_files_to_an_answer(
    prepare: Callable[[Path], Task],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    family, data, question, figure = prepare(tmp_path)
    make_tiny(family, tmp_path / "model")

    def omniloom(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["omniloom", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert end.value.code == 0, said.err
        return said.out

    config = ["model.path=model", *data, "data.split=0.4", "data.pack_tokens=512", "train.packs_per_step=1"]
    config += ["train.steps=2", "train.eval_every=1", "train.eval_answers=2", "train.eval_answer_tokens=4"]
    config += [f"checkpoint.best={figure}", "data.workers=0", "model.dtype=float32"]
    omniloom("check", *config)
    said = omniloom("train", *config)
    assert "next: omniloom " in said
    figures = read_evaluations(tmp_path / "runs" / "train")
    assert list(figures) == [1, 2]
    assert all(np.isfinite(found[figure]) for found in figures.values())
    assert omniloom("generate", "runs/train", *question, "--max-new-tokens", "3").endswith("\n")
    worst = omniloom("score", "runs/train", data[0].partition("=")[2], "--worst", "1", *data[1:], "data.workers=0")
    assert json.loads(worst)["loss"] > 0
    omniloom("export", "runs/train", "best", "--best")
    assert (tmp_path / "best" / "config.json").is_file()
    assert "Rows of the highest loss" in Path(omniloom("report", "runs/train").split()[-1]).read_text()
