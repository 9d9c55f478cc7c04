"""The settings of LLaMA-Factory's YAML files (with `dataset_info.json`) and of ms-swift's command lines.

Both stand on transformers' TrainingArguments, whose names they share. What they do where nothing is said is written out
where it differs from what we do, so that the run stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniloom.tools.migrate.draft import Draft, Setting, files, read_rules, switch, whole

FROM_TRANSFORMERS = {  # where they differ from ours
    "train.betas": [0.9, 0.999],
    "train.seed": 42,
}


def migrate_llama_factory(draft: Draft, data_sets: Mapping[str, Any] | None, folder: Path) -> None:
    """A LLaMA-Factory YAML, whose `dataset` names entries of `dataset_info.json` (`data_sets`, None if not found)."""
    if (stage := draft.first("stage")) is not None and stage.value != "sft":
        draft.faults.append(f"{stage.origin}: {stage.value} is not offered; omniloom does supervised fine-tuning (sft)")
    _batch(draft, default_batch=8, default_accumulation=1)
    _warmup_and_betas(draft)
    _recompute(draft, "disable_gradient_checkpointing", off=True)
    how = draft.first("finetuning_type")
    lora = _lora(draft, "lora" if how is None else str(how.value), how, rank=8, alpha=None, dropout=0.0)
    _frozen(draft, "freeze_vision_tower", True, _towers(draft), lora)
    _frozen(draft, "freeze_multi_modal_projector", True, ("vision.merger",), lora)
    _frozen(draft, "freeze_language_model", False, ("text",), lora)
    _dataset_info(draft, data_sets, folder)
    draft.apply(read_rules("transformers"))
    _defaults(draft, {
        **FROM_TRANSFORMERS, "train.learning_rate": 5e-5, "train.schedule": "linear", "data.pack_tokens": 2048,
        "data.image.max_pixels": 768 * 768, "data.image.min_pixels": 32 * 32, "data.video.max_pixels": 256 * 256,
        "data.video.min_pixels": 16 * 16, "checkpoint.every": 500,
    }, "LLaMA-Factory's own default")  # fmt: skip
    if "train.steps" not in draft.entries:
        _defaults(draft, {"train.epochs": 3.0}, "LLaMA-Factory's own default")


def migrate_swift(draft: Draft) -> None:
    """An ms-swift command line, and the variables that stand before it."""
    _batch(draft, default_batch=1, default_accumulation=None)
    _warmup_and_betas(draft, beta2=0.95)
    _recompute(draft, "gradient_checkpointing", off=False)
    how = draft.first("train_type", "sft_type", "tuner_type")
    kind = "lora" if how is None else str(how.value)
    lora = _lora(draft, kind, how, rank=8, alpha=32.0, dropout=0.05)
    _frozen(draft, "freeze_llm", False, ("text",), lora)
    _frozen(draft, "freeze_vit", True, _towers(draft), lora)
    _frozen(draft, "freeze_aligner", True, ("vision.merger",), lora)
    data = draft.first("dataset")
    if data is not None:
        _swift_data(draft, data)
    if (valid := draft.first("val_dataset")) is not None:
        draft.put("data.eval", str(valid.value).split(), [valid])
    draft.apply(read_rules("transformers"))
    _defaults(draft, {**FROM_TRANSFORMERS, "train.betas": [0.9, 0.95], "train.weight_decay": 0.1,
                      "train.learning_rate": 1e-4 if lora else 1e-5}, "ms-swift's own default")  # fmt: skip
    if "train.steps" not in draft.entries:
        _defaults(draft, {"train.epochs": 3.0}, "ms-swift's own default")


def _defaults(draft: Draft, values: Mapping[str, Any], whose: str) -> None:
    for key, value in values.items():
        if key not in draft.entries:
            draft.put(key, value, [whose])


def _batch(draft: Draft, *, default_batch: int, default_accumulation: int | None) -> None:
    batch = draft.first("per_device_train_batch_size", "train_batch_size")
    accumulation = draft.first("gradient_accumulation_steps")
    ranks = draft.num_ranks
    size = default_batch if batch is None else whole(batch.value)
    if accumulation is not None:
        steps = whole(accumulation.value)
    elif default_accumulation is None:
        steps = max(round(16 / (size * (ranks or 1))), 1)  # ms-swift aims at sixteen samples a step
    else:
        steps = default_accumulation
    note = "a step there took so many samples; a pack holds as many as fit"
    if ranks is None:
        note = "for one rank, since the files do not say how many: multiply by it"
    origins: list[Setting | str] = [one for one in (batch, accumulation) if one is not None]
    draft.put("train.packs_per_step", size * steps * (ranks or 1), origins or ["the defaults there"], note)


def _warmup_and_betas(draft: Draft, beta2: float = 0.999) -> None:
    betas = [draft.first("adam_beta1"), draft.first("adam_beta2")]
    if any(betas):
        found = [one.value if one else usual for one, usual in zip(betas, (0.9, beta2), strict=True)]
        draft.put("train.betas", [float(value) for value in found], [one for one in betas if one])
    share = draft.first("warmup_ratio")
    steps = next((one for one in draft.settings if one.name == "max_steps"), None)
    if share is not None and not any(one.name == "warmup_steps" for one in draft.settings):
        if steps is not None and whole(steps.value) > 0:
            draft.put("train.warmup_steps", round(float(share.value) * whole(steps.value)), [share])
        elif float(share.value):
            draft.lost.append((str(share), "of how many steps, only the run itself tells: set train.warmup_steps"))
        else:
            draft.needless.append((share, "none is the default"))
    extra = draft.first("lr_scheduler_kwargs")
    if extra is not None and isinstance(extra.value, dict) and "min_lr" in extra.value:
        draft.put("train.min_learning_rate", float(extra.value["min_lr"]), [extra])
    elif extra is not None:
        draft.lost.append((str(extra), "train.schedule and train.min_learning_rate say all there is"))


def _recompute(draft: Draft, name: str, *, off: bool) -> None:
    one = draft.first(name)
    wanted = True if one is None else switch(one.value) != off
    if wanted:
        draft.put("memory.recompute", "full", [one or "the default there"], "none is faster where memory is enough")
    elif one is not None:
        draft.needless.append((one, "none is the default"))


def _lora(draft: Draft, kind: str, how: Setting | None, *, rank: int, alpha: float | None, dropout: float) -> bool:
    found = {name: draft.first(f"lora_{name}") for name in ("rank", "alpha", "dropout", "dtype")}
    targets = draft.first("lora_target", "target_modules", "lora_target_modules")
    switches = {"rslora": draft.first("use_rslora"), "dora": draft.first("use_dora")}
    everything = [one for one in (*found.values(), targets, *switches.values()) if one is not None]
    bits = draft.first("quantization_bit", "quant_bits")
    if bits is not None and bits.value:
        draft.lost.append((str(bits), "the base stays in bf16"))
    if kind != "lora":
        if kind != "full":
            draft.faults.append(f"{how.origin if how else 'tuner'}: {kind!r} is not offered; full and lora are")
        draft.needless += [(one, "the whole model trains") for one in everything]
        if how is not None:
            draft.needless.append((how, "what no rule names trains"))
        return False
    chosen = rank if found["rank"] is None else whole(found["rank"].value)
    default: list[Setting | str] = [how or "the default there"]
    draft.put("policy.text.lora.rank", chosen, [found["rank"]] if found["rank"] else default)
    scale = found["alpha"]
    draft.put("policy.text.lora.alpha", float(scale.value) if scale else (alpha or 2.0 * chosen),
              [scale] if scale else default)  # fmt: skip
    drop = found["dropout"]
    draft.put("policy.text.lora.dropout", float(drop.value) if drop else dropout, [drop] if drop else default)
    for name, one in switches.items():
        if one is not None and switch(one.value):
            draft.put(f"policy.text.lora.{name}", True, [one])
    if targets is not None and targets.value not in ("all", "all-linear"):
        names = targets.value if isinstance(targets.value, list) else str(targets.value).replace(",", " ").split()
        draft.put("policy.text.lora.modules", names, [targets])
    elif targets is not None:
        draft.needless.append((targets, "every linear is the default"))
    return True


def _towers(draft: Draft) -> tuple[str, ...]:
    """What both call the vision tower: of omni models the audio tower too."""
    model = next((str(one.value) for one in draft.settings if one.name in ("model", "model_name_or_path")), "")
    return ("vision", "audio") if "omni" in model.lower() else ("vision",)


def _frozen(draft: Draft, name: str, usual: bool, components: tuple[str, ...], lora: bool) -> None:
    one = draft.first(name)
    frozen = usual if one is None else switch(one.value)
    if lora and not frozen and components != ("text",):
        draft.lost.append((str(one), f"give {components[0]} a lora section of its own if adapters shall train there"))
    elif components == ("text",):
        if frozen and not lora:
            draft.put("policy.text.freeze", True, [one or "the default there"])
        elif one is not None:
            draft.needless.append((one, "what no rule freezes trains" if not lora else "adapters train there"))
    else:
        for component in components:
            draft.put(f"policy.{component}.freeze", frozen, [one or "the default there"])


def _dataset_info(draft: Draft, data_sets: Mapping[str, Any] | None, folder: Path) -> None:
    """The files behind the names of `dataset`, and how their rows are written."""
    names, valid = draft.first("dataset"), draft.first("eval_dataset")
    where = draft.first("dataset_dir")
    directory = Path(str(where.value)) if where is not None and isinstance(where.value, str) else folder
    if where is not None:
        draft.put("data.media_dir", str(where.value), [where], "where relative media paths start")
    for setting, key in ((names, "data.train"), (valid, "data.eval")):
        if setting is None:
            continue
        found = []
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
                found.append(str(directory / entry["file_name"]))
                _row_fields(draft, name, entry)
        if found:
            draft.put(key, found, [setting])


COLUMNS = {"messages": "messages", "images": "images", "videos": "videos", "audios": "audios", "tools": "tools",
           "system": "system"}  # fmt: skip


def _row_fields(draft: Draft, name: str, entry: Mapping[str, Any]) -> None:
    where = f"dataset_info.json: {name}"
    for column, value in (entry.get("columns") or {}).items():
        if column in COLUMNS and value != COLUMNS[column] and value is not None:
            draft.put(f"data.attr.{COLUMNS[column]}", value, [f"{where}.columns.{column}"])
        elif column not in COLUMNS and value != column:
            draft.lost.append((f"{where}.columns.{column} {value}", f"rename the field to {column}"))
    for tag, value in (entry.get("tags") or {}).items():
        draft.put(f"data.attr.{tag}", value, [f"{where}.tags.{tag}"])
    if entry.get("num_samples"):
        draft.put("data.max_samples", whole(entry["num_samples"]), [f"{where}.num_samples"])
    for key in ("ranking", "split", "subset", "folder"):
        if entry.get(key) not in (None, False, "train"):
            draft.lost.append((f"{where}.{key} {entry[key]}", "name the file that holds these rows"))


def _swift_data(draft: Draft, data: Setting) -> None:
    """`a.jsonl b.jsonl#500`: files, with the number of rows to take of each behind `#`."""
    found, counts = [], set()
    for word in str(data.value).split():
        path, _, count = word.partition("#")
        counts.add(count)
        if Path(path).suffix or Path(path).exists():
            found.append(path)
        else:
            draft.faults.append(f"{data.origin}: {path} is no file but a name on a hub; download it and name the file")
    draft.put("data.train", found, [data])
    if len(counts) == 1 and (count := counts.pop()):
        draft.put("data.max_samples", whole(count), [data])
    elif len(counts) > 1:
        draft.lost.append((str(data), "unlike numbers of rows per file (#N); data.max_samples holds for each file"))
