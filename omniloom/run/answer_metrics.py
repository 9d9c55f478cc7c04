"""How answers to held-out rows compare with what the rows expect: our metrics, and functions of the user's own.

Each metric finds by itself the rows that it is about and is absent where there are none; docs/evaluation.md says how.
A row is a mapping with `id`, `modality`, `question`, `media`, `expected` and `answer`. Knows no model.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

Row = Mapping[str, Any]
Metric = Callable[[Sequence[Row]], object]

ANSWER_METRICS = (  # what `compare_answers` may give
    *("eval_exact_match", "eval_cer", "eval_wer", "eval_choice", "eval_tool_names", "eval_tool_calls", "eval_iou"),
)
_LOWER_IS_BETTER = re.compile(r"loss|error|perplexity|(^|_)([cw]er|ppl|mae|mse|rmse)($|[_.])")
_TRANSCRIBE = re.compile(
    r"transcri|speech[- ]to[- ]text|what (is|was) (being )?said|what (does|did) .{0,40}\bsay\b|write down what"
    r"|转写|转录|听写|转成文[字本]|转换[成为]文[字本]|语音识别|识别.{0,12}(语音|音频)|说了(什么|些什么)|说的是什么",
    re.IGNORECASE,
)
_WIDE_SCRIPTS = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")  # written without spaces
_OPTION = re.compile(r"(?:^|[\n\r\s])\(?([A-Z])[.):、]\s*\S")
_CHOICE = re.compile(r"\(?([A-Z])(?![A-Za-z])[.):、]?")
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_BOX = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*[\])]")


def is_lower_better(name: str) -> bool:
    """Whether a figure counts as better the lower it is, by its name: losses and error rates."""
    return _LOWER_IS_BETTER.search(name) is not None


def compare_answers(rows: Sequence[Row], own: Iterable[tuple[str, Metric]] = ()) -> dict[str, float]:
    """Figures by name, as `metrics.jsonl` has them. `own` as `load_metrics`. Raises: ValueError for what those give."""
    if not rows:
        return {}
    found = {"eval_exact_match": _mean(row["expected"].strip() == row["answer"].strip() for row in rows)}
    found |= error_rates([row for row in rows if is_transcription(row)])
    pairs = [(row, choice) for row in rows if (choice := _expected_choice(row)) is not None]
    if pairs:
        found["eval_choice"] = _mean(_choice_of(row["answer"]) == choice for row, choice in pairs)
    called = [(calls, _calls(row["answer"])) for row in rows if (calls := _calls(row["expected"]))]
    if called:
        found["eval_tool_names"] = _mean(_names(calls) == _names(answered) for calls, answered in called)
        found["eval_tool_calls"] = _mean(calls == answered for calls, answered in called)
    boxes = [(wanted, boxes_of(row["answer"])) for row in rows if (wanted := boxes_of(row["expected"]))]
    if boxes:
        found["eval_iou"] = _mean(_mean_iou(wanted, answered) for wanted, answered in boxes)
    for name, metric in own:
        found |= _own_figures(name, _call(name, metric, rows))
    return found


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


# ---------------------------------------------------------------------------------------- transcriptions


def is_transcription(row: Row) -> bool:
    """Whether a row has sound alone and asks for nothing but its words, or asks nothing at all."""
    question = row["question"].strip()
    return row["modality"] == "audio" and (not question or _TRANSCRIBE.search(question) is not None)


def normalise(text: str) -> str:
    """Text as error rates compare it: NFKC, lower case, no punctuation or symbols, single spaces.

    An apostrophe between letters stays; each Chinese or Japanese character is a word.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    kept = [
        mark if unicodedata.category(mark)[0] not in "PSC" or _is_in_word(text, place) else " "
        for place, mark in enumerate(text)
    ]
    return " ".join(_WIDE_SCRIPTS.sub(r" \1 ", "".join(kept)).split())


def _is_in_word(text: str, place: int) -> bool:
    return text[place] == "'" and text[place - 1 : place].isalpha() and text[place + 1 : place + 2].isalpha()


def error_rates(rows: Sequence[Row]) -> dict[str, float]:
    """Edits over the length of what was expected, all rows together; CER counts no spaces. Source: jiwer."""
    spoken = [(expected, normalise(row["answer"])) for row in rows if (expected := normalise(row["expected"]))]
    if not spoken:
        return {}
    import jiwer

    wanted, given = ([pair[place] for pair in spoken] for place in (0, 1))
    letters, answered = ([text.replace(" ", "") for text in texts] for texts in (wanted, given))
    return {"eval_cer": jiwer.cer(letters, answered), "eval_wer": jiwer.wer(wanted, given)}


