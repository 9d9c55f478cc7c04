"""The data side of a config: sources, hold-out, and the picklable factory of a row reader for loader workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omniloom.config import Config, ConfigError, DataConfig, as_source, options_of
from omniloom.data.agreement import PlanningRanks
from omniloom.data.extent_cache import ExtentCache, fingerprint_of
from omniloom.data.formats import describe_format, parse_row
from omniloom.data.loader import Loader
from omniloom.data.media_cache import MediaCache
from omniloom.data.media_decode import decode_clip
from omniloom.data.media_files import MediaLimits
from omniloom.data.media_headers import read_header
from omniloom.data.planner import Measure, Planner
from omniloom.data.row_streams import is_stream
from omniloom.data.rows import RowReader, SourceReader, clips_of
from omniloom.data.sources import Sources, open_sources
from omniloom.data.speech import with_codes
from omniloom.data.spilled_rows import STREAM_ROWS, StreamFeed, StreamRows
from omniloom.data.stream import BadSampleFile, StepStream
from omniloom.families.registry import spec_named
from omniloom.parallel.encoder_pool import EncoderPool, assign_clips
from omniloom.parallel.mesh import Layout
from omniloom.parallel.staging import stage
from omniloom.run.answer_metrics import ANSWER_METRICS, load_metrics
from omniloom.run.opening import Workshop, open_workshop
from omniloom.run.results import NO_ADAPTER
from omniloom.training.trackers import check_trackers
from omniloom.types import Conversation, PackPlan, Row, SampleError

DESCRIBED_FILES = 8
SILENT_RATE = 16000  # Hz at which sound is counted for a model without an audio tower
# What verbs that train nothing take: for a prompt, and beside it for a file of rows.
PROMPT_KEYS = (
    *("data.template", "data.template_variables.*", "data.system", "data.enable_thinking", "data.allow_urls"),
    *("data.image.*", "data.video.*", "data.audio.*"),
)
ROW_KEYS = (
    *("data.format", "data.attr.*", "data.max_samples", "data.media_dir", "data.allow_outside_media_dir"),
    *("data.unplaced_media", "data.scratch"),
)
# Of `data`, what does not change the sample that a row becomes: the planner itself holds on to which rows there are and
# how they are packed; the rest is where files lie, what may be opened, speed, and evaluation.
_OTHER_OPTIONS = frozenset(
    f"data.{name}"
    for name in (
        *("train", "eval", "split", "max_samples", "exclude", "pack_tokens", "window", "overlong", "max_bad_fraction"),
        *("shuffle", "media_dir", "allow_outside_media_dir", "allow_urls", "workers", "prefetch_packs"),
        *("cache", "cache_gigabytes", "cache_dir", "scratch", "stream_shards"),
    )
)


def open_run(config: Config, *, spill: Path | None = None) -> tuple[Workshop, Sources, Sources | None]:
    """What a run begins with: the checkpoint, and the rows to train and to evaluate on.

    Streams are read as training goes on, and kept in the folder `spill`; without it they are read whole.

    Raises: ValueError for whatever is wrong with config, checkpoint or data and can be said without ranks.
    """
    wanted = (
        *(("model.path", config.model.path), ("data.train", config.data.train)),
        ("train.run_dir", config.train.run_dir),
    )
    if missing := [name for name, value in wanted if not value]:
        raise ConfigError([f"{name}: not set; every run needs it" for name in missing], "the configuration")
    if (Path(config.train.run_dir) / "config.json").exists():  # it would be both, and `chat DIR` either
        fault = f"train.run_dir: {config.train.run_dir} is a model's directory (it has config.json); set another one"
        raise ConfigError([fault], "the configuration")
    workshop = open_workshop(config)
    if workshop.cut and workshop.adapters and not config.checkpoint.export:
        raise ValueError(
            f"checkpoint.export: false would leave nothing of this run, since {NO_ADAPTER}; set it to true"
        )
    if faults := _stream_faults(config):
        raise ConfigError(faults, "the configuration")
    train_rows, eval_rows = open_data(config.data, config.train.seed, spill=spill)
    check_trackers(config.log)
    load_metrics(config.train.eval_metrics)  # what is wrong with them is said now
    if faults := _evaluation_faults(config, has_rows=eval_rows is not None):
        raise ConfigError(faults, "the configuration")
    return workshop, train_rows, eval_rows


def _evaluation_faults(config: Config, *, has_rows: bool) -> list[str]:
    """What is asked of evaluations that cannot be had."""
    train, best = config.train, config.checkpoint.best
    asked = [f"train.{name}" for name in ("eval_every", "eval_answers", "eval_metrics") if getattr(train, name)]
    faults = [f"{key}: nothing is held out to evaluate; set data.eval or data.split" for key in asked if not has_rows]
    if train.patience is not None and best is None:
        faults.append("train.patience: no figure to wait for; set checkpoint.best, e.g. to eval_loss")
    if best is not None and not train.eval_every:
        faults.append(f"checkpoint.best: {best}: nothing is evaluated on the way; set train.eval_every")
    of_answers = [f"checkpoint.best: {best}"] if best in ANSWER_METRICS else []
    of_answers += ["train.eval_metrics"] if train.eval_metrics else []
    if not train.eval_answers:
        faults += [f"{key}: no rows are answered; set train.eval_answers to how many" for key in of_answers]
    return faults


def _stream_faults(config: Config) -> list[str]:
    """What a run cannot do with rows whose number is not known, and that are read once."""
    entries = [as_source(entry) for entry in config.data.train]
    names = {number: entry.path for number, entry in enumerate(entries) if is_stream(entry)}
    faults = [f"data.eval: {path} is a stream, which is read once; save it to a file"
              for path in (entry.path for entry in map(as_source, config.data.eval) if is_stream(entry))]  # fmt: skip
    if not names:
        return faults
    if config.train.steps is None:
        first = next(iter(names.values()))
        faults.append(f"train.steps: not set, and {first} is a stream whose length is not known; set it")
    for number, path in names.items():
        if options_of(config.data, entries[number]).split and not config.data.eval:
            faults.append(f"data.split: nothing can be held out of the stream {path}; set it to 0 there, or data.eval")
    if len(names) < len(entries) and not all(entry.weight for entry in entries):
        faults.append("data.train: beside a stream, whose length is not known, every data set needs a weight")
    return faults


def open_data(config: DataConfig, seed: int, *, spill: Path | None = None) -> tuple[Sources, Sources | None]:
    """Training and evaluation rows. `split` holds out the same rows on every rank and on every resumption.

    Raises: ValueError for files that cannot be read and for a split that leaves nothing on one side.
    """
    rows = open_sources(config.train, config, spill=spill)
    eval_rows = open_sources(config.eval, config, part=None) if config.eval else None
    if config.exclude is not None:
        rows = rows.without(config.exclude)
        eval_rows = eval_rows and eval_rows.without(config.exclude)
    shares = [options_of(config, entry).split for entry in rows.entries]
    if eval_rows is not None or not any(shares):
        return rows, eval_rows
    kept, held_out = rows.split(shares, seed)
    if not (len(kept) and len(held_out)):
        said = ", ".join(f"{share:g} of {size}" for share, size in zip(shares, rows.sizes, strict=True))
        raise ValueError(f"data.split: {said} rows holds out {len(held_out)}; both sides need at least one")
    return kept, held_out


def describe_files(source: Sources, config: Config) -> list[str]:
    """How the rows of each data file are read, by its first one: a line each for the log."""
    first_rows = source.first_rows()
    lines = []
    for index in first_rows[:DESCRIBED_FILES]:
        file, _ = source.locate(index)
        part = source.parts[source.find(index)[0]]
        if isinstance(part, StreamRows) and len(part) == STREAM_ROWS:  # read when they are needed
            lines.append(f"{part.stream.path}: a stream, {part.stream.num_readers} of its readers in turns")
            continue
        try:
            options = options_of(config.data, source.entries[source.find(index)[0]])
            lines.append(f"{file}: {describe_format(source.read_row(index)[0], options)}")
        except SampleError as error:
            lines.append(f"{file}: its first row is bad: {error}")
    more = len(first_rows) - len(lines)
    return [*lines, f"and {more} more"] if more else lines


def describe_template(workshop: Workshop, source: Sources) -> str:
    """The chat template that rows are rendered with, and what rows may hold that it does not write."""
    processor: Any = open_rows(workshop, source, cache=False)().processor
    template = processor.renderer.template
    lacking = f" (writes no {', no '.join(template.leaves_out)})" if template.leaves_out else ""
    return f"{template.where}{lacking}"


@dataclass(frozen=True, kw_only=True)
class OpenRows:
    """Builds a `RowReader` in whatever process calls it. Holds only what pickles cheaply."""

    source: Sources
    options: tuple[DataConfig, ...]  # of each source
    family_name: str
    family: Any
    model_dir: Path
    modalities: tuple[str, ...]
    cache_dir: Path | None
    decode_all: bool = False  # rows are measured only after they were decoded, for `check`
    needs_answer: bool = True
    last_answer_only: bool = False  # whatever weights and options say: for rows that the model is to answer

    def __call__(self) -> RowReader:
        data = self.options[0]
        wanted = list(zip(self.options, [entry.loss_weight for entry in self.source.entries] or [1.0], strict=True))
        distinct = [one for number, one in enumerate(wanted) if one not in wanted[:number]]
        readers = [self._read_with(*one) for one in distinct]
        return RowReader(
            source=self.source,
            readers=tuple(readers[distinct.index(one)] for one in wanted),
            pack_tokens=data.pack_tokens,
            shrink=data.overlong == "shrink",
            cache=ExtentCache(self.cache_dir) if self.cache_dir is not None else None,
            decode_all=self.decode_all,
            media=MediaCache(data.cache, 1e9 * data.cache_gigabytes) if data.cache is not None else None,
        )

    def _read_with(self, data: DataConfig, loss_weight: float) -> SourceReader:
        planned = _changed(data, DataConfig())
        if self.last_answer_only:
            data = replace(data, train_on_prompt=False, last_turn_only=True)
        processor = spec_named(self.family_name).make_processor(self.model_dir, self.family, data)
        limits = MediaLimits(data=data, sampling_rate=processor.towers.settings.sampling_rate or SILENT_RATE)
        return SourceReader(
            parse=partial(self._parse, options=data, loss_weight=loss_weight),
            read_header=partial(read_header, limits=limits),
            decode=partial(decode_clip, limits=limits),
            processor=processor,
            fingerprint=fingerprint_of(self.model_dir, self.family, self.modalities, planned),
        )

    def _parse(self, row: Row, file: str, line: int, *, options: DataConfig, loss_weight: float) -> Conversation:
        conversation = parse_row(row, file=file, line=line, options=options, needs_answer=self.needs_answer)
        for media, kind in clips_of(conversation):
            for wanted in (kind, "audio") if media.use_audio else (kind,):
                if wanted not in self.modalities:
                    has = ", ".join(self.modalities)
                    raise SampleError(f"{wanted}s", f"the row has {wanted}, this run only {has} (model.modalities)")
        if self.last_answer_only:
            return _without_weights(conversation)
        if self.family.talker is not None:
            conversation = with_codes(conversation, self.family.talker.tokens.of_recordings)
        elif any(turn.speech for turn in conversation.turns):  # a run that makes none
            turns = tuple(replace(turn, speech=None) for turn in conversation.turns)
            conversation = replace(conversation, turns=turns)
        return replace(conversation, weight=conversation.weight * loss_weight)


def _without_weights(conversation: Conversation) -> Conversation:
    turns = (
        replace(turn, weight=None, speech=None, parts=tuple(replace(part, weight=None) for part in turn.parts))
        for turn in conversation.turns
    )
    return replace(conversation, turns=tuple(turns), weight=1.0)


def planned_options(workshop: Workshop) -> dict[str, Any]:
    """The options that decide what a row becomes, as JSON by their names in the config, without those at defaults.

    For the planner's state: a resumption that reads the same rows in another way would train on another plan. Neither
    code nor checkpoint files count, so that an upgrade does not end a run.
    """
    data = workshop.config.data
    found = _changed(data, DataConfig())
    for index, entry in enumerate(data.train):
        found |= _changed(options_of(data, entry), data, f"data.train.{index}")
        if (loss_weight := as_source(entry).loss_weight) != 1.0:
            found[f"data.train.{index}.loss_weight"] = loss_weight
    spoken = {"policy.talker": "trains"} if workshop.family.talker is not None else {}
    return {**found, **spoken, "model.modalities": list(workshop.modalities)}


def _changed(section: Any, usual: Any, path: str = "data", name: str = "data") -> dict[str, Any]:
    """What of a section differs from another and changes samples, by its path."""
    found: dict[str, Any] = {}
    for field in fields(section):
        value, other = getattr(section, field.name), getattr(usual, field.name)
        if is_dataclass(value):
            found |= _changed(value, other, f"{path}.{field.name}", f"{name}.{field.name}")
        elif value != other and f"{name}.{field.name}" not in _OTHER_OPTIONS:
            found[f"{path}.{field.name}"] = value
    return found


def open_rows(workshop: Workshop, source: Sources, *, cache: bool = True, decode_all: bool = False) -> OpenRows:
    """The factory of readers of some sources. Without `cache`, extents are kept only where `data.cache_dir` says.

    Raises: ValueError for options that contradict each other.
    """
    config, data = workshop.config, workshop.config.data
    cache_dir = Path(data.cache_dir) if data.cache_dir is not None else None
    if cache_dir is None and cache:
        cache_dir = Path(config.train.run_dir) / "cache"
    return OpenRows(
        source=source,
        options=tuple(options_of(data, entry) for entry in source.entries) or (data,),
        family_name=workshop.spec.name,
        family=workshop.family,
        model_dir=workshop.checkpoint.directory,
        modalities=workshop.modalities,
        cache_dir=cache_dir,
        decode_all=decode_all,
    )


def open_planner(workshop: Workshop, rows: Sources, measure: Measure, layout: Layout | None = None) -> Planner:
    """The planner of a run's training rows: of all ranks of a layout together, or of this process alone."""
    ranks = PlanningRanks()
    if layout is not None:
        exchange = partial(layout.exchange, channel="planning")
        ranks = PlanningRanks(exchange=exchange, rank=layout.rank, world_size=layout.world_size)
    return Planner(
        rows_per_source=rows.sizes,
        config=workshop.config,
        measure=measure,
        locate=rows.locate,
        feed=StreamFeed(
            rows.parts,
            rank=ranks.rank,
            world_size=ranks.world_size,
            kept_checkpoints=workshop.config.checkpoint.keep,
        ),
        data_fingerprint=rows.fingerprint,
        row_options=planned_options(workshop),
        entries=rows.entries,
        ranks=ranks,
    )


