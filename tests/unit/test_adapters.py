"""Training with LoRA from config to files: what trains, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omniloom.checkpoint.adapters import CONFIG_NAME, NOTE_NAME, PREFIX, TENSORS_NAME, fingerprint
from omniloom.checkpoint.dcp import MODEL, OPTIMIZER
from omniloom.checkpoint.stored import find_latest
from omniloom.checkpoint.tensor_files import open_checkpoint
from omniloom.config import ConfigError, load_config
from omniloom.keymap import canonical_name
from omniloom.run.opening import load_weights, open_workshop
from omniloom.run.trainer import Trainer, run
from omniloom.tools.export import export_checkpoint
from omniloom.tools.generate import Sampling, answers
from omniloom.tools.score import score_rows
from omniloom.tools.tiny import make_tiny
from tests.mixed_rows import write_rows

LORA = (
    "policy.text.lora={rank: 4, alpha: 8, dropout: 0.1}",
    "policy.text.router.freeze=true",
    "policy.vision.freeze=true",
    "policy.vision.merger.freeze=false",
    "policy.audio.lora={rank: 2, modules: [q_proj, v_proj]}",
    "policy.audio.projector.freeze=true",
    "policy.lm_head.lora={rank: 3, dropout: 0.1}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_tiny("qwen3_omni", folder / "model")
    write_rows(folder)
    return folder


def train(folder: Path, run_name: str, *overrides: str) -> Path:
    words = [
        *(f"model.path={folder / 'model'}", f"data.train={folder / 'rows.json'}", "data.workers=0", *LORA),
        *("data.pack_tokens=256", "data.max_bad_fraction=0.2", "data.image.max_pixels=4096", "log.tensorboard=false"),
        *(f"train.run_dir={folder / run_name}", "train.packs_per_step=2", "train.learning_rate=1e-2"),
        *("train.schedule=constant", "train.steps=4", "checkpoint.every=2", *overrides),
    ]
    assert run(load_config(None, words)) == 0
    return folder / run_name


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    return train(folder, "run")


SCORED = ("model.dtype=float32", "data.workers=0", "data.image.max_pixels=4096")


def test_scores_with_an_adapter_are_those_of_the_merged_model(folder: Path, finished: Path) -> None:
    own, bad = score_rows(folder / "model", folder / "rows.json", SCORED, adapter=str(finished / "adapter"))
    merged, _ = score_rows(finished / "hf", folder / "rows.json", SCORED)
    plain, _ = score_rows(folder / "model", folder / "rows.json", SCORED)
    assert (len(own), len(bad)) == (23, 1)
    rounding, effect = (
        sum(abs(one["loss"] - two["loss"]) for one, two in zip(own, other, strict=True)) for other in (merged, plain)
    )
    assert rounding < 0.05 * effect  # the merged weights are bfloat16, as published


def test_what_trained_beside_an_earlier_adapter_stays_in_results_where_it_is_frozen_now(
    folder: Path, finished: Path
) -> None:
    words = (f"model.adapter={finished / 'adapter'}", "policy.vision.merger.freeze=true", "train.steps=1")
    again = train(folder, "again", *words)
    before, after = (load_file(run_dir / "adapter" / TENSORS_NAME) for run_dir in (finished, again))
    beside = [name for name in before if ".lora_" not in name]
    assert beside
    assert all(torch.equal(after[name], before[name]) for name in beside)
    shards = (again / "hf").glob("*.safetensors")
    merged = {canonical_name(name): value for shard in shards for name, value in load_file(shard).items()}
    assert all(torch.equal(merged[canonical_name(name.removeprefix(PREFIX))], before[name]) for name in beside)


def test_adapters_of_a_tower_that_is_not_built_are_left_out_of_scores(folder: Path, finished: Path) -> None:
    (folder / "words.jsonl").write_text(json.dumps({"query": "Which?", "response": "It is 1."}))
    (whole,), (text,) = (
        score_rows(folder / "model", folder / "words.jsonl", [*SCORED, *words], adapter=str(finished / "adapter"))[0]
        for words in ([], ["model.modalities=text"])
    )
    assert text == whole


def test_answers_with_an_adapter_are_those_of_the_merged_model(folder: Path, finished: Path) -> None:
    def ask(model: Path, adapter: str | None = None) -> list[str]:
        lines = answers(model, data=rows, sampling=Sampling(max_new_tokens=4), adapter=adapter)
        return [line["answer"] for line in lines]

    rows = folder / "asked.jsonl"
    rows.write_text("\n".join(json.dumps({"query": f"Row {number}"}) for number in range(3)))
    assert ask(folder / "model", str(finished / "adapter")) == ask(finished / "hf") != ask(folder / "model")


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_an_adapter_that_is_not_there_or_of_another_model_is_refused(folder: Path, finished: Path, verb: str) -> None:
    def call(adapter: Path) -> None:
        rows = folder / "rows.json"
        if verb == "score":
            score_rows(folder / "model", rows, SCORED, adapter=str(adapter))
        else:
            list(answers(folder / "model", data=rows, adapter=str(adapter)))

    with pytest.raises(ValueError, match=r"gone has no adapter_config\.json"):
        call(folder / "gone")
    other = shutil.copytree(finished / "adapter", folder / f"other_{verb}")
    (other / NOTE_NAME).write_text(json.dumps({"base": "0"}))
    with pytest.raises(ValueError, match="trained on another model"):
        call(other)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def test_the_table_tells_ranks_and_counts_adapters(finished: Path) -> None:
    rows = {row["component"]: row for row in json.loads((finished / "trainable.json").read_text())}
    assert {name: row["lora_rank"] for name, row in rows.items() if row["lora_rank"]} == {
        "text": 4,
        "text.experts": 4,
        "audio": 2,
        "lm_head": 3,
    }
    tensors = load_file(finished / "adapter" / TENSORS_NAME)
    of_audio = sum(value.numel() for name, value in tensors.items() if "audio_tower" in name)
    assert rows["audio"]["num_trainable"] == of_audio > 0
    assert rows["vision.merger"]["num_trainable"] == rows["vision.merger"]["num_parameters"]
    assert rows["text.router"]["num_trainable"] == 0


def test_a_checkpoint_holds_only_what_trains(finished: Path) -> None:
    stored, _ = find_latest(finished)
    held = {name.removeprefix(MODEL) for name in stored.shapes if name.startswith(MODEL)}
    assert all("lora_" in name or name.startswith("vision.merger") for name in held)
    assert any("experts.gate_up_lora_b" in name for name in held)
    optimized = {name.removeprefix(OPTIMIZER).rsplit(".", 1)[0] for name in stored.shapes if OPTIMIZER in name}
    assert optimized == held


def test_resuming_gives_the_bytes_of_the_run_that_was_not_interrupted(folder: Path, finished: Path) -> None:
    checkpoint = finished / "checkpoints" / "step_00000002"
    again = train(folder, "resumed", f"checkpoint.resume={checkpoint}")
    for name in (f"adapter/{TENSORS_NAME}", "hf/model.safetensors.index.json"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()
    for name, value in tensors_of(finished / "hf").items():
        assert torch.equal(tensors_of(again / "hf")[name], value), name


def test_exporting_the_checkpoint_gives_the_files_of_the_run(folder: Path, finished: Path) -> None:
    export_checkpoint(finished, folder / "merged")
    for path in (finished / "hf").iterdir():
        assert path.read_bytes() == (folder / "merged" / path.name).read_bytes(), path.name
    export_checkpoint(finished, folder / "alone", adapter=True)
    for name in (CONFIG_NAME, TENSORS_NAME):
        assert (folder / "alone" / name).read_bytes() == (finished / "adapter" / name).read_bytes()


def test_a_checkpoint_is_not_exported_onto_another_model(folder: Path, finished: Path, tmp_path: Path) -> None:
    """Where a run's model lay, another may lie by now."""
    other, moved = make_tiny("qwen3_omni", tmp_path / "model", seed=1), shutil.copytree(finished, tmp_path / "run")
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(folder / "model"), str(other)))
    for adapter in (False, True):
        with pytest.raises(ValueError, match=r"step_00000004 belongs to a run on another model than model\.path="):
            export_checkpoint(moved, tmp_path / "hf", adapter=adapter)
    assert not (tmp_path / "hf").exists()


