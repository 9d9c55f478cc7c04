"""Generation answers a batch as it answers its rows one by one, with what the row reader prepares."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from omniloom import cli
from omniloom.config import DataConfig
from omniloom.data.sources import open_sources
from omniloom.options import ImageConfig, VideoConfig
from omniloom.tools import generate
from omniloom.tools.demo_data import FRAMES_PER_SECOND, NUM_PIXELS, write_demo_data
from omniloom.tools.generate import answer, join_inputs, load_model, open_reader, read_prompts
from omniloom.tools.tiny import make_tiny
from tests.unit.media_files import tone, write_video

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


def print_answers(*arguments, data: Path | None = None, max_new_tokens: int, **options) -> None:
    """As the command line does."""
    sampling = generate.Sampling(max_new_tokens=max_new_tokens)
    lines = generate.answers(*arguments, data=data, sampling=sampling, **options)
    generate.print_answers(lines, as_json=data is not None)


def test_a_batch_answers_like_its_rows_one_by_one(model_dir: Path, prompts: list[generate.Prompt]) -> None:
    model = load_model(model_dir)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    together = answer(model, tokenizer, prompts, generate.Sampling(max_new_tokens=6))
    alone = [answer(model, tokenizer, [prompt], generate.Sampling(max_new_tokens=6))[0] for prompt in prompts]
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
    print_answers(model_dir, "Which colour?", {"image": [picture]}, data=None, max_new_tokens=3)
    assert capsys.readouterr().out.strip()


def test_a_file_is_answered_line_by_line(
    model_dir: Path, rows_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = rows_file.parent / "few.jsonl"
    few.write_text("\n".join(rows_file.read_text().splitlines()[-2:]) + "\n")
    capsys.readouterr()
    print_answers(model_dir, None, {}, data=few, max_new_tokens=3)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == ["held_out_joint_00001", "words"]
    assert lines[1]["expected"] == "no"


def test_rows_without_an_answer_are_answered_and_data_options_hold(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"ask": [{"role": "user", "content": "Which colour?"}]}) + "\n")
    capsys.readouterr()
    print_answers(model_dir, None, {}, data=rows, max_new_tokens=3, overrides=["data.attr.messages=ask"])
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
    code, _, err = run("data.video.fps=1")
    assert code == 2
    assert "no prompt: expected it before the overrides, got 'data.video.fps=1'" in err
    for key in ("model.adapter=a", "train.seed=3", "policy.text.freeze=true", "data.pack_tokens=9", "data.media_dir=."):
        code, _, err = run("Which colour?", key)
        assert code == 2
        assert f"{key.partition('=')[0]}: generate does not use it; it takes data.template" in err
    code, _, err = run("Which colour?", "--adapter", str(tmp_path / "gone"))
    assert code == 2
    assert "gone has no adapter_config.json" in err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[generate.Prompt]]:
    """The prompts of every call of the model, which answers each with its last word."""
    calls: list[list[generate.Prompt]] = []

    def reply(model: object, tokenizer: Tokenizer, prompts: list[generate.Prompt], sampling: object) -> list[str]:
        calls.append(prompts)
        texts = [tokenizer.decode(prompt.inputs["input_ids"][0].tolist()) for prompt in prompts]
        return [text.removesuffix("\nassistant\n").split()[-1] for text in texts]

    monkeypatch.setattr(generate, "answer", reply)
    monkeypatch.setattr(generate, "load_model", lambda model_dir, **_: None)
    return calls


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "sounding.mp4", sound=tone(44100, 44100), num_frames=25)
    write_video(folder / "silent.mp4", num_frames=25)
    return folder


def test_media_of_a_prompt_follow_the_rules_of_rows(
    model_dir: Path, clips: Path, asked: list[list[generate.Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (clips / "sub").mkdir(exist_ok=True)
    monkeypatch.chdir(clips / "sub")

    def ask(name: str, *overrides: str) -> generate.Prompt:
        print_answers(model_dir, "?", {"video": [name]}, data=None, max_new_tokens=1, overrides=overrides)
        return asked[-1][0]

    assert ask("../sounding.mp4").inputs["use_audio_in_video"] is False
    assert ask("../sounding.mp4", "data.video.use_audio=true").inputs["use_audio_in_video"] is True
    assert ask("../silent.mp4").inputs["use_audio_in_video"] is False
    with pytest.raises(ValueError, match="its sound is asked for, but it has none"):
        ask("../silent.mp4", "data.video.use_audio=true")
    with pytest.raises(ValueError, match=r"is a URL; .*data\.allow_urls=true"):
        ask("https://example.com/a.mp4")


def test_a_placeholder_in_a_prompt_is_a_word(
    model_dir: Path, clips: Path, asked: list[list[generate.Prompt]], capsys: pytest.CaptureFixture[str]
) -> None:
    for media in ({}, {"video": [clips / "silent.mp4"]}):
        print_answers(model_dir, "What is <image>", media, data=None, max_new_tokens=1)
        assert capsys.readouterr().out == "<image>\n"


def test_a_hub_id_is_resolved_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(model_dir))
    print_answers("some-org/some-model", "hi", {}, data=None, max_new_tokens=2)
    assert capsys.readouterr().out.strip()


def test_a_run_and_adapters_are_refused_with_what_to_name_instead(tmp_path: Path) -> None:
    step = "run/checkpoints/step_00000001"
    for folder in (step, "done/hf", "adapter"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("run/config.yaml", "done/config.yaml", "adapter/adapter_config.json"):
        (tmp_path / file).write_text("{}")
    hints = {"run": "run: no complete checkpoint here", step: f"omniloom export .*{step} DIR"}
    hints |= {"done": "done: no complete checkpoint here", "adapter": "holds adapters alone"}
    for name, hint in hints.items():
        with pytest.raises(ValueError, match=hint):
            print_answers(tmp_path / name, "hi", {}, data=None, max_new_tokens=1)


def test_a_file_is_answered_in_chunks_and_a_bad_row_costs_itself(
    model_dir: Path,
    clips: Path,
    asked: list[list[generate.Prompt]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate, "BATCH_ROWS", 3)
    videos = [{"path": "sounding.mp4", "use_audio_in_video": True}, "silent.mp4"]
    lines = [
        json.dumps({"id": "first", "query": "one"}),
        json.dumps({"id": "gone", "query": "<image>", "images": ["gone.png"]}),
        json.dumps({"instruction": "two", "input": "three"}),
        json.dumps({"id": 4, "prompt": "<video><video>", "videos": videos}),
        "{broken",
        json.dumps({"prompt": "<video>four", "videos": ["sounding.mp4"]}),
        json.dumps({"id": "last", "query": "five", "response": "six"}),
    ]
    rows = clips / "rows.jsonl"
    rows.write_text("\n".join(lines))
    capsys.readouterr()
    print_answers(model_dir, None, {}, data=rows, max_new_tokens=3)
    out, err = capsys.readouterr()
    printed = [json.loads(line) for line in out.splitlines()]
    ids = ["first", "gone", f"{rows}:3", "4", f"{rows}:5", f"{rows}:6", "last"]
    assert [line["id"] for line in printed] == ids
    assert [line.get("answer") for line in printed] == ["one", None, "three", None, None, "four", "five"]
    assert [line.get("expected") for line in printed] == ["", None, "", None, None, "", "six"]
    errors = {index: line["error"] for index, line in enumerate(printed) if "error" in line}
    assert errors[1] == f"{rows}:2: image: {clips}/gone.png does not exist"
    assert errors[3].startswith(f"{rows}:4: use_audio_in_video: transformers takes the sound of all videos")
    assert errors[4].startswith(f"{rows}:5: row: not JSON")
    assert [len(prompts) for prompts in asked] == [2, 1, 1]
    assert err.splitlines()[-1] == "3 of 7 rows are bad; their lines hold the reason as error"
    rows.write_text("\n".join(lines[3:5]))
    with pytest.raises(ValueError, match=r"none of the 2 rows can be answered; the first: .*rows\.jsonl:1: use_audio"):
        print_answers(model_dir, None, {}, data=rows, max_new_tokens=3)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_bad_input_is_refused_in_words(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either a prompt or --data"):
        print_answers(model_dir, None, {}, data=None, max_new_tokens=3)
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]
    rows.write_text(json.dumps({"messages": turns, "images": ["gone.png"]}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*gone\.png"):
        print_answers(model_dir, None, {}, data=rows, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"gone\.wav"):
        print_answers(model_dir, "?", {"audio": [tmp_path / "gone.wav"]}, data=None, max_new_tokens=3)
