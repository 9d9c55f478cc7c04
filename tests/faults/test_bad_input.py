"""Every kind of bad input ends in one clear message, a non-zero exit and untouched earlier results."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omniloom import cli
from omniloom.checkpoint.stored import find_latest
from omniloom.tools.tiny import make_tiny
from tests.faults.conftest import TEXT
from tests.run_server import ROOT
from tests.unit.media_files import write_video

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(12)
]


@pytest.fixture
def work(tmp_path, checkpoint):
    """A folder with its own copy of the model and a good data file, so that each test may break what it likes."""
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


def omniloom(capsys, monkeypatch, *words: str) -> tuple[int, str]:
    """Run the command line in this process. Returns the exit code and what went to standard error."""
    monkeypatch.setattr(sys, "argv", ["omniloom", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    code = stop.value.code
    return (code if isinstance(code, int) else 1), capsys.readouterr().err


def train_words(work: Path, *extra: str) -> list[str]:
    return [
        "train",
        f"model.path={work / 'model'}",
        f"data.train={work / 'rows.json'}",
        f"train.run_dir={work / 'run'}",
        "train.steps=1",
        "train.packs_per_step=1",
        "data.pack_tokens=128",
        "data.workers=0",
        "model.dtype=float32",
        "log.tensorboard=false",
        *extra,
    ]


def edit_json(path: Path, change) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def first_shard(work: Path) -> Path:
    return sorted((work / "model").glob("*.safetensors"))[0]


def break_tokenizer(work: Path) -> None:
    text = (work / "model" / "tokenizer.json").read_text()
    (work / "model" / "tokenizer.json").write_text(text.replace("<|image_pad|>", "<|picture|>"))
    for path in (work / "model").glob("tokenizer_config.json"):
        path.write_text(path.read_text().replace("<|image_pad|>", "<|picture|>"))


def drop_index_entry(work: Path) -> None:
    edit_json(
        work / "model" / "model.safetensors.index.json",
        lambda tree: tree["weight_map"].pop("thinker.model.norm.weight"),
    )


def rewrite_shard(work: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    index = json.loads((work / "model" / "model.safetensors.index.json").read_text())
    shard = work / "model" / index["weight_map"]["thinker.model.norm.weight"]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    for name in tensors:
        index["weight_map"].setdefault(name, shard.name)
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if file != shard.name or name in tensors
    }
    (work / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def write_row_with_image(work: Path, path: str) -> None:
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    (work / "rows.json").write_text(json.dumps([{"messages": messages, "images": [path]}]))


def write_adapter_of_another(work: Path) -> None:
    from safetensors.torch import save_file

    (work / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "Qwen/Qwen2-7B"}
    (work / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 8)}, work / "adapter" / "adapter_model.safetensors")


def write_silent_video(work: Path) -> None:
    write_video(work / "silent.mp4", num_frames=8, fps=4)
    messages = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "x"}]
    (work / "rows.json").write_text(json.dumps([{"messages": messages, "videos": ["silent.mp4"]}]))


def write_lines(work: Path, num_broken: int) -> None:
    """JSONL of 40 rows, some of them cut off."""
    lines = [json.dumps(ROWS[n % 12]) for n in range(40)]
    for n in range(num_broken):
        lines[3 + n] = lines[3 + n][:20]
    (work / "rows.json").unlink()
    (work / "rows.jsonl").write_text("\n".join(lines) + "\n")


# name: (what to break, extra words, what the message must say)
CASES = {
    "missing model directory": (lambda w: shutil.rmtree(w / "model"), [], r"no such model directory: .*model"),
    "nothing named": (None, ["model.path="], r"model\.path"),
    "config of another family": (
        lambda w: edit_json(w / "model/config.json", lambda t: t.update(model_type="llama")),
        [],
        r"llama.*qwen3_omni_moe",
    ),
    "broken config.json": (lambda w: (w / "model/config.json").write_text("{oops"), [], r"config\.json.*JSON"),
    "config.json without a field": (
        lambda w: edit_json(w / "model/config.json", lambda t: t["thinker_config"]["text_config"].pop("num_experts")),
        [],
        r"num_experts",
    ),
    "truncated safetensors": (
        lambda w: first_shard(w).write_bytes(first_shard(w).read_bytes()[:-100]),
        [],
        r"safetensors.*(truncated|bytes)",
    ),
    "garbage safetensors": (lambda w: first_shard(w).write_bytes(b"garbage" * 50), [], r"safetensors"),
    "missing shard": (lambda w: first_shard(w).unlink(), [], r"missing shard model-0+1-of.*download"),
    "missing tensor": (drop_index_entry, [], r"thinker\.model\.norm\.weight"),
    "tensor gone from its shard": (
        lambda w: rewrite_shard(w, lambda t: t.pop("thinker.model.norm.weight")),
        [],
        r"thinker\.model\.norm\.weight",
    ),
    "extra tensor": (
        lambda w: rewrite_shard(w, lambda t: t.update({"thinker.model.surprise": t["thinker.model.norm.weight"] * 1})),
        [],
        r"thinker\.model\.surprise",
    ),
    "tokenizer missing": (
        lambda w: [(w / "model" / name).unlink() for name in ("tokenizer.json", "vocab.json", "merges.txt")],
        [],
        r"no tokenizer: expected tokenizer\.json, or vocab\.json and merges\.txt",
    ),
    "broken tokenizer": (lambda w: (w / "model/tokenizer.json").write_text("{"), [], r"tokenizer\.json.*JSON"),
    "tokenizer without media tokens": (break_tokenizer, [], r"image_token_id.*image_pad.*'<\|picture\|>'"),
    "missing data file": (lambda w: (w / "rows.json").rename(w / "rowz.json"), [], r"rows\.json.*rowz\.json"),
    "empty data file": (lambda w: (w / "rows.json").write_text(""), [], r"rows\.json.*empty"),
    "no rows": (lambda w: (w / "rows.json").write_text("[]"), [], r"rows\.json.*(no rows|empty)"),
    "broken JSON": (lambda w: (w / "rows.json").write_text('[{"messages": '), [], r"rows\.json.*line 1"),
    "binary data": (lambda w: (w / "rows.json").write_bytes(bytes(range(256)) * 9), [], r"rows\.json"),
    "rows of no known format": (lambda w: (w / "rows.json").write_text('[{"foo": 1}, {"foo": 2}]'), [], r"foo"),
    "media outside media_dir": (lambda w: write_row_with_image(w, "../../etc/passwd.png"), [], r"lies outside"),
    "a URL": (lambda w: write_row_with_image(w, "https://example.org/a.png"), [], r"is a URL; download it"),
    "a missing image": (
        lambda w: write_row_with_image(w, "cat.png"),
        [],
        r"rows\.json:1: image: .*cat\.png does not exist",
    ),
    "too many broken lines": (
        lambda w: write_lines(w, 20),
        ["data.train={work}/rows.jsonl"],
        r"20 of 40 rows are bad, more than data\.max_bad_fraction=0\.05.*rows\.jsonl:4: row: not JSON",
    ),
    "misspelt key": (
        None,
        ["train.learing_rate=1"],
        r"train\.learing_rate: unknown key; did you mean train\.learning_rate\?",
    ),
    "misspelt section": (None, ["trian.steps=1"], r"trian: unknown section; did you mean train\?"),
    "wrong type": (None, ["train.steps=many"], r"train\.steps: expected a whole number, got 'many'"),
    "several errors at once": (
        None,
        ["train.stps=1", "train.learning_rate=-1", "data.workers=-1"],
        r"3 faults.*stps.*data\.workers.*learning_rate",
    ),
    "a config file that is not there": (
        None,
        ["{work}/run.yaml"],
        r"no such file: .*run\.yaml; did you mean .*runs\.yaml",
    ),
    "a config file that is no YAML": (None, ["{work}/runs.yaml"], r"runs\.yaml.*not valid YAML: line 1"),
    "packs smaller than every sample": (None, ["data.pack_tokens=8"], r"pack_tokens.*8"),
    "a policy that matches nothing": (None, ["policy.visoin.freeze=true"], r"did you mean vision"),
    "everything frozen": (
        None,
        [f"policy.{name}.freeze=true" for name in ("text", "vision", "audio", "lm_head")],
        r"nothing would train",
    ),
    "zero layers": (None, ["model.num_layers.text=0"], r"num_layers\.text.*at least 1"),
    "more layers than there are": (None, ["model.num_layers.text=99"], r"num_layers.*99"),
    "a template of nobody": (None, ["data.template=llama3"], r"llama3"),
    "a template of another family": (
        None,
        ["data.template=qwen2_omni"],
        r"qwen2_omni is of another family; .* takes qwen3_omni_nothink or qwen3_omni",
    ),
    "a LoRA rule that matches nothing": (
        None,
        ["policy.text.lora.rank=4", "policy.text.lora.modules=[q_porj]"],
        r"policy\.text\.lora\.modules: q_porj matches nothing; its modules: .*q_proj",
    ),
    "an adapter of another base": (
        write_adapter_of_another,
        ["policy.text.lora.rank=4", "model.adapter={work}/adapter"],
        r"adapter was trained on Qwen/Qwen2-7B, model\.path is",
    ),
    "tools that are no JSON": (
        lambda w: (w / "rows.json").write_text(json.dumps([ROWS[0] | {"tools": "[{name: f}]"}])),
        [],
        r"rows\.json:1: tools: .*JSON",
    ),
    "the sound of a silent video": (
        write_silent_video,
        ["data.video.use_audio=true"],
        r"rows\.json:1: videos: its sound is asked for, but it has none; data\.video\.no_audio=video_only",
    ),
    "evaluation of nothing": (None, ["train.eval_answers=3"], r"train\.eval_answers: nothing is held out"),
    "no steps and no epochs of nothing": (None, ["train.steps=0"], r"train\.steps.*at least 1"),
    "run directory that is a file": (lambda w: (w / "run").write_text("x"), [], r"run"),
    "checkpoint to resume that is not there": (None, ["checkpoint.resume=/nowhere/step_1"], r"/nowhere/step_1"),
    "degrees that do not multiply": (None, ["parallel.shard=2"], r"shard|world"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_one_clear_message(case, work, capsys, monkeypatch) -> None:
    breakage, extra, expected = CASES[case]
    (work / "run" / "checkpoints" / "step_00000007").mkdir(parents=True)
    kept = work / "run" / "checkpoints" / "step_00000007" / "precious"
    kept.write_text("weights")
    if case == "run directory that is a file":
        shutil.rmtree(work / "run")
    if breakage:
        breakage(work)
    (work / "runs.yaml").write_text("train: [")
    settings = [word.format(work=work) for word in extra if "=" in word]
    files = [word.format(work=work) for word in extra if "=" not in word]
    verb, *words = train_words(work, *settings)
    code, text = omniloom(capsys, monkeypatch, verb, *files, *words)
    assert code == 2, text
    assert "Traceback" not in text
    assert text.startswith("error: "), text
    assert text.count("error: ") == 1, text
    assert re.search(expected, text, re.DOTALL | re.IGNORECASE), text
    if case != "run directory that is a file":
        assert kept.read_text() == "weights"


def test_a_good_run_passes_in_the_same_fixture(work, capsys, monkeypatch) -> None:
    code, text = omniloom(capsys, monkeypatch, *train_words(work))
    assert code == 0, text
    assert (work / "run" / "hf" / "config.json").is_file()


def test_debug_shows_the_traceback(work, capsys, monkeypatch) -> None:
    shutil.rmtree(work / "model")
    code, text = omniloom(capsys, monkeypatch, "--debug", *train_words(work))
    assert code == 2
    assert "Traceback" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--nproc", "0"], r"--nproc: expected at least 1, got 0"),
        (["trian"], r"Did you mean 'train'"),
        (["tiny", "qwen3_omnii", "somewhere"], r"did you mean qwen3_omni\?"),
        (["export", "nothing_here", "out"], r"nothing_here"),
        (["score", "nothing_here", "rows.json"], r"nothing_here"),
        (["report", "nothing_here"], r"nothing_here"),
        (["export", "empty_run", "out"], r"empty_run: no complete checkpoint here"),
    ],
)
def test_verbs_refuse_what_they_cannot_do(words, expected, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty_run" / "checkpoints").mkdir(parents=True)
    code, text = omniloom(capsys, monkeypatch, *words)
    assert code == 2
    assert re.search(expected, text), text
    assert "Traceback" not in text


def test_a_folder_that_cannot_be_written_is_said_before_training(work, capsys, monkeypatch) -> None:
    code, text = omniloom(capsys, monkeypatch, *train_words(work, "train.run_dir=/proc/omniloom_run"))
    assert code == 2
    assert "/proc/omniloom_run" in text
    assert "Traceback" not in text


def test_a_broken_line_costs_only_itself(work, capsys, monkeypatch) -> None:
    write_lines(work, 1)
    words = train_words(work, f"data.train={work / 'rows.jsonl'}", "checkpoint.export=false")
    code, text = omniloom(capsys, monkeypatch, *words)
    assert code == 0, text
    (listed,) = (work / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(listed)["line"] == 4
    assert (json.loads(listed)["source"], json.loads(listed)["row"]) == (str(work / "rows.jsonl"), 4)
    again = [f"data.exclude={work / 'run' / 'bad_samples.jsonl'}", f"train.run_dir={work / 'clean'}"]
    code, text = omniloom(capsys, monkeypatch, *words, *again)
    assert code == 0, text
    assert not (work / "clean" / "bad_samples.jsonl").exists()


def test_a_checkpoint_of_another_model_is_refused_and_kept(work, capsys, monkeypatch) -> None:
    code, text = omniloom(capsys, monkeypatch, *train_words(work, "checkpoint.export=false"))
    assert code == 0, text
    shutil.rmtree(work / "model")
    sizes = {f"{TEXT}.num_hidden_layers": 1, f"{TEXT}.num_experts": 4, f"{TEXT}.num_experts_per_tok": 1}
    make_tiny("qwen3_omni", work / "model", num_words=300, overrides=sizes)
    code, text = omniloom(capsys, monkeypatch, *train_words(work, "train.steps=2"))
    assert code == 2
    assert re.search(r"error: .*step_00000001 belongs to a run on another model.*set another train\.run_dir", text)
    assert find_latest(work / "run")[0].step == 1


def test_bad_rows_in_mid_run_end_it_after_what_was_trained_is_saved(work, capsys, monkeypatch) -> None:
    rows = [ROWS[n % 12] for n in range(64)] + [{"foo": 1}] * 64
    (work / "rows.json").write_text(json.dumps(rows))
    words = train_words(work, "train.steps=100", "data.window=64", "data.shuffle=false", "checkpoint.every=2")
    code, text = omniloom(capsys, monkeypatch, *words)
    assert code == 2, text
    assert "64 of 64 rows are bad, more than data.max_bad_fraction=0.05 allows" in text
    assert "Traceback" not in text
    assert find_latest(work / "run")[0].step >= 2
    assert len((work / "run" / "bad_samples.jsonl").read_text().splitlines()) == 64


def test_a_disk_that_is_full_while_exporting_is_one_message_and_the_run_can_be_exported_later(
    work, capsys, monkeypatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    code, text = omniloom(capsys, monkeypatch, *train_words(work, "checkpoint.export=false"))
    assert code == 0, text
    words = ("export", str(work / "run"), str(work / "hf"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses the write, as a full disk would
    try:
        code, text = omniloom(capsys, monkeypatch, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert re.search(r"error: could not write the export .*hf: File too large; nothing there was changed", text)
    assert sorted(path.name for path in work.iterdir()) == ["model", "rows.json", "run"]
    assert omniloom(capsys, monkeypatch, *words)[0] == 0
    assert (work / "hf" / "config.json").is_file()


def test_two_ranks_say_what_is_wrong_once(work) -> None:
    """A wrong template is found by both ranks, once they have started."""
    command = [
        sys.executable,
        "-m",
        "omniloom.cli",
        *train_words(work, "train.packs_per_step=2", "data.template=llama3"),
    ]
    done = subprocess.run([*command, "--nproc", "2"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: data.template: unknown template 'llama3'")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.stps=2"], "did you mean train.steps?"),
        (["parallel.tensor=4", "data.pack_tokens=512"], "makes 4 ranks, but 2 were started"),
        (["train.packs_per_step=1"], "1 packs cannot feed 2 data-parallel ranks"),
        (["parallel.expert=3"], "parallel.expert: 3 does not divide shard x context x tensor = 2; choose from [1, 2]"),
        (["parallel.pipeline_layers=1,1"], "parallel.pipeline_layers divide the layers over stages"),
    ],
)
def test_two_ranks_are_not_started_for_a_command_that_is_wrong(words, expected, work, capsys, monkeypatch) -> None:
    monkeypatch.setattr("omniloom.tools.launch._launch", lambda *_: pytest.fail("ranks were started"))
    code, text = omniloom(capsys, monkeypatch, *train_words(work, *words), "--nproc", "2")
    assert code == 2
    assert expected in text


@pytest.mark.parametrize("case", ["tokenizer without media tokens", "a missing image"])
def test_what_data_workers_find_is_one_message_too(case, work, capsys, monkeypatch) -> None:
    breakage, _, expected = CASES[case]
    breakage(work)
    code, text = omniloom(capsys, monkeypatch, *train_words(work, "data.workers=1"))
    assert code == 2
    assert "Traceback" not in text
    assert text.count("error: ") == 1
    assert re.search(expected, text, re.DOTALL)
