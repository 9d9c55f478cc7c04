"""check, preview and plan show what training would read."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from omniloom.config import load_config
from omniloom.data.sources import Subset
from omniloom.run.rows import describe_files, open_data
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
    assert "24 rows, of the first 24: 23 good, 1 bad\n" in printed
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
    check_config([*words, f"data.train={tmp_path / 'cut.json'}"])
    printed = capsys.readouterr().out
    assert "2 rows, of the first 2: 1 good, 1 bad\n" in printed
    assert "cut.jpg: image file is truncated" in printed


def test_check_names_the_template_and_warns_where_the_checkpoint_writes_another(words, capsys) -> None:
    check_config(words)
    assert "template   qwen3_omni_nothink\n" in capsys.readouterr().out
    check_config([*words, "data.template=qwen3_omni"])
    assert "template   qwen3_omni; warning: the checkpoint's own chat template writes" in capsys.readouterr().out


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
    assert [line.partition(":")[0] for line in describe_files(Subset(source, [1, 5, 6]), config)] == [
        str(files[index]) for index in (1, 4, 5)
    ]
    check_config([*words, f"data.train={files[0]},{files[2]}"])
    assert f"{files[2]}: format query_response" in capsys.readouterr().out


def test_plan_prints_a_line_per_pack_and_covers_every_good_row(words, capsys) -> None:
    show_plan([*words, "train.epochs=1"], 99)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert sum(int(line[2]) for line in lines) == 23
    assert all(int(line[3]) <= 256 for line in lines)
