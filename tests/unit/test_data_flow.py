"""From real files to packed batches: sources, formats, media, a family's processor, planner and loader together."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch

from omniloom.config import config_to_dict, load_config
from omniloom.data.loader import Loader
from omniloom.data.planner import Planner
from omniloom.data.sources import open_sources
from omniloom.data.stream import StepStream
from omniloom.run.opening import open_workshop
from omniloom.run.rows import open_rows, planned_options
from omniloom.tools.demo_data import write_demo_data
from omniloom.tools.tiny import make_tiny
from omniloom.types import IGNORE_LABEL, Extent, PackedBatch, PackPlan, PlannedSample

REAL = Path(__file__).parents[3] / "shared" / "real"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_tiny("qwen3_omni", tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    write_demo_data(directory, num_train=21, num_held_out=4)
    return directory / "train.jsonl"


def load_all(checkpoint: Path, files: list[Path], run_dir: Path, *words: str) -> list:
    """Every step of a run on these files."""
    names = ",".join(map(str, files))
    config = load_config(
        None, [f"model.path={checkpoint}", f"data.train={names}", f"train.run_dir={run_dir}", "train.epochs=1", *words]
    )
    source = open_sources(config.data.train)
    open_reader = open_rows(open_workshop(config), source)
    loader = Loader(open_reader, workers=config.data.workers)
    planner = Planner(rows_per_source=source.sizes, config=config, measure=loader.measure, locate=source.locate)
    with StepStream(planner, loader) as stream:
        return list(stream)


def tensors_of(value, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {path: value}
    if not hasattr(value, "__dataclass_fields__"):
        return {}
    found: dict[str, torch.Tensor] = {}
    for name in value.__dataclass_fields__:
        found |= tensors_of(getattr(value, name), f"{path}.{name}")
    return found


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("data.system=be brief", {"data.system": "be brief"}),
        ("data.last_turn_only=true", {"data.last_turn_only": True}),
        ("data.enable_thinking=false", {"data.enable_thinking": False}),
        ("data.template_variables.reasoning_effort=high", {"data.template_variables": {"reasoning_effort": "high"}}),
        ("data.template_variables.preserve_thinking=false", {"data.template_variables": {"preserve_thinking": False}}),
        ("data.video.max_frames=8", {"data.video.max_frames": 8}),
        ("data.image.limit_pixels=1000", {"data.image.limit_pixels": 1000}),
        ("data.media_dir=elsewhere", {}),
        ("data.workers=7", {}),
        ("model.modalities=image", {"model.modalities": ["text", "image"]}),
    ],
)
def test_the_plan_holds_on_to_every_option_that_changes_what_a_row_becomes(checkpoint, demo, word, named):
    words = [f"model.path={checkpoint}", f"data.train={demo}", "train.run_dir=runs/none"]
    usual = planned_options(open_workshop(load_config(None, words)))
    found = planned_options(open_workshop(load_config(None, [*words, word])))
    assert found == json.loads(json.dumps({**usual, **named}))


def test_thinking_that_is_switched_off_reaches_the_processor(checkpoint, demo):
    words = [f"model.path={checkpoint}", f"data.train={demo}", "train.run_dir=runs/none"]
    source = open_sources((str(demo),))
    for word, enabled in (("data.enable_thinking=true", True), ("data.enable_thinking=false", False)):
        open_reader = open_rows(open_workshop(load_config(None, [*words, word])), source, cache=False)
        assert open_reader().processor.towers.options.enable_thinking is enabled


ODD_ROWS = (
    {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "tool_call", "content": {"name": "\udc00"}}]},
    {"query": "a", "response": "b", "tools": [{"name": "f", "parameters": {"\ud800": 1}}]},
    {"query": "a", "response": "b", "id": "\ud800"},
    {"query": "<image>", "response": "b", "images": ["\ud800.png"]},
    {"query": "<image>", "response": "b", "images": [{"path": "flat.png", "min_pixels": 10**400}]},
    {"query": "<image>", "response": "b", "images": ["flat.png"]},  # 900 pixels wide, 1 high
    {"query": "<image>", "response": "b", "images": ["float.tiff"]},
    {"query": "a", "response": "b", "weight": 10**400},
    {"query": "a", "response": "b", "tools": '[{"name": "f", "x": "\\ud800"}]'},
    {"query": "<|image_pad|>", "response": "b"},
    {"query": "a\0b", "response": ""},
)


def test_whatever_a_row_holds_is_its_own_fault(checkpoint, tmp_path):
    from PIL import Image

    Image.new("RGB", (900, 1)).save(tmp_path / "flat.png")
    Image.new("F", (40, 40)).save(tmp_path / "float.tiff")
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ODD_ROWS))
    config = load_config(None, [f"model.path={checkpoint}", f"train.run_dir={tmp_path}"])
    reader = open_rows(open_workshop(config), open_sources((str(tmp_path / "odd.jsonl"),)), cache=False)()
    found = reader.measure(range(len(ODD_ROWS)), {}, lambda row: None)
    good = [index for index, row in enumerate(found) if isinstance(row, Extent)]
    assert good == [7]  # its header is fine, its pixels have no brightness
    sample = PlannedSample(row=7, epoch=0, extent=found[7], weight_scale=1.0)
    (bad,) = reader.load(PackPlan(index=0, samples=(sample,)), None, {}, lambda row: None).bad
    for row in (bad, *(row for row in found if row is not found[7])):
        json.dumps([row.field, row.reason], ensure_ascii=False).encode()


def test_options_of_a_source_are_its_own(checkpoint, tmp_path):
    from PIL import Image

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (640, 640)).save(tmp_path / folder / "a.png")
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "<image>?", "response": "b", "image": "one/a.png"}))
    (tmp_path / "b.jsonl").write_text('{"ask": "<image>?", "say": "b", "pictures": ["a.png"]}\n' * 3)
    own = {
        "path": str(tmp_path / "b.jsonl"),
        "attr": {"query": "ask", "response": "say", "images": "pictures"},
        "media_dir": str(tmp_path / "two"),
        "image": {"max_pixels": 90_000},
        "max_samples": 2,
        "template": "qwen3_omni",
        "loss_weight": 0.5,
    }
    tree = {"model": {"path": str(checkpoint)}, "data": {"train": [str(tmp_path / "a.jsonl"), own]}}
    config = load_config(tree)
    assert load_config(config_to_dict(config)) == config
    rows = open_sources(config.data.train)
    assert rows.sizes == (1, 2)
    workshop = open_workshop(config)
    reader = pickle.loads(pickle.dumps(open_rows(workshop, rows, cache=False)))()
    found = reader.measure([0, 1, 2], {}, lambda row: None)
    assert [extent.clips[0].grid_thw for extent in found[1:]] == [(1, 18, 18)] * 2
    assert found[0].clips[0].grid_thw == (1, 40, 40)
    assert "<think>" in text_of(reader, 1, found[1])
    assert "<think>" not in text_of(reader, 0, found[0])
    planned = planned_options(workshop)
    assert {name: planned[f"data.train.1.attr.{name}"] for name in own["attr"]} == own["attr"]
    assert "data.train.1.media_dir" not in planned_options(workshop)
    assert planned["data.train.1.loss_weight"] == 0.5
    assert [extent.weight_sum / extent.num_loss_tokens for extent in found] == [1.0, 0.5, 0.5]
    for wrong, words in (
        ({"attr": {}}, "data.train.1.path: not set"),
        ({"path": "x", "atr": {}}, "data.train.1.atr: unknown key; did you mean data.train.1.attr?"),
        ({"path": "x", "image": {"max_pixels": 0}}, "data.train.1.image.max_pixels: expected at least 1"),
        (3, "data.train.1: expected text or a section"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            load_config({**tree, "data": {"train": ["a", wrong]}})


def text_of(reader, row: int, extent: Extent) -> str:
    processor = reader.reader_of(row).processor
    example = processor.encode(reader.conversation(row), extent.clips, (None,) * len(extent.clips))
    return processor.tokenizer.decode(example.input_ids.tolist(), skip_special_tokens=False)


def check_batch(batch: PackedBatch) -> None:
    bounds = batch.segments.cu_seqlens
    starts = bounds[: len(batch.sample_ids)]
    assert (batch.position_ids[:, starts[~batch.is_padding[starts]]] == 0).all()  # each sample counts from 0
    assert torch.equal(batch.loss_weights > 0, batch.labels != IGNORE_LABEL)
    assert not (batch.is_padding & (batch.labels != IGNORE_LABEL)).any()
    last = bounds[1 : 1 + len(batch.sample_ids)] - 1
    assert (batch.labels[last] == IGNORE_LABEL).all()  # no loss crosses from one sample to the next
    inside = ~batch.is_padding
    trained = batch.loss_index
    assert torch.equal(batch.labels[trained], batch.input_ids[trained + 1])
    for media in (batch.vision, batch.audio):
        assert inside[media.token_index].all()
    both = torch.cat([batch.vision.token_index, batch.audio.token_index])
    assert len(both.unique()) == len(both)  # no row is filled twice


@pytest.fixture(scope="module")
def demo_steps(checkpoint, demo, tmp_path_factory) -> list:
    words = ("data.pack_tokens=512", "train.packs_per_step=2", "data.workers=0", "data.window=8")
    return load_all(checkpoint, [demo], tmp_path_factory.mktemp("run"), *words)


def test_media_rows_become_batches_that_fit_together(demo, demo_steps):
    assert not [bad for step in demo_steps for bad in step.bad]
    packs = [pack for step in demo_steps for pack in step.packs]
    assert sum(len(pack.batch.sample_ids) for pack in packs) == 21
    for pack in packs:
        check_batch(pack.batch)
    planned = [sample for step in demo_steps for pack in step.plan.packs for sample in pack.samples]
    stats = [step.agreement.stats for step in demo_steps]
    assert sum(item.num_tokens for item in stats) == sum(int((~pack.batch.is_padding).sum()) for pack in packs)
    assert sum(item.num_loss_tokens for item in stats) == sum(len(pack.batch.loss_index) for pack in packs)
    rows = [json.loads(line) for line in demo.read_text().splitlines()]
    assert sum(item.num_images for item in stats) == sum("images" in row for row in rows) > 0
    assert sum(sample.extent.weight_sum for sample in planned) == sum(
        float(pack.batch.loss_weights.double().sum()) for pack in packs
    )


def test_workers_give_the_same_tensors_of_real_media(checkpoint, demo, demo_steps, tmp_path):
    words = ("data.pack_tokens=512", "train.packs_per_step=2", "data.workers=2", "data.window=8")
    for step, whole in zip(load_all(checkpoint, [demo], tmp_path, *words), demo_steps, strict=True):
        assert step.plan == whole.plan
        for pack, expected in zip(step.packs, whole.packs, strict=True):
            ours, theirs = tensors_of(pack.batch), tensors_of(expected.batch)
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert torch.equal(ours[name], theirs[name]), name


def test_a_broken_file_costs_its_own_row_only(checkpoint, demo, tmp_path):
    rows = [json.loads(line) for line in demo.read_text().splitlines()]
    victim = next(number for number, row in enumerate(rows) if row.get("images"))
    rows[victim]["images"] = [str(tmp_path / "broken.png")]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    gone = next(number for number, row in enumerate(rows) if row.get("audios"))
    rows[gone]["audios"] = ["media/no_such_file.flac"]
    file = demo.with_name("damaged.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = load_all(
        checkpoint,
        [file],
        tmp_path / "run",
        "data.pack_tokens=512",
        "data.workers=0",
        "data.max_bad_fraction=0.5",
        "data.allow_outside_media_dir=true",
    )
    bad = {row.line - 1: row for step in steps for row in step.bad}
    assert sorted(bad) == sorted((victim, gone))
    assert "no_such_file" in bad[gone].reason
    assert sum(step.agreement.stats.num_samples for step in steps) == 19


@pytest.mark.skipif(not REAL.is_dir(), reason="the real demo files are not here")
def test_real_photographs_sound_and_video_load_as_planned(checkpoint, tmp_path):
    files = [REAL / f"mllm_{name}.json" for name in ("demo", "audio_demo", "video_demo", "video_audio_demo")]
    words = (f"data.media_dir={REAL}", "data.pack_tokens=2048", "train.packs_per_step=2", "data.workers=1")
    # few pixels and frames, for speed
    words += ("data.image.max_pixels=65536", "data.video.max_pixels=16384", "data.video.max_frames=8")
    steps = load_all(checkpoint, files, tmp_path, *words)
    assert not [bad for step in steps for bad in step.bad]
    assert sum(step.agreement.stats.num_samples for step in steps) == 15
    for step in steps:
        for pack in step.packs:
            check_batch(pack.batch)
