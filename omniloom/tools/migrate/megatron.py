"""The settings of MindSpeed-MM and Pai-Megatron-Patch: Megatron's flags, `data.json`, `model.json`, YAML files.

Names are as their files spell them: flags with underscores, the paths of the JSON and YAML trees with dots. What one
setting alone decides is in `other_trainers.yaml`; here is what several decide together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from omniloom.tools.migrate.draft import Draft, read_rules
from omniloom.tools.migrate.readers import Value, files, switch, whole

MEGATRON_DEFAULTS = {  # where they differ from ours
    "train.betas": [0.9, 0.999],
    "train.weight_decay": 0.01,
    "train.schedule": "linear",
    "train.seed": 1234,
    "train.loss": "batch",
}
TOWER = {"visual.patch_embed", "visual.blocks", "visual.pos_embed"}
FROZEN = {  # component: sets of module names of which one must be in the list whole
    "vision": ({"visual"}, TOWER),
    "vision.merger": ({"visual"}, {"visual.merger"}),
    "vision.deepstack": ({"visual"}, {"visual.merger_list"}, {"visual.deepstack_merger_list"}),
    "audio": ({"audio_tower"},),
    "text": ({"language_model"}, {"layers", "embed_tokens"}),
    "lm_head": ({"lm_head"},),
}


def migrate_megatron(
    draft: Draft, whose: str = "Megatron's own default", defaults: Mapping[str, Value] = MEGATRON_DEFAULTS
) -> None:
    """Deal with every setting of these systems that `draft` holds. `defaults` hold where they say nothing."""
    uses_megatron = any(one.name in ("train_iters", "micro_batch_size") for one in draft.settings)
    _batch(draft)
    draft.put_betas((0.9, 0.999))
    _context(draft)
    _recompute(draft)
    _loss_chunks(draft)
    _freezing(draft)
    _profile(draft)
    draft.apply(read_rules("megatron"))
    draft.put_warmup_share("lr_warmup_fraction", "lr_warmup_ratio")
    _evaluation(draft)
    if any(key.startswith("policy.text.lora") for key in draft.entries):
        draft.drop("policy.text.freeze", "adapters train in place of the weights")
    if "parallel.pipeline" not in draft.entries:
        draft.drop("parallel.pipeline_layers", "it holds under pipeline parallelism alone, which is off")
    if uses_megatron:
        draft.put_defaults(defaults, whose)


def _batch(draft: Draft) -> None:
    if any(one.name.endswith("cutoff_len") for one in draft.settings):
        draft.set_aside(draft.take("seq_length"), "the data's cutoff_len bounds a sample")
    parts = [one for one in draft.settings if one.name in ("micro_batch_size", "gradient_accumulation_steps")]
    if not parts or any(one.name == "global_batch_size" and one.value is not None for one in draft.settings):
        return
    note = "a step there took so many samples; a pack holds as many as fit"
    ranks = 1
    if draft.num_ranks is None:
        note = "for each rank: the files do not say how many; multiply by the number of data-parallel ranks"
    else:
        sharing = ("ulysses_parallel_size", "context_parallel_size", "tensor_parallel_size", "ring_attention_size",
                   "tensor_model_parallel_size", "pipeline_model_parallel_size")  # fmt: skip
        ranks = max(draft.num_ranks // draft.product(*sharing), 1)
    draft.put("train.packs_per_step", ranks * draft.product(*(one.name for one in parts)), parts, note)


def _context(draft: Draft) -> None:
    """A ring, and what swaps heads beside it; without one, rules know the rest."""
    ring = draft.first("ring_attention_size")
    if ring is not None and (degree := draft.read(ring, whole, 1)) == 1:
        draft.set_aside([ring], "1 is the default")
    elif ring is not None:
        draft.put("parallel.context.ring", degree, [ring])
        if (ulysses := draft.first("ulysses_parallel_size", "context_parallel_size")) is not None:
            draft.put("parallel.context.ulysses", draft.read(ulysses, whole, 1), [ulysses])


def _recompute(draft: Draft) -> None:
    """`recompute` alone means all blocks, with a plan the towers or the decoder that it names."""
    if (plan := draft.first("recompute_plan.apply_modules")) is None:
        return
    asked = draft.first("recompute")
    if not draft.read(asked, switch, False):
        draft.set_aside([plan], "recompute is off")
        return
    known: list[Value] = []
    for root, mark in (("vision", "visual"), ("audio", "audio_tower"), ("text", "layers")):
        if found := [name for name in plan.value if mark in str(name)]:
            draft.put(f"policy.{root}.recompute", True, [plan])
            known += found
    draft.lost += [
        (f"{plan.origin} {name}", "no component here; see policy") for name in plan.value if name not in known
    ]


def _loss_chunks(draft: Draft) -> None:
    chunk = draft.first("loss_cfg.chunk_size", "chunkloss_plan.chunk_size")
    mode, on = draft.first("loss_cfg.compute_mode"), draft.first("enable_chunk_loss")
    draft.set_aside([one for one in (mode, on) if one], "the head's loss is always chunked")
    asked = (mode is not None and mode.value == "chunk") or draft.read(on, switch, False)
    if chunk is not None and asked:
        draft.put("memory.loss_chunk_tokens", draft.read(chunk, whole, 1), [chunk])
    elif chunk is not None:
        draft.set_aside([chunk], "memory.loss_chunk_tokens: auto chooses it")


def _freezing(draft: Draft) -> None:
    merger = draft.first("image_encoder.vision_projector.freeze")
    if merger is not None and merger.value is not None:
        has_deepstack = any("qwen3" in str(one.value) for one in draft.settings if one.name.endswith("model_id"))
        for component in ("vision.merger", "vision.deepstack")[: 1 + has_deepstack]:
            draft.put(f"policy.{component}.freeze", draft.read(merger, switch, False), [merger])
    listed = draft.first("freeze")
    if listed is None or not listed.value:
        return
    names = {re.sub(r"^(model|thinker)\.", "", str(name)) for name in files(listed.value)}
    covered: set[str] = set()
    for component, wholes in FROZEN.items():
        found = [modules for modules in wholes if modules <= names]
        covered = covered.union(*found)
        with_tower = component.startswith("vision.") and "policy.vision.freeze" in draft.entries
        if bool(found) != with_tower:
            draft.put(f"policy.{component}.freeze", bool(found), [listed], "" if found else "not in the list there")
    for name in sorted(names - covered):
        draft.lost.append((f"{listed.origin} {name}", "parts of a component cannot be frozen alone; see policy"))


def _profile(draft: Draft) -> None:
    enabled = draft.take("profile.enable", "memory_profile.enable")
    first, last = draft.take("profile.*start_step")[:1], draft.take("profile.*end_step")[:1]
    if any(draft.read(one, switch, False) for one in enabled if one.name == "profile.enable") and first and last:
        draft.put("log.profile", [draft.read(one, whole, 1) for one in (first[0], last[0])], [*first, *last])
    else:
        draft.set_aside([*first, *last], "off")
    draft.set_aside(enabled, "log.profile traces time and memory of its steps")


def _evaluation(draft: Draft) -> None:
    """Files of evaluation rows, or Megatron's `--split 99,1,0`: shares of training, validation and test rows."""
    valid, share, every = draft.first("valid_data_path"), draft.first("split"), draft.first("eval_interval")
    train = draft.entries.get("data.train")
    if valid is not None and (train is None or files(valid.value) != train.value):
        draft.put("data.eval", files(valid.value), [valid])
    elif valid is not None:
        draft.set_aside([valid], "the same files; data.split holds rows out")
    if share is not None and share.value is not None:
        parts = draft.read(share, lambda value: [float(part) for part in str(value).split(",")], [1.0])
        if "data.eval" in draft.entries or len(parts) < 2 or not parts[1]:
            draft.set_aside([share], "evaluation rows have files of their own, or none are held out")
        else:
            draft.put("data.split", parts[1] / sum(parts), [share])
            if sum(parts[2:]):
                draft.lost.append((str(share), "its test share; hold rows back in a file of their own"))
    if every is not None and {"data.split", "data.eval"} & draft.entries.keys():
        draft.put("train.eval_every", draft.read(every, whole, 1), [every])
    elif every is not None:
        draft.set_aside([every], "there are no evaluation rows; set data.split or data.eval")
