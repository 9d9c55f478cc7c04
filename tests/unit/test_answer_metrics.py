"""Answers are compared by what their rows ask for: words, letters, calls, boxes, and functions of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omniloom.config import ConfigError, load_config
from omniloom.run.answer_metrics import compare_answers, iou, is_lower_better, load_metrics, normalise
from omniloom.run.best import BestSteps, read_evaluations, write_evaluations
from omniloom.run.rows import _evaluation_faults


def row(expected: str, answer: str, question: str = "q", modality: str = "text") -> dict[str, Any]:
    return {"expected": expected, "answer": answer, "question": question, "modality": modality, "media": []}


def test_error_rates_are_of_transcriptions_alone() -> None:
    rows = [
        row("A cat sat.", "a hat sat", "Transcribe the audio.", "audio"),
        row("你好、世界", "你好世人", "请转写这段语音", "audio"),
        row("yes", "no", "", "audio"),  # nothing asked: the words are
        row("a dog", "a car", "What do you hear?", "audio"),
        row("a dog", "a car", "Transcribe the audio.", "audio+image"),
    ]
    found = compare_answers(rows)
    assert found["eval_wer"] == pytest.approx((1 + 1 + 1) / (3 + 4 + 1))
    assert found["eval_cer"] == pytest.approx((1 + 1 + 3) / (7 + 4 + 3))
    assert "eval_wer" not in compare_answers(rows[3:])


def test_text_is_compared_without_case_marks_and_width() -> None:
    assert normalise("It\u2019s 3.5% — “Well-done”!  \uff2f\uff4b 你好") == "it's 3 5 well done ok 你 好"


def test_choices_are_of_questions_that_offer_them() -> None:
    asked = "What is it?\nA. a cat\nB. a dog\n(C) a car"
    rows = [row("B", "B. a dog", asked), row("A", "The answer is (A).", asked), row("C", "A or C", asked)]
    assert compare_answers(rows)["eval_choice"] == pytest.approx(2 / 3)
    assert "eval_choice" not in compare_answers([row("A", "A", "Which letter?"), row("A cat", "A dog", "a or b?")])


def test_every_call_of_a_row_counts_by_name_and_arguments() -> None:
    def calls(*bodies: str) -> str:
        return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)

    one, two = '{"name": "f", "arguments": {"a": 1, "b": [2]}}', '{"name": "g", "arguments": {}}'
    rows = [
        row(calls(one, two), calls('{"arguments": {"b": [2], "a": 1}, "name": "f"}', two)),
        row(calls(one, two), calls(one)),
        row(calls(one), calls(one.replace("1", "7"))),
        row(calls(one), calls(one[:-1])),  # cut off
    ]
    found = compare_answers(rows)
    assert (found["eval_tool_calls"], found["eval_tool_names"]) == (1 / 4, 2 / 4)
    assert "eval_tool_calls" not in compare_answers([row("x", calls(one))])


def test_boxes_are_compared_in_order_and_missing_ones_count_nothing() -> None:
    assert iou((0, 0, 2, 2), (3, 2, 1, 0)) == pytest.approx(2 / 6)
    assert iou((0, 0, 1, 1), (5, 5, 6, 6)) == 0
    wanted = '[{"bbox_2d": [0, 0, 10, 10]}, {"bbox_2d": [5, 5, 9, 9]}]'
    rows = [row(wanted, "[0, 0, 10, 10] and [5, 5, 9, 9]"), row(wanted, "[0, 0, 10, 10]"), row("none", "[1, 2, 3, 4]")]
    assert compare_answers(rows)["eval_iou"] == pytest.approx((1 + 0.5) / 2)


def test_a_function_of_the_users_gives_figures(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(rows):\n    return sum(len(row['answer']) for row in rows)\n"
        "def two(rows):\n    return {'f1': 0.5, 'eval_p': 1}\n"
        "def odd(rows):\n    return 'many'\n"
        "def ends(rows):\n    raise SystemExit(3)\n"
    )
    own = load_metrics([f"{file}:length", f"{file}:two"])
    found = compare_answers([row("a", "abc")], own)
    assert (found["eval_length"], found["eval_f1"], found["eval_p"]) == (3.0, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"odd gave 'many' for odd; expected a finite number"):
        compare_answers([row("a", "b")], load_metrics([f"{file}:odd"]))
    with pytest.raises(ValueError, match=r"ends failed: SystemExit: 3 \(mine\.py:8\)"):
        compare_answers([row("a", "b")], load_metrics([f"{file}:ends"]))
    (tmp_path / "wrong.py").write_text("def f(rows:\n")
    for name, words in (
        ("f1", "expected module:function"),
        (f"{file}:none", "has no function none"),
        (f"{tmp_path}/no.py:f", "no such file"),
        ("no_such_module:f", "No module named"),
        (f"{tmp_path}/wrong.py:f", r"wrong\.py:f: SyntaxError: .*; name a module"),
    ):
        with pytest.raises(ValueError, match=words):
            load_metrics([name])


def test_figures_are_better_low_or_high_by_their_names() -> None:
    lower = ["eval_loss", "eval_loss.image", "eval_set_loss.talk", "eval_wer", "eval_cer", "eval_error"]
    assert all(map(is_lower_better, lower))
    assert not any(map(is_lower_better, ["eval_exact_match", "eval_iou", "eval_choice", "eval_power", "eval_f1"]))


def test_the_best_steps_are_kept_and_patience_ends(tmp_path: Path) -> None:
    words = ["checkpoint.best=eval_f1", "checkpoint.keep_best=2", "train.patience=2"]
    best = BestSteps(load_config(None, words), {2: {"eval_f1": 0.3}, 4: {"eval_f1": 0.9}})
    assert (best.kept, best.value, best.is_exhausted) == ([4, 2], 0.9, False)
    best.add(6, {"eval_f1": 0.9})
    assert (best.kept, best.is_exhausted) == ([4, 6], False)
    best.add(8, {"eval_f1": 0.1})
    assert best.is_exhausted
    lowest = load_config(None, [*words, "checkpoint.best_is=lowest"])
    assert BestSteps(lowest, {2: {"eval_f1": 1.0}, 4: {"eval_f1": 0.0}}).kept[0] == 4
    with pytest.raises(ValueError, match=r"eval_f1 was not measured after step 9.*has eval_loss"):
        best.add(9, {"eval_loss": 1.0})
    write_evaluations(tmp_path, {2: {"eval_loss": 1.0}, 4: {"eval_loss": 2.0}})
    assert read_evaluations(tmp_path, 3) == {2: {"eval_loss": 1.0}}


def test_what_evaluation_cannot_give_is_refused() -> None:
    words = ["checkpoint.best=eval_wer", "train.patience=2", "train.eval_metrics=m:f"]
    faults = "\n".join(_evaluation_faults(load_config(None, words), has_rows=True))
    assert "set train.eval_every" in faults
    assert faults.count("set train.eval_answers") == 2
    assert "set data.eval" in "\n".join(_evaluation_faults(load_config(None, words), has_rows=False))
    assert "set checkpoint.best" in _evaluation_faults(load_config(None, ["train.patience=1"]), has_rows=True)[0]
    with pytest.raises(ConfigError, match="best_is"):
        load_config(None, ["checkpoint.best_is=biggest"])
