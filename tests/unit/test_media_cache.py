"""Decoded media come back from the cache as they went in, and nothing that is wrong with it is a failure."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from omniloom.config import load_config
from omniloom.data.media_cache import MediaCache
from omniloom.run.rows import open_rows, open_run
from omniloom.tools.tiny import make_tiny
from omniloom.types import ClipGeometry, DecodedClip, MediaSource, PackPlan, PlannedSample
from tests.unit.media_files import tone, write_audio, write_video

CLIPS = [
    DecodedClip(pixels=np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)),
    DecodedClip(waveform=np.linspace(-1, 1, 7, dtype=np.float32)),
    DecodedClip(pixels=np.full((2, 3, 1, 3), 9, np.uint8), waveform=np.ones(5, np.float32)),
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "clip.png"
    path.write_bytes(b"x" * 10)
    return path


def keys(cache, path, count):
    geometry = ClipGeometry(kind="image", num_tokens=1)
    return [cache.key(MediaSource(path=str(path)), replace(geometry, num_tokens=n), "f") for n in range(count)]


@pytest.mark.parametrize("clip", CLIPS)
def test_a_clip_comes_back_as_it_went_in(tmp_path, file, clip) -> None:
    cache = MediaCache(tmp_path / "cache", 1e9)
    (key,) = keys(cache, file, 1)
    assert cache.get(key) is None
    cache.put(key, clip)
    found = cache.get(key)
    for name in ("pixels", "waveform"):
        before, after = getattr(clip, name), getattr(found, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            assert np.array_equal(before, after)
            torch.from_numpy(after)  # warns of arrays that cannot be written to


def test_a_changed_file_geometry_or_processor_is_another_clip(tmp_path, file) -> None:
    cache, source, clip = (
        MediaCache(tmp_path / "c", 1e9),
        MediaSource(path=str(file)),
        ClipGeometry(kind="image", num_tokens=1),
    )
    before = cache.key(source, clip, "f")
    others = [cache.key(source, replace(clip, num_tokens=2), "f"), cache.key(source, clip, "g")]
    others += [cache.key(MediaSource(data=b"1"), clip, "f"), cache.key(MediaSource(data=b"2"), clip, "f")]
    os.utime(file, ns=(1, 1))
    others.append(cache.key(source, clip, "f"))
    assert len({before, *others}) == 6
    assert cache.key(MediaSource(path=str(tmp_path / "missing")), clip, "f") is None


def test_damaged_files_are_decoded_anew(tmp_path, file) -> None:
    cache = MediaCache(tmp_path / "cache", 1e9)
    (key,) = keys(cache, file, 1)
    cache.put(key, CLIPS[2])
    (path,) = (tmp_path / "cache").glob("??/*")
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (b"", whole[:100], whole[:-1], flipped, b"x" + whole[1:], b"[" + whole[1:]):
        path.write_bytes(damaged)
        assert cache.get(key) is None
    cache.put(key, CLIPS[2])
    assert path.read_bytes() == whole


def test_the_cache_stays_below_its_limit_and_keeps_what_is_used(tmp_path, file, monkeypatch) -> None:
    monkeypatch.setattr("omniloom.data.media_cache._PUTS_BETWEEN_SWEEPS", 8)
    clip = DecodedClip(pixels=np.zeros((10, 100, 3), np.uint8))
    cache = MediaCache(tmp_path / "cache", 40_000)
    names = keys(cache, file, 65)
    for number, key in enumerate(names):
        cache.put(key, clip)
        os.utime(tmp_path / "cache" / key[:2] / key[2:], (number, number))
        if number:
            assert cache.get(names[0]) is not None, "what is used stays"
    held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("??/*"))
    assert held <= 40_000 + 8 * 3300
    stale = tmp_path / "cache" / names[0][:2] / ".unfinished.1"
    stale.write_bytes(b"x")
    os.utime(stale, (time.time() - 9999,) * 2)
    for _ in range(8):
        cache.put(names[1], clip)
    assert not stale.exists()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, file, caplog) -> None:
    (tmp_path / "cache").write_text("a file")
    cache = MediaCache(tmp_path / "cache", 1e9)
    (key,) = keys(cache, file, 1)
    cache.put(key, CLIPS[0])
    assert "data.cache" in caplog.text
    assert cache.key(MediaSource(path=str(file)), ClipGeometry(kind="image", num_tokens=1), "f") is None


def test_rows_from_the_cache_are_those_of_decoding_and_need_no_decoder(tmp_path, monkeypatch) -> None:
    make_tiny("qwen3_omni", tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (75, 91, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    write_audio(tmp_path / "s.wav", "pcm_s16le", 16000, tone(16000, 16000))
    write_video(tmp_path / "v.mp4", num_frames=20, fps=10, sound=tone(88200, 44100))
    rows = [
        {"query": "<image>", "response": "r", "images": ["a.png"]},
        {"query": "<audio>", "response": "r", "audios": ["s.wav"]},
        {"query": "<video>", "response": "r", "videos": ["v.mp4"], "use_audio_in_video": True},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 'rows.jsonl'}", "data.pack_tokens=2048"]

    def load(*more):
        workshop, source, _ = open_run(load_config(None, [*words, *more]))
        reader = open_rows(workshop, source, cache=False)()
        extents = reader.measure(range(3), {}, lambda _: None)
        samples = (PlannedSample(row=n, epoch=0, extent=extent, weight_scale=1.0) for n, extent in enumerate(extents))
        loaded = reader.load(PackPlan(index=0, samples=tuple(samples)), None, {}, lambda _: None)
        assert not loaded.bad
        return loaded.batch

    plain = load()
    cache = f"data.cache={tmp_path / 'cache'}"
    first = load(cache)
    monkeypatch.setattr("omniloom.run.rows.decode_clip", lambda *_, **__: pytest.fail("decoded once more"))
    second = load(cache)
    for batch in (first, second):
        assert torch.equal(batch.vision.patches, plain.vision.patches)
        assert torch.equal(batch.audio.features, plain.audio.features)
        assert torch.equal(batch.input_ids, plain.input_ids)
    limits = []
    monkeypatch.setattr("omniloom.run.rows.MediaCache", lambda _, limit_bytes: limits.append(limit_bytes))
    workshop, source, _ = open_run(load_config(None, [*words, cache, "data.cache_gigabytes=0.0025"]))
    open_rows(workshop, source, cache=False)()
    assert limits == [2.5e6]
