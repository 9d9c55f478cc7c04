"""`omniloom preview CONFIG --page FILE`: rows as the model sees them and packs as the run will fill them, on one page.

Owns what is shown of a row: each token with its weight in the loss and its positions, each clip as decoded and resized,
where its tokens sit. `preview.html.jinja` is the page, `thumbnails` makes the pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from omniloom.config import config_from_words
from omniloom.data.planner import PlanError
from omniloom.data.rows import RowReader, clips_of
from omniloom.data.sources import Sources
from omniloom.processors.chat import ChatProcessor
from omniloom.processors.features import resize
from omniloom.processors.grounding import clip_of, relative_points
from omniloom.run.opening import Workshop
from omniloom.run.rows import open_rows, open_run
from omniloom.tools.charts import percent
from omniloom.tools.preview import planned_steps
from omniloom.tools.report import template
from omniloom.tools.thumbnails import file_player, picture_of, sound_player, spectrogram_of
from omniloom.types import (
    BadSample,
    ClipGeometry,
    Conversation,
    DecodedClip,
    Example,
    MediaSource,
    SampleError,
    StepPlan,
)

MAX_TEXT_TOKENS = 3000  # of a row
MAX_PACKS = 32
MAX_CHARACTER_TOKENS = 8  # that one character may be spelled with
PACK_STEPS = 8


# What the page's template reads, by name. A piece of a row is some tokens of text, with their weight as a share of the
# row's largest, or where tokens of a clip sit: all of them, or those of one time step of a video; only that has a kind.
View = dict[str, Any]


def write_page(words: Sequence[str], page: Path, num_rows: int) -> None:
    """Write the page of the first rows and packs, or of what keeps training from making any.

    Raises: ValueError for a config or checkpoint that training would refuse.
    """
    config = config_from_words(words)
    workshop, source, _ = open_run(config)
    reader = open_rows(workshop, source, cache=False)()
    rows = [_view_row(reader, source, row) for row in range(min(num_rows, len(source)))]
    packs, fault = list[View](), ""
    try:
        packs = _view_packs(workshop, source)
    except PlanError as error:  # what is wrong with rows is to be seen here, too
        fault = str(error)
    text = template("preview.html.jinja").render(
        model=config.model.path, rows=rows, num_rows=len(source), packs=packs, fault=fault
    )
    page.write_text(text, encoding="utf-8")
    print(f"wrote {page}")


# ---------------------------------------------------------------------------------------- rows


def _view_row(rows: RowReader, source: Sources, row: int) -> View:
    where = "{}:{}".format(*source.locate(row))
    extent = rows.measure([row], {}, lambda _: None)[0]
    if isinstance(extent, BadSample):
        return {"where": where, "about": "bad row", "fault": f"{extent.field}: {extent.reason}", "pieces": ()}
    reader, processor = rows.reader_of(row), rows.reader_of(row).processor
    assert isinstance(processor, ChatProcessor)
    try:
        conversation = rows.conversation(row)
        media = [one for one, _ in clips_of(conversation)]
        decoded = [reader.decode(one, clip) for one, clip in zip(media, extent.clips, strict=True)]
        example = processor.encode(conversation, extent.clips, tuple(decoded))
    except SampleError as error:
        return {"where": where, "about": "bad row", "fault": str(error), "pieces": ()}
    about = f"{extent.num_tokens:,} tokens, {extent.num_loss_tokens:,} with a loss, {extent.cost / 1000:,.3g} GFLOP"
    view = _Clips(processor, conversation, media, extent.clips, decoded, example)
    return {"where": where, "about": about, "fault": None, "pieces": [*_view_tokens(processor, example, view)]}


def _view_tokens(processor: ChatProcessor, example: Example, clips: _Clips) -> Iterator[View]:
    """Tokens of text in as many pieces as there are characters, and each run of a clip's tokens as one."""
    ids, weights = example.input_ids.tolist(), [0.0, *example.loss_weights[:-1].tolist()]
    most, num_shown = max(weights), 0
    for owner, run in groupby(range(len(ids)), lambda token: int(clips.owner[token])):
        places = list(run)
        if owner >= 0:
            yield clips.view(owner, places)
            continue
        while places and num_shown < MAX_TEXT_TOKENS:
            for length in range(1, min(MAX_CHARACTER_TOKENS, len(places)) + 1):
                text = processor.tokenizer.decode([ids[at] for at in places[:length]], skip_special_tokens=False)
                if not text.endswith("\ufffd"):
                    break
            first, places, num_shown = places[0], places[length:], num_shown + length
            position = " ".join(str(int(axis)) for axis in example.position_ids[:, first])
            about = f"token {first} · id {ids[first]} · position {position} · weight {weights[first]:g}"
            yield {"text": text, "weight": weights[first] / most if most else 0.0, "about": about}
    if (left := int((clips.owner < 0).sum()) - num_shown) > 0:
        yield {"text": f" … {left:,} more tokens of text", "weight": 0.0, "about": "not shown"}


