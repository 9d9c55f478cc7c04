"""Answers of the model as it trains, against transformers choosing token by token on each row alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from omniloom.parallel.degrees import Degrees
from omniloom.parallel.mesh import Layout, build_layout, close_distributed, init_distributed
from omniloom.run.answers import answer_pack, make_room
from omniloom.types import IGNORE_LABEL, Segments
from tests.parity import builders
from tests.parity.builders import Sample

NUM_NEW = 5


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield build_layout(Degrees(), init_distributed(timeout_seconds=30))
    close_distributed()


def with_answer(sample: Sample, first: int, last: int) -> Sample:
    """Only rows from `first` to `last` have labels: one answer."""
    inside = torch.zeros(len(sample.labels), dtype=torch.bool)
    inside[first:last] = True
    return replace(
        sample,
        labels=torch.where(inside, sample.labels, IGNORE_LABEL),
        loss_weights=inside.float(),
    )


def greedy(reference, sample: Sample, num_prompt: int, stop: int) -> list[int]:
    """What transformers says next, one token at a time, the whole row computed anew for each."""
    found: list[int] = []
    ids, positions = sample.input_ids[:num_prompt], sample.position_ids[:, :num_prompt]
    for _ in range(NUM_NEW):
        grown = replace(sample, input_ids=ids, position_ids=positions)
        with torch.no_grad():
            token = int(builders.reference_logits(reference, grown).logits[0, -1].argmax())
        if token == stop:
            break
        found.append(token)
        ids = torch.cat((ids, torch.tensor([token])))
        positions = torch.cat((positions, positions[:, -1:] + 1), dim=1)
    return found


def make_batch(samples, config_json, num_tokens):
    batch = builders.pack(samples, config_json, num_tokens=num_tokens)
    names = tuple(f"row{number}" for number in range(len(samples)))
    used = [0, *torch.tensor([len(sample.input_ids) for sample in samples]).cumsum(0).tolist()]
    lengths = [high - low for low, high in pairwise([*used, num_tokens])]
    return replace(
        batch,
        sample_ids=names,
        sample_bounds=tuple(used),
        segments=Segments.from_lengths(lengths, num_bounds=16),
    )


def test_answers_are_those_of_transformers_whatever_shares_the_pack(layout: Layout) -> None:
    rng = random.Random(1)
    config_json = builders.random_config(rng, num_layers=2)
    reference = builders.reference_model(config_json, seed=1)
    model = builders.our_model(config_json, reference).eval()
    media = [("image",), (), ("audio", "video")]
    samples = []
    for number, kinds in enumerate(media):
        sample = builders.random_sample(rng, reference, kinds, seed=number)
        words = int(torch.randint(1, 90, (), generator=torch.Generator().manual_seed(number)))
        extra = torch.tensor([(words + 3 * i) % builders.NUM_WORDS for i in range(6)])
        ids = torch.cat((sample.input_ids, extra))
        positions = torch.cat((sample.position_ids, sample.position_ids.max() + torch.arange(1, 7).expand(3, -1)), 1)
        labels = torch.cat((ids[1:], torch.tensor([IGNORE_LABEL])))
        sample = replace(sample, input_ids=ids, position_ids=positions, labels=labels)
        samples.append(with_answer(sample, len(ids) - 5, len(ids) - 2))
    unasked = replace(samples[1], labels=torch.full_like(samples[1].labels, IGNORE_LABEL),
                      loss_weights=torch.zeros_like(samples[1].loss_weights))  # fmt: skip
    expected = [
        greedy(reference, sample, len(sample.input_ids) - 4, int(sample.labels[sample.labels >= 0][-1]))
        for sample in samples
    ]
    packed = [samples[0], unasked, samples[1], samples[2]]
    num_tokens = sum(len(sample.input_ids) for sample in packed) + 3 * NUM_NEW + 7
    batch = make_batch(packed, config_json, num_tokens)
    found = answer_pack(model, batch, layout, None, None, lambda value: [value], max_new_tokens=NUM_NEW)
    assert [list(answer.tokens) for answer in found] == expected
    assert [answer.position for answer in found] == [0, 2, 3]
    assert [answer.expected for answer in found] == [tuple(s.labels[s.labels >= 0].tolist()[:-1]) for s in samples]
    assert any(len(answer.tokens) == NUM_NEW for answer in found)


def test_room_moves_rows_and_loses_none() -> None:
    rng = random.Random(2)
    config_json = builders.random_config(rng, num_layers=1)
    reference = builders.reference_model(config_json)
    samples = [builders.random_sample(rng, reference, kinds, seed=3) for kinds in (("image", "audio"), ("video",))]
    samples = [with_answer(sample, 2, 4) for sample in samples]
    used = sum(len(sample.input_ids) for sample in samples)
    batch = make_batch(samples, config_json, used + 11)
    spread, questions = make_room(batch, 4)
    kept = spread.input_ids != 0
    assert sorted(spread.input_ids[kept].tolist()) == sorted(batch.input_ids[batch.input_ids != 0].tolist())
    for before, after in ((batch.vision, spread.vision), (batch.audio, spread.audio)):
        assert torch.equal(spread.input_ids[after.token_index], batch.input_ids[before.token_index])
    assert [question.row for question in questions] == [2, len(samples[0].input_ids) + 4 + 2]
    assert int((~spread.is_padding).sum()) == used + 8
    with pytest.raises(ValueError, match="has no room for 6 more"):
        make_room(batch, 6)
