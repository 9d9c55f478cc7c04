"""The settings of MindSpeed-MM and Pai-Megatron-Patch: Megatron's flags, `data.json`, `model.json`, YAML files.

Names are as their files spell them: flags with underscores, the paths of the JSON and YAML trees with dots.
"""

from __future__ import annotations

import re

from omniloom.tools.migrate.draft import Draft, Setting, files, read_rules, switch, whole

STEPS = ("train_iters", "training.train_iters")
MEGATRON_DEFAULTS = {  # where they differ from ours
    "train.betas": [0.9, 0.999],
    "train.weight_decay": 0.01,
    "train.schedule": "linear",
    "train.seed": 1234,
    "train.loss": "batch",
}
LORA_MODULES = {
    "linear_qkv": ["q_proj", "k_proj", "v_proj"],
    "linear_proj": ["o_proj"],
    "linear_fc1": ["gate_proj", "up_proj"],
    "linear_fc2": ["down_proj"],
}


def migrate_megatron(draft: Draft) -> None:
    """Deal with every setting of these two systems that `draft` holds."""
    uses_megatron = any(one.name in STEPS or one.name == "micro_batch_size" for one in draft.settings)
    _batch(draft)
    _schedule(draft)
    _loss(draft)
    _layout(draft)
    _recompute(draft)
    _offload_and_chunks(draft)
    _freezing(draft)
    _lora(draft)
    _attributes(draft)
    _split(draft)
    _checkpoints(draft)
    _profile(draft)
    draft.apply(read_rules("megatron"))
    if uses_megatron:
        for key, value in MEGATRON_DEFAULTS.items():
            if key not in draft.entries:
                draft.put(key, value, ["Megatron's own default"])