def open_stream(
    workshop: Workshop,
    planner: Planner,
    loader: Loader,
    layout: Layout,
    pool: EncoderPool,
    bad_samples: BadSampleFile | None,
) -> StepStream:
    """The steps of a run as this rank loads them."""
    return StepStream(
        planner,
        loader,
        data_rank=layout.data_rank,
        data_world=layout.data_world,
        keep_empty=layout.degrees.pipeline > 1,  # whose order of passes is made for the whole number
        exchange=lambda value: layout.exchange(value, "agreement"),
        prefetch_packs=workshop.config.data.prefetch_packs,
        bad_samples=bad_samples,
        clips_of=lambda pack: clips_of_rank(pack, layout),
        measure=(lambda _: None) if pool.is_alone else pool.measure,
        stage=lambda packs, measured: [
            stage(pack, layout.device, workshop.compute_dtype)
            for pack in (packs if pool.is_alone else pool.route(packs, measured))
        ],
    )


def options_by_row(data: DataConfig, rows: Sources) -> Callable[[int], DataConfig]:
    """Of a row's number the data section as it holds for its data set."""
    held = [options_of(data, entry) for entry in rows.entries]
    return lambda row: held[rows.find(row)[0]]


def clips_of_rank(pack: PackPlan, layout: Layout) -> frozenset[tuple[int, int]]:
    """The (sample, clip) pairs of a pack that this rank decodes, where ranks share packs."""
    return assign_clips(pack, layout.group_size)[layout.group_rank]
