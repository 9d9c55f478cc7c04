"""`omniloom check`: whatever `train` would refuse, and every row and clip, looked at before the run.

Opens what a run opens, in its order and with its words, without weights and ranks; then measures, decodes and encodes
all rows in the loader's workers, and packs them as the run will. Owns what it finds odd in rows that can be trained.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from omniloom.checkpoint.stored import find_latest
from omniloom.config import Config, ParallelConfig, config_from_words
from omniloom.data.extent_cache import extent_key
from omniloom.data.loader import Loader
from omniloom.data.planner import check_pack_counts
from omniloom.data.row_media import KINDS, PLACEHOLDER
from omniloom.data.rows import clips_of
from omniloom.data.sources import Sources
from omniloom.parallel.degrees import Degrees
from omniloom.parallel.device import choose_device, computes_bf16, total_memory_bytes
from omniloom.processors.grounding import relative_points
from omniloom.run.description import describe_kernels
from omniloom.run.directory import check_start, find_finished
from omniloom.run.footprint import ModelSizes
from omniloom.run.layouts import FREE_SHARE, choose_degrees
from omniloom.run.opening import Workshop
from omniloom.run.rows import OpenRows, describe_files, describe_template, open_planner, open_rows, open_run
from omniloom.run.step_time import Machine
from omniloom.tools.charts import duration, fmt, percent
from omniloom.tools.check_speech import describe_speech
from omniloom.tools.report import reason_kind
from omniloom.training.policy import trainable_table
from omniloom.training.schedule import describe_warmup
from omniloom.types import BadSample, ClipGeometry, Conversation, Extent, StepPlan

CHUNK_ROWS = 256  # between two strokes of the progress bar
COMPARED_ROWS = 8  # whose codes are made sound again
TURN_TOKENS = re.compile(r"<\|(im_start|im_end|endoftext)\|>")  # that the families' templates write themselves
EXAMPLES = 3  # of each kind of fault
MUCH_DROPPED = 0.1  # share of a set's rows
ODD = {  # what rows may hold, and seldom should
    "sound": "have videos whose sound is not used; set data.video.use_audio=true, or use_audio_in_video in the rows",
    "answer": "have a placeholder of media in an answer, which the model would learn to write; move it to the question",
    "tokens": "have tokens that end or begin a turn in their words, where the model reads them as such; remove them",
    "boxes": "have boxes outside their image or frame, or corners in the wrong order; is objects.bbox_type right?",
    "again": "say the same as an earlier row, media included; remove one, or write it into data.exclude",
}


@dataclass(frozen=True, kw_only=True)
class CheckedRow:
    """A row as it was found; its extent without clips, so that millions can be held."""

    extent: Extent | BadSample
    modality: str = "bad"
    clips: tuple[int, int, float] = (0, 0, 0.0)  # images, video frames, seconds of sound
    is_spoken: bool = False  # in a run that trains a talker
    has_recording: bool = False  # to compare its codes with
    content: str | None = None  # hash of what it says and of its media's sizes and times
    odd: tuple[str, ...] = ()  # keys of ODD


class CheckingReader:
    """In place of a loader's `RowReader`: measures, decodes and encodes a row, and looks at what it holds."""

    def __init__(self, rows: OpenRows) -> None:
        self._rows = rows()
        self._hears = "audio" in rows.modalities

    def measure(self, rows: Sequence[int], skip: Mapping[int, str], report: object) -> list[CheckedRow]:
        measured = self._rows.measure(rows, skip, report)  # type: ignore[arg-type]
        return [
            CheckedRow(extent=extent) if isinstance(extent, BadSample) else self._look(row, extent)
            for row, extent in zip(rows, measured, strict=True)
        ]

    def _look(self, row: int, extent: Extent) -> CheckedRow:
        conversation, clips = self._rows.conversation(row), extent.clips
        kinds = {clip.kind for clip in clips} | {"audio" for clip in clips if clip.num_mel_frames}
        spoken = [turn.speech for turn in conversation.turns if turn.speech is not None]
        odd = {
            "answer": _answers_with_media(conversation),
            "sound": self._leaves_sound(row, conversation, extent),
            "tokens": any(TURN_TOKENS.search(part.text) for turn in conversation.turns for part in turn.parts),
            "boxes": _has_odd_boxes(conversation, clips),
        }
        return CheckedRow(
            extent=replace(extent, clips=()),
            modality="+".join(kind for kind in KINDS if kind in kinds) or "text",
            clips=(
                sum(clip.kind == "image" for clip in clips),
                sum(len(clip.frame_indices) for clip in clips),
                sum(clip.sound_seconds for clip in clips),
            ),
            is_spoken=bool(spoken),
            has_recording=any(speech.recording for speech in spoken),
            content=extent_key(conversation, ""),
            odd=tuple(key for key, found in odd.items() if found),
        )

    def _leaves_sound(self, row: int, conversation: Conversation, extent: Extent) -> bool:
        """Whether a video's sound would not be heard, though the model can hear."""
        if not self._hears or all(clip.kind != "video" or clip.num_mel_frames for clip in extent.clips):
            return False
        read_header = self._rows.reader_of(row).read_header
        return any(
            kind == "video" and not media.use_audio and read_header(media, kind).has_audio
            for media, kind in clips_of(conversation)
        )


