"""Looking before a long run: `preview` and `plan`. They read what training would read and train nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

from omniloom.config import config_from_words, options_of
from omniloom.data.formats import describe_format
from omniloom.data.loader import Loader
from omniloom.data.rows import SourceReader, clips_of
from omniloom.data.sources import Sources
from omniloom.run.opening import Workshop
from omniloom.run.rows import open_planner, open_rows, open_run
from omniloom.types import SampleError, StepPlan


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
    workshop, source, _ = open_run(config_from_words(words))
    with planned_steps(workshop, source) as steps:
        heads = {"step": 5, "pack": 5, "samples": 9, "tokens": 8, "fill": 7, "loss tok": 10, "patches": 9, "mel": 8}
        print("".join(f"{head:>{width}}" for head, width in heads.items()) + f"{'cost':>10}")
        for step in islice(steps, num_steps):
            _print_step(step, workshop.config.data.pack_tokens)


@contextmanager
def planned_steps(workshop: Workshop, source: Sources) -> Iterator[Iterator[StepPlan]]:
    """The steps that a run would take, as they are planned."""
    with closing(Loader(open_rows(workshop, source, cache=False), workers=workshop.config.data.workers)) as loader:
        planner = open_planner(workshop, source, loader.measure)
        yield iter(planner.next_step, None)
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
