"""The configuration: what is refused, and that every fault is named at once with the way out."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from omniloom.config import (
    OTHER_TRAINERS,
    Config,
    ConfigError,
    DataSource,
    PolicyRule,
    config_from_words,
    config_to_dict,
    dump_config,
    keys_of,
    load_config,
)
from omniloom.options import ImageConfig
from omniloom.run.rows import open_run
from omniloom.tools import configuration


def faults_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def test_every_fault_is_reported_at_once_with_its_path() -> None:
    text = faults_of("train.stepz=3", "modl.path=x", "train.packs_per_step=four", "memory.recompute=foo")
    assert text.startswith("4 faults in the command line")
    assert "train.stepz: unknown key; did you mean train.steps?" in text
    assert "modl: unknown section; did you mean model?" in text
    assert "train.packs_per_step: expected a whole number, got 'four'" in text
    assert "memory.recompute" in text
    assert "'foo'" in text


def test_a_key_in_the_wrong_section_names_the_right_one() -> None:
    assert "did you mean train.learning_rate?" in faults_of("learning_rate=1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.pack_tokens=0", "at least 1, got 0"),
        ("train.learning_rate=0", "more than 0, got 0"),
        ("data.split=1.5", "data.split: expected at most 1, got 1.5"),
        ("train.betas=[0.9, 1.0]", "train.betas.1: expected less than 1, got 1.0"),
        ("train.min_learning_rate=1", "is above"),
        ("parallel.context=3", "does not divide by parallel.context x parallel.tensor = 3; the next that does is 8193"),
        ("train=5", "expected a section"),
        ("data.train_on_prompt=true & data.last_turn_only=true", "data.last_turn_only are both set; keep one"),
        (
            "data.video.min_pixels=9 & data.video.max_pixels=4",
            "min_pixels (9) is above data.video.max_pixels (4)",
        ),
        ("train.zzz=5", "train.zzz: unknown key; known here: run_dir, steps"),
        ("parallel.shard=x", "expected a whole number of at least 1 or auto, got 'x'"),
        ("train.betas=[0.9]", "train.betas: expected 2 values, got 1"),
        ("train.deterministic=2", "expected true or false, got 2"),
        ("data.image.min_pixels=9,data.image.max_pixels=4", "expected a whole number"),
        ("justaword", "is not an override"),
        ("policy.vision.frieze=true", "did you mean policy.vision.freeze?"),
        ("policy.text.learning_rate=-1", "policy.text.learning_rate: expected more than 0, got -1.0"),
        ("policy.vision.merger.weight_decay=-1", "policy.vision.merger.weight_decay: expected at least 0, got -1.0"),
        ("policy.text.weight_decay=.nan", "policy.text.weight_decay: expected at least 0, got nan"),
        ("train.epochs=.inf", "train.epochs: expected a finite number, got inf"),
        ("train.seed=" + "9" * 400, "train.seed: expected less than 9.22337e+18, got 999"),
        ("train.seed=-1", "train.seed: expected at least 0, got -1"),
        ("train.seed=9223372036854775808", "train.seed: expected less than 9.22337e+18, got 9223372036854775808"),
        ("parallel.tensor=0", "parallel.tensor: expected at least 1, got 0"),
        ("parallel.context=0", "parallel.context: expected a whole number of at least 1 or a section, got 0"),
        ("parallel.context={ring: 0}", "parallel.context.ring: expected at least 1, got 0"),
        ("parallel.context.ring=3", "in two chunks for each of 3 ring ranks: 6; the next that does is 8196"),
        ("policy.text.lora=", "policy.text.lora: empty; give it keys (rank, alpha, "),
        ("policy.text=", "policy.text: empty; give it keys (freeze, learning_rate, "),
        ("policy.text={}", "policy.text: empty; give it keys"),
        ("model.num_layers=", "model.num_layers: empty; give it keys (text, vision, audio) or remove it"),
    ],
)
def test_bad_values_say_what_is_allowed_and_what_came(override: str, words: str) -> None:
    assert words in faults_of(*override.split(" & "))


def test_records_of_data_sets_can_be_written_in_an_override() -> None:
    train = load_config(
        None, ["data.train=[{path: 'a, b.json', repeat: 2, image: {max_pixels: 9}}, {0,1}.json]"]
    ).data.train
    assert train[0] == DataSource(path="a, b.json", repeat=2.0, options={"image": ImageConfig(max_pixels=9)})
    assert train[1] == "{0,1}.json"
    assert "data.train.0.wieght: unknown key; did you mean data.train.0.weight?" in faults_of(
        "data.train=[{path: a.json, wieght: 2}]"
    )


def test_a_section_left_empty_in_the_file_is_refused_and_null_on_the_command_line_removes_it(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("policy:\n  text:\n    freeze: true\n    lora:\n  vision:\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert [fault.split(";")[0] for fault in caught.value.faults] == ["policy.text.lora: empty", "policy.vision: empty"]
    rules = load_config(tmp_path / "c.yaml", ["policy.text.lora=null", "policy.vision=null"]).policy
    assert rules == {"text": PolicyRule(freeze=True)}
    assert load_config(None, ["policy.text.lora.rank=4", "policy.text.lora=null"]).policy == {}


def test_steps_and_epochs_exclude_each_other() -> None:
    assert "keep one" in faults_of("train.steps=1", "train.epochs=1")


def test_component_names_with_dots_can_be_overridden() -> None:
    config = load_config(None, ["policy.vision.merger.freeze=false", "policy.text.experts.lora.rank=4"])
    assert config.policy["vision.merger"].freeze is False
    whole = load_config(None, ["policy.vision.merger={freeze: true}", "policy.vision.freeze=true"])
    assert sorted(whole.policy) == ["vision", "vision.merger"]
    assert list(load_config(config_to_dict(whole), ["policy.vision.merger=null"]).policy) == ["vision"]
    assert config.policy["text.experts"].lora is not None
    assert config.policy["text.experts"].lora.rank == 4


def test_files_may_be_a_list_or_separated_by_commas() -> None:
    assert load_config(None, ["data.train=a.json, b.jsonl"]).data.train == ("a.json", "b.jsonl")
    assert load_config(None, ["data.train=[a.json]"]).data.train == ("a.json",)


@pytest.mark.parametrize(
    "text", ["exp #1", "yes", "2026-01-01", "0123", "a: b", "~", "[x", "'quoted'", " be kind\n- #1\n", "{a}", "a, b=c"]
)
@pytest.mark.parametrize("key", ["train.run_dir", "data.system", "model.adapter", "checkpoint.resume"])
def test_text_given_on_the_command_line_arrives_as_it_is(key: str, text: str) -> None:
    section, name = key.split(".")
    assert getattr(getattr(load_config(None, [f"{key}={text}"]), section), name) == text
    assert load_config(None, [f"{key}={text}", f"{key}=null"]) == Config()  # null alone unsets


def test_a_name_with_odd_characters_survives_a_file_and_a_dict(tmp_path) -> None:
    config = load_config(None, ["data.system=yes", "train.run_dir=0123"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == load_config(config_to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"data\.system: expected text, got True; put it in quotes"):
        load_config({"data": {"system": True}})


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("q_{1,2},k", ["q_{1,2}", "k"]),
        ("[q_{1,2}, k[0,1]]", ["q_{1,2}", "k[0,1]"]),
        ("(?:q|k){1,2}_proj", ["(?:q|k){1,2}_proj"]),
        ("['a, b', \"it's\"]", ["a, b", "it's"]),
        ("a #1, yes", ["a #1", "yes"]),
        ("[2026-01-01]", ["2026-01-01"]),
    ],
)
def test_commas_split_lists_but_not_inside_brackets_braces_and_quotes(text: str, items: list[str]) -> None:
    assert list(load_config(None, [f"data.train={text}"]).data.train) == items
    assert list(load_config({"data": {"train": text}}).data.train) == items
    assert list(load_config({"data": {"train": items}}).data.train) == items  # a list in a file is one already


def test_numbers_may_come_in_every_spelling() -> None:
    config = load_config(
        None, ["train.learning_rate=1e-4", "train.steps=1e3", "train.betas=0.8,0.9", "log.profile=3,5"]
    )
    assert (config.train.learning_rate, config.train.steps, config.train.betas) == (1e-4, 1000, (0.8, 0.9))
    assert config.log.profile == (3, 5)


def test_a_dict_may_hold_paths_and_numbers_of_numpy() -> None:
    rows = Path("a,b.json")  # a comma in a path divides nothing
    config = load_config(
        {
            "model": {"path": Path("m")},
            "data": {"train": rows, "eval": [rows, {"path": rows}], "shuffle": np.bool_(False), "media_dir": Path("x")},
            "train": {"steps": np.int32(4), "learning_rate": np.float64(1e-3), "betas": np.array([0.5, 0.75])},
        }
    )
    assert (config.model.path, config.data.media_dir, config.data.shuffle) == ("m", "x", False)
    assert config.data.train == ("a,b.json",)
    assert config.data.eval == ("a,b.json", DataSource(path="a,b.json"))
    assert (config.train.steps, config.train.learning_rate, config.train.betas) == (4, 1e-3, (0.5, 0.75))
    with pytest.raises(ConfigError, match=r"train\.steps: expected a whole number, got 1\.5"):
        load_config({"train": {"steps": np.float32(1.5)}})


def test_a_file_whose_name_holds_an_equals_sign_is_a_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "lr=1.yaml").write_text("train: {steps: 3}")
    monkeypatch.chdir(tmp_path)
    for name in ("lr=1.yaml", "./lr=1.yaml", str(tmp_path / "lr=1.yaml")):
        assert config_from_words([name, "train.seed=4"]).train.steps == 3


def test_every_key_says_in_a_line_what_it_does() -> None:
    for path, kind, _ in keys_of():
        texts = [part for part in getattr(kind, "__metadata__", ()) if isinstance(part, str)]
        has_keys = any(other.startswith(f"{path}.") for other, *_ in keys_of())
        assert len(texts) == 1 or has_keys, path


@pytest.mark.parametrize("key", ["data.overlong", "train.loss", "train.nonfinite", "memory.recompute"])
def test_a_key_that_chooses_among_ways_tells_them_apart(key: str) -> None:
    kind, words = configuration.describe(key).split("; default", 1)
    choices = re.findall(r"\b(?!or\b)[a-z]+\b", kind.partition(": ")[2].partition(" or a ")[0])
    assert len(choices) > 1
    assert all(choice in words.partition("\n")[2] for choice in choices)


def test_a_saved_config_reads_back_equal(tmp_path) -> None:
    config = load_config(None, ["train.steps=7", "policy.vision.freeze=true", "parallel.shard=2", "data.train=a"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_broken_yaml_names_line_and_column(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("train:\n  steps: [1, 2\nmodel: {}\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: line \d+, column \d+"):
        load_config(tmp_path / "c.yaml")


def test_a_model_or_rows_in_place_of_a_config_are_told_where_they_go(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(ConfigError, match=rf"not valid YAML: .*; rows are given as data\.train={rows}"):
        config_from_words([str(rows)])
    (tmp_path / "rows.json").write_text('[{"a": 1}]')
    with pytest.raises(ConfigError, match=r"expected sections .*, got a list; rows are given as data\.train="):
        config_from_words([str(tmp_path / "rows.json")])
    with pytest.raises(ConfigError, match=rf"got a directory; a model is given as model\.path={tmp_path}"):
        config_from_words([str(tmp_path), str(rows)])


def test_a_key_that_is_there_twice_is_refused_and_a_merged_one_is_not(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("train: {steps: 3}\nmodel: {path: m}\ntrain:\n  epochs: 1\n")
    with pytest.raises(ConfigError, match=r"line 3, column 1: the key train is there twice"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(
        "policy:\n  vision: &still {freeze: true, weight_decay: 0.1}\n  audio: {<<: *still, weight_decay: 0.2}\n"
    )
    policy = load_config(tmp_path / "c.yaml").policy
    assert [(rule.freeze, rule.weight_decay) for rule in policy.values()] == [(True, 0.1), (True, 0.2)]


def test_a_path_in_the_home_directory_is_read_as_a_shell_would(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/some one")
    config = load_config({"model": {"path": "~/m"}}, ["data.train=~/a.jsonl,b~/c.jsonl,{path: ~/d.jsonl, repeat: 2}"])
    assert config.model.path == "/home/some one/m"
    first, second, third = config.data.train
    assert (first, second, third.path) == ("/home/some one/a.jsonl", "b~/c.jsonl", "/home/some one/d.jsonl")


def test_a_run_directory_that_a_shell_left_empty_is_not_the_present_one(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"train\.run_dir: not set"):
        open_run(load_config(None, ["model.path=m", "data.train=a.json", "train.run_dir="]))


def test_a_models_directory_is_no_run_directory(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"train\.run_dir: .* is a model's directory \(it has config\.json\)"):
        open_run(load_config(None, [f"model.path={tmp_path}", "data.train=a.json", f"train.run_dir={tmp_path}"]))


def test_a_missing_file_suggests_its_neighbour(tmp_path) -> None:
    (tmp_path / "sft.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"did you mean .*sft\.yaml"):
        load_config(tmp_path / "stf.yaml")


def test_defaults_are_valid_and_survive_yaml() -> None:
    tree = yaml.safe_load(yaml.safe_dump(config_to_dict(Config())))
    assert load_config(tree) == Config()


def test_config_is_frozen_and_imports_nothing_slow() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]
    code = "import sys, omniloom.config; print(any(m in sys.modules for m in ('torch', 'pydantic', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gradient_accumulation_steps=4", "here it is train.packs_per_step, the packs of an optimizer step"),
        ("train.per_device_train_batch_size=4", "here it is train.packs_per_step"),
        ("lora_rank=8", "here it is policy.text.lora.rank"),
        ("cutoff_len=4096", "here it is data.pack_tokens (longer rows are listed, never cut)"),
        ("num-train-epochs=3", "here it is train.epochs"),
        ("freeze_vit=true", "here it is policy.vision.freeze and policy.audio.freeze"),
        ("train.micro_batch_size=1", "here it is train.packs_per_step"),
        ("variable_seq_lengths=true", "not needed here: samples are packed"),
        ("eval_iters=10", "without a counterpart here: evaluation takes all held-out rows"),
    ],
)
def test_names_of_other_trainers_are_answered_with_ours(override, words) -> None:
    assert words in faults_of(override)


def test_a_name_near_one_of_ours_is_ours() -> None:
    assert faults_of("train.learning_rte=1").endswith(
        "train.learning_rte: unknown key; did you mean train.learning_rate?"
    )


def test_the_words_for_names_of_other_trainers_name_keys_that_exist() -> None:
    known = {path for path, *_ in keys_of()}
    words = yaml.safe_load(OTHER_TRAINERS.read_text(encoding="utf-8"))["together"].values()
    named = re.findall(r"\b(?:model|data|train|policy|parallel|checkpoint|log)\.[a-z_.]*[a-z]", " ".join(words))
    assert len(named) > 10
    for path in named:
        assert re.sub(r"^policy\.(text|vision\.merger|vision|audio)\.", "policy.*.", path) in known, path


def test_the_defaults_read_back_as_the_defaults() -> None:
    assert load_config(yaml.safe_load(configuration.defaults())) == Config()


def test_the_page_of_all_keys_is_the_one_in_docs() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8").strip() == configuration.page().strip(), (
        f"write it again: omniloom config --page > {page.name}"
    )


def test_a_section_and_a_key_are_described() -> None:
    described = configuration.describe("train.loss").splitlines()
    assert described[0] == "train.loss: token or sample or sqrt or batch; default token"
    assert max(map(len, described)) <= 80
    assert "policy.*.lora.rank: " in configuration.describe("lora")
    with pytest.raises(ConfigError, match=r"cutoff_len: no such section or key; here it is data\.pack_tokens"):
        configuration.describe("cutoff_len")
    assert "memory.recompute: " in configuration.describe("memory")
    with pytest.raises(ConfigError, match=r"no such section or key; did you mean train\.loss"):
        configuration.describe("train.los")
