"""check, preview and plan show what training would read."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

import omniloom
from omniloom.config import load_config
from omniloom.data.sources import read_excludes
from omniloom.run.layouts import choose_degrees
from omniloom.run.rows import describe_files, open_data, open_run
from omniloom.run.step_time import Machine
from omniloom.tools.check import check_config
from omniloom.tools.preview import preview_rows, show_plan
from omniloom.tools.tiny import make_tiny
from tests.mixed_rows import write_rows
from tests.unit.media_files import tone, write_video


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
    assert "data       24 rows: 23 good, 1 bad\n" in printed
    assert "rows.json: format messages (detected), read from messages" in printed
    assert "missing.png" in printed
    built, trainable = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:parameters|trainable)", printed))
    assert 0 < trainable < built


def test_check_decodes_what_it_calls_good(words, tmp_path, capsys) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) * 2 // 3])
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns, "images": [name]} for name in ("whole.jpg", "cut.jpg")]
    (tmp_path / "cut.json").write_text(json.dumps(rows))
    check_config([*words, f"data.train={tmp_path / 'cut.json'}", "data.max_bad_fraction=0.5"])
    printed = capsys.readouterr().out
    assert "2 rows: 1 good, 1 bad\n" in printed
    assert "cut.jpg: image file is truncated" in printed


def test_check_names_the_template_and_what_it_does_not_write(words, capsys) -> None:
    check_config(words)
    assert "chat_template.json\n" in capsys.readouterr().out
    check_config([*words, "data.template=qwen3_omni"])
    assert "template   qwen3_omni\n" in capsys.readouterr().out


def test_check_refuses_what_a_run_would_refuse(words) -> None:
    with pytest.raises(ValueError, match="did you mean vision"):
        check_config([*words, "policy.visoin.freeze=true"])


@pytest.mark.parametrize(
    ("overrides", "nproc", "fault"),
    [
        (["parallel.context=2"], 1, r"parallel: .*context 2.* makes 2 ranks, but 1 were started"),
        (["parallel.context=3", "data.pack_tokens=258"], 3, r"attention heads.* do(es)? not divide"),
        (["parallel.expert=3", "train.packs_per_step=3"], 3, r"parallel\.expert: 8 experts do not divide over 3 ranks"),
        ([], 4, r"train\.packs_per_step: 2 packs cannot feed 4 data-parallel ranks"),
        (
            ["parallel.tensor=3", "data.pack_tokens=258"],
            3,
            r"parallel\.tensor: .* does not divide over 3 ranks; choose from",
        ),
        (["data.split=0.001"], None, r"data\.split: 0\.001 of 24 rows holds out 0"),
        (["train.eval_every=5"], None, r"train\.eval_every: nothing is held out to evaluate"),
    ],
)
def test_check_refuses_in_the_words_of_train(words, overrides, nproc, fault) -> None:
    config = load_config(None, [*words, *overrides])

    def train_on_ranks() -> None:  # as the trainer begins, before it waits for others
        workshop, _, _ = open_run(config)
        choose_degrees(workshop, nproc or 1, memory_bytes=math.inf, machine=Machine())

    said = []
    for call in (lambda: check_config([*words, *overrides], nproc=nproc), train_on_ranks):
        with pytest.raises(ValueError, match=fault) as caught:
            call()
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["data.max_bad_fraction=0"], r"1 of 24 rows are bad, more than data\.max_bad_fraction=0 allows"),
        pytest.param(
            ["data.pack_tokens=8"], r"data\.pack_tokens=8 is smaller than every sample", marks=pytest.mark.full
        ),
        (
            ["data.pack_tokens=50", "data.overlong=error"],
            r"pack_tokens=50, and data\.overlong is error",
        ),
        (["model.attention.text=flash"], r"flash"),
    ],
)
def test_check_refuses_what_training_finds_before_its_first_step(words, overrides, fault, tmp_path) -> None:
    own = [*words, *overrides, f"train.run_dir={tmp_path}", "train.epochs=1"]
    said = []
    for call in (lambda: check_config(own), lambda: omniloom.train(load_config(None, own))):
        with pytest.raises(ValueError, match=fault) as caught:
            call()
        said.append(str(caught.value))
    assert said[1].startswith(said[0]), "train adds where it listed the rows"


def test_what_check_excludes_is_left_out_of_the_run(words, tmp_path, capsys) -> None:
    excludes, own = tmp_path / "excludes.jsonl", [*words, "data.pack_tokens=55", "data.max_bad_fraction=1"]
    check_config(own, excludes=excludes)
    lines = [json.loads(line) for line in excludes.read_text().splitlines()]
    assert [line["row"] for line in lines if "missing.png" in line["reason"]] == [5]
    assert len(lines) > 1, "rows longer than a pack are among them"
    capsys.readouterr()
    for split in ("data.split=0", "data.split=0.25"):
        check_config([*own, split, f"data.exclude={excludes}", "data.max_bad_fraction=0"])
        assert "bad row" not in capsys.readouterr().out
    excludes.write_text(json.dumps({"source": lines[0]["source"], "row": 25}))
    read_excludes.cache_clear()
    with pytest.raises(ValueError, match=r"data\.exclude: .* names row 25 of .*rows\.json, which has 24; write"):
        check_config([*own, f"data.exclude={excludes}"])
    excludes.write_text("rows.json:3\n")
    read_excludes.cache_clear()
    with pytest.raises(ValueError, match=r"data\.exclude: .*:1: expected .*got 'rows\.json:3'"):
        check_config([*own, f"data.exclude={excludes}"])


def test_check_tells_what_is_legal_and_seldom_meant(words, tmp_path, capsys) -> None:
    rows = [{"query": "q", "response": f"answer {n}"} for n in range(18)]
    rows += [{"query": "q", "response": "answer 3"}, {"query": "q", "response": ["broken"]}]
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "<image>"}]
    rows += [{"messages": turns}, {"query": "q"}]
    rows[5]["response"] += "<|im_end|>"
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)))
    check_config([*words, f"data.train={tmp_path / 'odd.jsonl'}", "data.workers=1"], nproc=1)
    printed = capsys.readouterr().out
    assert re.search(
        r"odd {8}1 of 22 rows have tokens that end or begin a turn in their words.*odd\.jsonl:6\n", printed
    )
    assert re.search(r"odd {8}1 of 22 rows say the same as an earlier row.*: \S*odd\.jsonl:19\n", printed)
    assert re.search(r"odd {8}1 of 22 rows have a placeholder of media in an answer.*odd\.jsonl:21\n", printed)
    assert re.search(r"odd\.jsonl: 22 rows, [\d,]+ tokens; 2 dropped; 20 text\n", printed)
    assert "bad row" in printed
    assert "warning: 9.1% of" not in printed, "one row in eleven is no warning"
    assert re.search(
        r"memory +[\d.]+ MiB of weights, gradients and optimizer states on each rank, about [\d.]+ \w+ at the fullest",
        printed,
    )
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, rows[10:])))
    check_config([*words, f"data.train={tmp_path / 'odd.jsonl'}"])
    assert re.search(r"warning: 16\.7% of \S*odd\.jsonl is dropped", capsys.readouterr().out)


def test_check_tells_of_boxes_outside_their_image(words, tmp_path, capsys) -> None:
    Image.new("RGB", (80, 40)).save(tmp_path / "a.png")
    boxes = [[0, 0, 80, 40], [10, 10, 90, 20], [10, 5, 30, 41], [79, 39]]
    for number, box in enumerate(boxes):
        row = {"query": "<image>", "response": f"{number} <bbox>", "images": ["a.png"], "objects": {"bbox": [box]}}
        with (tmp_path / "boxes.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    check_config([*words, f"data.train={tmp_path / 'boxes.jsonl'}"])
    printed = capsys.readouterr().out
    assert re.search(r"odd +2 of 4 rows have boxes outside their image.*: \S*:2, \S*:3\n", printed)


def test_check_reads_held_out_rows_too(words, tmp_path, capsys) -> None:
    (tmp_path / "eval.jsonl").write_text(json.dumps({"query": "q"}) + "\n")
    with pytest.raises(ValueError, match="none of the 1 held-out rows can be used"):
        check_config([*words, f"data.eval={tmp_path / 'eval.jsonl'}"])
    assert "eval       1 rows: 0 good, 1 bad" in capsys.readouterr().out


def test_check_names_the_layout_and_the_packs_that_it_wastes(words, capsys) -> None:
    check_config([*words, "train.packs_per_step=3", "parallel.replicate=2", "parallel.context=2"], nproc=4)
    printed = capsys.readouterr().out
    assert "layout     replicate 2 x context 2; warning: train.packs_per_step=3 does not divide over 2" in printed
    check_config([*words, "parallel.context=2"])
    assert "layout     not checked: say --nproc N for so many ranks" in capsys.readouterr().out


def test_check_warns_of_a_warm_up_longer_than_the_run(words, capsys) -> None:
    warning = "train.warmup_steps is 50 and the run has {} steps, so that the learning rate stays below"
    check_config([*words, "train.warmup_steps=50", "train.steps=40"])
    assert warning.format(40) in capsys.readouterr().out
    check_config([*words, "train.warmup_steps=50"])
    printed = capsys.readouterr().out
    num_steps = int(re.search(r"schedule   about (\d+) steps, 50 of them warm-up", printed)[1])
    assert warning.format(num_steps) in printed
    check_config([*words, "train.warmup_steps=40", "train.steps=40"])
    assert "stays below" not in capsys.readouterr().out


def test_check_tells_of_videos_whose_sound_is_not_used(words, tmp_path, capsys) -> None:
    write_video(tmp_path / "sounding.mp4", sound=tone(8000, 8000), num_frames=8)
    write_video(tmp_path / "silent.mp4", num_frames=8)
    clips = ["sounding.mp4", "silent.mp4", {"video": "sounding.mp4", "use_audio_in_video": True}]
    rows = [json.dumps({"query": "<video>", "response": "r", "videos": [clip]}) for clip in clips]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    own = [*words, f"data.train={tmp_path / 'rows.jsonl'}", "data.video.max_pixels=4096", "data.max_bad_fraction=1"]
    check_config(own)
    assert "odd        1 of 3 rows have videos whose sound is not used" in capsys.readouterr().out
    for other in ("data.video.use_audio=true", "model.modalities=text,image,video"):
        check_config([*own, other, "data.video.no_audio=video_only"])
        assert "sound is not used" not in capsys.readouterr().out


def test_check_tells_what_a_used_run_directory_means(words, tmp_path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint\.resume=none: .* holds steps or results of a run already"):
        check_config([*words, f"train.run_dir={tmp_path}", "checkpoint.resume=none"])


def test_preview_brackets_exactly_what_trains(words, capsys) -> None:
    preview_rows(words, 3)
    text, image, sound = capsys.readouterr().out.split("── ")[1:]
    assert re.search(r"assistant\n⟦It is number 0, <\|im_end\|>⟧", text)
    assert text.count("⟦") == 1
    assert re.search(r"<\|vision_start\|><\|image_pad\|>\*\d+<\|vision_end\|>Row 1", image)
    assert re.search(r"<\|audio_start\|><\|audio_pad\|>\*\d+<\|audio_end\|>Row 2", sound)


def test_preview_shows_characters_of_several_tokens_and_goes_on_after_a_bad_row(words, tmp_path, capsys) -> None:
    turns = [{"role": "user", "content": "猫在哪里呢"}, {"role": "assistant", "content": "在垫子上🐈。"}]
    rows = [json.dumps({"messages": turns}), '{"broken"', '{"what": 1}', json.dumps({"query": "q", "response": "r"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    preview_rows([*words, f"data.train={tmp_path / 'rows.jsonl'}"], 4)
    chinese, broken, unknown, pair = capsys.readouterr().out.split("── ")[1:]
    assert "猫在哪里呢<|im_end|>" in chinese
    assert "⟦在垫子上🐈。<|im_end|>⟧" in chinese
    assert "rows.jsonl:2\nbad row: row: not JSON" in broken
    assert "bad row: row: no known format" in unknown
    assert "format query_response" in pair


def test_every_data_file_is_described(words, tmp_path, capsys) -> None:
    row = {"query": "q", "response": "r"}
    files = [tmp_path / f"{n}.jsonl" for n in range(10)]
    for number, file in enumerate(files):
        file.write_text("{}\n" if number == 1 else json.dumps(row) + "\n")
    config = load_config(None, [f"data.train={[str(files[0]), str(files[1]), str(files[0]), *map(str, files[2:])]}"])
    source, _ = open_data(config.data, 0)
    lines = describe_files(source, config)
    assert [line.partition(":")[0] for line in lines[:3]] == [str(files[0]), str(files[1]), str(files[0])]
    assert "format query_response (detected)" in lines[0]
    assert "its first row is bad: row: no known format" in lines[1]
    assert len(lines) == 9
    assert lines[8] == "and 3 more"
    check_config([*words, f"data.train={files[0]},{files[2]}"])
    assert f"{files[2]}: format query_response" in capsys.readouterr().out


def test_plan_prints_a_line_per_pack_and_covers_every_good_row(words, capsys) -> None:
    show_plan([*words, "train.epochs=1"], 99)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert sum(int(line[2]) for line in lines) == 23
    assert all(int(line[3]) <= 256 for line in lines)
