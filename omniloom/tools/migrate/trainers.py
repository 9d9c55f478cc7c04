"""The settings of LLaMA-Factory's YAML files (with `dataset_info.json`) and of ms-swift's command lines.

Both stand on transformers' TrainingArguments, whose names they share. What they do where nothing is said is written out
where it differs from what we do, so that the run stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from omniloom.tools.migrate.draft import Draft, Setting, flatten, read_rules
from omniloom.tools.migrate.megatron import migrate_megatron
from omniloom.tools.migrate.readers import files, switch, whole

FROM_TRANSFORMERS = {"train.betas": [0.9, 0.999], "train.seed": 42, "memory.recompute": "full"}


def migrate_llama_factory(draft: Draft, data_sets: Mapping[str, Any] | None, folder: Path) -> None:
    """A LLaMA-Factory YAML, whose `dataset` names entries of `dataset_info.json` (`data_sets`, None if not found)."""
    _check_task(draft, stage="sft")
    _batch(draft, default_batch=8, default_accumulation=1)
    lora = _policy(
        draft, ("finetuning_type",), "freeze_language_model", "freeze_vision_tower", "freeze_multi_modal_projector"
    )
    _dataset_info(draft, data_sets, folder)
    _apply(draft, beta2=0.999)
    rank = draft.entries.get("policy.text.lora.rank")
    adapters = {"rank": 8, "alpha": 2.0 * (rank.value if rank else 8), "dropout": 0.0} if lora else {}
    _put_defaults(draft, "LLaMA-Factory's own default", adapters, {
        "train.learning_rate": 5e-5, "train.schedule": "linear", "data.pack_tokens": 2048,
        "data.image.max_pixels": 768 * 768, "data.image.min_pixels": 32 * 32, "data.video.max_pixels": 256 * 256,
        "data.video.min_pixels": 16 * 16, "checkpoint.every": 500,
    })  # fmt: skip


def migrate_swift(draft: Draft) -> None:
    """An ms-swift command line, and the variables that stand before it; `megatron sft`, too."""
    _check_task(draft, task_type="causal_lm")
    on_megatron = any(
        one.name in ("micro_batch_size", "global_batch_size", "train_iters", "lr") for one in draft.settings
    )
    if not on_megatron:
        _batch(draft, default_batch=1, default_accumulation=None)
    elif not any(one.name == "global_batch_size" for one in draft.settings):
        draft.settings.append(Setting(name="global_batch_size", value=16, origin="ms-swift's own default"))
    lora = _policy(draft, ("train_type", "sft_type", "tuner_type"), "freeze_llm", "freeze_vit", "freeze_aligner",
                   usual="full" if on_megatron else "lora")  # fmt: skip
    if (data := draft.first("dataset")) is not None:
        _swift_data(draft, data)
    _apply(draft, beta2=0.95)
    adapters = {"rank": 8, "alpha": 32.0, "dropout": 0.05} if lora else {}
    own = {"train.betas": [0.9, 0.95], "train.weight_decay": 0.1, "train.learning_rate": 1e-4 if lora else 1e-5}
    if on_megatron:
        own |= {"train.seed": 42, "memory.recompute": "selective"}
        own |= {f"policy.text.lora.{name}": value for name, value in adapters.items()}
        migrate_megatron(draft, "ms-swift's own default", own)
    else:
        _put_defaults(draft, "ms-swift's own default", adapters, own)


def _check_task(draft: Draft, **offered: str) -> None:
    """What is trained for must be the one thing that is offered."""
    for one in draft.settings:
        if one.name in offered and one.value != (task := offered[one.name]):
            draft.faults.append(
                f"{one.origin}: {one.value} is not offered; omniloom does supervised fine-tuning ({task})"
            )


def _apply(draft: Draft, *, beta2: float) -> None:
    """What both read alike. `beta2` is that of AdamW where only the other one is given."""
    draft.put_betas((0.9, beta2))
    if (extra := draft.first("lr_scheduler_kwargs")) is not None:  # of a command line, as JSON; of a file it is flat
        given = yaml.safe_load(str(extra.value))
        draft.settings += flatten(given, extra.origin, "lr_scheduler_kwargs.") if isinstance(given, dict) else [extra]
    draft.settings = [
        replace(one, name="warmup_ratio")
        if one.name == "warmup_steps" and re.fullmatch(r"0?\.\d+", str(one.value)) else one
        for one in draft.settings
    ]  # fmt: skip
    draft.apply(read_rules("transformers"))
    draft.put_warmup_share("warmup_ratio")


def _put_defaults(draft: Draft, whose: str, adapters: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    epochs = {} if "train.steps" in draft.entries else {"train.epochs": 3.0}
    lora = {f"policy.text.lora.{name}": value for name, value in adapters.items()}
    draft.put_defaults({**FROM_TRANSFORMERS, **own, **epochs, **lora}, whose)


def _batch(draft: Draft, *, default_batch: int, default_accumulation: int | None) -> None:
    batch = draft.first("per_device_train_batch_size", "train_batch_size")
    accumulation = draft.first("gradient_accumulation_steps")
    ranks = draft.num_ranks or 1
    size = draft.read(batch, whole, default_batch)
    steps = draft.read(accumulation, whole, 1) if accumulation is not None else default_accumulation
    if steps is None:
        steps = max(round(16 / (size * ranks)), 1)  # ms-swift aims at sixteen samples a step
    note = "a step there took so many samples; a pack holds as many as fit"
    if draft.num_ranks is None:
        note = "for one rank, since the files do not say how many: multiply by it"
    origins = [one for one in (batch, accumulation) if one is not None]
    draft.put("train.packs_per_step", size * steps * ranks, origins or ["the defaults there"], note)


def _policy(draft: Draft, kinds: Sequence[str], language: str, tower: str, merger: str, usual: str = "lora") -> bool:
    """Adapters or all weights, by the setting of one of the names `kinds`, and what is frozen, by those of the others.

    Returns: whether adapters train.
    """
    how = draft.first(*kinds)
    lora = (usual if how is None else how.value) == "lora"
    if how is not None and how.value not in ("lora", "full"):
        draft.faults.append(f"{how.origin}: {how.value!r} is not offered; full and lora are")
    elif how is not None:
        draft.set_aside([how], "adapters train" if lora else "what no rule names trains")
    if not lora:
        draft.set_aside(draft.take("lora_*", "target_modules", "use_rslora", "use_dora"), "the whole model trains")
    model = next((str(one.value) for one in draft.settings if one.name in ("model", "model_name_or_path")), "")
    towers = ("vision", "audio") if "omni" in model.lower() else ("vision",)  # one setting there means both
    for name, components in ((language, ("text",)), (tower, towers), (merger, ("vision.merger",))):
        one = draft.first(name)
        frozen = draft.read(one, switch, components != ("text",))
        if lora and components == ("text",):
            draft.set_aside([one] if one else [], "adapters train there")
        elif lora and not frozen:
            draft.lost.append((str(one), f"give {components[0]} a lora section of its own to have adapters there"))
        elif frozen or one is not None:
            for component in components:
                draft.put(f"policy.{component}.freeze", frozen, [one or "the default there"])
    return lora


def _dataset_info(draft: Draft, data_sets: Mapping[str, Any] | None, folder: Path) -> None:
    """The files behind the names of `dataset`, and how their rows are written."""
    named = {"data.train": draft.first("dataset"), "data.eval": draft.first("eval_dataset")}
    settings = {key: setting for key, setting in named.items() if setting is not None}
    where = draft.first("dataset_dir")
    directory = Path(str(where.value)) if where is not None and isinstance(where.value, str) else folder
    if where is not None:
        draft.put("data.media_dir", str(where.value), [where], "where relative media paths start")
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for key, setting in settings.items():
        for name in files(str(setting.value).replace(" ", "")):
            entry = None if data_sets is None else data_sets.get(name)
            if entry is None:
                known = "was not given and does not lie in dataset_dir" if data_sets is None else "has no such entry"
                draft.faults.append(
                    f"{setting.origin}: dataset_info.json {known}, so the file of {name!r} is not known"
                )
            elif "file_name" not in entry:
                draft.faults.append(f"dataset_info.json: {name} is on a hub; download it and name the file")
            else:
                found.setdefault(key, []).append(
                    (str(directory / entry["file_name"]), _row_options(draft, name, entry))
                )
    _put_sources(draft, found, {key: setting.origin for key, setting in settings.items()})


def _put_sources(
    draft: Draft, found: Mapping[str, list[tuple[str, dict[str, Any]]]], origins: Mapping[str, str]
) -> None:
    """Files with the options of each: of the data section where all have the same, else of records."""
    each = [options for sources in found.values() for _, options in sources]
    alike = all(options == each[0] for options in each)
    for key, sources in found.items():
        records = [{"path": path, **options} if options and not alike else path for path, options in sources]
        draft.put(key, records, [origins[key]])
    for name, value in (each[0] if each and alike else {}).items():
        for part, inner in value.items() if isinstance(value, dict) else [("", value)]:
            draft.put(f"data.{name}.{part}".rstrip("."), inner, [f"{next(iter(origins.values()))}, of each"])


COLUMNS = ("messages", "images", "videos", "audios", "tools", "system", "prompt", "query", "response", "history")


def _row_options(draft: Draft, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    where, options = f"dataset_info.json: {name}", dict[str, Any]()
    attr = {column: value for column, value in (entry.get("columns") or {}).items() if value is not None}
    for column in [column for column in attr if column not in COLUMNS]:
        if (value := attr.pop(column)) != column:
            draft.lost.append((f"{where}.columns.{column} {value}", f"rename the field to {column}"))
    attr = {column: value for column, value in attr.items() if value != column} | (entry.get("tags") or {})
    if attr:
        options["attr"] = attr
    if entry.get("num_samples"):
        count = Setting(name="num_samples", value=entry["num_samples"], origin=f"{where}.num_samples")
        options["max_samples"] = draft.read(count, whole, 1)
    for key in ("ranking", "split", "subset", "folder"):
        if entry.get(key) not in (None, False, "train"):
            draft.lost.append((f"{where}.{key} {entry[key]}", "name the file that holds these rows"))
    return options


def _swift_data(draft: Draft, data: Setting) -> None:
    """`a.jsonl b.jsonl#500`: files, with the number of rows to take of each behind `#`."""
    found = []
    for word in str(data.value).split():
        path, _, count = word.partition("#")
        found.append((path, {"max_samples": draft.read(data, whole, 1, count)} if count else {}))
        if not (Path(path).suffix or Path(path).exists()):
            draft.faults.append(f"{data.origin}: {path} is no file but a name on a hub; download it and name the file")
    _put_sources(draft, {"data.train": found}, {"data.train": data.origin})
