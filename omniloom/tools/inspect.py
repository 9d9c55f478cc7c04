"""Looking before a long run: `check`, `preview` and `plan`. They read what training would read and train nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from omniloom.config import Config, ParallelConfig, config_from_words
from omniloom.data.formats import describe_format
from omniloom.data.loader import Loader
from omniloom.data.planner import Planner, check_pack_counts
from omniloom.data.rows import SourceReader, clips_of
from omniloom.data.sources import Sources
from omniloom.run.directory import check_start, find_finished
from omniloom.run.opening import Workshop, choose_degrees
from omniloom.run.rows import describe_files, describe_template, open_rows, open_run, options_of
from omniloom.training.policy import trainable_table
from omniloom.training.schedule import describe_warmup
from omniloom.types import BadSample, Extent, SampleError, StepPlan

CHECKED_ROWS = 200


def check_config(words: Sequence[str], *, nproc: int | None = None) -> None:
    """Open config, checkpoint and data, build the model without memory, decode the first rows, and say what is there.

    With `nproc`, also whether the run can be laid out on so many ranks. Raises: ValueError for whatever would stop it.
    """
    config = config_from_words(words)
    workshop, source, _ = open_run(config)
    run_dir = Path(config.train.run_dir)
    finished = find_finished(run_dir, config)
    if finished is None:
        check_start(run_dir, config, overwrite=False)
    with torch.device("meta"):
        parameters = dict(workshop.build().named_parameters())
    table = trainable_table(workshop.policies(list(parameters)), {name: p.numel() for name, p in parameters.items()})
    print(f"model      {workshop.spec.name}, {sum(row.num_parameters for row in table):,} parameters built, "
          f"{sum(row.num_trainable for row in table):,} trainable")  # fmt: skip
    _print_layout(workshop, nproc)
    print(f"template   {describe_template(workshop, source)}")
    with _loader(config, workshop, source, decode_all=True) as loader:
        measured = loader.measure(range(min(len(source), CHECKED_ROWS)))
    good = {row: extent for row, extent in enumerate(measured) if isinstance(extent, Extent)}
    bad = [item for item in measured if isinstance(item, BadSample)]
    print(f"data       {len(source):,} rows, of the first {len(measured)}: {len(good)} good, {len(bad)} bad")
    for line in describe_files(source, config):
        print(f"           {line}")
    if good:
        _print_sizes(config, [extent.num_tokens for extent in good.values()], len(source))
        _print_unused_sound(workshop, source, good)
    for item in bad[:10]:
        print(f"bad row    {item.file}:{item.line}: {item.field}: {item.reason}")
    if finished is not None:
        print(f"run        {finished}")
    if not good:
        raise ValueError(f"none of the first {len(measured)} rows can be used")


def _print_layout(workshop: Workshop, nproc: int | None) -> None:
    parallel, packs_per_step = workshop.config.parallel, workshop.config.train.packs_per_step
    if nproc is not None:
        degrees = choose_degrees(workshop, nproc)
        warning = check_pack_counts(packs_per_step, degrees.replicate * degrees.shard)
        print(f"layout     {degrees.describe()}" + (f"; warning: {warning}" if warning else ""))
    elif parallel != ParallelConfig():
        print("layout     not checked: say --nproc N for so many ranks")


def _print_sizes(config: Config, lengths: list[int], num_rows: int) -> None:
    """Of the rows that were measured, and what follows for the run."""
    lengths = sorted(lengths)
    pack_tokens, train = config.data.pack_tokens, config.train
    print(f"tokens     shortest {lengths[0]}, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}, "
          f"in packs of {pack_tokens}")  # fmt: skip
    if longer := sum(length > pack_tokens for length in lengths):
        print(f"overlong   {longer} rows are longer than a pack (data.overlong={config.data.overlong})")
    num_tokens = sum(lengths) / len(lengths) * num_rows * (train.epochs or 1.0)
    num_steps = train.steps or math.ceil(num_tokens / (pack_tokens * train.packs_per_step))
    about = "" if train.steps else "about "
    print(f"schedule   {about}{num_steps:,} steps, {train.warmup_steps} of them warm-up")
    if warning := describe_warmup(train.warmup_steps, num_steps):
        print(f"           {warning}")


def _print_unused_sound(workshop: Workshop, source: Sources, good: Mapping[int, Extent]) -> None:
    """Rows with videos whose sound would not be heard, though the model can hear."""
    if "audio" not in workshop.modalities:
        return
    reader = open_rows(workshop, source, cache=False)()
    rows = [
        row
        for row, extent in good.items()
        if any(clip.kind == "video" and not clip.num_mel_frames for clip in extent.clips)
        and any(reader.reader_of(row).read_header(media, kind).has_audio
                for media, kind in clips_of(reader.conversation(row))
                if kind == "video" and not media.use_audio)
    ]  # fmt: skip
    if rows:
        print(f"sound      {len(rows)} of the first {len(good)} rows have videos whose sound is not used; set "
              "data.video.use_audio=true, or use_audio_in_video in the rows")  # fmt: skip


def preview_rows(words: Sequence[str], num_rows: int) -> None:
    """Print how the first rows read as tokens: what trains stands in brackets ⟦⟧, media tokens are counted."""
    config = config_from_words(words)
    workshop, source, _ = open_run(config)
    reader = open_rows(workshop, source, cache=False)()
    for row in range(min(num_rows, len(source))):
        print("── {}:{}".format(*source.locate(row)))
        try:
            raw, file, line = source.read_row(row)
            print(describe_format(raw, options_of(config.data, source.entries[source.find(row)[0]])))
            print(_describe(reader.reader_of(row), raw, file, line))
        except SampleError as error:
            print(f"bad row: {error}")


def show_plan(words: Sequence[str], num_steps: int) -> None:
    """Print the packs of the first steps: samples, tokens, fill, loss tokens, media and cost."""
    config = config_from_words(words)
    workshop, source, _ = open_run(config)
    with _loader(config, workshop, source) as loader:
        planner = Planner(
            rows_per_source=source.sizes,
            config=config,
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


@contextmanager
def _loader(config: Config, workshop: Workshop, source: Sources, *, decode_all: bool = False) -> Iterator[Loader]:
    rows = open_rows(workshop, source, cache=False, decode_all=decode_all)
    loader = Loader(rows, workers=config.data.workers)
    try:
        yield loader
    finally:
        loader.close()


def _describe(reader: SourceReader, raw: dict[str, Any], file: str, line: int) -> str:
    conversation = reader.parse(raw, file, line)
    headers = tuple(reader.read_header(source, kind) for source, kind in clips_of(conversation))
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
