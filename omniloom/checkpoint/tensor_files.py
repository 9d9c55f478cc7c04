"""Safetensors files as bytes on disk: headers checked in full, tensors read box by box.

Owns the file format: where each tensor of a published directory lies and how a slice of it is fetched without the
rest. Knows no model and no rank. `hf` reads models through it, `export` writes what it describes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from omniloom.checkpoint.files import read_json
from omniloom.keymap import Box, Shape, listed, whole
from omniloom.types import suggest

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
BUFFER_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a safetensors file, as its header describes it."""

    name: str
    dtype: str  # the format's word, a key of DTYPES
    shape: Shape
    file: Path
    start: int  # bytes from the start of the file
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class HFCheckpoint:
    """A published directory whose headers have been read and found whole. No tensor is in memory."""

    directory: Path
    entries: dict[str, TensorEntry]  # file by file, in the order of the bytes
    metadata: dict[Path, dict[str, str]]  # each file's `__metadata__`, in file order
    index: dict[str, Any] | None  # None: a single file

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read_slice(self, name: str, box: Box | None = None) -> Tensor:
        """The tensor's `box` (None: all), in the published dtype, on the CPU. Reads little beyond these bytes."""
        entry = self.entries[name]
        box = whole(entry.shape) if box is None else box
        out = torch.empty([stop - start for start, stop in box], dtype=DTYPES[entry.dtype])
        with entry.file.open("rb", buffering=0) as file:
            _read_box(file, entry.start, entry.shape, box, out)
        return out