def _answers_with_media(conversation: Conversation) -> bool:
    answers = (part for turn in conversation.turns if turn.role == "assistant" for part in turn.parts)
    return any(part.media is not None or PLACEHOLDER.search(part.text) for part in answers)


def _has_odd_boxes(conversation: Conversation, clips: Sequence[ClipGeometry]) -> bool:
    boxes = (box for turn in conversation.turns for part in turn.parts for box in part.boxes)
    shares = [relative_points(box, clips) for box in boxes]
    outside = any(not 0 <= share <= 1 for each in shares for share in each)
    return outside or any(low > high for each in shares for low, high in zip(each, each[2:], strict=False))


# ---------------------------------------------------------------------------------------- the whole


def check_config(words: Sequence[str], *, nproc: int | None = None, excludes: Path | None = None) -> None:
    """Open config, checkpoint and data, build the model without memory, look at all rows, and say what is there.

    With `nproc`, also whether the run can be laid out on so many ranks. What cannot be trained is written to the file
    `excludes`, which `data.exclude` takes. Raises: ValueError for whatever would stop the run.
    """
    config = config_from_words(words)
    workshop, source, held_out = open_run(config)
    workshop = replace(workshop, computes_bf16=computes_bf16(choose_device(0)))
    run_dir = Path(config.train.run_dir)
    finished = find_finished(run_dir, config)
    if finished is None:
        check_start(run_dir, config, overwrite=False)
    _print_model(workshop, nproc)
    print(f"template   {describe_template(workshop, source)}")
    for line in describe_files(source, config):
        print(f"           {line}")
    rows = _look_at(workshop, source, "data")
    held = [] if held_out is None else _look_at(workshop, held_out, "eval")
    if excludes is not None:
        _write_excludes(excludes, config, ((source, rows), (held_out, held)))
    if finished is not None:
        print(f"run        {finished}")
    _print_plan(workshop, source, [row.extent for row in rows])
    if held and all(isinstance(row.extent, BadSample) for row in held):
        raise ValueError(f"none of the {len(held)} held-out rows can be used; correct them or name others as data.eval")


def _print_model(workshop: Workshop, nproc: int | None) -> None:
    with torch.device("meta"):
        parameters = dict(workshop.build().named_parameters())
    table = trainable_table(workshop.policies(list(parameters)), {name: p.numel() for name, p in parameters.items()})
    device = choose_device(0)
    built, trainable = (sum(getattr(row, f"num_{what}") for row in table) for what in ("parameters", "trainable"))
    print(f"model      {workshop.spec.name}, {built:,} parameters built, {trainable:,} trainable")
    print(f"           attention {describe_kernels(workshop, device)}")
    degrees = None
    if nproc is not None:
        machine = Machine(devices=nproc)
        degrees, why = choose_degrees(workshop, nproc, memory_bytes=total_memory_bytes(device), machine=machine)
        warning = check_pack_counts(workshop.config.train.packs_per_step, degrees.replicate * degrees.shard)
        print(f"layout     {degrees.describe()}" + (f"; warning: {warning}" if warning else ""))
        for line in why:
            print(f"           {line}")
    elif workshop.config.parallel != ParallelConfig():
        print("layout     not checked: say --nproc N for so many ranks")
    _print_memory(workshop, degrees, total_memory_bytes(device))


