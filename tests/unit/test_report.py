"""The report shows what a run directory holds, survives what it lacks, and is a page that a browser can draw."""

import base64
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omniloom.config import dump_config, load_config
from omniloom.tools import report
from omniloom.tools.charts import MAX_HOVERS, MAX_POINTS, Series, fmt, line_chart
from omniloom.tools.comparison import write_comparison
from omniloom.tools.demo_data import write_demo_data
from omniloom.tools.report import write_report
from omniloom.training.policy import TrainableRow

NUM_STEPS = 400
RATES = {"learning_rate": 1e-3, "weight_decay": 0.0, "lora_rank": None}
VOID_TAGS = {"meta", "img", "br", "line", "circle", "polyline", "link", "input"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def metrics_line(step: int) -> dict:
    return {
        "step": step,
        "loss": 2.0 * math.exp(-step / 90) + 0.01 * (step % 7),
        "grad_norm": 1.0 + 0.1 * (step % 5),
        "learning_rate": 1e-3 * (1 - step / NUM_STEPS),
        "num_tokens": 1000,
        "num_loss_tokens": 100,
        "num_samples": 30,
        "num_images": 12,
        "video_frames": 60,
        "audio_seconds": 9.0,
        "tokens_per_second": 9000.0 + step,
        "mfu": 0.2,
        "data_wait_fraction": 0.03,
        "peak_memory_bytes": 900 * 2**20,
        "step_seconds": 0.1,
    } | ({"eval_loss": 0.5} if step % 100 == 99 else {})


def write_run(directory: Path, *, num_lines: int = NUM_STEPS) -> Path:
    directory.mkdir(parents=True)
    config = load_config({"model": {"path": "some/model"}, "train": {"steps": NUM_STEPS}})
    (directory / "config.yaml").write_text(dump_config(config))
    lines = [json.dumps(metrics_line(step)) + "\n" for step in range(num_lines)]
    (directory / "metrics.jsonl").write_text("".join(lines))
    return directory


def widen_run(run: Path, media: Path) -> None:
    """Add everything that a demo run holds beyond a plain one."""
    data = write_demo_data(media, num_train=7, num_held_out=4)
    samples = []
    for modality, path in data.held_out.items():
        for index, text in enumerate(path.read_text().splitlines()):
            row = json.loads(text)
            (name,) = row.get("images") or row.get("audios") or row.get("videos")
            expected = row["messages"][1]["content"]
            answer = "nonsense" if index == 0 else expected
            question = row["messages"][0]["content"].split(">")[1]
            line = {"question": question, "answer": answer, "expected": expected, "modality": modality}
            samples.append(line | {"media": [str(media / name)]})
    (run / "answers").mkdir()
    (run / "answers" / "step_00000400.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    components = [("vision", 120_000, 120_000), ("text", 640_000, 640_000), ("lm_head", 40_000, 0)]
    table = [TrainableRow(component=name, num_parameters=n, num_trainable=t, **RATES) for name, n, t in components]
    (run / "trainable.json").write_text(json.dumps([dataclasses.asdict(row) for row in table]))
    bad = [{"file": "a.jsonl", "line": i, "field": "images[0]", "reason": f"no such file: m/{i}.png"} for i in range(5)]
    bad.append({"file": "a.jsonl", "line": 9, "field": "audios[0]", "reason": "0 Hz"})
    (run / "bad_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    summary = {
        "seconds": 200,
        "accuracy": {"image": 0.99, "audio": 0.9, "video": 1.0, "joint": 0.95},
        "accuracy_without_media": {"image": 0.22, "audio": 0.33, "video": 0.25, "joint": 0.08},
        "accuracy_frozen_frame": {"video": 0.26, "joint": 0.24},
        "chance": data.chance,
        "accuracy_by_step": [{"step": 200, "image": 0.5, "audio": 0.4}, {"step": 400, "image": 0.99, "audio": 0.9}],
        "accuracy_by_question": {"image": {"Which colour?": 1.0}},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    (run / "checkpoints" / "step_00000400").mkdir(parents=True)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run = write_run(root / "demo")
    widen_run(run, root / "media")
    write_report(run)
    return run


class Page(HTMLParser):
    """Checks that tags nest, and collects texts, addresses and elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "poster")]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data.strip())


def read_page(run: Path) -> Page:
    return Page((run / "report.html").read_text())


def test_a_full_run_shows_all_that_it_holds(full_run: Path) -> None:
    page = read_page(full_run)
    text = " ".join(filter(None, page.texts))
    assert "lora rank" not in text  # a column without a value
    for words in (
        "finished",
        "step 400 of 400",
        "96%",  # mean accuracy
        "Which way and pitch?",
        "first frame frozen",
        "Gradient norm",
        "Learning rate",
        "Waiting for data",
        "Peak memory",
        "900 MiB",
        "video frames",
        "no such file: …",
        "audios[…]: … Hz",
        "lm_head",
        "frozen",
        "all 800k 760k",
        "path: some/model",
        "newest step_00000400",
        "exported to hf/",
    ):
        assert words in text, words
    assert "nonsense ✗" in text
    assert "absent" not in text
    assert page.tags.count("svg") == 1 + 7 + 4 + 3  # accuracy, curves with MFU, other figures, mix
    assert "4 more figures" in text


def test_the_newest_load_of_every_expert_is_drawn_darker_for_more(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    loads = [{"step": 0, "tokens": [[1, 1], [1, 1]]}, {"step": 5, "tokens": [[6, 2], [0, 4]]}]
    (run / "expert_load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in loads))
    page = write_report(run).read_text()
    assert "Load of each expert, by layer" in page
    assert "step 6" in page
    shades = [cell.split('fill-opacity="')[1].split('"')[0] for cell in page.split('class="cell"')[1:]]
    assert shades == ["0.75", "0.25", "0.00", "1.00"]  # of twice the layer's mean


def test_the_page_needs_no_network_and_no_script(full_run: Path) -> None:
    page = read_page(full_run)
    text = (full_run / "report.html").read_text()
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags
    assert not re.search(r"@import|url\((?!data:)", text)


def test_pictures_of_samples_are_embedded_as_they_are(full_run: Path) -> None:
    page = read_page(full_run)
    kinds = [address.split(";")[0].removeprefix("data:") for address in page.addresses]
    # 4 images; 4 spectrograms; 4 strips; 4 strips with spectrograms; and what plays: 4 sounds, 8 clips
    assert sum(kind.startswith("image/") for kind in kinds) == 4 + 4 + 4 + 8
    assert sum(kind.startswith("audio/") for kind in kinds) == 4
    assert kinds.count("video/mp4") == 8
    first = next(address for address in page.addresses if address.startswith("data:image/"))
    with Image.open(io.BytesIO(base64.b64decode(first.split(",")[1]))) as image:
        assert image.size == (64, 64)
        assert np.ptp(np.asarray(image.convert("RGB"))) > 100


def test_an_empty_run_is_drawn_with_its_parts_named_absent(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_lines=0)
    write_report(run)
    text = " ".join(read_page(run).texts)
    assert "not started" in text
    assert "No step has been logged." in text
    assert "No trainable.json" in text
    assert "not in this run's metrics" in text
    (run / "config.yaml").unlink()
    (run / "metrics.jsonl").write_text(json.dumps(metrics_line(0)) + "\n")
    write_report(run)
    assert "No config.yaml" in " ".join(read_page(run).texts)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_lines=100)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "loss": 0.1')
    write_report(run)
    text = " ".join(read_page(run).texts)
    assert "step 100 of 400" in text
    assert "30 s left" in text  # 300 steps of 0.1 s
    assert "going" in text


def test_a_silent_unfinished_run_is_said_to_have_stopped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_lines=100)
    hour_ago = time.time() - 3600
    os.utime(run / "metrics.jsonl", (hour_ago, hour_ago))
    write_report(run)
    text = " ".join(read_page(run).texts)
    assert "stopped" in text
    assert "silent for 60 min" in text


def test_a_run_is_going_as_long_as_its_process_holds_the_directory(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_lines=100)
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")  # of the end from which it goes on
    hold = f"import sys\nfrom omniloom.checkpoint.run_lock import run_lock\nwith run_lock({str(run)!r}):\n"
    hold += "    print(flush=True)\n    sys.stdin.read()\n"
    process = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    write_report(run)
    assert "going step 100 of 400" in re.sub(r"\s+", " ", " ".join(read_page(run).texts))
    process.kill()
    process.communicate()
    (run / "hf" / "config.json").unlink()
    write_report(run)
    told = re.sub(r"\s+", " ", " ".join(read_page(run).texts))
    assert "stopped step 100 of 400, its process has ended" in told


def test_words_from_data_are_shown_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    attack = "<script>alert(1)</script>"
    sample = {
        "question": attack,
        "answer": attack,
        "expected": attack,
        "media": [attack],
        "modality": attack,
    }
    (run / "answers").mkdir()
    (run / "answers" / "step_00000001.jsonl").write_text(json.dumps(sample))
    (run / "bad_samples.jsonl").write_text(json.dumps({"file": attack, "line": 1, "field": attack, "reason": attack}))
    (run / "trainable.json").write_text(json.dumps([{attack: attack}]))
    (run / "summary.json").write_text(
        json.dumps({"accuracy": {attack: 0.5}, "accuracy_by_step": [{"step": 1, attack: 0}]})
    )
    write_report(run)
    page = read_page(run)
    assert "script" not in page.tags
    assert page.texts.count(attack) >= 4


def test_media_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "torn.mp4").write_bytes(b"\0" * 100)
    (tmp_path / "torn.png").write_bytes(b"no picture")
    media = [str(tmp_path / name) for name in ("torn.mp4", "torn.png", "gone.wav")]
    sample = {"step": 1, "question": "?", "answer": "a", "media": media, "modality": "image"}
    (run / "answers").mkdir()
    (run / "answers" / "step_00000001.jsonl").write_text(json.dumps(sample))
    write_report(run)
    text = " ".join(read_page(run).texts)
    for name in ("torn.mp4", "torn.png", "gone.wav"):
        assert f"{name} cannot be read" in text


def test_why_a_run_was_left_is_told_and_half_a_line_of_expert_load_is_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_lines=20)
    (run / "stopped.json").write_text(json.dumps({"reason": "SIGUSR1", "step": 20}))
    lines = [json.dumps({"step": step, "tokens": [[step, 1]]}) for step in (3, 7)]
    (run / "expert_load.jsonl").write_text("\n".join([*lines, '{"step": 9, "to']))
    write_report(run)
    text = " ".join(read_page(run).texts)
    assert "stopped step 20 of 400, by SIGUSR1" in re.sub(r"\s+", " ", text)
    assert "step 8" in text


def test_losses_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_lines=20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_line(20) | {"loss": math.nan}) + "\n")
        file.write(json.dumps(metrics_line(21)) + "\n")
    path = write_report(run)
    assert path.read_text().count('class="lost"') == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such run directory.*train\.run_dir"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.yaml or metrics\.jsonl, found neither"):
        write_report(tmp_path)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=2 * MAX_POINTS),
    st.sampled_from(["", "%", "bytes", "count"]),
    st.booleans(),
    st.sampled_from([None, 0.0]),
    st.booleans(),
)
def test_any_series_is_drawn_inside_its_frame(
    values: list[float], unit: str, raw: bool, floor: float | None, log: bool
) -> None:
    series = Series(name="x", points=list(enumerate(values)), raw=raw)
    svg = line_chart([series], label="any", unit=unit, floor=floor, log=log)
    if not any(math.isfinite(value) for value in values):
        assert svg == ""
        return
    Page(svg)
    assert "nan" not in svg
    assert "inf" not in svg
    for points in re.findall(r'class="line a" points="([^"]*)"', svg):
        pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]
        assert 1 <= len(pairs) <= MAX_POINTS
        assert all(0 <= x <= 360 and -0.1 <= y <= 172.1 for x, y in pairs)


def test_thinning_keeps_the_ends_and_the_level() -> None:
    points = [(float(i), math.sin(i / 50)) for i in range(5000)]
    svg = line_chart([Series(name="x", points=points)], label="x")
    text = re.findall(r'class="line a" points="([^"]*)"', svg)[0]
    pairs = [tuple(map(float, pair.split(","))) for pair in text.split()]
    assert len(pairs) == MAX_POINTS
    heights = [y for _, y in pairs]
    # a sine between -1 and 1 on an axis from -1 to 1 fills the plot from top (8) to bottom (152)
    assert min(heights) < 10
    assert max(heights) > 150


def test_a_line_that_is_level_but_for_rounding_stays_in_its_frame() -> None:
    svg = line_chart([Series(name="x", points=[(float(i), 0.1) for i in range(400)], raw=True)], label="x")
    heights = {pair.split(",")[1] for text in re.findall(r'points="([^"]*)"', svg) for pair in text.split()}
    assert all(8 <= float(height) <= 152 for height in heights)


def test_a_log_axis_has_powers_of_ten_and_only_where_the_span_is_wide() -> None:
    falling = [(float(i), 10 ** (-i / 25)) for i in range(101)]  # from 1 to 1e-4
    svg = line_chart([Series(name="x", points=falling)], label="x", log=True)
    assert re.findall(r'text-anchor="end">([^<]*)<', svg)[:5] == ["1e-4", "0.001", "0.01", "0.1", "1"]
    text, plain = re.findall(r'class="line a" points="([^"]*)"', svg)  # what is shown first comes first
    assert svg.startswith('<svg class="chart shows-log both"')
    assert text != plain
    heights = [float(pair.split(",")[1]) for pair in text.split()]
    assert np.ptp(np.diff(heights)) < 0.21  # a straight line, to the drawing's tenth of a unit
    narrow = line_chart([Series(name="x", points=falling[:20])], label="x", floor=0.0, log=True)
    assert "0.25" in narrow
    assert narrow.startswith('<svg class="chart shows-linear both"')
    assert "<svg" in line_chart([Series(name="x", points=[(0.0, 0.0), (1.0, 5.0)])], label="x", log=True)


def test_the_values_under_the_pointer_are_told(tmp_path: Path) -> None:
    series = [
        Series(name="training", points=[(float(i), 1.0 + i) for i in range(300)]),
        Series(name="evaluation", points=[(99.0, 0.5), (199.0, 0.25)]),
    ]
    svg = line_chart(series, label="x")
    told = re.findall(r"<title>([^<]*)</title>", svg)
    assert len(told) == MAX_HOVERS
    assert (told[0], told[-1]) == ("0\ntraining 1", "299\ntraining 300\nevaluation 0.25")
    assert 'class="much' not in svg
    noisy = line_chart([dataclasses.replace(series[0], raw=True)], label="x")
    assert noisy.count('<g class="noisy">') == noisy.count('class="much a"') == 2  # on both axes


def test_every_figure_has_a_curve_and_the_last_evaluation_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_lines=20)
    evaluations = [
        {"step": 10, "eval_wer": 0.5, "eval_mine": 2.0, "eval_loss.image": 1.0, "eval_loss.text": 2.0},
        {"step": 20, "eval_wer": 0.4321, "eval_mine": 3.0, "eval_loss.image": 1.0, "eval_loss.text": 2.0},
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    write_report(run)
    text = " ".join(read_page(run).texts)
    assert "Evaluation: word error rate 0.4321" in re.sub(r"\s+", " ", text)
    assert "Evaluation: mine" in text
    assert "Evaluation: loss by modality" in text
    assert "step 20 of 400" in text
    assert ">20\nEvaluation: mine 3<" in (run / "report.html").read_text()  # the axis counts steps that are done


def test_a_figure_that_stays_zero_has_an_axis_from_zero() -> None:
    svg = line_chart([Series(name="x", points=[(1.0, 0.0), (2.0, 0.0)])], label="x")
    assert re.findall(r'text-anchor="end">([^<]*)<', svg)[0] == "0"


def test_runs_are_compared_by_figures_curves_and_what_differs(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", num_lines=50)
    config = load_config(
        {
            "model": {"path": "some/model"},
            "train": {"steps": NUM_STEPS, "learning_rate": 0.125},
            "data": {"train": ["a.json"]},
        }
    )
    (two / "config.yaml").write_text(dump_config(config))
    path = write_comparison([one, two], tmp_path / "page.html")
    page = Page(path.read_text())
    text = re.sub(r"\s+", " ", " ".join(filter(None, page.texts)))
    assert "2 runs one two" in text
    assert "train.learning_rate 1e-05 0.125" in text
    assert "data.train [] [a.json]" in text  # as a config has it
    assert "train.steps" not in text
    assert "going, step 50 of 400" in text
    assert "script" not in page.tags
    svg = path.read_text().split('aria-label="Loss over steps"')[1].split("</svg>")[0]
    assert 'class="line a"' in svg
    assert 'class="line b"' in svg
    with pytest.raises(ValueError, match="no such run directory"):
        write_comparison([one, tmp_path / "gone"], tmp_path / "page.html")


def test_the_report_is_drawn_while_a_run_goes_on_and_when_it_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, drawn, clock = tmp_path / "run", [], [0.0]
    monkeypatch.setattr(report, "write_report", lambda run, is_going: drawn.append((clock[0], is_going)))
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])

    def train(config, on_step, on_end, *, overwrite: bool) -> int:
        for clock[0] in range(10, 200, 10):
            on_step(None)
        raise ValueError("broken")

    monkeypatch.setattr(report, "run_training", train)
    config = load_config(None, [f"train.run_dir={run_dir}"])
    with pytest.raises(ValueError, match="broken"):
        report.train_with_report(config)
    assert drawn == [(10, True), (80, True), (150, True), (190, False)]  # a minute apart, and when it broke
    monkeypatch.setattr(report, "run_training", lambda config, on_step, on_end, *, overwrite: on_end(run_dir) or 0)
    assert report.train_with_report(config) == 0
    assert len(drawn) == 5


def test_a_page_that_cannot_be_drawn_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(run: Path, *, is_going: bool) -> Path:
        raise OSError(28, "No space left on device")

    def train(config: Any, on_step: Any, on_end: Any, *, overwrite: bool) -> int:
        on_step(None)
        return 75

    monkeypatch.setattr(report, "write_report", full)
    monkeypatch.setattr(report, "run_training", train)
    assert report.train_with_report(load_config(None, [f"train.run_dir={tmp_path}"])) == 75
    said = capsys.readouterr().out
    assert said.count("report.html cannot be drawn: ") == 2  # in the run, and as it stops
    assert f"try omniloom report {tmp_path} later" in said


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "", "0"),
        (3.14159, "", "3.142"),
        (1e-5, "", "1e-5"),
        (2.5e-4, "", "2.5e-4"),
        (1234.0, "count", "1,234"),
        (811_000.0, "count", "811k"),
        (30.5e9, "count", "30.5G"),
        (0.0345, "%", "3.45%"),
        (900 * 2.0**20, "bytes", "900 MiB"),
        (0.0, "bytes", "0 B"),
    ],
)
def test_numbers_are_written_as_people_write_them(value: float, unit: str, text: str) -> None:
    assert fmt(value, unit) == text


def test_reasons_are_counted_without_their_numbers_and_names() -> None:
    lines = [{"field": "images[0]", "reason": f"no such file: a/b{i}.png", "file": "f", "line": i} for i in range(3)]
    lines.append({"field": "text", "reason": "empty"})
    assert [(kind, count) for kind, count, _ in report._bad_reasons(lines)] == [
        ("images[…]: no such file: …", 3),
        ("text: empty", 1),
    ]


def screenshot(page: Path, picture: Path, width: int, height: int) -> np.ndarray:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--mute-audio"]
    command += [f"--user-data-dir={picture.parent / 'profile'}", f"--window-size={width},{height}"]
    command += [f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium binary")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_draws_the_page_without_sideways_scrolling(full_run: Path, tmp_path: Path, width: int) -> None:
    # a headless window is at least 500 wide, so the page is put into a frame of the wanted width;
    # whatever sticks out of that frame would be cut off by its edge, so the edge must be free of ink
    frame = tmp_path / "frame.html"
    style = f"width:{width}px;height:1500px;border:0"
    frame.write_text(f'<body style="margin:0"><iframe src="{(full_run / "report.html").as_uri()}" style="{style}">')
    pixels = screenshot(frame, tmp_path / "page.png", max(width, 500), 1500)[:, :width]
    paper = pixels[2, 2]
    assert np.abs(pixels[:, width - 6 :] - paper).max() <= 8, "something reaches the right edge"
    inked = (np.abs(pixels - paper).max(-1) > 40).any(1)
    assert inked[:200].sum() > 40  # the big numbers
    blue = (pixels[..., 2] - pixels[..., 0] > 60) & (pixels[..., 2] > 120)
    assert blue.sum() > 300  # bars and lines are drawn in the first tone


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium binary")
def test_the_page_prints_to_a_few_sheets(full_run: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    pdf = tmp_path / "page.pdf"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--print-to-pdf={pdf}", (full_run / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    num_pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    assert 2 <= num_pages <= 10


def test_a_count_has_ticks_at_whole_numbers() -> None:
    svg = line_chart([Series(name="x", points=[(1.0, 1.0), (30.0, 1.0)])], label="x", unit="count", floor=0.0)
    assert re.findall(r'text-anchor="end">([^<]*)<', svg)[:2] == ["0", "1"]
