"""`omniloom export`: a Hugging Face directory from a run or one of its checkpoints, in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from omniloom.checkpoint.dcp import MODEL, stored_names
from omniloom.checkpoint.hf import read_tensor
from omniloom.checkpoint.stored import StoredCheckpoint, open_stored, read_stored_tensor, step_name
from omniloom.config import load_config
from omniloom.ops.nf4 import pack
from omniloom.run.best import BestSteps, read_evaluations
from omniloom.run.opening import Workshop, open_workshop
from omniloom.run.provenance import from_where_it_ran
from omniloom.run.results import export_adapter, export_model
from omniloom.run.state import check_model
from omniloom.run.trained_media import TrainedMedia


def export_checkpoint(
    source: Path,
    directory: Path,
    *,
    adapter: bool = False,
    best: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the newest checkpoint of a run, or the named one, as transformers and vLLM load it, adapters merged in.

    With `adapter`, the adapters alone, as PEFT loads them; with `best`, the run's best by its `checkpoint.best`.

    Tensors are read one at a time, so the host never holds the whole model. Raises: ValueError for a source that holds
    no complete checkpoint and for a target that is not empty; with `overwrite`, one that holds no earlier export.
    """
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise ValueError(f"{directory} is not empty; choose another one, or --overwrite an earlier export")
    if not source.exists():
        raise ValueError(f"{source} does not exist; name a run directory or one of its checkpoints/step_...")
    stored = open_stored(best_checkpoint(source) if best else source)
    workshop = _open_source(stored)
    check_model(stored, workshop, f"in {stored.directory.parent.parent / 'config.yaml'}")
    with torch.device("meta"):
        known = [name for name, _ in workshop.build().named_parameters()]
    changed = stored_names(stored, known)
    held, packed = frozenset(changed), frozenset(workshop.packed)

    def read(name: str) -> torch.Tensor:
        if name in held:
            return read_stored_tensor(stored, f"{MODEL}{name}")
        assembly = workshop.assemblies[name]
        published = torch.empty(assembly.shape)
        read_tensor(assembly, workshop.checkpoint, published)
        return pack(published) if name in packed else published

    if adapter:
        export_adapter(workshop, directory, changed, read)
    else:
        media = TrainedMedia(**stored.extras.get("media", {}))
        export_model(workshop, directory, changed, read, media=media, say=say)


def _open_source(stored: StoredCheckpoint) -> Workshop:
    """The model that a checkpoint's run began with, and its adapters as the run has them by now."""
    run_dir = stored.directory.parent.parent
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(
            f"{run_dir} has no config.yaml beside its checkpoints; export reads the source model's path there"
        )
    config = load_config(run_dir / "config.yaml")
    sizes = {name: (rank, alpha) for name, (rank, alpha) in stored.extras.get("adapter_sizes", {}).items()}
    path = from_where_it_ran(run_dir, config.model.path)
    return open_workshop(replace(config, model=replace(config.model, path=path, adapter=None)), adapter_sizes=sizes)


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint that a run keeps for its `checkpoint.best`. Raises: ValueError where it has none."""
    path = run_dir / "config.yaml"
    config = load_config(path)
    steps = BestSteps(config, read_evaluations(run_dir))
    if steps.name is None:
        raise ValueError(f"{path} has no checkpoint.best, so no checkpoint counts as the best; leave --best out")
    found = next((run_dir / "checkpoints" / step_name(step) for step in steps.kept), None)
    if found is None or not found.is_dir():
        raise ValueError(f"{run_dir}: no evaluation with a checkpoint has {steps.name} yet; leave --best out")
    return found
