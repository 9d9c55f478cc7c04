"""What a run leaves for others: a Hugging Face directory with adapters merged in, and the adapters alone.

Both `run/trainer.py`, from weights in memory, and `tools/export.py`, from a checkpoint, come here with a `gather`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniloom.checkpoint.adapters import write_adapter
from omniloom.checkpoint.agreement import Group
from omniloom.checkpoint.export import export
from omniloom.config import Config, DataConfig, config_to_dict
from omniloom.ops.nf4 import unpack
from omniloom.run.opening import Workshop
from omniloom.run.trained_media import TrainedMedia, processor_files
from omniloom.training.lora import merging

NO_ADAPTER = "model.num_layers cuts the model and peft would put an adapter onto all layers"


def export_model(
    workshop: Workshop,
    directory: Path,
    changed: Collection[str],
    gather: Callable[[str], Tensor],
    *,
    media: TrainedMedia,
    say: Callable[[str], None],
    group: Group = None,
) -> Path:
    """Write the model as transformers and vLLM load it; all of `group` alike, `gather` as in `export`.

    `changed` are the parameters that differ from the published ones; those that adapters belong to, and packed ones,
    which `gather` gives as codes, are added. What the run did to media goes into the processor files.
    """
    files, limits = processor_files(workshop.checkpoint.directory, media, workshop.config.data)
    for words in limits:
        say(f"{directory.name}/ is for {words}, as trained")
    if workshop.cut or workshop.new_voices:
        files["config.json"] = dict(workshop.config_json)
    # what was packed trained as its codes say, so that is the model that was evaluated, too
    bases = [*(adapter.base for adapter in workshop.adapters), *workshop.packed]
    numbers = partial(_numbers, gather, frozenset(workshop.packed))
    return export(
        directory,
        workshop.checkpoint,
        workshop.key_map,
        list(dict.fromkeys([*(name for name in changed if name not in workshop.adapter_names), *bases])),
        merging(numbers, workshop.adapters) if workshop.adapters else numbers,
        files=files,
        dropped=workshop.cut,
        note={"data": media_settings(workshop.config.data)},
        group=group,
    )


def _numbers(gather: Callable[[str], Tensor], packed: Collection[str], name: str) -> Tensor:
    return unpack(gather(name), torch.float32) if name in packed else gather(name)


def media_settings(data: DataConfig) -> dict[str, Any]:
    """What of the section `data` says how a prompt and its media are read, as a config file has it."""
    tree = config_to_dict(Config(data=data))["data"]
    template = ("template", "template_variables", "system", "enable_thinking")
    return {name: tree[name] for name in (*template, "image", "video", "audio")}


def export_adapter(
    workshop: Workshop,
    directory: Path,
    changed: Collection[str],
    gather: Callable[[str], Tensor],
    *,
    group: Group = None,
) -> Path:
    """Write the adapters, and what was trained beside them, as PEFT loads them onto the published model.

    Raises: ValueError for a run without adapters, or on fewer layers than the published model has.
    """
    if not workshop.adapters:
        raise ValueError("this run trained no adapter; export the whole model instead")
    if workshop.cut:
        raise ValueError(f"this run's adapters go with its merged model alone, since {NO_ADAPTER}; export that instead")
    return write_adapter(
        directory,
        workshop.checkpoint,
        workshop.config_json,
        workshop.assemblies,
        workshop.adapters,
        gather,
        tied=workshop.key_map.tied,
        base_name=workshop.base_name,
        trained=[name for name in changed if name not in workshop.adapter_names],
        group=group,
    )


def write_results(
    workshop: Workshop,
    gather: Callable[[str], Tensor],
    changed: Collection[str],
    *,
    media: TrainedMedia,
    on_tensor: Callable[[str], None],
    say: Callable[[str], None],
    group: Group,
) -> None:
    """A finished run's model, adapters merged in, in `hf/`; its adapters in `adapter/`, where they fit. Collective.

    `on_tensor` is called with the name of each tensor that is gathered.
    """
    run_dir = Path(workshop.config.train.run_dir)

    def gather_next(name: str) -> Tensor:
        on_tensor(name)
        return gather(name)

    if workshop.adapters and workshop.cut:
        say(f"no adapter/, since {NO_ADAPTER}; hf/ has the adapters merged in")
    elif workshop.adapters:
        directory = export_adapter(workshop, run_dir / "adapter", changed, gather_next, group=group)
        say(f"wrote {directory}")
    if workshop.config.checkpoint.export:
        directory = export_model(workshop, run_dir / "hf", changed, gather_next, media=media, say=say, group=group)
        say(f"wrote {directory}")
