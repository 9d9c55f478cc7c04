"""From row numbers to extents, and from a planned pack to tensors: what a loader's worker does.

Joins source, format, media decoder and the family's processor, all handed in; owns what happens when one of them
refuses a row. Knows no process, no rank and no plan beyond the pack it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from omniloom.data.collate import FailedSlot, check_example, collate
from omniloom.data.extent_cache import ExtentCache, extent_key
from omniloom.data.media_cache import MediaCache
from omniloom.data.sources import Sources
from omniloom.data.speech_batch import add_speech
from omniloom.types import (
    BadSample,
    ClipGeometry,
    Conversation,
    DecodedClip,
    Example,
    Extent,
    LoadedPack,
    MediaHeader,
    MediaKind,
    MediaSource,
    MissingFile,
    PackPlan,
    PackStats,
    PlannedSample,
    Processor,
    Row,
    SampleError,
)

Made = TypeVar("Made")


class RowFault(RuntimeError):
    """A fault of this package that a row brought to light. It ends the run: filed as a bad row, it would be lost."""


@dataclass(frozen=True, kw_only=True)
class SourceReader:
    """How the rows of one source are read. `fingerprint` stands for processor and options in the cache's keys."""

    parse: Callable[[Row, str, int], Conversation]
    read_header: Callable[[MediaSource, MediaKind], MediaHeader]
    decode: Callable[[MediaSource, ClipGeometry], DecodedClip]
    processor: Processor
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Measures and loads rows; built once per worker process by a picklable factory.

    `report(row)` is called before each row, so that a row that kills the process is known by name; rows in `skip`
    (with the reason) are bad without being touched. With `decode_all` a row is good only once it has been decoded and
    encoded as for training: headers do not tell of pictures that break off.
    """

    source: Sources
    readers: tuple[SourceReader, ...]  # one for each source
    pack_tokens: int
    shrink: bool = False  # data.overlong: shrink
    cache: ExtentCache | None = None
    decode_all: bool = False
    media: MediaCache | None = None  # of clips decoded and resized

    @property
    def processor(self) -> Processor:
        """That of the first source: tokenizer and towers are the same for all."""
        return self.readers[0].processor

    def reader_of(self, row: int) -> SourceReader:
        return self.readers[self.source.find(row)[0]]

    def conversation(self, row: int) -> Conversation:
        """Raises: SampleError."""
        return self.reader_of(row).parse(*self.source.read_row(row))

    def measure(
        self, rows: Sequence[int], skip: Mapping[int, str], report: Callable[[int], None]
    ) -> list[Extent | BadSample]:
        found: list[Extent | BadSample] = []
        fresh: dict[str, Extent] = {}
        for row in rows:
            report(row)
            found.append(self._attempt(row, skip, partial(self._measure_row, row, fresh)))
        if self.cache is not None:
            self.cache.put(fresh)
        return found

    def load(
        self,
        plan: PackPlan,
        decode_clips: frozenset[tuple[int, int]] | None,
        skip: Mapping[int, str],
        report: Callable[[int], None],
    ) -> LoadedPack:
        """Tensors of one pack; of its media only the clips in `decode_clips` (sample, clip) are decoded, or all."""
        examples: list[Example | FailedSlot] = []
        bad: list[BadSample] = []
        for position, sample in enumerate(plan.samples):
            report(sample.row)
            made = self._attempt(sample.row, skip, partial(self.encode_row, sample, position, decode_clips))
            if isinstance(made, Example):
                examples.append(made)
            else:
                bad.append(replace(made, epoch=sample.epoch))
                examples.append(FailedSlot(id=f"{made.file}:{made.line}", num_tokens=sample.extent.num_tokens))
        batch = collate(
            examples,
            pack_tokens=self.pack_tokens,
            weight_scales=[sample.weight_scale for sample in plan.samples],
            collate_vision=self.processor.collate_vision,
            collate_audio=self.processor.collate_audio,
        )
        if groups := self.processor.num_code_groups:
            batch = add_speech(batch, examples, [sample.speech_scale for sample in plan.samples], groups)
        loaded = [
            sample for sample, example in zip(plan.samples, examples, strict=True) if isinstance(example, Example)
        ]
        return LoadedPack(index=plan.index, batch=batch, stats=count_samples(loaded), bad=tuple(bad))

    def _attempt(self, row: int, skip: Mapping[int, str], work: Callable[[], Made]) -> Made | BadSample:
        """What `work` makes of a row, or what is wrong with that. Raises: RowFault for what is no fault of the row."""
        try:
            if row in skip:
                raise SampleError("row", skip[row])
            return work()
        except SampleError as error:
            file, line = self.source.locate(row)
            missing = error.path if isinstance(error, MissingFile) else ""
            return BadSample(file=file, line=line, field=error.field, reason=error.reason, row=row, missing=missing)
        except (ValueError, OSError, EOFError, MemoryError) as error:
            file, line = self.source.locate(row)
            raise RowFault(
                f"{file}:{line}: {type(error).__name__}: {error}; this is a fault of omniloom, please report it. "
                "Without this row the run goes on"
            ) from error

    def _measure_row(self, row: int, fresh: dict[str, Extent]) -> Extent:
        extent = self._known_or_measured(row, fresh)
        if self.decode_all:
            self.encode_row(PlannedSample(row=row, epoch=0, extent=extent, weight_scale=1.0))
        return extent

    def _known_or_measured(self, row: int, fresh: dict[str, Extent]) -> Extent:
        reader, conversation = self.reader_of(row), self.conversation(row)
        fingerprint = f"{reader.fingerprint}, shrunk to {self.pack_tokens}" if self.shrink else reader.fingerprint
        key = extent_key(conversation, fingerprint) if self.cache is not None else None
        if self.cache is not None and key is not None and (known := self.cache.get(key)) is not None:
            return known
        headers = tuple(reader.read_header(media, kind) for media, kind in clips_of(conversation))
        extent = reader.processor.measure(conversation, headers)
        if self.shrink and extent.num_tokens > self.pack_tokens:
            clips = reader.processor.shrink(conversation, headers, self.pack_tokens)
            if clips is not None:
                extent = reader.processor.measure(conversation, headers, clips)
        if key is not None:
            fresh[key] = extent
        return extent

    def encode_row(
        self, sample: PlannedSample, position: int = 0, decode_clips: frozenset[tuple[int, int]] | None = None
    ) -> Example:
        """One row as tensors: of its clips, as the sample at `position` of its pack, those in `decode_clips`, or all.

        Raises: SampleError.
        """
        reader, conversation = self.reader_of(sample.row), self.conversation(sample.row)
        media, clips = clips_of(conversation), sample.extent.clips
        if len(media) != len(clips):
            raise SampleError(
                "media", f"the row has {len(media)} clips, {len(clips)} were planned; did the file change?"
            )
        decoded = tuple(
            self._decode(reader, one, clip) if decode_clips is None or (position, number) in decode_clips else None
            for number, ((one, _), clip) in enumerate(zip(media, clips, strict=True))
        )
        example = reader.processor.encode(conversation, clips, decoded)
        fault = check_example(example, sample.extent.num_tokens)
        if fault is not None:
            raise SampleError("num_tokens", fault)
        return example

    def _decode(self, reader: SourceReader, source: MediaSource, clip: ClipGeometry) -> DecodedClip:
        key = None if self.media is None else self.media.key(source, clip, reader.fingerprint)
        if self.media is None or key is None:
            return reader.decode(source, clip)
        found = self.media.get(key)
        if found is None:
            found = reader.processor.resized(clip, reader.decode(source, clip))
            self.media.put(key, found)
        return found


def count_samples(samples: Sequence[PlannedSample]) -> PackStats:
    """What the metrics say of samples that were loaded, from their extents."""
    clips = [clip for sample in samples for clip in sample.extent.clips]
    return PackStats(
        num_tokens=sum(sample.extent.num_tokens for sample in samples),
        num_loss_tokens=sum(sample.extent.num_loss_tokens for sample in samples),
        num_samples=len(samples),
        num_images=sum(clip.kind == "image" for clip in clips),
        video_frames=sum(len(clip.frame_indices) for clip in clips),
        audio_seconds=sum(clip.sound_seconds for clip in clips),
    )


def clips_of(conversation: Conversation) -> list[tuple[MediaSource, Any]]:
    """The clips of a conversation in order, each with its kind."""
    return [(part.media, part.kind) for turn in conversation.turns for part in turn.parts if part.media is not None]