def test_merging_changes_what_is_adapted_and_nothing_else(folder: Path, finished: Path) -> None:
    before, after = tensors_of(folder / "model"), tensors_of(finished / "hf")
    changed = {name for name, old in before.items() if not torch.equal(old, after[name])}
    assert all(
        name.startswith(
            ("thinker.model.layers", "thinker.visual.merger.", "thinker.audio_tower.layers.", "thinker.lm_")
        )
        for name in changed
    )
    assert not [name for name in changed if "mlp.gate." in name or "norm" in name]
    assert any("mlp.experts.0.gate_proj" in name for name in changed)
    assert any("self_attn.o_proj" in name for name in changed)
    assert "thinker.lm_head.weight" in changed


def test_training_goes_on_from_an_adapter_of_its_own(folder: Path, finished: Path, tmp_path: Path) -> None:
    """One module has another rank and alpha than the rest of its component, as PEFT's patterns may say."""
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    stem = "base_model.model.thinker.model.layers.0.self_attn.q_proj"
    before = load_file(adapter / TENSORS_NAME)
    before[f"{stem}.lora_A.weight"] = before[f"{stem}.lora_A.weight"][:2].clone()
    before[f"{stem}.lora_B.weight"] = before[f"{stem}.lora_B.weight"][:, :2].clone()
    save_file(before, adapter / TENSORS_NAME)
    config = json.loads((adapter / CONFIG_NAME).read_text())
    config["rank_pattern"]["language_model.layers.0.self_attn.q_proj"] = 2
    config["alpha_pattern"]["layers.0.self_attn.q_proj"] = 6
    (adapter / CONFIG_NAME).write_text(json.dumps(config))
    run_dir = train(folder, "further", f"model.adapter={adapter}", "train.steps=1", "train.learning_rate=1e-30")
    shutil.rmtree(adapter)  # what is saved does without it
    export_checkpoint(run_dir, tmp_path / "out", adapter=True)
    for directory in (run_dir / "adapter", tmp_path / "out"):
        after = load_file(directory / TENSORS_NAME)
        for name, value in before.items():
            assert torch.equal(after[name], value), name
        settings = json.loads((directory / CONFIG_NAME).read_text())
        name = r"model\.language_model\.layers\.0\.self_attn\.q_proj"
        assert (settings["rank_pattern"][name], settings["alpha_pattern"][name]) == (2, 6)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("use_bdlora", True, "sets use_bdlora, which is not computed here"),
        ("r", "4", "expected a number as r, got 4"),
        ("rank_pattern", {"layers.0.self_attn.v_proj": 2}, r"v_proj\.lora_A.* is \[4, 64\], here \[2, 64\]"),
    ],
)
def test_an_adapter_whose_settings_do_not_hold_is_refused(
    folder: Path, finished: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / CONFIG_NAME).read_text())
    (adapter / CONFIG_NAME).write_text(json.dumps(config | {key: value}))
    words_of_run = [f"model.path={folder / 'model'}", f"model.adapter={adapter}", *LORA]

    def load() -> None:
        workshop = open_workshop(load_config(None, words_of_run))
        load_weights(workshop, workshop.build())

    with pytest.raises(ValueError, match=words):
        load()