def _print_memory(workshop: Workshop, degrees: Degrees | None, there: int) -> None:
    """What a device will hold by estimate, at the fullest moment of a step."""
    found = ModelSizes(workshop).footprint(degrees or Degrees())
    where = "on one rank (--nproc N divides it)" if degrees is None else "on each rank"
    fixed = found.parameters + found.gradients + found.states
    print(f"memory     {fmt(fixed, 'bytes')} of weights, gradients and optimizer states {where}, about "
          f"{fmt(found.total, 'bytes')} at the fullest moment; the device has {fmt(there, 'bytes')}")  # fmt: skip
    if found.total > (1 - FREE_SHARE) * there:
        print("           warning: that does not fit; use more ranks, recomputation, LoRA, or freeze components by "
              "policy; omniloom plan --gpus N --memory GIB shows what would")  # fmt: skip


# ---------------------------------------------------------------------------------------- rows


def _look_at(workshop: Workshop, source: Sources, name: str) -> list[CheckedRow]:
    """All rows of some sources, in their order, decoded in the loader's workers; prints what was found."""
    from rich.console import Console
    from rich.progress import track

    opened = open_rows(workshop, source, cache=False, decode_all=True)
    chunks = [range(start, min(start + CHUNK_ROWS, len(source))) for start in range(0, len(source), CHUNK_ROWS)]
    rows: list[CheckedRow] = []
    screen = Console(stderr=True)
    with closing(Loader(partial(CheckingReader, opened), workers=workshop.config.data.workers)) as loader:
        for chunk in track(chunks, f"rows of {name}", console=screen, transient=True, disable=not sys.stderr.isatty()):
            rows += loader.measure(chunk)
    good = [row for row in rows if isinstance(row.extent, Extent)]
    print(f"{name}       {len(rows):,} rows: {len(good):,} good, {len(rows) - len(good):,} bad")
    _print_sets(source, rows, workshop.config)
    _print_sizes(workshop.config, good)
    _print_faults(rows)
    _print_odd(source, rows)
    if spoken := [number for number, row in enumerate(rows) if row.is_spoken]:
        recorded = [number for number in spoken if rows[number].has_recording][:COMPARED_ROWS]
        reader = open_rows(workshop, source, cache=False)()
        turns = [
            (Path(source.locate(number)[0]).parent / turn.speech.recording, turn.speech)
            for number in recorded
            for turn in reader.conversation(number).turns
            if turn.speech is not None and turn.speech.recording
        ]
        for line in describe_speech(workshop, turns, len(spoken)):
            print(line)
    return rows


def _print_sets(source: Sources, rows: Sequence[CheckedRow], config: Config) -> None:
    """Of each data file what it holds, and whether much of it would be dropped."""
    for number, first in enumerate(source.first_rows()):
        of_set = rows[first : first + [size for size in source.sizes if size][number]]
        extents = [row.extent for row in of_set if isinstance(row.extent, Extent)]
        dropped = sum(_is_dropped(row.extent, config) for row in of_set)
        kinds = Counter(row.modality for row in of_set if row.modality != "bad")
        images, frames, seconds = (sum(row.clips[place] for row in of_set) for place in range(3))
        path, _ = source.origin(first)
        said = [f"{sum(extent.num_tokens for extent in extents):,} tokens", f"{dropped:,} dropped"]
        said += [f"{count:,} {kind}" for kind, count in kinds.most_common()]
        if kinds.keys() - {"text"}:
            said.append(f"{images:,} images, {frames:,} frames, {duration(seconds)} of sound")
        print(f"           {path}: {len(of_set):,} rows, " + "; ".join(said))
        if dropped >= MUCH_DROPPED * len(of_set):
            share = percent(dropped / len(of_set))
            print(f"           warning: {share} of {path} is dropped; look at its faults below")


def _is_dropped(extent: Extent | BadSample, config: Config) -> bool:
    return isinstance(extent, BadSample) or extent.num_tokens > config.data.pack_tokens


