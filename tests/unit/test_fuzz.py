"""Damaged input of every kind: whatever the bytes, a row is bad or a file refused, and nothing else escapes.

`PYTHONPATH=. python tests/unit/test_fuzz.py [CASES]` runs as many cases of each kind and prints what became of them.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import sys
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omniloom.config import DataConfig
from omniloom.data.formats import describe_format, parse_row
from omniloom.data.media_headers import read_header
from omniloom.data.plain_pickle import as_media, read_plain_pickle
from omniloom.data.sources import open_sources
from omniloom.data.tar_rows import sample_row
from omniloom.data.text_rows import parse_json_row
from omniloom.types import MediaSource, SampleError
from tests.unit.media_files import limits_of, tone, write_audio, write_video

CALL = {"name": "f", "arguments": {"a": [1, None]}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}], "images": ["a.png"]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
                  {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
                  {"role": "tool", "content": "{}"}, {"role": "assistant", "content": "b", "loss": False}]},
    {"conversations": [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "yes"}], "videos": [["1.png"]],
     "tools": json.dumps([CALL]), "system": "s", "use_audio_in_video": True},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "weight": 0.5, "id": 3},
    {"query": "<image><bbox> of <ref-object>", "response": "[1]", "images": [{"bytes": "AAAA", "min_pixels": 9}],
     "objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]], "bbox_type": "norm1000", "image_id": [0]}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "t"}]}, {"role": "assistant",
     "content": [{"type": "tool_use", "name": "f", "input": {}}, {"type": "thinking", "thinking": "x"}]}]},
    {"query": "<audio>", "response": "r", "audios": {"path": "a.wav", "start": 1, "end": 2.5}},
]  # fmt: skip
VALUES: list[Any] = [None, True, 0, -1, 1.5, 1e308, 10**30, "", "x", "<image>", "data:image/png;base64,AA", "\ud83d"]
VALUES += [
    [],
    [[]],
    {},
    [None],
    {"url": 5},
    {"type": "image"},
    {"role": "user"},
    [[1, 2]],
    "[{",
    float("nan"),
    "http://a",
]


def damage_row(row: Any, draw: random.Random) -> Any:
    """A row with some values exchanged, dropped or moved, at any depth."""
    row = json.loads(json.dumps(row))
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        at, depth = row, draw.randint(1, 5)
        while depth and isinstance(at, dict | list) and at:
            key = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if depth == 1 or not isinstance(at[key], dict | list):
                choice = draw.random()
                if choice < 0.2:
                    del at[key]
                elif choice < 0.3 and isinstance(at, dict):
                    at[draw.choice(list(ROWS[draw.randrange(len(ROWS))]))] = at[key]
                else:
                    at[key] = copy.deepcopy(draw.choice(VALUES))  # later damage must not reach other cases
                break
            at, depth = at[key], depth - 1
    return row


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """Some bytes exchanged, stretches repeated, cut out or filled, mostly near the beginning; or the end cut off."""
    broken = bytearray(data)
    for _ in range(draw.choice([0, 1, 2, 5, 40])):
        at = draw.randrange(min(len(broken) or 1, draw.choice([16, 200, 600, len(broken) or 1])))
        size = draw.choice([1, 1, 1, 2, 4, 8, 30])
        new = draw.choice([draw.randbytes(size), b"\0" * size, b"\xff" * size, bytes(broken[at : at + size]) * 2, b""])
        broken[at : at + (len(new) if draw.random() < 0.8 else size)] = new
    return bytes(broken[: draw.randrange(len(broken) + 1)] if draw.random() < 0.2 else broken)


def fuzz_row(draw: random.Random) -> None:
    row = damage_row(draw.choice(ROWS), draw)
    describe_format(row, DataConfig())
    parse_row(row, file="rows.json", line=1, options=DataConfig(unplaced_media=draw.choice(["error", "front"])))


def fuzz_json(draw: random.Random) -> None:
    text = json.dumps(damage_row(draw.choice(ROWS), draw)).encode()
    parse_row(parse_json_row(damage_bytes(text, draw)), file="rows.json", line=1, options=DataConfig())


@cache
def sample_of_tar() -> bytes:
    file = io.BytesIO()
    picture = b"\xff\xd8\xff" + b"a" * 40
    parts = {"json": json.dumps(ROWS[0]).encode(), "jpgs": pickle.dumps([picture, picture]), "0.jpg": picture}
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in parts.items():
            member = tarfile.TarInfo(f"a.{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def fuzz_tar(draw: random.Random) -> None:
    fields = draw.choice([None, {"image": "0.jpg", "texts": "json[messages]"}, {"images": "jpgs", "caption": "json"}])
    row = sample_row(damage_bytes(sample_of_tar(), draw), fields)
    parse_row(row, file="a.tar", line=1, options=DataConfig())


def fuzz_pickle(draw: random.Random) -> None:
    value = draw.choice([[b"a", b"b"], [[b"a"], (b"b", "c", 2**70, 1.5)], b"a" * 300, [], "text"])
    as_media(read_plain_pickle(damage_bytes(pickle.dumps(value, protocol=draw.randint(0, 5)), draw)))


def fuzz_file(draw: random.Random) -> None:
    """A whole file of rows, or a shard with its index, opened and read."""
    with tempfile.TemporaryDirectory() as folder:
        name = draw.choice(["a.jsonl", "a.json", "a.csv", "a.tar"])
        lines = [json.dumps(row) for row in draw.sample(ROWS, 3)]
        whole = {
            "a.jsonl": "\n".join(lines).encode(),
            "a.json": f"[{', '.join(lines)}]".encode(),
            "a.csv": b'query,response\n"a ""b""",c\n"d\n",e\n',
            "a.tar": sample_of_tar() * 2 + bytes(1024),
        }[name]
        path = Path(folder, name)
        path.write_bytes(damage_bytes(whole, draw) if name != "a.tar" or draw.random() < 0.5 else whole)
        if name == "a.tar":
            offsets = np.array([0, len(sample_of_tar()), 2 * len(sample_of_tar())], dtype="<i8").tobytes()
            Path(folder, "a.tar.idx").write_bytes(damage_bytes(offsets, draw))
        source = open_sources([str(path)], DataConfig(scratch=str(Path(folder, "scratch"))))
        for number in range(len(source)):
            try:
                parse_row(source.read_row(number)[0], file="a", line=1, options=DataConfig())
            except SampleError:
                continue


