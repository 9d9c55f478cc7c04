"""Saves and restores the whole state of a run: tensors by torch DCP, everything else as JSON.

Owns when a checkpoint counts: files first, on all ranks, then checksums, which rank 0 compares with what it sees
itself, then the marker, then the rename to its final name, then `latest`, then the removal of old ones. State is a flat
mapping from names to tensors, keyed by parameter names, so that it does not depend on the layout. Needs one file system
that all ranks see. `stored` reads it back.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save as torch_save
from torch.distributed.tensor import DTensor

from omniloom.checkpoint.agreement import agree, attempt, gather, in_group, num_ranks, on_first, rank
from omniloom.checkpoint.files import sync_directory, write_text
from omniloom.checkpoint.stored import (
    EXTRAS_NAME,
    MARKER_NAME,
    METADATA_NAME,
    StoredCheckpoint,
    checksum,
    list_committed,
    load_tensors,
    read_marker,
    seal,
    step_name,
    verify_files,
)
from omniloom.keymap import listed

LATEST_NAME = "latest"
MODEL, OPTIMIZER, RNG = "model.", "optimizer.", "rng."  # prefixes of names in a checkpoint


# ---------------------------------------------------------------------------------------- saving


class Saver:
    """Writes the checkpoints of one run. Every rank makes one (a collective where no `group` is given).

    With `asynchronous`, `save` only copies the rank's tensors to host memory (kept between saves) and returns; a thread
    writes them. An error of that thread is raised by the next `save` or by `finish`. `group` is a gloo group that is
    used for nothing else meanwhile.
    """

    def __init__(
        self, run_dir: str | Path, *, keep: int = 2, asynchronous: bool = False, group: dist.ProcessGroup | None = None
    ) -> None:
        self.root = Path(run_dir) / "checkpoints"
        self.keep = keep
        self.kept_steps: Collection[int] = ()  # whatever comes after them
        self.group = dist.new_group(backend="gloo") if group is None and in_group() else group
        self._staged: dict[str, Tensor] | None = {} if asynchronous else None
        self._thread = _make_thread() if asynchronous else None
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Mapping[str, Tensor], extras: Mapping[str, Any]) -> None:
        """Save `state` (plain tensors or DTensors; the same plain name must hold the same values on every rank).

        `extras` is JSON-able and the same on all ranks; rank 0's is written. Collective over all ranks.

        Raises: ValueError on every rank if any rank could not write; the attempt is removed, earlier ones stay.
        """
        self.finish()
        text = json.dumps(extras)  # now, so that a later change of a list does not reach the thread
        planner = _Planner(_local_tensors(state, self._staged))
        if self._thread is None:
            self._write(step, planner, dict(state), text)
        else:
            self._pending = self._thread.submit(self._write, step, planner, dict(state), text)

    def finish(self) -> None:
        """Wait for a save under way. Raises: its ValueError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish, and end the thread."""
        self.finish()
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, planner: _Planner, state: dict[str, Tensor], extras: str) -> None:
        partial = self.root / f"{step_name(step)}.partial"
        words = f"save step {step}", "; earlier checkpoints are intact"
        try:
            on_first(lambda: _make_empty(partial), *words, group=self.group)
            writer = _Writer(partial, sync_files=True)
            agree(attempt(lambda: self._save_tensors(writer, planner, state), *words), self.group)
            files = {path.name: _describe(path) for path in partial.glob(f"__{rank(self.group)}_*")}
            files = {name: item for part in gather(files, self.group) for name, item in part.items()}
            on_first(lambda: self._commit(partial, step, files, extras), *words, group=self.group)
        except ValueError:
            shutil.rmtree(partial, ignore_errors=True)  # by all: it may be another directory on another node
            raise

    def _save_tensors(self, writer: _Writer, planner: _Planner, state: dict[str, Tensor]) -> None:
        """Collective. Raises: this rank's own error, of which the other ranks know by now."""
        # torch warns a process without a group, of which nothing is expected
        with nullcontext() if in_group() else warnings.catch_warnings(action="ignore"):
            try:
                torch_save(state, storage_writer=writer, planner=planner, process_group=self.group)
            except CheckpointException as failure:
                if (own := failure.failures.get(rank(self.group))) is not None:
                    raise own[0] from failure

    def _commit(self, partial: Path, step: int, files: dict[str, dict[str, Any]], extras: str) -> None:
        write_text(partial / EXTRAS_NAME, extras)
        files |= {name: _describe(partial / name) for name in (METADATA_NAME, EXTRAS_NAME)}
        # as this rank sees them: another node may have written into another directory of the same name
        faults = verify_files(partial, {name: (item["bytes"], item["crc32"]) for name, item in files.items()})
        if faults:
            raise OSError(
                f"rank 0 does not find in {partial} what other ranks wrote ({listed(faults, '; ')}); "
                "train.run_dir must be one directory that all nodes see"
            )
        sequence = 1 + max(
            (read_marker(directory)["sequence"] for directory in list_committed(self.root)[0]), default=0
        )
        marker = {"step": step, "sequence": sequence, "num_ranks": num_ranks(self.group), "files": files}
        sync_directory(partial)
        write_text(partial / MARKER_NAME, json.dumps(seal(marker), indent=1))
        sync_directory(partial)
        final = self.root / step_name(step)
        replaced = self.root / f"{step_name(step)}.replaced"
        if final.exists():  # the run went back and comes by again
            final.rename(replaced)
        partial.rename(final)
        write_text(self.root / LATEST_NAME, final.name + "\n")
        sync_directory(self.root)
        self._remove_old()

    def _remove_old(self) -> None:
        whole = [directory for directory in list_committed(self.root)[0] if not directory.suffix]  # not .replaced
        names = {step_name(step) for step in self.kept_steps}
        kept = {*whole[: self.keep], *(directory for directory in whole if directory.name in names)}
        for directory in self.root.glob("step_*"):
            if directory not in kept:
                # the marker first, so that a kill leaves no half one that counts
                (directory / MARKER_NAME).unlink(missing_ok=True)
                shutil.rmtree(directory, ignore_errors=True)


