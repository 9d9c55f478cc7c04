"""Looking before a long run: `check`, `preview` and `plan`. They read what training would read and train nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch

from omniloom.config import Config, ConfigError, config_from_words
from omniloom.data.formats import describe_format, row_options
from omniloom.data.loader import Loader
from omniloom.data.planner import Planner, plan_options
from omniloom.data.rows import RowReader
from omniloom.run.opening import Workshop, open_workshop
from omniloom.run.rows import describe_files, describe_template, open_data, open_rows
from omniloom.training.policy import trainable_table
from omniloom.types import SampleError, Source, StepPlan

CHECKED_ROWS = 200


def check_config(words: list[str]) -> None:
    """Open config, checkpoint and data, build the model without memory, decode the first rows, and say what is there.

    Raises: ValueError for whatever would stop a run.
    """
    config, workshop, source = _open(words)
    with torch.device("meta"):
        parameters = dict(workshop.build().named_parameters())
    table = trainable_table(workshop.policies(list(parameters)), {name: p.numel() for name, p in parameters.items()})
    print(f"model      {workshop.spec.name}, {sum(row.num_parameters for row in table):,} parameters built, "
          f"{sum(row.num_trainable for row in table):,} trainable")  # fmt: skip
    print(f"template   {describe_template(workshop, source)}")
    with _loader(config, workshop, source, decode_all=True) as loader:
        rows = range(min(len(source), CHECKED_ROWS))
        measured = loader.measure(rows)
    good = [extent for extent in measured if hasattr(extent, "num_tokens")]
    bad = [item for item in measured if not hasattr(item, "num_tokens")]
    print(f"data       {len(source):,} rows, of the first {len(rows)}: {len(good)} good, {len(bad)} bad")
    for line in describe_files(source, config):
        print(f"           {line}")
    if good:
        lengths = sorted(extent.num_tokens for extent in good)
        print(f"tokens     shortest {lengths[0]}, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}, "
              f"in packs of {config.data.pack_tokens}")  # fmt: skip
        longer = sum(length > config.data.pack_tokens for length in lengths)
        if longer:
            print(f"overlong   {longer} rows are longer than a pack (data.overlong={config.data.overlong})")
    for item in bad[:10]:
        print(f"bad row    {item.file}:{item.line}: {item.field}: {item.reason}")
    if not good:
        raise ValueError(f"none of the first {len(rows)} rows can be used")


def preview_rows(words: list[str], num_rows: int) -> None:
    """Print how the first rows read as tokens: what trains stands in brackets ⟦⟧, media tokens are counted."""
    config, workshop, source = _open(words)
    reader = open_rows(workshop, source, cache=False)()
    for row in range(min(num_rows, len(source))):
        print("── {}:{}".format(*source.locate(row)))
        try:
            raw, file, line = source.read(row)
            print(describe_format(raw, row_options(config.data)))
            print(_describe(reader, raw, file, line))
        except SampleError as error:
            print(f"bad row: {error}")


def show_plan(words: list[str], num_steps: int) -> None:
    """Print the packs of the first steps: samples, tokens, fill, loss tokens, media and cost."""
    config, workshop, source = _open(words)
    with _loader(config, workshop, source) as loader:
        planner = Planner(
            rows_per_source=(len(source),),
            options=plan_options(config),
            measure=loader.measure,
            locate=source.locate,
            data_fingerprint=source.fingerprint,
        )
        heads = {"step": 5, "pack": 5, "samples": 9, "tokens": 8, "fill": 7, "loss tok": 10, "patches": 9, "mel": 8}
        print("".join(f"{head:>{width}}" for head, width in heads.items()) + f"{'cost':>10}")
        for _ in range(num_steps):
            step = planner.next_step()
            if step is None:
                break
            _print_step(step, config.data.pack_tokens)
        planner.close()


def _print_step(step: StepPlan, pack_tokens: int) -> None:
    for number, pack in enumerate(step.packs):
        extents = [sample.extent for sample in pack.samples]
        tokens = sum(extent.num_tokens for extent in extents)
        print(
            f"{step.step + 1:>5}{number:>5}{len(extents):>9}{tokens:>8}{tokens / pack_tokens:>7.1%}"
            f"{sum(extent.num_loss_tokens for extent in extents):>10}{sum(extent.num_patches for extent in extents):>9}"
            f"{sum(extent.num_audio_frames for extent in extents):>8}{sum(extent.cost for extent in extents):>10}"
        )


def _open(words: list[str]) -> tuple[Config, Workshop, Source]:
    config = config_from_words(words)
    wanted = (("model.path", config.model.path), ("data.train", config.data.train))
    if missing := [name for name, value in wanted if not value]:
        raise ConfigError([f"{name}: not set; this verb needs it" for name in missing], "the configuration")
    workshop = open_workshop(config)
    source, _ = open_data(config.data, config.train.seed)
    return config, workshop, source


@contextmanager
def _loader(config: Config, workshop: Workshop, source: Source, *, decode_all: bool = False) -> Iterator[Loader]:
    rows = open_rows(workshop, source, cache=False, decode_all=decode_all)
    loader = Loader(rows, workers=config.data.workers)
    try:
        yield loader
    finally:
        loader.close()


def _describe(reader: RowReader, raw: dict[str, Any], file: str, line: int) -> str:
    conversation = reader.parse(raw, file, line)
    media = [(part.media, part.kind) for turn in conversation.turns for part in turn.parts if part.media is not None]
    headers = tuple(reader.read_header(source, kind) for source, kind in media)
    processor: Any = reader.processor
    clips = processor.geometry(conversation, headers)
    example = processor.encode(conversation, clips, (None,) * len(clips))
    tokens = example.input_ids.tolist()
    targets = [False, *(example.loss_weights[:-1] > 0).tolist()]  # whether each token is predicted somewhere
    pads = processor.media.pad_ids
    keyed = [(trains, token if token in pads else None, token) for token, trains in zip(tokens, targets, strict=True)]
    text = ""
    for (trains, pad), run in groupby(keyed, itemgetter(0, 1)):  # in runs, since a character may be several tokens
        ids = [token for *_, token in run]
        words = processor.tokenizer.decode(ids if pad is None else [pad], skip_special_tokens=False)
        text += f"⟦{words}⟧" if trains else words if pad is None else f"{words}*{len(ids)}"
    return text
