"""Writes a published directory: trained tensors in the source's names, dtypes and files, everything else as it was.

Owns the outgoing half of the Hugging Face format. The bytes depend on the source and the trained tensors alone, never
on the number of ranks: full tensors are gathered one at a time in key-map order on all ranks, and rank 0 writes them
where the source's layout has them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from omniloom.checkpoint.agreement import agree, attempt, rank
from omniloom.checkpoint.files import sync_directory, write_json
from omniloom.checkpoint.tensor_files import DTYPES, INDEX_NAME, HFCheckpoint, TensorEntry, bytes_of
from omniloom.keymap import Assembly, KeyMap, listed

MARKER_NAME = "omniloom_export.json"
# of weights and of trainers' states
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".onnx")
VOICES = "spk_dict.pt"  # without which Qwen2.5-Omni cannot be loaded
COPY_BYTES = 16 << 20


def export(
    out_dir: str | Path,
    source: HFCheckpoint,
    key_map: KeyMap,
    names: Collection[str],
    gather: Callable[[str], Tensor | None],
    *,
    files: Mapping[str, dict[str, Any]] | None = None,
    dropped: Collection[str] = (),
    note: Mapping[str, Any] | None = None,
    group: ProcessGroup | None = None,
) -> Path:
    """Write `names` of ours, taken from `gather`, and all else of `source` into `out_dir`, atomically.

    All ranks of `group` call it alike, and it `gather(name)` once per name in the same order: so that may be a
    collective, which returns the full tensor, any float dtype, on rank 0. Tensors of ours in `dropped` (cut layers) are
    left out. `files` are JSON files, by name, in place of the source's; `note` goes into the export's marker.

    Raises: ValueError on every rank if `out_dir` holds something that is no earlier export, for tensors that do not
        fit the source, and when the disk is full; what was there before is then untouched.
    """
    assemblies = key_map.assemblies(source.shapes)
    plan = _plan(source, assemblies, key_map, names, dropped)
    writer = _Writer(Path(out_dir), source, plan) if rank(group) == 0 else None
    words = f"write the export {out_dir}", "; nothing there was changed"
    try:
        fault = attempt(lambda: writer.begin(files or {}, note or {}), *words) if writer else None
        agree(fault, group)
        for name in (name for name in assemblies if name in plan.places):
            tensor = gather(name)
            if writer is not None and fault is None:  # after a fault, keep the other ranks' collectives company
                fault = attempt(partial(writer.write, name, tensor, assemblies[name]), *words)
            del tensor
        agree(fault or (attempt(writer.commit, *words) if writer else None), group)
    except ValueError:
        if writer is not None:
            shutil.rmtree(writer.partial, ignore_errors=True)
        raise
    return Path(out_dir)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    entries: dict[str, TensorEntry]  # the source's, of all tensors that will be written
    places: dict[str, tuple[str, ...]]  # tensor of ours: published tensors that it fills
    carried: tuple[str, ...]


def _plan(
    source: HFCheckpoint,
    assemblies: dict[str, Assembly],
    key_map: KeyMap,
    names: Collection[str],
    dropped: Collection[str],
) -> _Plan:
    unknown = [name for name in (*names, *dropped) if name not in assemblies]
    if unknown:
        raise ValueError(f"{source.directory} has no tensors for {listed(unknown)}; is it the model trained here?")
    second = key_map.second_names(source.shapes)
    filled: dict[str, list[str]] = {}
    owner: dict[str, str] = {}  # a tied name of ours has the same pieces: write them once
    for name in names:
        for piece in assemblies[name].pieces:
            if owner.setdefault(piece.published, name) == name:
                filled.setdefault(name, []).append(piece.published)
    for published, same_as in second.items():
        if same_as in filled:
            filled[same_as].append(published)
    gone = {piece.published for name in dropped for piece in assemblies[name].pieces}
    entries = {name: entry for name, entry in source.entries.items() if name not in gone}
    written = {published for places in filled.values() for published in places}
    assert not written & gone, "a tensor is both exported and dropped"
    return _Plan(
        entries=entries,
        places={name: tuple(places) for name, places in filled.items()},
        carried=tuple(name for name in entries if name not in written),
    )


class _Writer:
    """The one rank's work on disk: a folder beside the target, renamed into place at the end."""

    def __init__(self, out_dir: Path, source: HFCheckpoint, plan: _Plan) -> None:
        self.out_dir = out_dir
        self.source = source
        self.plan = plan
        self.partial = out_dir.parent / f".{out_dir.name}.partial"
        self.previous = out_dir.parent / f".{out_dir.name}.previous"
        self.offsets: dict[str, tuple[Path, int]] = {}

    def begin(self, files: Mapping[str, dict[str, Any]], note: Mapping[str, Any]) -> None:
        """Check the target, copy all that was not trained, leave room for the rest."""
        if self.previous.is_dir() and not self.out_dir.exists():
            self.previous.rename(self.out_dir)  # a kill between the two renames of an earlier export
        self._check_target()
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        needed = sum(entry.num_bytes for entry in self.plan.entries.values())
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"the export takes {needed} bytes, the disk has {free} free")
        self._copy_other_files(files, note)
        for file in self.source.metadata:
            self._lay_out_file(file)
        for name in self.plan.carried:
            self._carry(self.source.entries[name])

    def write(self, name: str, tensor: Tensor | None, assembly: Assembly) -> None:
        """Put one full tensor of ours into its published places."""
        assert tensor is not None, f"gather gave rank 0 nothing for {name}"
        if tuple(tensor.shape) != assembly.shape:
            raise ValueError(f"{name}: expected {list(assembly.shape)} as in the source, got {list(tensor.shape)}")
        pieces = {piece.published: piece for piece in assembly.pieces}
        for published in self.plan.places[name]:
            entry = self.source.entries[published]
            part = tensor
            if published not in pieces and tuple(tensor.shape) != entry.shape:
                raise ValueError(
                    f"{published}: expected {list(tensor.shape)} as its twin {name}, got {list(entry.shape)}"
                )
            if (piece := pieces.get(published)) is not None:
                part = tensor[tuple(slice(start, stop) for start, stop in piece.box)]
                part = part[0] if piece.stacked else part
                part = part.transpose(-1, -2) if piece.reshape == "transpose" else part
            self._put(published, part.to(DTYPES[entry.dtype]).reshape(entry.shape).contiguous())

    def commit(self) -> None:
        for file in sorted(self.partial.rglob("*")):
            if file.is_file():
                sync_directory(file)
        sync_directory(self.partial)
        if self.out_dir.exists():
            shutil.rmtree(self.previous, ignore_errors=True)
            self.out_dir.rename(self.previous)
        self.partial.rename(self.out_dir)
        sync_directory(self.out_dir.parent)
        shutil.rmtree(self.previous, ignore_errors=True)

    def _check_target(self) -> None:
        if self.out_dir.resolve() == self.source.directory.resolve():
            raise ValueError(f"{self.out_dir} is the source of this model; export into another directory")
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise ValueError(f"{self.out_dir} is a file; export into a directory")
        held = self.out_dir.is_dir() and any(self.out_dir.iterdir())
        if held and not (self.out_dir / MARKER_NAME).is_file():
            raise ValueError(f"{self.out_dir} is not empty and no earlier export; choose another directory or empty it")

    def _copy_other_files(self, files: Mapping[str, dict[str, Any]], note: Mapping[str, Any]) -> None:
        for path, relative in _other_files(self.source.directory):
            target = self.partial / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        for name, content in files.items():
            write_json(self.partial / name, content)
        if self.source.index is not None:
            weight_map = {name: entry.file.name for name, entry in self.plan.entries.items()}
            metadata = dict(self.source.index.get("metadata") or {})
            metadata["total_size"] = sum(entry.num_bytes for entry in self.plan.entries.values())
            if "total_parameters" in metadata and len(self.plan.entries) < len(self.source.entries):
                del metadata["total_parameters"]
            index = {**self.source.index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.partial / INDEX_NAME, index)
        marker = {"source": self.source.directory.name, "trained_tensors": sum(map(len, self.plan.places.values()))}
        write_json(self.partial / MARKER_NAME, {**marker, **note})

    def _lay_out_file(self, file: Path) -> None:
        entries = [entry for entry in self.plan.entries.values() if entry.file == file]
        if not entries:
            return
        header: dict[str, Any] = {"__metadata__": self.source.metadata[file]} if self.source.metadata[file] else {}
        place = 0
        for entry in entries:
            stop = place + entry.num_bytes
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [place, stop]}
            place = stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        target = self.partial / file.name
        for entry in entries:
            start, _ = header[entry.name]["data_offsets"]
            self.offsets[entry.name] = (target, 8 + len(text) + start)
        with target.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.flush()
            if place:
                os.posix_fallocate(stream.fileno(), 8 + len(text), place)  # a full disk shows now, not in an hour

    def _carry(self, entry: TensorEntry) -> None:
        target, start = self.offsets[entry.name]
        with entry.file.open("rb") as source, target.open("r+b") as stream:
            source.seek(entry.start)
            stream.seek(start)
            left = entry.num_bytes
            while left:
                block = source.read(min(left, COPY_BYTES))
                if not block:
                    raise ValueError(f"{entry.file} became shorter while it was copied")
                stream.write(block)
                left -= len(block)

    def _put(self, published: str, tensor: Tensor) -> None:
        target, start = self.offsets[published]
        if tensor.numel():
            with target.open("r+b") as stream:
                stream.seek(start)
                stream.write(bytes_of(tensor.contiguous()))


def _other_files(directory: Path) -> Iterable[tuple[Path, Path]]:
    """What a model has beside its weights. Folders with weights are another's: of a run, of a trainer's checkpoint."""
    found = [(path, path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]
    weights = {path for _, path in found if path.suffix in WEIGHT_SUFFIXES and path.name != VOICES}
    others = {folder for path in weights for folder in path.parents if folder != Path()}
    for path, relative in found:
        hidden = any(part.startswith(".") for part in relative.parts)
        written = relative in weights or path.name.endswith(".index.json") or path.name == MARKER_NAME
        if not hidden and not written and others.isdisjoint(relative.parents):
            yield path, relative
