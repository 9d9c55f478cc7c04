"""What a resumable checkpoint is on disk, and how one is found, verified and read.

A directory `checkpoints/step_00000100/` of torch DCP files, `extras.json` and `COMMITTED`. The marker comes last and
lists every file with its size and CRC-32; a directory without it does not count. Nothing in a checkpoint is executed:
DCP's pickled `.metadata` goes through an unpickler that admits only the classes it needs, tensors are loaded with
`weights_only`, the rest is JSON. Knows no optimizer and no model: names and tensors only. `dcp` writes these.
"""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from omniloom.checkpoint.agreement import gather, num_ranks, rank
from omniloom.keymap import listed

MARKER_NAME = "COMMITTED"
EXTRAS_NAME = "extras.json"
METADATA_NAME = ".metadata"
CHECKSUM_BYTES = 16 << 20
VERIFY_THREADS = 8  # reading and zlib leave the interpreter to one another

# all that the .metadata of a state of tensors needs
METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # a lookup in a table of layouts
    ("torch", "Size"),
}
DTYPE_NAMES = {str(kind).removeprefix("torch.") for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A committed checkpoint whose files have been verified."""

    directory: Path
    step: int
    sequence: int  # counts commits of a run; the highest is the newest, also after going back to an earlier step
    extras: dict[str, Any]
    metadata: Metadata

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes by name."""
        return {name: tuple(self._entry(name).size) for name in self.metadata.state_dict_metadata}

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).properties.dtype

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self.metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata), name  # as `read_metadata` has seen to
        return entry


# ---------------------------------------------------------------------------------------- finding


def find_latest(
    run_dir: str | Path, *, group: ProcessGroup | None = None
) -> tuple[StoredCheckpoint | None, tuple[str, ...]]:
    """The newest checkpoint of a run that is whole, and what was passed over on the way, in words for the log.

    Collective over `group`, whose ranks share the work of verification. None where no save was ever completed.

    Raises: ValueError if there are committed checkpoints and every one is damaged: starting over in silence would
        lose the run.
    """
    root = Path(run_dir) / "checkpoints"
    newest_first, damaged, incomplete = gather(list_committed(root), group)[0]
    for directory in newest_first:
        try:
            return open_stored(directory, group=group), (*incomplete, *damaged)
        except ValueError as error:
            if group is None and not directory.exists():  # a run that is saving named it, or removed it, meanwhile
                return find_latest(run_dir)
            damaged.append(str(error))
    if damaged:
        raise ValueError(
            f"{root}: none of {len(damaged)} checkpoints is whole; --overwrite starts over:\n  " + "\n  ".join(damaged)
        )
    return None, tuple(incomplete)


def open_stored(path: str | Path, *, group: ProcessGroup | None = None) -> StoredCheckpoint:
    """Verify and open one checkpoint directory (or a run's newest, if `path` is a run directory).

    Collective over `group`. Raises: ValueError for a directory that holds none, or a damaged one.
    """
    directory = Path(path)
    if not (directory / MARKER_NAME).is_file():
        if (directory / "checkpoints").is_dir():
            stored, _ = find_latest(directory, group=group)
            if stored is not None:
                return stored
        raise ValueError(
            f"{directory}: no complete checkpoint here ({MARKER_NAME} is missing); name a run directory, or a step "
            "of its checkpoints/"
        )
    marker = read_marker(directory)
    mine = dict(sorted(marker["files"].items())[rank(group) :: num_ranks(group)])
    faults = sorted({fault for part in gather(verify_files(directory, mine), group) for fault in part})
    if faults:
        raise ValueError(f"{directory} is damaged: " + listed(faults, "; "))
    return StoredCheckpoint(
        directory=directory,
        step=marker["step"],
        sequence=marker["sequence"],
        extras=json.loads((directory / EXTRAS_NAME).read_text(encoding="utf-8")),
        metadata=read_metadata(directory, marker),
    )


