"""Speech in rows: what is read, what is refused and in which words, and which rows of a pack it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omniloom.config import Config, DataConfig, LoraConfig, ModelConfig, PolicyRule, load_config
from omniloom.data.formats import parse_row
from omniloom.data.loader import Loader
from omniloom.data.packing import plan_steps
from omniloom.data.planner import plan_all
from omniloom.data.sources import open_sources
from omniloom.data.speech import with_codes
from omniloom.families.qwen3_omni.spec import SPEC
from omniloom.parallel.apply import check_plan
from omniloom.parallel.context import move_chunks, slice_batch
from omniloom.parallel.degrees import Degrees
from omniloom.run.opening import open_workshop
from omniloom.run.rows import open_rows
from omniloom.tools.tiny import make_tiny, tiny_config
from omniloom.training.policy import resolve_policy
from omniloom.types import CODE0, CODES, Extent, PlannedSample, SampleError

BY_HAND = "recordings become codes by hand"
CODES_OF_THREE = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_omni", tmp_path_factory.mktemp("speech") / "model")


def row(speech: Any = CODES_OF_THREE, **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": "one two", "speech": speech, **message}
    return {"messages": [{"role": "user", "content": "count to three please"}, said]}


def load(model: Path, folder: Path, *rows: dict[str, Any], speaks: bool = True) -> tuple[Any, list[Any], Any]:
    """The rows in one pack, those that are bad, and the pack's plan."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    policy = {"talker": PolicyRule(freeze=False)} if speaks else {}
    data = DataConfig(train=(str(path),), pack_tokens=192)
    workshop = open_workshop(Config(model=ModelConfig(path=str(model)), data=data, policy=policy))
    source = open_sources(data.train, data)
    loader = Loader(open_rows(workshop, source, cache=False), workers=0)
    try:
        packs, bad = plan_all(num_rows=len(rows), pack_tokens=192, measure=loader.measure, locate=source.locate)
        return next(iter(loader.load_in_order(packs))), list(bad), packs[0]
    finally:
        loader.close()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (row([[1, 2], [3]]), "lists of several lengths"),
        (row([[0.5] * 2] * 4), "of float64"),
        (row([[], [], [], []]), r"got shape \[4, 0\]"),
        (row(None, speaker="ethan"), "a speaker .* and no speech"),
        (row(speaker=3), "expected the name of a voice"),
        (row("gone.npy"), "gone.npy does not exist"),
        (row("sound.wav"), "got another kind of file; recordings become codes by hand"),
        (row("cut.npy"), "not a whole .npy file"),
        ({"messages": [{"role": "user", "content": "q", "speech": CODES_OF_THREE}]}, "only an answer is spoken"),
    ],
)  # fmt: skip
def test_speech_that_cannot_be_read_is_refused(tmp_path: Path, given: dict[str, Any], reason: str) -> None:
    (tmp_path / "sound.wav").write_bytes(b"RIFF1234WAVE")
    np.save(tmp_path / "cut.npy", np.zeros((4, 100), np.int64))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:200])
    with pytest.raises(SampleError, match=reason):
        with_codes(parse_row(given, file=str(tmp_path / "rows.jsonl"), line=1, options=DataConfig()), BY_HAND)


def test_speech_that_the_checkpoint_cannot_have_is_a_bad_row(model: Path, tmp_path: Path) -> None:
    wrong = [row(CODES_OF_THREE[:3]), row([1, 2, 3]), row([[1], [64], [1], [1]]), row([[102], [1], [1], [1]]),
             row(speaker="nobody"), row()]  # fmt: skip
    pack, bad, _ = load(model, tmp_path, *wrong)
    reasons = [
        "expected codes of 4 groups, all of as many frames, got 3 groups of 3 frames",
        "expected codes of 4 groups, all of as many frames, got 1 groups of 3 frames",
        "codes must be from 0 to 63, those of the codebooks, got 1 to 64",
        "codes must be from 0 to 63, those of the codebooks, got 1 to 102",
        "unknown speaker 'nobody'; the checkpoint knows chelsie, ethan, aiden",
    ]
    assert [one.reason for one in bad] == reasons
    assert len(pack.batch.sample_ids) == 1