def open_checkpoint(directory: str | Path) -> HFCheckpoint:
    """Read and check the headers of all safetensors files of a published directory.

    Raises: ValueError for a missing directory or shard, a truncated or garbage file, and for tensors that the index
        has and the files lack or the other way round. All faults of a directory in one message.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(_describe_missing(directory))
    index_path = directory / INDEX_NAME
    if (directory / SINGLE_NAME).is_file():  # as in transformers: the index may be an earlier model's
        index, files = None, [directory / SINGLE_NAME]
    elif index_path.is_file():
        index = _read_index(index_path)
        files = sorted({directory / name for name in index["weight_map"].values()})
    else:
        raise ValueError(f"{directory}: expected {INDEX_NAME} or {SINGLE_NAME}, found neither; {_hint(directory)}")
    entries: dict[str, TensorEntry] = {}
    metadata, faults = {}, []
    for file in files:
        try:
            found, metadata[file] = read_header(file)
        except ValueError as error:
            faults.append(str(error))
            continue
        faults += [f"{name} is in {entries[name].file.name} and in {file.name}" for name in found if name in entries]
        entries |= found
    if index is not None and not faults:
        faults = _compare_with_index(index["weight_map"], entries)
    if faults:
        raise ValueError(f"{directory} is not a whole checkpoint:\n  " + listed(faults, "\n  "))
    return HFCheckpoint(directory=directory, entries=entries, metadata=metadata, index=index)


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of one file in the order of their bytes, and its metadata.

    Raises: ValueError unless the file exists and its header accounts for every byte of it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header_bytes = stream.read(length) if length <= MAX_HEADER_BYTES else b""
    except FileNotFoundError:
        raise ValueError(f"missing shard {file.name}; download it again") from None
    except OSError as error:
        raise ValueError(f"cannot read {file.name}: {error.strerror}") from None
    if size < 8 or length > MAX_HEADER_BYTES or len(header_bytes) < length:
        raise ValueError(f"{file.name} is no safetensors file or cut short ({size} bytes); download it again")
    try:
        header = json.loads(header_bytes)
        metadata = header.pop("__metadata__", {})
        unknown = next((name for name, item in header.items() if item["dtype"] not in DTYPES), None)
        entries = [] if unknown else [_entry(name, item, file, 8 + length) for name, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} has a garbage header ({error}); download it again") from None
    if unknown:
        raise ValueError(
            f"{file.name}: {unknown} is stored as {header[unknown]['dtype']}, a format of quantised weights; known are "
            f"{', '.join(DTYPES)}"
        )
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    place = 8 + length
    for entry in entries:
        if entry.start != place:
            raise ValueError(f"{file.name} has a garbage header ({entry.name} does not start at byte {place})")
        place += entry.num_bytes
    if place != size:
        raise ValueError(
            f"{file.name} is {'truncated' if size < place else 'too long'}: "
            f"its header promises {place} bytes, the file has {size}; download it again"
        )
    return {entry.name: entry for entry in entries}, metadata


def _entry(name: str, item: dict[str, Any], file: Path, data_start: int) -> TensorEntry:
    dtype, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{name} has shape {shape}, offsets {start}, {stop}")
    if stop - start != prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} {list(shape)} of {dtype} cannot take {stop - start} bytes")
    return TensorEntry(name=name, dtype=dtype, shape=shape, file=file, start=data_start + start, num_bytes=stop - start)


def _read_index(path: Path) -> dict[str, Any]:
    index = read_json(path)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path}: expected a weight_map from tensor to file, got {type(names).__name__}")
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{path}: {name} must lie in a file of the same directory, got {file!r}")
    return index


def _compare_with_index(weight_map: dict[str, str], entries: dict[str, TensorEntry]) -> list[str]:
    faults = []
    for name, file in weight_map.items():
        if name not in entries:
            faults.append(f"missing tensor {name}: the index places it in {file}, which lacks it")
        elif entries[name].file.name != file:
            faults.append(f"{name}: the index places it in {file}, it lies in {entries[name].file.name}")
    faults += [f"extra tensor {name} in {entries[name].file.name}: not in the index" for name in entries
               if name not in weight_map]  # fmt: skip
    return faults


def _describe_missing(directory: Path) -> str:
    if directory.exists():
        return f"{directory}: expected a model directory, got a file"
    parent = directory.parent
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    hint = suggest(directory.name, names, among="", before=f"{parent}/")
    return (
        f"no such model directory: {directory}{hint}; expected a published checkpoint with its config.json: "
        "download it first, or give its hub id"
    )


def _hint(directory: Path) -> str:
    """What to name in place of a directory that is no model."""
    if (directory / "hf").is_dir():
        return f"it is a run, whose model is {directory / 'hf'}"
    if (directory / "config.yaml").is_file() or directory.parent.name == "checkpoints":
        return f"it belongs to a run: `omniloom export {directory} DIR` writes the model to DIR"
    if (directory / "adapter_config.json").is_file():
        return "it holds adapters alone: name their base model, or merge them by `omniloom export RUN DIR` and name DIR"
    names = sorted(path.name for path in directory.iterdir())
    if pickles := [name for name in names if re.fullmatch(r"(pytorch_)?model.*\.(bin|pt|pth)", name)]:
        return (
            f"its weights are pickles ({pickles[0]}), which may run any code when they are loaded; where you trust "
            f"them, rewrite them as safetensors by transformers: Class.from_pretrained({str(directory)!r})"
            ".save_pretrained(NEW), Class being its architecture, and name NEW"
        )
    if others := [name for name in names if name.endswith(".gguf")]:
        return f"{others[0]} is llama.cpp's format; take the checkpoint that it was made from"
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return f"it has {shards[0]}, but no index that lists its files; download the index again"
    return "is it a model directory?"


def _read_box(file: IO[bytes], start: int, shape: Shape, box: Box, out: Tensor) -> None:
    """Fill `out` (contiguous) with `box` of the row-major tensor at `start`."""
    row_bytes = prod(shape[1:]) * out.element_size()
    if box[1:] == whole(shape[1:]):
        first = box[0][0] if box else 0
        _fill(file, start + first * row_bytes, out)
    elif row_bytes >= BUFFER_BYTES // 32:
        for place, row in enumerate(range(*box[0])):
            _read_box(file, start + row * row_bytes, shape[1:], box[1:], out[place])
    else:  # short rows: reading past what is wanted is cheaper than one call for each
        num_rows = max(1, BUFFER_BYTES // max(row_bytes, 1))
        for first in range(box[0][0], box[0][1], num_rows):
            rows = torch.empty((min(num_rows, box[0][1] - first), *shape[1:]), dtype=out.dtype)
            _fill(file, start + first * row_bytes, rows)
            place = first - box[0][0]
            out[place : place + len(rows)] = rows[(slice(None), *(slice(low, high) for low, high in box[1:]))]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, by as_strided: a single element counts as one with any stride."""
    assert tensor.is_contiguous(), tensor.stride()
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _fill(file: IO[bytes], start: int, out: Tensor) -> None:
    if out.numel() == 0:
        return
    view = bytes_of(out)
    file.seek(start)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{file.name} became shorter while it was read")
        done += count
