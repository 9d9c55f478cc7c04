"""What a run leaves behind: a directory that transformers loads, in which only what trained has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from omniloom.config import load_config
from omniloom.run.rows import open_rows
from omniloom.run.trainer import run
from omniloom.tools.export import export_checkpoint
from omniloom.tools.score import score_file
from omniloom.tools.tiny import make_tiny
from omniloom.types import DecodedClip
from tests.mixed_rows import write_rows
from tests.parity.vllm_layout import check_vllm_layout


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        found |= load_file(shard)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of three steps with the vision tower frozen, all but its merger."""
    folder = tmp_path_factory.mktemp("export")
    model = make_tiny("qwen3_omni", folder / "model")
    config = load_config(
        None,
        [
            *(f"model.path={model}", "model.dtype=float32", f"data.train={write_rows(folder)}", "data.workers=0"),
            *("data.pack_tokens=256", "data.max_bad_fraction=0.2", "data.image.max_pixels=4096"),
            *(f"train.run_dir={folder / 'run'}", "train.steps=3", "train.packs_per_step=4", "train.learning_rate=1e-2"),
            *("policy.vision.freeze=true", "policy.vision.merger.freeze=false", "log.tensorboard=false"),
        ],
    )
    assert run(config) == 0
    return folder


def test_only_what_trains_changes_and_the_rest_is_the_source_bit_for_bit(finished) -> None:
    before, after = tensors_of(finished / "model"), tensors_of(finished / "run" / "hf")
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        assert (new.dtype, new.shape) == (old.dtype, old.shape), name
        frozen = name.startswith(("talker.", "code2wav.")) or (
            name.startswith("thinker.visual.") and not name.startswith("thinker.visual.merger.")
        )
        same = torch.equal(old.view(torch.uint8), new.view(torch.uint8))
        if frozen:
            assert same, f"{name} changed"
        elif old.ndim > 1 and "experts" not in name:  # an expert may have seen no token, a vector may round to itself
            assert not same, f"{name} did not train"


def test_the_files_of_the_source_come_along(finished) -> None:
    source = {path.name for path in (finished / "model").iterdir()}
    assert source <= {path.name for path in (finished / "run" / "hf").iterdir()}
    assert (finished / "model" / "config.json").read_bytes() == (finished / "run" / "hf" / "config.json").read_bytes()


def test_the_limits_of_media_that_trained_come_along(finished, tmp_path) -> None:
    export_checkpoint(finished / "run", tmp_path / "again")
    for directory in (finished / "run" / "hf", tmp_path / "again"):
        settings = json.loads((directory / "preprocessor_config.json").read_text())
        assert settings["max_pixels"] == settings["size"]["longest_edge"] == 4096


def test_vllm_finds_its_model_in_the_export(finished, tmp_path) -> None:
    export = finished / "run" / "hf"
    check_vllm_layout(export)
    index = json.loads((export / "model.safetensors.index.json").read_text())
    other = tmp_path / "other"
    for change in ("a tensor is missing", "a tensor too many", "a shape is wrong", "a shard is missing"):
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(export, other)
        name = "thinker.model.layers.1.mlp.experts.2.up_proj.weight"
        shard = other / index["weight_map"][name]
        tensors = load_file(shard)
        if change == "a tensor too many":
            tensors["thinker.model.layers.1.mlp.experts.99.down_proj.bias"] = torch.zeros(1)
        elif change == "a shape is wrong":
            tensors[name] = torch.zeros(1, *tensors[name].shape).flatten(1).T.contiguous()
        else:
            del tensors[name]
        save_file(tensors, shard)
        if change == "a shard is missing":
            shard.unlink()
        with pytest.raises((AssertionError, KeyError)):
            check_vllm_layout(other)


def test_exporting_the_checkpoint_gives_the_bytes_of_the_run_s_own_export(finished) -> None:
    export_checkpoint(finished / "run", finished / "again")
    for path in (finished / "run" / "hf").iterdir():
        assert path.read_bytes() == (finished / "again" / path.name).read_bytes(), path.name


def test_scores_are_transformers_losses_of_the_exported_model(finished, capsys) -> None:
    from transformers import Qwen3OmniMoeForConditionalGeneration

    directory = finished / "run" / "hf"
    model, report = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    words = ["data.workers=0", "data.image.max_pixels=4096", "data.pack_tokens=512", "model.dtype=float32"]
    score_file(directory, finished / "rows.json", words)
    printed = capsys.readouterr()
    scores = [json.loads(line) for line in printed.out.splitlines()]
    assert len(scores) == 23
    assert "missing.png" in printed.err

    config = load_config(None, [f"model.path={directory}", f"data.train={finished / 'rows.json'}", *words])
    reader = _reader(config)
    for row, score in ((0, scores[0]), (1, scores[1]), (2, scores[2])):  # text, an image, a sound
        example, inputs = _both(reader, row)
        with torch.no_grad():
            logits = model.thinker(**inputs).logits[0].float()
        losses = F.cross_entropy(logits, example.labels, reduction="none", ignore_index=-100)
        expected = (losses * example.loss_weights).sum() / example.loss_weights.sum()
        # float32 through two implementations, whose sums run in another order
        assert score["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert score["num_loss_tokens"] == int((example.loss_weights > 0).sum())


def _reader(config):
    from omniloom.data.sources import open_sources
    from omniloom.run.opening import open_workshop

    workshop = open_workshop(config)
    source = open_sources(config.data.train)
    return open_rows(workshop, source, cache=False)()


def _both(reader, row: int):
    """The row as our example, and as arguments of transformers' forward with the whole conversation in it."""
    conversation = reader.conversation(row)
    reader = reader.reader_of(row)
    media = [(part.media, part.kind) for turn in conversation.turns for part in turn.parts if part.media is not None]
    headers = [reader.read_header(source, kind) for source, kind in media]
    clips = reader.processor.geometry(conversation, headers)
    decoded: list[DecodedClip] = [reader.decode(source, clip) for (source, _), clip in zip(media, clips, strict=True)]
    example = reader.processor.encode(conversation, clips, decoded)
    inputs = reader.processor.prompt(conversation, headers, decoded)
    inputs["input_ids"] = example.input_ids[None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return example, inputs