def test_speech_takes_rows_beside_those_of_its_text(model: Path, tmp_path: Path) -> None:
    long = row([[number % 60 for number in range(40)]] * 4)
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    pack, bad, plan = load(model, tmp_path, long, row(), silent)
    assert bad == []
    batch, speech = pack.batch, pack.batch.speech
    lengths = {sample.row: sample.extent.num_tokens for sample in plan.samples}
    text_rows, spoken_rows = int((~batch.is_padding).sum()), int((~speech.is_padding).sum())
    assert lengths[0] > 49  # its speech has more rows than its text
    assert spoken_rows > lengths[0]
    assert text_rows < sum(lengths.values()) < 192
    assert [sample.extent.num_code_frames for sample in sorted(plan.samples, key=lambda s: s.row)] == [40, 3, 0]
    assert len(batch.targets[CODES].weights) == 43
    assert len(batch.targets[CODE0].weights) == 45
    assert speech.segments.bounds[-1] == batch.segments.bounds[-1] == 192


@pytest.mark.parametrize("ring", [1, 4])
def test_ranks_that_share_a_pack_read_and_predict_each_frame_once(model: Path, tmp_path: Path, ring: int) -> None:
    """A frame whose own row begins a rank's part is predicted on the rank before."""
    pack, _, _ = load(model, tmp_path, row([[number % 60 for number in range(40)]] * 4))
    parts = [slice_batch(pack.batch, rank, 8, ring=ring) for rank in range(8)]
    places = move_chunks(torch.arange(192), 192, ring)
    for found, wanted in (
        (
            [(part.speech.rows.frame_index, part.speech.rows.frames) for part in parts],
            pack.batch.speech.rows.frame_index,
        ),
        (
            [(part.targets[CODES].token_index, part.targets[CODES].values) for part in parts],
            pack.batch.targets[CODES].token_index,
        ),
    ):
        index = torch.cat([own + 24 * rank for rank, (own, _) in enumerate(found)])
        order = index.argsort()
        assert torch.equal(index[order], places[wanted].sort().values)
        codes = torch.cat([values for _, values in found])[order]
        assert torch.equal(codes, pack.batch.speech.rows.frames[places[wanted].argsort()])
    assert any(len(part.speech.rows.frames) != len(part.targets[CODES].values) for part in parts)


@pytest.mark.parametrize("ring", [1, 4])
def test_states_that_rows_hear_are_numbered_by_their_places_in_the_whole_pack(
    model: Path, tmp_path: Path, ring: int
) -> None:
    pack, _, _ = load(model, tmp_path, row())
    index, speech = torch.arange(192), pack.batch.speech
    rows = replace(speech.rows, state_index=index, hidden_index=index.flip(0))
    batch = replace(pack.batch, speech=replace(speech, rows=rows))
    parts = [slice_batch(batch, rank, 8, ring=ring).speech.rows for rank in range(8)]
    reading = torch.cat([part.state_index + 24 * rank for rank, part in enumerate(parts)])
    heard = torch.cat([part.hidden_index for part in parts])
    places = move_chunks(index, 192, ring)
    assert torch.equal(reading.sort().values, index)
    assert torch.equal(heard[reading.argsort()], places.flip(0)[places.argsort()])


def test_a_run_without_a_talker_reads_over_speech(model: Path, tmp_path: Path) -> None:
    pack, bad, plan = load(model, tmp_path, row("gone.npy"), speaks=False)
    assert (pack.batch.speech, dict(pack.batch.targets), bad) == (None, {}, [])
    assert plan.samples[0].extent.num_code_frames == 0