def _print_sizes(config: Config, good: Sequence[CheckedRow]) -> None:
    extents = sorted((row.extent for row in good if isinstance(row.extent, Extent)), key=lambda e: e.num_tokens)
    if not extents:
        return
    lengths, costs = [e.num_tokens for e in extents], sorted(e.cost for e in extents)
    pack_tokens, middle = config.data.pack_tokens, len(extents) // 2
    share = percent(sum(e.num_loss_tokens for e in extents) / sum(lengths))
    print(f"tokens     shortest {lengths[0]}, median {lengths[middle]}, longest {lengths[-1]}, {share} have a loss")
    towers = sum(e.tower_cost for e in extents) / max(1, sum(costs))
    print(f"cost       forward GFLOP of a row: median {costs[middle] / 1000:,.3g}, largest {costs[-1] / 1000:,.3g}; "
          f"{percent(towers)} of it in towers")  # fmt: skip
    if longer := sum(length > pack_tokens for length in lengths):
        print(f"overlong   {longer} rows are longer than a pack of {pack_tokens} (data.overlong="
              f"{config.data.overlong}); raise data.pack_tokens, or set data.overlong=shrink")  # fmt: skip


def _print_faults(rows: Sequence[CheckedRow]) -> None:
    kinds: dict[str, list[BadSample]] = defaultdict(list)
    for row in rows:
        if isinstance(row.extent, BadSample):
            kinds[reason_kind(f"{row.extent.field}: {row.extent.reason}")].append(row.extent)
    for bad in sorted(kinds.values(), key=len, reverse=True):
        for one in bad[:EXAMPLES]:
            print(f"bad row    {one.file}:{one.line}: {one.field}: {one.reason}")
        if len(bad) > EXAMPLES:
            print(f"           and {len(bad) - EXAMPLES:,} more of this kind")


def _print_odd(source: Sources, rows: Sequence[CheckedRow]) -> None:
    """What can be trained, and is seldom meant."""
    found: dict[str, list[int]] = defaultdict(list)
    seen: set[str] = set()
    for number, row in enumerate(rows):
        again = ("again",) if row.content in seen else ()
        for key in (*row.odd, *again):
            found[key].append(number)
        if row.content is not None:
            seen.add(row.content)
    for key, numbers in found.items():
        where = ", ".join("{}:{}".format(*source.locate(number)) for number in numbers[:EXAMPLES])
        print(f"odd        {len(numbers):,} of {len(rows):,} rows {ODD[key]}: {where}"
              + (", ..." if len(numbers) > EXAMPLES else ""))  # fmt: skip


def _write_excludes(
    path: Path, config: Config, looked_at: Sequence[tuple[Sources | None, Sequence[CheckedRow]]]
) -> None:
    lines = []
    for source, rows in looked_at:
        for number, row in enumerate(rows):
            if source is None or not _is_dropped(row.extent, config):
                continue
            file, of_file = source.origin(number)
            reason = f"{row.extent.num_tokens} tokens" if isinstance(row.extent, Extent) else row.extent.reason
            record = {"source": file, "row": of_file, "line": int(source.locate(number)[1]), "reason": reason}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    use = f": set {shlex.quote(f'data.exclude={path}')}" if lines else ""
    print(f"excludes   {len(lines):,} rows written to {path}{use}")


# ---------------------------------------------------------------------------------------- the plan


def _print_plan(workshop: Workshop, source: Sources, extents: Sequence[Extent | BadSample]) -> None:
    """Pack an epoch as the run will. Raises: PlanError, and ValueError where a checkpoint's plan does not fit."""
    config = workshop.config
    planner = open_planner(workshop, source, lambda rows: [extents[row] for row in rows])
    settings = config.checkpoint
    if settings.resume == "auto" and (stored := find_latest(Path(config.train.run_dir))[0]) is not None:
        open_planner(workshop, source, lambda rows: []).load_state_dict(stored.extras["data"])
    steps: list[StepPlan] = []
    while not (steps and steps[-1].rows_planned >= len(source)) and (step := planner.next_step()) is not None:
        steps.append(step)
    planner.close()
    packs = [[s.extent for s in pack.samples] for step in steps for pack in step.packs]
    packs = [pack for pack in packs if pack]
    fill = sum(extent.num_tokens for pack in packs for extent in pack) / (len(packs) * config.data.pack_tokens)
    costs = [sum(extent.cost for extent in pack) for pack in packs]
    print(f"packs      {len(packs):,} planned, {percent(fill)} full, the heaviest "
          f"{max(costs) * len(costs) / max(1, sum(costs)):.2f} x the mean cost")  # fmt: skip
    train = config.train
    num_steps = train.steps or math.ceil(len(steps) * (train.epochs or 1.0))
    print(f"schedule   {'' if train.steps else 'about '}{num_steps:,} steps, {train.warmup_steps} of them warm-up")
    if warning := describe_warmup(train.warmup_steps, num_steps):
        print(f"           {warning}")