class _Clips:
    """The clips of one row: which token is whose, and what is shown where a run of them stands."""

    def __init__(
        self,
        processor: ChatProcessor,
        conversation: Conversation,
        media: Sequence[MediaSource],
        clips: Sequence[ClipGeometry],
        decoded: Sequence[DecodedClip],
        example: Example,
    ) -> None:
        self._processor, self._media, self._clips, self._decoded = processor, media, clips, decoded
        self._example = example
        self._boxes = [box for turn in conversation.turns for part in turn.parts for box in part.boxes]
        self._runs_shown: Counter[int] = Counter()
        self.owner = np.full(len(example.input_ids), -1)  # the clip that each token stands for, -1 for text
        seen = [number for number, clip in enumerate(clips) if clip.grid_thw]
        heard = [number for number, clip in enumerate(clips) if clip.num_mel_frames]
        runs = [*zip(seen, (feature.token_index for feature in example.vision), strict=True)]
        runs += zip(heard, (feature.token_index for feature in example.audio), strict=True)
        for number, token_index in runs:
            self.owner[token_index.numpy()] = number

    def view(self, number: int, places: Sequence[int]) -> View:
        clip, decoded = self._clips[number], self._decoded[number]
        run = self._runs_shown[number]
        self._runs_shown[number] += 1
        first, last = ([int(axis) for axis in self._example.position_ids[:, at]] for at in (places[0], places[-1]))
        about = f"tokens {places[0]} to {places[-1]} · positions {first} to {last}"
        if clip.grid_thw:
            patch = self._processor.towers.vision.patch_size
            about += f" · {clip.grid_thw[2] * patch} x {clip.grid_thw[1] * patch} pixels"
        rate, waveform = self._processor.towers.settings.sampling_rate, decoded.waveform if run == 0 else None
        path = self._media[number].path
        return {
            "kind": clip.kind,
            "about": about,
            "num_tokens": len(places),
            "picture": self._picture(clip, decoded, run, len(places)),
            "sound": None if waveform is None else spectrogram_of(waveform),
            "audio": None if waveform is None else sound_player(waveform, rate),
            "video": file_player(Path(path)) if clip.kind == "video" and path is not None and run == 0 else None,
            "boxes": [*self._view_boxes(number)] if self._is_one_frame(clip, len(places)) else [],
        }

    def _picture(self, clip: ClipGeometry, decoded: DecodedClip, run: int, num_tokens: int) -> str | None:
        """The frames that the tokens stand for, in the size that the tower sees."""
        if clip.grid_thw is None or decoded.pixels is None:
            return None
        frames = decoded.pixels[None] if decoded.pixels.ndim == 3 else decoded.pixels
        _, rows, columns = clip.grid_thw
        vision = self._processor.towers.vision
        if self._is_one_frame(clip, num_tokens):
            frames = frames[run * vision.temporal_patch_size :][:1]
        return picture_of([resize(frame, rows * vision.patch_size, columns * vision.patch_size) for frame in frames])

    def _is_one_frame(self, clip: ClipGeometry, num_tokens: int) -> bool:
        """Whether so many tokens stand for an image, or one time step of a video."""
        return clip.grid_thw is not None and self._processor.towers.num_merged((1, *clip.grid_thw[1:])) == num_tokens

    def _view_boxes(self, number: int) -> Iterator[View]:
        for box in self._boxes:
            if clip_of(box, self._clips) == number:
                x, y, *corner = (100 * share for share in relative_points(box, self._clips))
                right, bottom = corner[:2] if len(corner) >= 2 else (x, y)
                yield {"left": x, "top": y, "width": right - x, "height": bottom - y}  # percent of the picture


# ---------------------------------------------------------------------------------------- packs


def _view_packs(workshop: Workshop, source: Sources) -> list[View]:
    with planned_steps(workshop, source) as steps:
        packs = [(step, pack) for step in islice(steps, PACK_STEPS) for pack in step.packs][:MAX_PACKS]
    heaviest = max((sum(s.extent.cost for s in pack.samples) for _, pack in packs), default=0)
    return [_view_pack(step, pack, workshop.config.data.pack_tokens, heaviest, source) for step, pack in packs]


def _view_pack(step: StepPlan, pack: Any, pack_tokens: int, heaviest: int, source: Sources) -> View:
    bars = []
    for sample in pack.samples:
        extent = sample.extent
        kinds = {clip.kind for clip in extent.clips}
        tone = next((kind for kind in ("video", "image", "audio") if kind in kinds), "text")
        where = "{}:{}".format(*source.locate(sample.row))
        about = f"{where} · {extent.num_tokens:,} tokens · {extent.num_loss_tokens:,} with a loss · {tone}"
        bars.append({"share": 100 * extent.num_tokens / pack_tokens, "tone": tone, "about": about})
    cost = sum(sample.extent.cost for sample in pack.samples)
    return {
        "name": f"{step.step + 1}.{pack.index % len(step.packs) + 1}",
        "samples": bars,
        "fill": percent(sum(bar["share"] for bar in bars) / 100),
        "cost": 100 * cost / max(1, heaviest),  # percent of the heaviest
        "about": f"{len(bars)} samples · {cost / 1000:,.4g} GFLOP forward",
    }