def _batch(draft: Draft) -> None:
    length = draft.first("seq_length")
    if length is not None and not any(one.name.endswith("cutoff_len") for one in draft.settings):
        draft.put("data.pack_tokens", whole(length.value), [length], "longer rows are listed, never cut")
    elif length is not None:
        draft.needless.append((length, "the data's cutoff_len bounds a sample"))
    whole_batch = [one for one in draft.take("global_batch_size") if one.value is not None]
    note = "a step there took so many samples; a pack holds as many as fit"
    if whole_batch:
        draft.put("train.packs_per_step", whole(whole_batch[0].value), whole_batch[:1], note)
        return
    parts = [one for one in draft.settings if one.name in ("micro_batch_size", "gradient_accumulation_steps")]
    if not parts:
        return
    per_rank = 1
    for part in parts:
        per_rank *= whole(part.value)
    context = draft.number_of("ulysses_parallel_size", "context_parallel_size") * draft.number_of(
        "tensor_parallel_size", "ring_attention_size"
    )
    ranks = None if draft.num_ranks is None else max(draft.num_ranks // context, 1)
    if ranks is None:
        note = "for each rank: the files do not say how many; multiply by the number of data-parallel ranks"
    draft.put("train.packs_per_step", per_rank * (ranks or 1), parts, note)


def _schedule(draft: Draft) -> None:
    steps = draft.first("train_iters")
    if steps is not None:
        draft.put("train.steps", whole(steps.value), [steps])
    betas = [draft.first("adam_beta1"), draft.first("adam_beta2")]
    if any(betas):
        found = [one.value if one else usual for one, usual in zip(betas, (0.9, 0.999), strict=True)]
        draft.put("train.betas", [float(value) for value in found], [one for one in betas if one])
    if (fixed := draft.first("lr_warmup_iters")) is not None:
        draft.put("train.warmup_steps", whole(fixed.value), [fixed])
    share = draft.first("lr_warmup_fraction", "lr_warmup_ratio")
    if share is not None and fixed is None and share.value is not None:
        total = int(draft.entries["train.steps"].value) if "train.steps" in draft.entries else None
        if total is None:
            draft.lost.append((str(share), "without a number of steps it says no number; set train.warmup_steps"))
        else:
            draft.put("train.warmup_steps", round(float(share.value) * total), [share], f"of {total} steps")


def _loss(draft: Draft) -> None:
    token, sample = draft.first("calculate_per_token_loss"), draft.first("calculate_per_sample_loss")
    kind = draft.first("loss_cfg.loss_type")
    if token is not None and switch(token.value):
        draft.put("train.loss", "token", [token])
    if sample is not None and switch(sample.value):
        draft.put("train.loss", "sample", [sample])
    if kind is not None:
        names = {"default": "batch", "per_sample_loss": "sample", "per_token_loss": "token", "square": "sqrt",
                 "square_loss": "sqrt", "token": "token", "sample": "sample"}  # fmt: skip
        if kind.value in names:
            if "train.loss" not in draft.entries or kind.value != "default":
                draft.put("train.loss", names[kind.value], [kind], "train.loss: token weighs all tokens alike")
        else:
            draft.lost.append((str(kind), "a loss of one's own; train.loss knows token, sample, sqrt and batch"))


def _layout(draft: Draft) -> None:
    context = draft.take("context_parallel_size", "ulysses_parallel_size", "text_decoder.cp")
    for one in context:
        if whole(one.value or 1) > 1:
            draft.put("parallel.context", whole(one.value), [one])
        else:
            draft.needless.append((one, "1 is the default"))
    for one in draft.take("expert_model_parallel_size", "expert_parallel_size"):
        if whole(one.value or 1) > 1:
            draft.put("parallel.expert", whole(one.value), [one])
        else:
            draft.needless.append((one, "1 is the default"))
    made_fit = "divided there to fit into memory; parallel.shard: auto spreads parameters, gradients and states instead"
    for one in draft.take(
        *("tensor_model_parallel_size", "tensor_parallel_size", "pipeline_model_parallel_size", "text_decoder.tp"),
        *("text_decoder.pp", "text_decoder.pipeline_num_layers", "expert_tensor_parallel_size", "*_tp_size"),
        *("*_pp_layers", "tp_size", "virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"),
        *("vit_pp_size", "llm_pp_layers"),
    ):
        divides = isinstance(one.value, list) or whole(one.value or 1) > 1
        draft.needless.append((one, made_fit if divides else "1 is the default"))
    if (ring := draft.first("ring_attention_size")) is not None:
        if whole(ring.value or 1) > 1:
            draft.lost.append((str(ring), "set parallel.context, which divides a pack by heads (Ulysses)"))
        else:
            draft.needless.append((ring, "1 is the default"))
    if (half := draft.first("fp16")) is not None and switch(half.value):
        draft.faults.append(f"{half.origin}: fp16 is not offered, since it overflows; bf16 is the same size")


def _recompute(draft: Draft) -> None:
    plan = draft.first("recompute_plan.apply_modules")
    asked = draft.first("recompute")
    if asked is not None and switch(asked.value) and plan is not None:
        for root, mark in (("vision", "visual"), ("audio", "audio_tower"), ("text", "layers")):
            if any(mark in str(name) for name in plan.value):
                draft.put(f"policy.{root}.recompute", True, [plan])
    elif asked is not None and switch(asked.value):
        draft.put("memory.recompute", "full", [asked])
    elif plan is not None:
        draft.needless.append((plan, "recompute is off"))
    places = {"": "", "image_encoder.vision_encoder.": "vision", "audio_encoder.audio_encoder.": "audio",
              "text_decoder.": "text"}  # fmt: skip
    for prefix, root in places.items():
        how = draft.first(f"{prefix}recompute_granularity")
        details = draft.take(f"{prefix}recompute_method", f"{prefix}recompute_num_layers")
        if how is not None and how.value == "full":
            draft.put(f"policy.{root}.recompute" if root else "memory.recompute", True if root else "full", [how])
        elif how is not None and how.value is not None:
            draft.lost.append((str(how), "what of a block is recomputed is not chosen there; memory.recompute: full "
                               "recomputes blocks whole, and is not needed where memory is enough"))  # fmt: skip
        draft.needless += [(one, "blocks are recomputed one by one") for one in details]


def _offload_and_chunks(draft: Draft) -> None:
    for one in draft.take("*activation_offload", "activation_offload_plan.*", "enable_activation_offload"):
        wanted = bool(one.value) if isinstance(one.value, list) else switch(one.value)
        if wanted and one.name != "activation_offload_plan.apply_modules":
            draft.put("memory.offload_activations", True, [one])
        else:
            draft.needless.append((one, "off, or a list of modules; memory.offload_activations takes all blocks"))
    mode, on = draft.first("loss_cfg.compute_mode"), draft.first("enable_chunk_loss")
    chunk = draft.first("loss_cfg.chunk_size", "chunkloss_plan.chunk_size")
    module = draft.take("chunkloss_plan.apply_module")
    draft.needless += [(one, "the head's loss is always chunked") for one in (*module, mode, on) if one]
    asked = (mode is not None and mode.value == "chunk") or (on is not None and switch(on.value))
    if chunk is not None and asked:
        draft.put("memory.loss_chunk_tokens", whole(chunk.value), [chunk])
    elif chunk is not None:
        draft.needless.append((chunk, "memory.loss_chunk_tokens: auto chooses it"))


def _freezing(draft: Draft) -> None:
    has_deepstack = any("qwen3" in str(one.value) for one in draft.settings if one.name.endswith("model_id"))
    rules = {
        "image_encoder.vision_encoder.freeze": ("vision",),
        "image_encoder.vision_projector.freeze": ("vision.merger", *(["vision.deepstack"] if has_deepstack else [])),
        "audio_encoder.audio_encoder.freeze": ("audio",),
        "text_decoder.freeze": ("text",),
    }
    for name, components in rules.items():
        if (one := draft.first(name)) is not None and one.value is not None:
            for component in components:
                draft.put(f"policy.{component}.freeze", switch(one.value), [one])
    listed = draft.first("freeze")
    if listed is not None and listed.value:
        _frozen_modules(draft, listed)


def _frozen_modules(draft: Draft, listed: Setting) -> None:
    """A list of module names, whole towers or all of their parts."""
    names = {re.sub(r"^(model|thinker)\.", "", str(name)) for name in files(listed.value)}
    whole_tower = {"visual.patch_embed", "visual.blocks", "visual.pos_embed"}
    known = {
        "vision": "visual" in names or whole_tower <= names,
        "vision.merger": "visual" in names or "visual.merger" in names,
        "vision.deepstack": bool({"visual", "visual.merger_list", "visual.deepstack_merger_list"} & names),
        "audio": "audio_tower" in names,
        "text": "language_model" in names or {"layers", "embed_tokens"} <= names,
        "lm_head": "lm_head" in names,
    }
    if known["vision"]:
        draft.put("policy.vision.freeze", True, [listed])
        for part in ("vision.merger", "vision.deepstack"):
            if not known[part]:
                draft.put(f"policy.{part}.freeze", False, [listed], "not in the list there")
    for component in ("audio", "text", "lm_head"):
        if known[component]:
            draft.put(f"policy.{component}.freeze", True, [listed])
    covered = {"visual", *whole_tower, "visual.merger", "visual.merger_list", "visual.deepstack_merger_list"}
    covered |= {"audio_tower", "language_model", "layers", "embed_tokens", "lm_head"}
    for name in sorted(names - covered) if known["vision"] else sorted(names & whole_tower | (names - covered)):
        draft.lost.append((f"{listed.origin} {name}", "parts of a component cannot be frozen alone; see policy"))


def _lora(draft: Draft) -> None:
    found = {name: draft.first(f"lora_{name}", f"lora_args.lora_{name}")
             for name in ("r", "alpha", "dropout", "target_modules")}  # fmt: skip
    hooks = draft.take("lora_register_forward_hook", "lora_args.lora_register_forward_hook", "lora_mixed_precision",
                       "load_base_model")  # fmt: skip
    draft.needless += [(one, "gradients reach adapters without hooks") for one in hooks]
    if not any(found.values()):
        return
    for name, key in (("r", "rank"), ("alpha", "alpha"), ("dropout", "dropout")):
        if (one := found[name]) is not None:
            value = whole(one.value) if name == "r" else float(one.value)
            draft.put(f"policy.text.lora.{key}", value, [one])
    if (targets := found["target_modules"]) is not None:
        names = re.split(r"[\s,]+", targets.value) if isinstance(targets.value, str) else files(targets.value)
        modules = [part for name in names if name for part in LORA_MODULES.get(name, [name])]
        draft.put("policy.text.lora.modules", list(dict.fromkeys(modules)), [targets])
    if "policy.text.freeze" in draft.entries:
        frozen = draft.entries.pop("policy.text.freeze")
        draft.needless.append((Setting(name="freeze", value=None, origin=", ".join(frozen.origins)),
                               "adapters train in place of the weights"))  # fmt: skip


def _attributes(draft: Draft) -> None:
    """`attr`: which field of a row is what; null there says that rows have none, which needs no saying."""
    for one in draft.take("attr.*"):
        name = one.name.removeprefix("attr.")
        if one.value is None:
            draft.needless.append((one, "rows without such a field need no word"))
        elif name == "formatting":
            draft.needless.append((one, "the format is detected"))
        else:
            draft.put(f"data.attr.{name}", one.value, [one])


def _split(draft: Draft) -> None:
    """Megatron's `--split 99,1,0`: shares of training, validation and test rows."""
    train, valid = draft.first("train_data_path"), draft.first("valid_data_path")
    share = draft.first("split")
    if train is not None:
        draft.settings.append(train)
    if valid is not None and (train is None or valid.value != train.value):
        draft.put("data.eval", files(valid.value), [valid])
    elif valid is not None:
        draft.needless.append((valid, "the same files; data.split holds rows out"))
    if share is not None and share.value is not None:
        parts = [float(part) for part in str(share.value).split(",")]
        if "data.eval" in draft.entries or len(parts) < 2 or not parts[1]:
            draft.needless.append((share, "evaluation rows have files of their own, or none are held out"))
        else:
            draft.put("data.split", parts[1] / sum(parts), [share])
            if sum(parts[2:]):
                draft.lost.append((str(share), "its test share; hold rows back in a file of their own"))
    every = draft.first("eval_interval")
    if every is not None:
        if "data.split" in draft.entries or "data.eval" in draft.entries:
            draft.put("train.eval_every", whole(every.value), [every])
        else:
            draft.needless.append((every, "there are no evaluation rows; set data.split or data.eval"))


def _checkpoints(draft: Draft) -> None:
    for name, key in (("no_load_optim", "load_optimizer"), ("no_load_rng", "load_rng"),
                      ("no_save_optim", "save_optimizer")):  # fmt: skip
        if (one := draft.first(name)) is not None:
            if switch(one.value):
                draft.put(f"checkpoint.{key}", False, [one], "remove it to resume exactly")
            else:
                draft.needless.append((one, "off"))


def _profile(draft: Draft) -> None:
    for prefix in ("profile.", "memory_profile."):
        enabled = draft.first(f"{prefix}enable")
        on = enabled is not None and switch(enabled.value)
        first, last = draft.take(f"{prefix}*start_step"), draft.take(f"{prefix}*end_step")
        rest = [one for one in (enabled, *draft.take(f"{prefix}*")) if one is not None]
        if on and prefix == "profile." and first and last:
            draft.put("log.profile", [whole(first[0].value), whole(last[0].value)], [first[0], last[0]])
            draft.needless += [(one, "log.profile writes a whole trace of these steps") for one in rest]
        else:
            why = "off" if not on else "log.profile traces time and memory"
            draft.needless += [(one, why) for one in (*first, *last, *rest)]