def _make_thread() -> ThreadPoolExecutor:
    """A thread with this one's accelerator: on the first, which is every new thread's, DCP would claim memory."""
    own: dict[str, Any] = {}
    if torch.accelerator.is_available():
        index = torch.accelerator.current_device_index()
        own = {"initializer": torch.accelerator.set_device_index, "initargs": (index,)}
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", **own)


class _Planner(DefaultSavePlanner):
    """DCP's planner over tensors whose local parts have been taken aside."""

    def __init__(self, local: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=False)
        self._local = local

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._local[index.fqn]


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # DCP's own notes the absolute path, as a pickled class


def _local_tensors(state: Mapping[str, Tensor], staged: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """This rank's part of each tensor: itself, or its copy in `staged` (host memory, reused if it fits)."""
    local = {}
    for name, tensor in state.items():
        with torch.no_grad():
            local[name] = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    if staged is None:
        return local
    on_device = False
    for name in [name for name in staged if name not in local]:
        del staged[name]
    for name, tensor in local.items():
        held = staged.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = staged[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=not tensor.is_cpu)
        held.copy_(tensor, non_blocking=True)
        on_device = on_device or not tensor.is_cpu
    if on_device:
        torch.accelerator.synchronize()  # the optimizer will change these tensors next
    return dict(staged)


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


# ---------------------------------------------------------------------------------------- what a state is made of


def model_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their own names, as a checkpoint names them."""
    return {MODEL + name: tensor for name, tensor in tensors.items()}


def optimizer_state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`optimizer.<parameter>.<key>` for every tensor (exp_avg, exp_avg_sq, step) that the optimizer has by now."""
    state = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"{name}: optimizer state {key} is a {type(value).__name__}, not a tensor"
            state[f"{OPTIMIZER}{name}.{key}"] = value
    return state


def rng_state() -> dict[str, Tensor]:
    """This rank's torch generators: CPU, and the current accelerator's."""
    state = {f"{RNG}{rank()}.cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        state[f"{RNG}{rank()}.{kind.type}"] = torch.get_device_module(kind).get_rng_state()
    return state


def stored_names(stored: StoredCheckpoint, known: Collection[str]) -> list[str]:
    """The parameters and buffers that a checkpoint holds, by their own names.

    Raises: ValueError if it holds one that is not among `known`: going on without it would lose what it learnt.
    """
    names = [name.removeprefix(MODEL) for name in stored.shapes if name.startswith(MODEL)]
    if foreign := [name for name in names if name not in known]:
        raise ValueError(
            f"{stored.directory} is a checkpoint of another model or policy: it holds {listed(foreign)}, "
            "which this run has not; go on with the config it was made with, or start anew with --overwrite"
        )
    return names


def load_model_state(stored: StoredCheckpoint, tensors: Mapping[str, Tensor]) -> None:
    """Fill parameters and buffers in place. Raises: ValueError listing what is missing or of another shape."""
    load_tensors(stored, model_state(tensors))


def load_optimizer_state(
    stored: StoredCheckpoint, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Give `optimizer` the stored state of its parameters, in their present sharding.

    Raises: ValueError if the checkpoint has no state for a parameter that the optimizer holds.
    """
    held = (parameter for group in optimizer.param_groups for parameter in group["params"])
    number_of = {id(parameter): number for number, parameter in enumerate(held)}
    wanted = {name: parameter for name, parameter in parameters.items() if id(parameter) in number_of}
    stored_keys: dict[str, list[str]] = {}
    for full in stored.shapes:
        if full.startswith(OPTIMIZER):
            name, key = full.removeprefix(OPTIMIZER).rsplit(".", 1)
            stored_keys.setdefault(name, []).append(key)
    if absent := [name for name in wanted if name not in stored_keys]:
        raise ValueError(
            f"{stored.directory} has no optimizer state for {listed(absent)}; was it saved with another policy, or "
            "with checkpoint.save_optimizer=false? checkpoint.load_optimizer=false starts with fresh moments"
        )
    values: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for name, parameter in wanted.items():
        for key in stored_keys[name]:
            full = f"{OPTIMIZER}{name}.{key}"
            shape, dtype, whole = stored.shapes[full], stored.dtype(full), tuple(parameter.shape)
            if key != "step" and shape in (whole, (*whole[:-1], 1)):  # sharded as it is; of rows, as its first column
                like = parameter if shape == whole else parameter.detach()[..., :1]
                values[full] = torch.zeros_like(like, dtype=dtype, requires_grad=False)
            else:
                values[full] = torch.zeros(shape, dtype=dtype)
            state.setdefault(number_of[id(parameter)], {})[key] = values[full]
    load_tensors(stored, values)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})  # it places `step` as the optimizer needs it


def load_rng_state(stored: StoredCheckpoint) -> tuple[int, ...]:
    """Restore this rank's generators. Returns the ranks, the same on each, that a checkpoint of other ranks lacks."""
    state = {name.removeprefix(f"{RNG}{rank()}."): tensor.clone() for name, tensor in rng_state().items()}
    lacking = tuple(
        number for number in range(num_ranks()) if any(f"{RNG}{number}.{kind}" not in stored.shapes for kind in state)
    )
    if rank() not in lacking:
        load_tensors(stored, {f"{RNG}{rank()}.{kind}": value for kind, value in state.items()})
        for kind, value in state.items():
            if kind == "cpu":
                torch.set_rng_state(value)
            else:
                torch.get_device_module(kind).set_rng_state(value)
    return lacking
