"""Held-out rows answered by the model as it trains: greedy, in its layout.

Rows are packed with room for an answer behind each prompt; every pass over a pack gives one more token to all of its
rows. There is no cache of keys and values: what a token may see is decided by the pack's own causal segments, so the
very modules that train also answer. Sits beside `evaluation.py`, which gives the loss; `answer_metrics.py` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from omniloom.models.fusion import OmniModel
from omniloom.parallel.encoder_pool import EncoderPool
from omniloom.parallel.mesh import Layout
from omniloom.parallel.pipeline import Pipeline
from omniloom.parallel.step import best_tokens, prepare
from omniloom.types import PackedBatch, Segments

Exchange = Callable[[object], list[Any]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row of a pack that is to be answered."""

    position: int  # of its sample in the pack
    row: int  # of the last token before the answer, in the pack with room
    expected: tuple[int, ...]  # its tokens in the row, end of turn included


@dataclass(frozen=True, kw_only=True)
class Answer:
    position: int  # of its sample in the pack
    tokens: tuple[int, ...]  # up to the end of turn, which is left out
    expected: tuple[int, ...]


def make_room(batch: PackedBatch, num_new: int) -> tuple[PackedBatch, tuple[Question, ...]]:
    """Open `num_new` rows before the last answer of every sample, on the host. What stood there moves behind them.

    A sample without an answer is not asked. Raises: ValueError where the pack has too few rows; plan with `num_new`
    more tokens per sample.
    """
    num_tokens = batch.input_ids.shape[0]
    place_of = torch.full((num_tokens,), -1)
    places, questions, starts, room = 0, [], [0], []
    for position, (low, high) in enumerate(pairwise(batch.sample_bounds)):
        answer = _last_answer(batch.loss_index[(batch.loss_index >= low) & (batch.loss_index < high)])
        cut = int(answer[0]) + 1 if len(answer) else high
        place_of[low:cut] = torch.arange(places, places + cut - low)
        places += cut - low
        if len(answer):
            questions.append(Question(position=position, row=places - 1, expected=tuple(batch.labels[answer].tolist())))
            room.append((places, cut - 1))
            places += num_new
        place_of[cut:high] = torch.arange(places, places + high - cut)
        places += high - cut
        starts.append(places)
    if places > num_tokens:
        raise ValueError(f"a pack of {num_tokens} tokens has no room for {num_new} more per sample; it takes {places}")
    return _spread(batch, place_of, starts, room, num_new), tuple(questions)


def _last_answer(index: Tensor) -> Tensor:
    """The last run of consecutive rows."""
    if not len(index):
        return index
    breaks = (index.diff() > 1).nonzero().flatten()
    return index[int(breaks[-1]) + 1 :] if len(breaks) else index


def _spread(
    batch: PackedBatch, place_of: Tensor, starts: Sequence[int], room: Iterable[tuple[int, int]], num_new: int
) -> PackedBatch:
    """The pack with its rows at new places; `room` are (first free row, row of the old pack before it).

    Attention being causal, what moved behind the room is not seen from within it.
    """
    num_tokens = batch.input_ids.shape[0]
    old = (place_of >= 0).nonzero().flatten()
    input_ids, is_padding = torch.zeros_like(batch.input_ids), torch.ones_like(batch.is_padding)
    position_ids = torch.zeros_like(batch.position_ids)
    input_ids[place_of[old]] = batch.input_ids[old]
    position_ids[:, place_of[old]] = batch.position_ids[:, old]
    is_padding[place_of[old]] = batch.is_padding[old]
    for first, before in room:
        steps = torch.arange(1, num_new + 1)
        position_ids[:, first : first + num_new] = batch.position_ids[:, before, None] + steps
        is_padding[first : first + num_new] = False
    moved = (int(place_of[start]) for start in batch.segments.bounds if start < batch.sample_bounds[-1])
    bounds = [*dict.fromkeys((*moved, starts[-1], num_tokens))]
    lengths = [high - low for low, high in pairwise(bounds)]
    vision, audio = batch.vision, batch.audio
    return replace(
        batch,
        input_ids=input_ids,
        labels=torch.full_like(batch.labels, 0),
        loss_weights=torch.zeros_like(batch.loss_weights),
        loss_index=batch.loss_index[:0],
        position_ids=position_ids,
        is_padding=is_padding,
        segments=Segments.from_lengths(lengths, num_bounds=len(batch.segments.cu_seqlens)),
        sample_bounds=tuple(starts),
        vision=None if vision is None else replace(vision, token_index=place_of[vision.token_index]),
        audio=None if audio is None else replace(audio, token_index=place_of[audio.token_index]),
    )


def answer_pack(
    model: OmniModel,
    batch: PackedBatch,
    layout: Layout,
    pool: EncoderPool | None,
    pipeline: Pipeline | None,
    exchange: Exchange,
    *,
    max_new_tokens: int,
) -> list[Answer]:
    """The greedy answers to all questions of one pack. Collective: every rank calls it equally often.

    `batch` is as loaded, on the host, the same text on all ranks that share it. `exchange` gives every rank's value to
    every rank, once per token: so ranks stop together.
    """
    batch, questions = make_room(batch, max_new_tokens)
    prepared = prepare(model, batch, layout, pool)
    input_ids = batch.input_ids.clone()
    answers: list[list[int]] = [[] for _ in questions]
    going = list(range(len(questions)))
    for number in range(max_new_tokens):
        rows = torch.tensor([questions[index].row + number for index in going], dtype=torch.int64)
        step = replace(batch, input_ids=input_ids, loss_index=rows)
        found = best_tokens(model, step, prepared, layout, pipeline)
        everywhere = exchange((layout.data_rank, found))
        tokens = {row: token for rank, part in everywhere if rank == layout.data_rank for row, token in part.items()}
        for index in list(going):
            token = tokens[questions[index].row + number]
            if token == questions[index].expected[-1]:  # the end of its turn
                going.remove(index)
                continue
            answers[index].append(token)
            if number + 1 < max_new_tokens:
                input_ids[questions[index].row + number + 1] = token
        if not any(exchange(bool(going))):
            break
    return [
        Answer(position=question.position, tokens=tuple(answer), expected=question.expected[:-1])
        for question, answer in zip(questions, answers, strict=True)
    ]
