"""Every family trains from its published layout and leaves a directory that transformers loads and scores alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from omniloom.config import load_config
from omniloom.data.sources import open_sources
from omniloom.families.registry import SPECS, find_spec
from omniloom.run.opening import open_workshop
from omniloom.run.rows import open_rows
from omniloom.run.trainer import run
from omniloom.tools.generate import load_model
from omniloom.tools.score import score_file
from omniloom.tools.tiny import make_tiny
from tests.media_rows import write_media_rows
from tests.parity.vllm_layout import ARCHITECTURES, check_vllm_layout

FAMILIES = [spec.name for spec in SPECS if spec.name != "qwen3_omni"]  # of which test_trained_export tells
WORDS = (
    *("data.workers=0", "model.dtype=float32", "data.pack_tokens=512", "data.image.max_pixels=4096"),
    "data.video.max_pixels=4096",
)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: value for shard in sorted(directory.glob("*.safetensors")) for name, value in load_file(shard).items()
    }


@pytest.fixture(scope="module", params=FAMILIES)
def finished(request, tmp_path_factory) -> Path:
    """The folder of a run of two steps with the vision tower frozen, all but its merger."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_tiny(request.param, folder / "model")
    rows = write_media_rows(folder, hears="omni" in request.param)
    overrides = (f"model.path={model}", f"data.train={rows}", f"train.run_dir={folder / 'run'}", *WORDS)
    training = ("train.steps=2", "train.packs_per_step=4", "train.learning_rate=1e-2", "log.tensorboard=false")
    frozen = ("policy.vision.freeze=true", "policy.vision.merger.freeze=false")
    assert run(load_config(None, [*overrides, *training, *frozen])) == 0
    assert not (folder / "run" / "bad_samples.jsonl").exists() or not (folder / "run" / "bad_samples.jsonl").read_text()
    return folder


def test_what_does_not_train_is_carried_bit_for_bit(finished) -> None:
    before, after = tensors_of(finished / "model"), tensors_of(finished / "run" / "hf")
    assert before.keys() == after.keys()
    changed = set()
    for name, old in before.items():
        assert (after[name].dtype, after[name].shape) == (old.dtype, old.shape), name
        if not torch.equal(old.view(torch.uint8), after[name].view(torch.uint8)):
            changed.add(name)
    assert not [name for name in changed if name.startswith(("talker.", "token2wav.", "mtp."))]
    assert not [name for name in changed if "visual." in name and ".merger." not in name]
    assert any(".merger." in name for name in changed)
    first = ("layers.0.self_attn.q_proj.weight", "layers.0.linear_attn.in_proj_qkv.weight")
    assert any(name.endswith(first) for name in changed)
    copied = {path.name for path in (finished / "model").iterdir()}
    assert copied <= {path.name for path in (finished / "run" / "hf").iterdir()}


def test_vllm_finds_its_model_in_the_export(finished) -> None:
    directory = finished / "run" / "hf"
    if json.loads((directory / "config.json").read_text())["architectures"][0] not in ARCHITECTURES:
        pytest.skip("its names in vLLM are not known here; they are those of the checkpoint it came from")
    check_vllm_layout(directory)


def test_scores_are_transformers_losses_of_the_exported_model(finished, capsys) -> None:
    directory = finished / "run" / "hf"
    config = load_config(None, [f"model.path={directory}", f"data.train={finished / 'rows.json'}", *WORDS])
    score_file(directory, finished / "rows.json", list(WORDS))
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = open_rows(open_workshop(config), open_sources(config.data.train), cache=False)()
    assert len(scores) == len(rows.source)
    model = load_model(directory)
    for row, score in enumerate(scores):
        reader, conversation = rows.reader_of(row), rows.conversation(row)
        media = [(part.media, part.kind) for turn in conversation.turns for part in turn.parts if part.media]
        headers = [reader.read_header(source, kind) for source, kind in media]
        clips = reader.processor.geometry(conversation, headers)
        decoded = [reader.decode(source, clip) for (source, _), clip in zip(media, clips, strict=True)]
        example = reader.processor.encode(conversation, clips, decoded)
        inputs = reader.processor.prompt(conversation, headers, decoded)
        inputs["input_ids"] = example.input_ids[None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:  # the answer is text
            kinds = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = F.pad(kinds, (0, len(example.input_ids) - kinds.shape[1]))
        with torch.no_grad():
            logits = model(**inputs).logits[0].float()
        losses = F.cross_entropy(logits, example.labels, reduction="none", ignore_index=-100)
        expected = (losses * example.loss_weights).sum() / example.loss_weights.sum()
        # float32 through two implementations, whose sums run in another order
        assert score["loss"] == pytest.approx(float(expected), rel=1e-5), f"row {row}"


def test_fewer_layers_train_and_are_exported_as_such(finished, tmp_path) -> None:
    layers = ("model.num_layers.text=1", "model.num_layers.vision=2")
    paths = (f"model.path={finished / 'model'}", f"data.train={finished / 'rows.json'}", f"train.run_dir={tmp_path}")
    assert run(load_config(None, [*paths, *WORDS, *layers, "train.steps=1", "train.packs_per_step=2"])) == 0
    config_json = json.loads((tmp_path / "hf" / "config.json").read_text())
    family = find_spec(config_json).read_config(config_json)
    assert (family.text.num_hidden_layers, family.vision.depth) == (1, 2)
    assert load_model(tmp_path / "hf") is not None


def test_a_tower_that_is_not_asked_for_is_not_built_and_yet_exported(finished, tmp_path) -> None:
    paths = (f"model.path={finished / 'model'}", f"data.train={finished / 'rows.json'}", f"train.run_dir={tmp_path}")
    text_only = ("model.modalities=[text]", "train.steps=1", "train.packs_per_step=1", "data.max_bad_fraction=1")
    assert run(load_config(None, [*paths, *WORDS, *text_only])) == 0
    before, after = tensors_of(finished / "model"), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys()
    towers = [name for name in before if "visual." in name or ".audio_tower." in name]
    assert towers
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in towers)


def test_modalities_that_a_family_lacks_are_refused(finished) -> None:
    directory = finished / "model"
    if "audio" in find_spec(json.loads((directory / "config.json").read_text())).modalities:
        pytest.skip("this family has them all")
    with pytest.raises(ValueError, match=r"model\.modalities: qwen\w+ knows text, image, video; remove audio"):
        open_workshop(load_config(None, [f"model.path={directory}", "model.modalities=[text, audio]"]))
