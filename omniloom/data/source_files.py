"""Which files the path of a data set names: one file, all that match a pattern, or what a folder keeps.

Knows the folders that others write: Energon's (`.nv-meta`), those of `datasets` (`save_to_disk`), and plain folders of
shards. Reads no rows.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from omniloom.types import suggest

_SUFFIXES = (".tar", ".parquet", ".arrow", ".jsonl", ".csv", ".tsv")  # of what a folder is read for
_PACKED = (".gz", ".zst")
_PARTS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
          "test": ("test", "testing", "eval", "evaluation")}  # fmt: skip
_PART_OF = {word: part for part, words in _PARTS.items() for word in words}
_PART_WORD = re.compile(rf"(?<![a-z])({'|'.join(_PART_OF)})(?![a-z])")  # Source: datasets, data_files.py


@dataclass(frozen=True, kw_only=True)
class SourceFiles:
    """Files in order. The rest is of an Energon directory, tar files by their `names` in there:
    which field of a sample is which part, and the samples (`name/key`) that are left out."""

    files: tuple[str, ...]
    names: tuple[str, ...] = ()
    fields: Mapping[str, str] | None = None
    excluded: frozenset[str] = frozenset()


def find_files(path: str, part: str | None) -> SourceFiles:
    """The files that `path` names; `part` of it, where it has parts. Raises: ValueError."""
    place = Path(path)
    if place.is_dir():
        return _of_folder(place, part)
    if place.is_file():
        return SourceFiles(files=(path,))
    if glob.has_magic(path):
        files = tuple(sorted(glob.glob(path, recursive=True)))
        if not files:
            raise ValueError(f"no data file matches {path}")
        return SourceFiles(files=files)
    raise ValueError(f"no such data file: {path}{_nearest(place)}")


def _nearest(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; the folder {file.parent} does not exist"
    return suggest(file.name, [path.name for path in file.parent.iterdir()], among="", before=f"{file.parent}/")


# ---------------------------------------------------------------------------------------- folders


def _of_folder(folder: Path, part: str | None) -> SourceFiles:
    if (folder / ".nv-meta").is_dir():
        return _of_energon(folder, part)
    if (folder / "dataset_dict.json").is_file():
        splits = _read(folder / "dataset_dict.json").get("splits", [])
        folder = folder / _choose(splits, part, folder)
    if (folder / "state.json").is_file():
        names = [str(entry["filename"]) for entry in _read(folder / "state.json").get("_data_files", [])]
        if not names:
            raise ValueError(f"{folder}/state.json names no files; save the data set anew with save_to_disk")
        return SourceFiles(files=tuple(str(folder / name) for name in names))
    files = [file for file in sorted(folder.rglob("*")) if _suffix(file) in _SUFFIXES and file.is_file()]
    if not files:
        near = ", ".join(sorted(file.name for file in folder.glob("*.json"))[:5])
        hint = f"; it holds {near}" if near else ""
        raise ValueError(f"{folder} is a directory without {', '.join(_SUFFIXES)} files{hint}; name a data file")
    return SourceFiles(files=tuple(map(str, _of_part(files, part, folder))))


def _of_part(files: Sequence[Path], part: str | None, folder: Path) -> Sequence[Path]:
    """Of files whose names say that they are parts, as `train-00000.parquet` and `test/a.jsonl`, those of one part."""
    parts: dict[str, list[Path]] = {}
    for file in files:
        word = _PART_WORD.search(str(file.relative_to(folder)).lower())
        parts.setdefault(_PART_OF[word[1]] if word else "", []).append(file)
    named = [name for name in parts if name]
    if len(named) < 2:
        return files
    if "" in parts:
        raise ValueError(f"{folder} has the parts {', '.join(named)} and {parts[''][0].name}; name files by a pattern")
    return parts[_choose(named, _PART_OF.get(part or "", part), folder)]


def _suffix(file: Path) -> str:
    return (file.with_suffix("") if file.suffix in _PACKED else file).suffix.lower()


def _read(file: Path) -> dict[str, Any]:
    """A JSON or YAML file of a directory's own. Raises: ValueError."""
    try:
        value = yaml.safe_load(file.read_bytes()) if file.suffix == ".yaml" else json.loads(file.read_bytes())
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected keys with values, got {type(value).__name__}")
    return value


def _choose(parts: Sequence[str], part: str | None, folder: Path) -> str:
    if part is not None and part in parts:
        return part
    if len(parts) == 1:
        return parts[0]
    has = f"{folder} has the parts {', '.join(parts) or '(none)'}"
    raise ValueError(f"{has}, {'not ' + part if part else 'expected one'}; name one: {{path: {folder}, part: ...}}")


def _of_energon(folder: Path, part: str | None) -> SourceFiles:
    meta = folder / ".nv-meta"
    info = next((meta / name for name in (".info.json", ".info.yaml") if (meta / name).is_file()), None)
    if info is None:
        raise ValueError(f"{meta} has no .info.json; run `energon prepare`, or move .nv-meta away to read all shards")
    known = list(_read(info).get("shard_counts", {}))
    split = next((meta / name for name in ("split.yaml", "split.json") if (meta / name).is_file()), None)
    splits = _read(split) if split is not None else {"split_parts": {"train": known}}
    parts = {name: patterns for name, patterns in splits.get("split_parts", {}).items() if patterns}
    excluded = {name for pattern in splits.get("exclude") or () for name in expand_braces(pattern)}
    patterns = parts[_choose(list(parts), part, folder)]
    names = [name for pattern in patterns for name in expand_braces(pattern) if name not in excluded]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{split or info} names {missing[0]}, which is not in {folder}")
    if not names:
        raise ValueError(f"{split or info} names no shards of {part}")
    declared = _read(meta / "dataset.yaml") if (meta / "dataset.yaml").is_file() else {}
    fields = declared.get("field_map")
    if fields is not None and not all(isinstance(item, str) for item in (*fields, *fields.values())):
        raise ValueError(f"{meta}/dataset.yaml: field_map: expected names of fields and parts, got {fields!r:.80}")
    return SourceFiles(
        files=tuple(str(folder / name) for name in names),
        names=tuple(names),
        fields=fields,
        excluded=frozenset(name for name in excluded if ".tar/" in name),
    )


def expand_braces(pattern: str) -> Iterator[str]:
    """`a{00..12}.tar` and `{a,b}.tar` as names, as a shell does."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span is not None:
        width = len(span[1]) if span[1].startswith("0") or span[2].startswith("0") else 0
        items = [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        items = found[1].split(",")
    for item in items:
        yield from expand_braces(pattern[: found.start()] + item + pattern[found.end() :])
