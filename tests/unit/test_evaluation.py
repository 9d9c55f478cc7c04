"""Evaluation as a run leaves it: losses by modality that add up, answers that are the exported model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omniloom.config import DataConfig, load_config
from omniloom.data.sources import open_sources
from omniloom.run.evaluation import choose_in_turn, modality_of
from omniloom.run.trainer import run
from omniloom.tools.generate import Sampling, answer, load_model, open_reader, read_prompts
from omniloom.tools.score import score_file
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines
from omniloom.types import ClipGeometry, Extent, PlannedSample
from tests.mixed_rows import write_rows

NUM_ANSWERS = 7
MAX_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    make_tiny("qwen3_omni", folder / "model")
    write_rows(folder)
    rows = json.loads((folder / "rows.json").read_text())
    usable = [row for row in rows if "missing.png" not in row.get("images", ())]
    (folder / "held_out.json").write_text(json.dumps(usable[:15]))
    words = [
        *(f"model.path={folder / 'model'}", f"data.train={folder / 'rows.json'}", "data.workers=0"),
        *(f"data.eval={folder / 'held_out.json'}", "model.dtype=float32", "data.image.max_pixels=4096"),
        *("data.pack_tokens=384", "data.max_bad_fraction=0.2", "log.tensorboard=false"),
        *(f"train.run_dir={folder / 'run'}", "train.packs_per_step=2", "train.learning_rate=3e-3"),
        *("train.steps=8", "train.eval_every=4", f"train.eval_answers={NUM_ANSWERS}"),
        *(f"train.eval_answer_tokens={MAX_NEW_TOKENS}", "policy.vision.freeze=true"),
    ]
    assert run(load_config(None, words)) == 0
    return folder


def answers_of(folder: Path, step: int) -> list[dict[str, str]]:
    path = folder / "run" / "answers" / f"step_{step:08d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_evaluation_leaves_its_figures(finished: Path) -> None:
    lines = {line["step"] + 1: line for line in read_lines(finished / "run" / "metrics.jsonl")}
    assert {step for step, line in lines.items() if "eval_loss" in line} == {4, 8}
    last = read_lines(finished / "run" / "evaluations.jsonl")[-1]
    assert last["step"] == 8
    names = {f"eval_{name}" for name in ("loss", "router_loss", "loss.text", "loss.image", "loss.audio", "exact_match")}
    assert last.keys() == {"step", *names}
    assert {name: lines[8][name] for name in names} == {name: last[name] for name in names}
    assert lines[8]["eval_loss"] < lines[4]["eval_loss"]


def test_losses_by_modality_are_those_of_the_exported_model(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model.dtype=float32", "data.workers=0", "data.image.max_pixels=4096"]
    score_file(finished / "run" / "hf", finished / "held_out.json", settings)
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = json.loads((finished / "held_out.json").read_text())
    figures = read_lines(finished / "run" / "evaluations.jsonl")[-1]
    for modality, key in (("image", "images"), ("audio", "audios"), ("text", None)):
        own = [score for score, row in zip(scores, rows, strict=True)
               if (key in row if key else not {"images", "audios"} & row.keys())]  # fmt: skip
        num_tokens = sum(score["num_loss_tokens"] for score in own)
        expected = sum(score["num_loss_tokens"] * score["loss"] for score in own) / num_tokens
        # the export is in bfloat16, as published
        assert figures[f"eval_loss.{modality}"] == pytest.approx(expected, rel=2e-2)


def test_rows_are_answered_in_turn_as_the_exported_model_answers(finished: Path) -> None:
    rows = answers_of(finished, 8)
    assert sorted(row["modality"] for row in rows) == ["audio"] * 3 + ["image"] * 2 + ["text"] * 2
    prompts = read_prompts(
        open_reader(
            finished / "run" / "hf",
            DataConfig(**vars(load_config(None, ["data.image.max_pixels=4096"]).data)),
            open_sources((str(finished / "held_out.json"),)),
        )
    )
    model = load_model(finished / "run" / "hf")
    by_id = {prompt.id: prompt for prompt in prompts}
    chosen = [by_id[row["id"]] for row in rows]
    assert [row["expected"] for row in rows] == [prompt.expected for prompt in chosen]
    tokenizer = open_reader(finished / "run" / "hf", DataConfig(), open_sources((str(finished / "held_out.json"),)))
    theirs = answer(model, tokenizer.processor.tokenizer, chosen, Sampling(max_new_tokens=MAX_NEW_TOKENS))
    same = sum(row["answer"] == text for row, text in zip(rows, theirs, strict=True))
    assert same >= len(rows) - 1  # the export's rounding to bfloat16 may tip one
    assert any(row["answer"] for row in rows)


def test_modalities_are_named_by_what_a_row_has() -> None:
    image = ClipGeometry(kind="image", num_tokens=4)
    sounding = ClipGeometry(kind="video", num_tokens=4, num_mel_frames=30)
    assert [modality_of(Extent(num_tokens=9, num_loss_tokens=1, weight_sum=1.0, clips=clips))
            for clips in ((), (image, image), (sounding,), (image, sounding))] == [
        "text", "image", "audio+video", "audio+image+video"]  # fmt: skip


def test_rows_without_an_answer_or_room_are_not_chosen() -> None:
    def sample(row: int, num_tokens: int, num_loss_tokens: int) -> PlannedSample:
        extent = Extent(num_tokens=num_tokens, num_loss_tokens=num_loss_tokens, weight_sum=1.0)
        return PlannedSample(row=row, epoch=0, extent=extent, weight_scale=1.0)

    groups = {
        "text": [sample(0, 5, 2), sample(1, 5, 0), sample(2, 5, 1), sample(3, 5, 1)],
        "image": [sample(4, 50, 3), sample(5, 9, 3)],
    }
    assert [sample.row for sample in choose_in_turn(groups, 3, 10)] == [5, 0, 2]
    assert choose_in_turn(groups, 0, 10) == []
    assert choose_in_turn({}, 3, 10) == []


def test_what_is_trained_does_not_change_what_is_asked(tmp_path: Path) -> None:
    """Prompts that train, weights on questions, a question behind the answer: the last answer is asked for."""
    turns = [("system", "s"), ("user", "what?"), ("assistant", "first"), ("user", "and?"), ("assistant", "second")]
    messages = [{"role": role, "content": words, "loss_scale": 2.0} for role, words in turns]
    messages[-1]["loss"] = False
    rows = [{"id": "a", "messages": messages}, {"id": "b", "messages": [*messages, {"role": "user", "content": "so?"}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [
        *(f"model.path={make_tiny('qwen3_vl', tmp_path / 'model')}", f"data.train={tmp_path / 'rows.json'}"),
        *(f"data.eval={tmp_path / 'rows.json'}", "data.train_on_prompt=true", "data.workers=0", "data.pack_tokens=256"),
        *("train.steps=1", "train.packs_per_step=1", "train.eval_answers=2", "train.eval_answer_tokens=4"),
        *(f"train.run_dir={tmp_path / 'run'}", "model.dtype=float32", "log.tensorboard=false"),
    ]
    assert run(load_config(None, words)) == 0
    asked = {row["id"]: (row["question"], row["expected"]) for row in answers_of(tmp_path, 1)}
    assert asked == {"a": ("and?", "second"), "b": ("and?", "second")}