def test_weights_of_rows_and_turns_are_those_of_their_frames(model: Path, tmp_path: Path) -> None:
    heavy, plain, unheard = {**row(loss_scale=0.5), "weight": 3.0}, row(), row(loss=False)
    heard = row()["messages"]
    silent_beside = {"messages": [*unheard["messages"], *heard]}
    pack, bad, _ = load(model, tmp_path, heavy, plain, silent_beside)
    assert bad == []
    assert sorted(pack.batch.targets[CODE0].weights.tolist()) == [1.0] * 8 + [1.5] * 4
    assert sorted(pack.batch.targets[CODES].weights.tolist()) == [1.0] * 6 + [1.5] * 3


@pytest.mark.parametrize(
    ("loss", "scales"), [("token", (1.0, 1.0)), ("sample", (0.25, 0.5)), ("batch", (1 / 6, 1 / 6))]
)
def test_the_loss_mode_weighs_frames_as_it_weighs_tokens(loss: str, scales: tuple[float, float]) -> None:
    extents = [Extent(num_tokens=9, num_loss_tokens=5, weight_sum=5.0, num_code_labels=labels) for labels in (4, 2)]
    samples = [PlannedSample(row=i, epoch=0, extent=extent, weight_scale=1.0) for i, extent in enumerate(extents)]
    (step,) = plan_steps([samples], packs_per_step=1, first_step=0, rows_before=0, bad_rows=(), loss=loss)
    assert tuple(sample.speech_scale for sample in step.packs[0].samples) == pytest.approx(scales)


def test_the_other_codes_count_as_the_config_says() -> None:
    found = load_config(None, ["train.codes_loss=0.7"]).train.loss_coefficients
    assert (found["code0"], found["codes"]) == (1.0, 0.7)


def test_only_what_is_named_trains_beside_the_talker() -> None:
    names = {name: name for name in ("text", "text.router", "vision", "talker", "talker.codec_embed")}

    def trains(**rules: PolicyRule) -> set[str]:
        resolved = resolve_policy(rules, names, learning_rate=1.0, weight_decay=0.0, roots=("text",))
        return {name for name, policy in resolved.items() if policy.trainable}

    spoken = {"talker", "talker.codec_embed"}
    assert trains(talker=PolicyRule(freeze=False)) == spoken
    assert trains(talker=PolicyRule(freeze=False), text=PolicyRule(freeze=False)) == {*spoken, "text", "text.router"}
    assert trains(talker=PolicyRule(freeze=True)) == {"text", "text.router", "vision"}


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"context": 8}, "parallel.context: 4 attention heads do not divide over 8 context ranks"),
        ({"tensor": 2}, "parallel.tensor: 2, but a talker is not divided so yet"),
        ({"pipeline": 2}, "parallel.pipeline: 2, but a talker is not divided so yet"),
        ({"shard": 8, "expert": 8}, r"8 and 4 experts do not divide over 8 ranks; choose from \[1, 2, 4\]"),
    ],
)
def test_a_layout_that_does_not_divide_a_talker_is_refused(degrees: dict[str, int], words: str) -> None:
    plan = SPEC.sharding(SPEC.read_config(tiny_config("qwen3_omni"), speaks=True))
    with pytest.raises(ValueError, match=words):
        check_plan(plan, Degrees(**degrees))
    check_plan(plan, Degrees(shard=4, expert=4))


def test_a_talker_that_is_not_there_is_refused_by_its_rule(tmp_path: Path) -> None:
    other = make_tiny("qwen3_vl", tmp_path / "model")
    for rule in (PolicyRule(freeze=False), PolicyRule(lora=LoraConfig())):
        config = Config(model=ModelConfig(path=str(other)), policy={"talker": rule})
        with pytest.raises(ValueError, match=r"policy\.talker: there is no talker to train, the checkpoint"):
            open_workshop(config)
