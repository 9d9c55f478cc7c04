"""Generation answers a batch as it answers its rows one by one, with what the row reader prepares."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from omniloom import cli
from omniloom.config import DataConfig, ImageConfig, VideoConfig
from omniloom.data.sources import open_sources
from omniloom.tools import generate
from omniloom.tools.demo_data import FRAMES_PER_SECOND, NUM_PIXELS, write_demo_data
from omniloom.tools.generate import answer, join_inputs, load_model, open_reader, read_prompts
from omniloom.tools.tiny import make_tiny

PIXELS = NUM_PIXELS**2
DATA = DataConfig(
    image=ImageConfig(min_pixels=PIXELS, max_pixels=PIXELS),
    video=VideoConfig(min_pixels=PIXELS, max_pixels=PIXELS, fps=float(FRAMES_PER_SECOND)),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_omni", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows of each modality and one of words alone, in one file."""
    data = write_demo_data(tmp_path_factory.mktemp("data"), num_train=7, num_held_out=2)
    lines = [line for path in data.held_out.values() for line in path.read_text().splitlines()]
    turns = [("user", "Say yes."), ("assistant", "yes"), ("user", "And now?"), ("assistant", "no")]
    lines.append(json.dumps({"id": "words", "messages": [{"role": role, "content": text} for role, text in turns]}))
    path = data.train.parent / "all.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def prompts(model_dir: Path, rows_file: Path) -> list[generate.Prompt]:
    return read_prompts(open_reader(model_dir, DATA, open_sources((str(rows_file),))))


def test_a_batch_answers_like_its_rows_one_by_one(model_dir: Path, prompts: list[generate.Prompt]) -> None:
    model = load_model(model_dir)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    together = answer(model, tokenizer, prompts, max_new_tokens=6)
    alone = [answer(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 3  # a random model babbles, but not the same for everything


def test_prompts_end_before_the_answer_and_keep_it_aside(prompts: list[generate.Prompt], rows_file: Path) -> None:
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert [prompt.id for prompt in prompts] == [row["id"] for row in rows]
    assert [prompt.expected for prompt in prompts] == [row["messages"][-1]["content"] for row in rows]
    assert {Path(prompt.file).name for prompt in prompts} == {"all.jsonl"}


def test_joining_pads_tokens_left_and_sound_right() -> None:
    first = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        "input_features": torch.ones(1, 2, 4),
        "feature_attention_mask": torch.ones(1, 4, dtype=torch.int64),
        "use_audio_in_video": True,
    }
    second = {
        "input_ids": torch.tensor([[8]]),
        "attention_mask": torch.ones(1, 1, dtype=torch.int64),
        "input_features": torch.ones(1, 2, 6),
        "feature_attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "pixel_values": torch.ones(4, 3),
        "use_audio_in_video": True,
    }
    joined = join_inputs([first, second], pad_id=9)
    assert joined["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert joined["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert joined["input_features"].shape == (2, 2, 6)
    assert joined["feature_attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert joined["pixel_values"].shape == (4, 3)
    assert joined["use_audio_in_video"] is True


def test_a_prompt_on_the_command_line_is_answered(
    model_dir: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = next((rows_file.parent / "media").glob("held_out_image_*0.png"), None) or next(
        (rows_file.parent / "media").glob("held_out_image_*0.jpg")
    )
    capsys.readouterr()
    generate.print_answers(model_dir, "Which colour?", {"image": [picture]}, data=None, max_new_tokens=3)
    assert capsys.readouterr().out.strip()


def test_a_file_is_answered_line_by_line(
    model_dir: Path, rows_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = rows_file.parent / "few.jsonl"
    few.write_text("\n".join(rows_file.read_text().splitlines()[-2:]) + "\n")
    capsys.readouterr()
    generate.print_answers(model_dir, None, {}, data=few, max_new_tokens=3)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == ["held_out_joint_00001", "words"]
    assert lines[1]["expected"] == "no"


def test_rows_without_an_answer_are_answered_and_data_options_hold(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"ask": [{"role": "user", "content": "Which colour?"}]}) + "\n")
    capsys.readouterr()
    generate.print_answers(model_dir, None, {}, data=rows, max_new_tokens=3, overrides=["data.attr.messages=ask"])
    assert json.loads(capsys.readouterr().out)["expected"] == ""


def test_the_command_line_tells_the_prompt_from_data_options(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"ask": [{"role": "user", "content": "Which colour?"}]}) + "\n")

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["omniloom", "generate", str(model_dir), *words, "--max-new-tokens", "2"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        written = capsys.readouterr()
        return stop.value.code or 0, written.out, written.err

    assert run("Which colour?", "data.video.fps=1")[0] == 0
    code, out, _ = run("--data", str(rows), "data.attr.messages=ask")
    assert (code, json.loads(out)["expected"]) == (0, "")
    code, _, err = run("Which colour?", "data.vidio.fps=1")
    assert code == 2
    assert "did you mean" in err


def test_bad_input_is_refused_in_words(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either a prompt or --data"):
        generate.print_answers(model_dir, None, {}, data=None, max_new_tokens=3)
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]
    rows.write_text(json.dumps({"messages": turns, "images": ["gone.png"]}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*gone\.png"):
        generate.print_answers(model_dir, None, {}, data=rows, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"gone\.wav"):
        generate.print_answers(model_dir, "?", {"audio": [tmp_path / "gone.wav"]}, data=None, max_new_tokens=3)