def test_frozen_weights_are_kept_in_the_dtype_of_compute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for vectors, which are small and some of which are computed with in float32."""
    seen: dict[str, tuple[torch.dtype, bool, int]] = {}

    def look(self: Trainer) -> int:
        seen.update({name: (p.dtype, p.requires_grad, p.ndim) for name, p in self.state.parameters.items()})
        return 0

    monkeypatch.setattr(Trainer, "run", look)
    lora = ("policy.text.lora.dtype=bf16", "policy.lm_head.lora.dtype=bf16")
    train(folder, "looked_at", "model.dtype=bf16", *lora)
    for name, (dtype, trains, num_dims) in seen.items():
        assert trains == ("lora_" in name or name.startswith("vision.merger."))
        float32 = name.startswith("vision.merger.") or ("lora_" in name and name.startswith("audio."))
        assert dtype == (torch.float32 if float32 or num_dims == 1 else torch.bfloat16), name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("policy.text.router.freeze=null", "policy.text.router.lora.rank=4"),
            "policy.text.router.lora matches nothing",
        ),
        (("policy.audio.lora.modules=[quark_proj]",), "its modules: .*q_proj"),
        (
            ("policy.audio.lora.modules=[q_proj, quark_proj, '.*k_prj']",),
            r"policy.audio.lora.modules: quark_proj, \.\*k_prj matches nothing",
        ),
        (("policy.text.embed.lora.rank=4",), "policy.text.embed.lora matches nothing; it holds no linear"),
        (("policy.lm_head={lora: {dora: true}}",), r"the head has no DoRA here; set policy.lm_head to {freeze: true}"),
        (("policy.text.lora.dora=true",), "DoRA in PEFT; set policy.text.experts to {freeze: true}"),
        (("policy.text.embed.learning_rate=1e-4",), r"embed\.learning_rate: nothing .* by policy\.text\.lora"),
        (("policy.text.experts.recompute=true",), r"only vision, audio, text can be .*; set policy\.text\.recompute"),
        (("policy.vision.lora={dtype: bf16}",), "all that trains in vision must have one dtype"),
        (("policy.txet.lora={}",), "did you mean text"),
    ],
)
def test_rules_that_cannot_hold_are_refused(folder: Path, overrides: tuple[str, ...], words: str) -> None:
    workshop = open_workshop(load_config(None, [f"model.path={folder / 'model'}", *LORA, *overrides]))
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        workshop.policies([name for name, _ in workshop.build().named_parameters()])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("policy.text.lora.rank=0", "policy.text.lora.rank: expected at least 1"),
        ("policy.text.lora.dropout=1", "policy.text.lora.dropout"),
        ("policy.text.lora.alpha=0", "policy.text.lora.alpha"),
        ("policy.text.freeze=false", "keep one"),
        ("policy.text.lora.modules=['*.q_proj']", r"'\*.q_proj' is neither a name nor a regular expression: nothing"),
        ("policy.text.lora.rnak=3", "did you mean policy.text.lora.rank"),
    ],
)
def test_settings_out_of_range_are_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, [*LORA, override])


def test_modules_may_be_regular_expressions_of_whole_names(folder: Path) -> None:
    modules = r"policy.text.lora.modules=['.*layers\.1\..*\.(q_proj|v_proj)', o_proj]"
    words = [f"model.path={folder / 'model'}", *LORA, modules, "policy.audio.lora=null"]
    found = {adapter.base for adapter in open_workshop(load_config(None, words)).adapters}
    names = {f"text.layers.1.attention.{name}.weight" for name in ("q_proj", "v_proj")}
    assert {name for name in found if "o_proj" not in name and "head" not in name} == names
    assert "text.layers.0.attention.o_proj.weight" in found


def test_an_adapter_of_another_base_is_refused(folder: Path, finished: Path, tmp_path: Path) -> None:
    make_tiny("qwen3_omni", tmp_path / "other", seed=9)
    words = [f"model.path={tmp_path / 'other'}", f"model.adapter={finished / 'adapter'}", *LORA]
    with pytest.raises(ValueError, match="trained on another model"):
        open_workshop(load_config(None, words))
    foreign = shutil.copytree(finished / "adapter", tmp_path / "foreign")
    (foreign / NOTE_NAME).unlink()
    words = [f"model.path={tmp_path / 'other'}", f"model.adapter={foreign}", *LORA]
    with pytest.raises(ValueError, match=r"was trained on .*model, model.path is .*other"):
        open_workshop(load_config(None, words))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("policy.text.lora.rank=8",), r"needs lora with rank: 4, alpha: 8"),
        (("policy.text.lora.alpha=9",), "is scaled by 2, here by 2.25"),
        (("policy.audio.lora.modules=[q_proj]",), "v_proj.lora_A.weight, which the policy does not adapt"),
        (("policy.audio.lora.modules=[q_proj,k_proj,v_proj]",), "lacks .*k_proj.lora_A.weight"),
    ],
)
def test_an_adapter_that_does_not_fit_the_policy_is_refused(
    folder: Path, finished: Path, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train(folder, "refused", f"model.adapter={finished / 'adapter'}", *overrides)


def test_files_that_are_no_adapter_are_refused(folder: Path, finished: Path, tmp_path: Path) -> None:
    def refusal(directory: Path, *overrides: str) -> str:
        with pytest.raises(ValueError, match=r"model\.adapter") as caught:
            open_workshop(
                load_config(None, [f"model.path={folder / 'model'}", f"model.adapter={directory}", *overrides])
            )
        return str(caught.value)

    assert CONFIG_NAME in refusal(folder / "model", *LORA)
    assert "rank: 4" in refusal(finished / "adapter")  # no rule has lora
    for key, value, words in (
        ("peft_type", "IA3", "a IA3 adapter"),
        ("bias", "all", "bias: none"),
        ("init_lora_weights", "pissa_niter_4", "pissa_niter_4, so that peft adds it to other weights than the model's"),
        ("kasa_config", {"beta": 1}, "sets kasa_config"),
    ):
        changed = shutil.copytree(finished / "adapter", tmp_path / key)
        config = json.loads((changed / CONFIG_NAME).read_text()) | {key: value}
        (changed / CONFIG_NAME).write_text(json.dumps(config))
        assert words in refusal(changed, *LORA)
    single = shutil.copytree(finished / "adapter", tmp_path / "single")
    tensors = {f"{PREFIX}thinker.model.layers.0.mlp.experts.3.up_proj.lora_A.weight": torch.zeros(4, 64)}
    save_file(tensors, single / TENSORS_NAME)
    assert "adapts single experts (thinker.model.layers.0.mlp.experts.3.up_proj" in refusal(single, *LORA)


def test_a_checkpoint_with_adapters_is_not_resumed_without_them(folder: Path, finished: Path) -> None:
    resume = f"checkpoint.resume={finished / 'checkpoints' / 'step_00000004'}"
    with pytest.raises(ValueError, match="which this run has not"):
        train(folder, "without", resume, "policy.audio.lora=null", "policy.audio.freeze=true")


def test_the_folder_of_an_adapter_is_not_written_over_something_else(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty; choose another"):
        export_checkpoint(finished, tmp_path, adapter=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_names_in_memory_are_reached_from_every_spelling() -> None:
    for name in (
        "thinker.model.layers.3.self_attn.q_proj",
        "thinker.model.language_model.layers.3.self_attn.q_proj",
        "model.language_model.layers.3.self_attn.q_proj",
    ):
        assert canonical_name(name) == "model.language_model.layers.3.self_attn.q_proj"
    assert canonical_name("thinker.visual.merger.mlp.0") == "model.visual.merger.mlp.0"
    assert canonical_name("thinker.audio_tower.proj1") == canonical_name("model.audio_tower.proj1")
    assert canonical_name("thinker.lm_head") == "lm_head"


def test_an_adapter_names_the_model_it_was_trained_on(folder: Path, finished: Path) -> None:
    config, note = (json.loads((finished / "adapter" / name).read_text()) for name in (CONFIG_NAME, NOTE_NAME))
    assert config["base_model_name_or_path"] == str(folder / "model")
    moved = shutil.copytree(folder / "model", folder / "moved")
    assert note["base"] == fingerprint(open_checkpoint(moved))
    (shard, *_) = sorted(moved.glob("*.safetensors"))
    tensors = {name: value + 1 for name, value in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    assert note["base"] != fingerprint(open_checkpoint(moved))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("policy.text.lora.alpha=9",), r"policy\.text\.lora\.alpha is 8\.0 there and 9\.0 here, .* set it to 8\.0"),
        (("policy.audio.lora.rslora=true",), r"policy\.audio\.lora\.rslora is False there and True here"),
    ],
)
def test_resuming_with_adapters_of_another_effect_is_refused(
    folder: Path, finished: Path, overrides: tuple[str, ...], words: str
) -> None:
    resume = f"checkpoint.resume={finished / 'checkpoints' / 'step_00000002'}"
    with pytest.raises(ValueError, match=words):
        train(folder, "other_effect", resume, *overrides)


def test_resuming_with_another_dropout_goes_on(folder: Path, finished: Path) -> None:
    resume = f"checkpoint.resume={finished / 'checkpoints' / 'step_00000002'}"
    train(folder, "other_dropout", resume, "policy.text.lora.dropout=0", "train.steps=3")


def test_fewer_layers_leave_the_merged_model_and_no_adapter(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train(folder, "cut", "model.num_layers.text=1", "train.steps=1")
    assert not (run_dir / "adapter").exists()
    assert "no adapter/, since model.num_layers cuts the model" in capsys.readouterr().out.replace("\n", " ")
    merged = tensors_of(run_dir / "hf")
    assert not torch.equal(merged["thinker.lm_head.weight"], tensors_of(folder / "model")["thinker.lm_head.weight"])
    assert not [name for name in merged if name.startswith("thinker.model.layers.1.")]
    with pytest.raises(ValueError, match="export that instead"):
        export_checkpoint(run_dir, folder / "cut_alone", adapter=True)
    with pytest.raises(ValueError, match=r"checkpoint\.export: false would leave nothing .* set it to true"):
        train(folder, "cut_without", "model.num_layers.text=1", "checkpoint.export=false")
    with pytest.raises(
        ValueError, match=r"it has model\.language_model\.layers\.1\..*, which the policy does not adapt"
    ):
        train(folder, "cut_after", f"model.adapter={finished / 'adapter'}", "model.num_layers.text=1")


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of Hugging Face that has the model under an id."""
    repo = tmp_path / "hub" / "models--org--tinyq"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    shutil.copytree(folder / "model", repo / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_adapter_keeps_the_hub_id_of_its_base(folder: Path, hub: Path) -> None:
    for number, path in enumerate(("org/tinyq", "hf:org/tinyq")):
        run_dir = train(folder, f"of_hub{number}", f"model.path={path}", "train.steps=1", "checkpoint.export=false")
        config = json.loads((run_dir / "adapter" / CONFIG_NAME).read_text())
        assert config["base_model_name_or_path"] == "org/tinyq"


@pytest.mark.parametrize("path", ["org/tinyq", "hub/models--org--tinyq/snapshots/abc"])
@pytest.mark.parametrize("base", ["org/tinyq", "elsewhere/tinyq", "/x/models--org--tinyq/snapshots/def", "org/other"])
def test_an_adapter_of_peft_is_known_by_the_hub_id(
    folder: Path, finished: Path, hub: Path, base: str, path: str
) -> None:
    foreign = shutil.copytree(finished / "adapter", hub / "padapter")
    (foreign / NOTE_NAME).unlink()
    config = json.loads((foreign / CONFIG_NAME).read_text()) | {"base_model_name_or_path": base}
    (foreign / CONFIG_NAME).write_text(json.dumps(config))
    words = [f"model.path={path}", f"model.adapter={foreign}", *LORA]
    if base == "org/other":
        with pytest.raises(ValueError, match=rf"trained on org/other, model\.path is {path}"):
            open_workshop(load_config(None, words))
    else:
        assert open_workshop(load_config(None, words)).adapter is not None