@cache
def media() -> tuple[tuple[str, bytes], ...]:
    """Kind and bytes of small files of many containers."""
    from PIL import Image

    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
        for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif", "jp2", "ppm", "tga", "ico"):
            path = folder / f"a.{suffix}"
            exif = Image.Exif()
            exif[0x0112] = 6
            picture.save(path, **({"exif": exif} if suffix in ("png", "jpg", "webp", "tif") else {}))
            found.append(("image", path.read_bytes()))
        sounds = [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame"), ("m4a", "aac"), ("aac", "aac"),
                  ("opus", "libopus"), ("aiff", "pcm_s16be"), ("mka", "aac"), ("caf", "pcm_s16le")]  # fmt: skip
        for suffix, codec in sounds:
            path = write_audio(folder / f"a.{suffix}", codec, 48000, tone(3000, 48000))
            found.append(("audio", path.read_bytes()))
        for suffix in ("mp4", "mkv", "ts", "flv", "avi"):
            path = write_video(folder / f"v.{suffix}", "mpeg4" if suffix == "avi" else "libx264", 4, 25, size=(32, 32))
            found.append(("video", path.read_bytes()))
    return tuple(found)


def fuzz_header(draw: random.Random) -> None:
    kind, data = draw.choice(media())
    limits = limits_of(10_000, video=100, audio=100)
    read_header(MediaSource(data=damage_bytes(data, draw)), kind, limits)  # type: ignore[arg-type]


KINDS: dict[str, tuple[Callable[[random.Random], None], tuple[type[Exception], ...]]] = {
    "rows": (fuzz_row, (SampleError,)),
    "json": (fuzz_json, (SampleError,)),
    "tars": (fuzz_tar, (SampleError,)),
    "pickles": (fuzz_pickle, (ValueError,)),
    "files and indexes": (fuzz_file, (ValueError,)),
    "media headers": (fuzz_header, (SampleError,)),
}


def fuzz(kind: str, num_cases: int, first: int = 0) -> Counter[str]:
    """Cases by seed; what became of them. Raises: AssertionError naming the seed of what escaped."""
    run, refused = KINDS[kind]
    found: Counter[str] = Counter()
    for seed in range(first, first + num_cases):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(random.Random(seed))
            found["read"] += 1
        except refused:
            found["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_refused_or_read(kind: str) -> None:
    found = fuzz(kind, 60)
    assert found["read"]
    assert found["refused"]


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_at_length(kind: str) -> None:
    assert fuzz(kind, 20_000, first=1000).total() == 20_000


if __name__ == "__main__":
    for name in KINDS:
        print(f"{name:18} {dict(fuzz(name, int(sys.argv[1]) if len(sys.argv) > 1 else 1000))}", flush=True)