def read_marker(directory: Path) -> dict[str, Any]:
    """The commit marker. Raises: ValueError if it is not what `dcp` writes."""
    try:
        marker = json.loads((directory / MARKER_NAME).read_text(encoding="utf-8"))
        if seal(marker) != marker:
            raise ValueError("it does not match its own checksum")
        files = {str(name): (int(item["bytes"]), str(item["crc32"])) for name, item in marker["files"].items()}
        step, sequence = int(marker["step"]), int(marker["sequence"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory} is damaged: {MARKER_NAME} is not readable ({error})") from None
    absent = {METADATA_NAME, EXTRAS_NAME} - files.keys()
    if absent or any(Path(name).name != name for name in files):
        raise ValueError(f"{directory} is damaged: {MARKER_NAME} does not list its files")
    if directory.name.partition(".")[0] != (name := step_name(step)) and directory.name.startswith("step_"):
        raise ValueError(f"{directory} is damaged: its marker is that of {name}")
    return {"step": step, "sequence": sequence, "files": files}


def seal(marker: Mapping[str, Any]) -> dict[str, Any]:
    """The marker with a checksum of its other fields, so that a flipped digit in it shows, too."""
    body = {key: value for key, value in marker.items() if key != "crc32"}
    return {**body, "crc32": f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"}


def step_name(step: int) -> str:
    return f"step_{step:08}"


def checksum(path: Path) -> str:
    """CRC-32 of a file as hexadecimal."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(CHECKSUM_BYTES):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def list_committed(root: Path) -> tuple[list[Path], list[str], list[str]]:
    """Committed directories, newest first; words about those with a damaged marker, and about those without any."""
    found, damaged, incomplete = [], [], []
    for directory in sorted(root.glob("step_*")):
        if not (directory / MARKER_NAME).is_file():
            incomplete.append(f"{directory} was not completed and is ignored")
            continue
        try:
            found.append((read_marker(directory)["sequence"], directory))
        except ValueError as error:
            damaged.append(str(error))
    return [directory for _, directory in sorted(found, reverse=True)], damaged, incomplete


def verify_files(directory: Path, files: Mapping[str, tuple[int, str]]) -> list[str]:
    """What is wrong with files of a checkpoint, given the bytes and the checksum that each must have."""

    def fault(name: str) -> str | None:
        num_bytes, crc32 = files[name]
        path = directory / name
        try:
            size = path.stat().st_size
            if size != num_bytes:
                return f"{name} has {size} bytes instead of {num_bytes}"
            return None if checksum(path) == crc32 else f"{name} does not match its checksum"
        except OSError as error:
            return f"{name}: {error.strerror}"

    with ThreadPoolExecutor(VERIFY_THREADS) as threads:
        return [found for found in threads.map(fault, files) if found is not None]


# ---------------------------------------------------------------------------------------- metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_CLASSES or (module == "torch" and name in DTYPE_NAMES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of tensors needs")


def read_metadata(directory: Path, marker: Mapping[str, Any]) -> Metadata:
    """DCP's `.metadata`, without running anything in it.

    Raises: ValueError if it names other classes than METADATA_CLASSES, holds anything but tensors, or points to
        files that the marker does not list.
    """
    path = directory / METADATA_NAME
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is refused: {error}") from None
    storage = getattr(metadata, "storage_data", None)
    entries = getattr(metadata, "state_dict_metadata", None)
    if not isinstance(metadata, Metadata) or not isinstance(storage, dict) or not isinstance(entries, dict):
        raise ValueError(f"{path} is refused: it describes no checkpoint")
    for name, entry in entries.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{path} is refused: {name} is no tensor but {type(entry).__name__}")
    for index, place in storage.items():
        file, changed = getattr(place, "relative_path", None), getattr(place, "transform_descriptors", None)
        if not isinstance(index, MetadataIndex) or file not in marker["files"] or changed:
            raise ValueError(f"{path} is refused: a tensor lies in {file!r}")
    return metadata


# ---------------------------------------------------------------------------------------- reading tensors


def load_tensors(stored: StoredCheckpoint, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors`, plain or DTensor in any sharding, with the stored values of these names. No collectives.

    Raises: ValueError listing names that the checkpoint lacks and shapes that differ, before anything is filled; for
        a file with anything but tensors in it, which is not executed.
    """
    shapes = stored.shapes
    faults = [f"{name} is not in it" for name in tensors if name not in shapes]
    for name, tensor in tensors.items():
        if name in shapes and shapes[name] != tuple(tensor.shape):
            faults.append(f"{name} has shape {list(shapes[name])} there, {list(tensor.shape)} here")
    if faults:
        raise ValueError(f"{stored.directory} is a checkpoint of another model or policy: " + listed(faults, "; "))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = FileSystemReader(stored.directory)
    with torch.no_grad():
        # dcp.load would unpickle .metadata by itself; each rank plans alone, since loading needs no coordination
        planner.set_up_planner(dict(tensors), stored.metadata, is_coordinator=True)
        reader.set_up_storage_reader(stored.metadata, True)
        plans = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
        plan = planner.finish_plan(reader.prepare_global_plan(plans)[0])
        try:
            reader.read_data(plan, planner).wait()
        except pickle.UnpicklingError:
            raise ValueError(f"{stored.directory} is refused: a file holds something that is no tensor") from None


def read_stored_tensor(stored: StoredCheckpoint, name: str) -> Tensor:
    """One full tensor, on the CPU, in its stored dtype: what `export` gathers from a checkpoint without its ranks."""
    if name not in stored.shapes:
        raise ValueError(f"{stored.directory} has no {name}")
    tensor = torch.empty(stored.shapes[name], dtype=stored.dtype(name))
    load_tensors(stored, {name: tensor})
    return tensor
