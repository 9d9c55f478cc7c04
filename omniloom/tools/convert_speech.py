"""`omniloom convert speech`: recordings of answers become codes in files, once, ahead of any training.

Each turn is encoded alone by transformers' `MimiModel`, the first quantizers only. Codes are named by their recording,
so that the same command again does what is left, and that rows share them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from omniloom.config import DataConfig
from omniloom.data.media_decode import decode_audio
from omniloom.data.media_files import MediaLimits
from omniloom.data.sources import open_sources
from omniloom.types import MediaSource, SampleError

TURNS = ("messages", "conversations", "conversation")


def convert_speech(
    data: Path, target: Path, codec: Path, *, num_groups: int = 16, workers: int = 1
) -> tuple[int, list[str]]:
    """Write the rows of `data` to `target`, JSON lines, their recordings replaced by the names of files of codes.

    `target` lies beside `data`, since rows name media from there; codes go to a folder beside it. Returns how many rows
    were written, and of the others where and why not. Raises: ValueError for a codec or a target that cannot be used.
    """
    if target.resolve().parent != data.resolve().parent:
        raise ValueError(f"{target}: rows name media from the folder of {data}; name a file in that folder")
    folder = target.with_name(f"{target.stem}_codes")
    folder.mkdir(exist_ok=True)
    source = open_sources((str(data),), DataConfig(train=(str(data),)))
    wanted: dict[str, Path] = {}
    for index in range(len(source)):
        for turn in _spoken(source.read_row(index)[0]):
            path = data.parent / turn["speech"]
            if path.is_file():
                wanted[turn["speech"]] = folder / f"{_name_of(path, codec, num_groups)}.npy"
    missing = {path: file for path, file in wanted.items() if not file.exists()}
    faults = dict(_encode_all(missing, data, codec, num_groups, workers))
    left_out, num_written = [], 0
    unfinished = target.with_name(f"{target.name}.partial")
    with open(unfinished, "w", encoding="utf-8") as out:
        for index in range(len(source)):
            row, file, line = source.read_row(index)
            turns = list(_spoken(row))
            if bad := [turn["speech"] for turn in turns if turn["speech"] in faults or turn["speech"] not in wanted]:
                left_out.append(f"{file}:{line}: {bad[0]}: {faults.get(bad[0], 'does not exist')}")
                continue
            for turn in turns:
                turn["recording"] = turn["speech"]  # `check` compares the codes with it
                turn["speech"] = f"{folder.name}/{wanted[turn['speech']].name}"
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_written += 1
    os.replace(unfinished, target)
    return num_written, left_out


def _spoken(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The turns of a row whose speech is a recording."""
    for turn in next((row[key] for key in TURNS if isinstance(row.get(key), list)), []):
        speech = turn.get("speech") if isinstance(turn, dict) else None
        if isinstance(speech, str) and not speech.endswith(".npy"):
            yield turn


def _name_of(path: Path, codec: Path, num_groups: int) -> str:
    stat = path.stat()
    said = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, str(codec.resolve()), num_groups]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:24]


def _encode_all(
    wanted: dict[str, Path], data: Path, codec: Path, num_groups: int, workers: int
) -> Iterator[tuple[str, str]]:
    """Encode recordings into their files; those that cannot be, with the reason."""
    if not wanted:
        return
    encode = partial(_encode, folder=data.parent, codec=codec, num_groups=num_groups)
    paths, files = list(wanted), list(wanted.values())
    if workers <= 1:
        results: list[str | None] = list(map(encode, paths, files))
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(encode, paths, files, chunksize=8))
    yield from ((path, reason) for path, reason in zip(paths, results, strict=True) if reason is not None)


def _encode(path: str, file: Path, *, folder: Path, codec: Path, num_groups: int) -> str | None:
    """Why a recording has no codes, or None once they are written."""
    import torch

    model = _open(codec, num_groups)
    limits = MediaLimits(data=DataConfig(), sampling_rate=model.config.sampling_rate)
    try:
        waveform = decode_audio(MediaSource(path=str(folder / path)), limits)
    except SampleError as error:
        return error.reason
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(waveform)[None, None], num_quantizers=num_groups).audio_codes[0]
    unfinished = file.with_suffix(f".{os.getpid()}.partial")
    with open(unfinished, "wb") as out:
        np.save(out, codes.numpy().astype(np.int16))
    os.replace(unfinished, file)
    return None


@cache  # once in each process
def _open(codec: Path, num_groups: int) -> Any:
    """Raises: ValueError for a directory that holds no codec of so many quantizers."""
    from transformers import MimiConfig, MimiModel

    if not (codec / "config.json").is_file():
        raise ValueError(f"{codec} holds no codec: expected a directory of kyutai/mimi with its config.json")
    config = MimiConfig.from_pretrained(codec)
    if config.num_quantizers < num_groups:
        raise ValueError(f"{codec}: {config.num_quantizers} quantizers, {num_groups} are asked for")
    return MimiModel.from_pretrained(codec).eval()