# ---------------------------------------------------------------------------------------- choices, calls, boxes


def _expected_choice(row: Row) -> str | None:
    """The letter that a row expects, if its question offers it and another."""
    options = set(_OPTION.findall(unicodedata.normalize("NFKC", row["question"])))  # full-width marks as plain ones
    choice = _choice_of(row["expected"])
    return choice if choice in options and len(options) > 1 else None


def _choice_of(text: str) -> str | None:
    """The letter that an answer begins with, or else the only one that it names."""
    text = unicodedata.normalize("NFKC", text).strip()
    if found := _CHOICE.match(text):
        return found[1]
    named = set(re.findall(r"(?<![A-Za-z])([A-Z])(?![A-Za-z'])", text))
    return named.pop() if len(named) == 1 else None


def _calls(text: str) -> list[Any]:
    """Tool calls in order, as name and arguments; what is no JSON stays text, and equals no call."""
    found: list[Any] = []
    for body in _TOOL_CALL.findall(text):
        try:
            call = json.loads(body)
            arguments = call["arguments"]
            found.append((call["name"], json.loads(arguments) if isinstance(arguments, str) else arguments))
        except (ValueError, KeyError, TypeError):
            found.append(body)
    return found


def _names(calls: Sequence[Any]) -> list[Any]:
    return [call[0] if isinstance(call, tuple) else None for call in calls]


def boxes_of(text: str) -> list[tuple[float, ...]]:
    """Boxes `[x1, y1, x2, y2]` in a text, in order."""
    return [tuple(map(float, found)) for found in _BOX.findall(text)]


def _mean_iou(wanted: Sequence[Sequence[float]], answered: Sequence[Sequence[float]]) -> float:
    """Mean over boxes in order; one that is missing, or too many, counts 0."""
    return sum(map(iou, wanted, answered)) / max(len(wanted), len(answered))


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), whatever corner comes first."""
    (a, b), (c, d) = ([(min(box[k], box[k + 2]), max(box[k], box[k + 2])) for k in (0, 1)] for box in (one, other))
    shared = max(0.0, min(a[1], c[1]) - max(a[0], c[0])) * max(0.0, min(b[1], d[1]) - max(b[0], d[0]))
    area = (a[1] - a[0]) * (b[1] - b[0]) + (c[1] - c[0]) * (d[1] - d[0]) - shared
    return shared / area if area else float(tuple(one) == tuple(other))


# ---------------------------------------------------------------------------------------- the user's own


def load_metrics(names: Sequence[str]) -> list[tuple[str, Metric]]:
    """The functions of `train.eval_metrics`, each `module:function` or `file.py:function`. Raises: ValueError."""
    return [(name, _load_metric(name)) for name in names]


def _load_metric(name: str) -> Metric:
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise ValueError(f"train.eval_metrics: expected module:function or file.py:function, got {name!r}")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # a user's module may raise anything
        kind = "" if isinstance(error, ImportError | OSError) else f"{type(error).__name__}: "
        raise ValueError(
            f"train.eval_metrics: {name}: {kind}{error}; name a module that Python imports here, or "
            "a file: my_metrics.py:wer"
        ) from error
    metric = getattr(module, function, None)
    if not callable(metric):
        raise ValueError(f"train.eval_metrics: {where} has no function {function}")
    found: Metric = metric
    return found


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise OSError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # of every path that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(name: str, metric: Metric, rows: Sequence[Row]) -> object:
    try:
        return metric(rows)
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        frames = traceback.extract_tb(error.__traceback__)[1:2]  # the metric itself, not what it calls
        where = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in frames)
        raise ValueError(f"train.eval_metrics: {name} failed: {type(error).__name__}: {error}{where}") from error


def _own_figures(name: str, given: object) -> dict[str, float]:
    """A number under the function's name, or the numbers of a mapping under theirs."""
    figures = given if isinstance(given, Mapping) else {name.rpartition(":")[2]: given}
    found = {}
    for key, value in figures.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"train.eval_metrics: {name} gave {value!r} for {key}; expected a finite number, or a mapping of "
                "names to numbers"
            )
        found[f"eval_{str(key).removeprefix('eval_')}"] = float(value)
    return found
