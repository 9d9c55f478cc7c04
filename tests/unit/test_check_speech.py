"""`check` hears whether codes fit the checkpoint's vocoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omniloom.config import Config, ModelConfig
from omniloom.run.opening import open_workshop
from omniloom.tools.check import check_config
from omniloom.tools.check_speech import open_vocoder, spectral_distance
from omniloom.tools.tiny import make_tiny
from tests.unit.media_files import write_audio

RATE = 24_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, codes, and their recordings: the vocoder's own sound, so that they fit."""
    folder = tmp_path_factory.mktemp("check_speech")
    model = make_tiny("qwen3_omni", folder / "model")
    vocoder = open_vocoder(open_workshop(Config(model=ModelConfig(path=str(model)))).checkpoint)
    for number in range(3):
        codes = torch.randint(0, 64, (1, 4, 6), generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            sound = vocoder.chunked_decode(codes).flatten().numpy()
        write_audio(folder / f"{number}.wav", "pcm_s16le", RATE, sound[None] / np.abs(sound).max())
        np.save(folder / f"{number}.npy", codes[0].numpy())
    return folder


def check(folder: Path, capsys: pytest.CaptureFixture[str], recordings: list[str | None], speaks: bool = True) -> str:
    rows: list[dict[str, Any]] = []
    for number, recording in enumerate(recordings):
        answer = {"role": "assistant", "content": f"a {number}", "speech": f"{number}.npy"}
        answer |= {} if recording is None else {"recording": recording}
        rows.append({"messages": [{"role": "user", "content": "q"}, answer]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"model.path={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}", "data.pack_tokens=256"]
    words += ["data.workers=0", f"train.run_dir={folder / 'run'}"]
    check_config([*words, *(["policy.talker.freeze=false"] if speaks else [])])
    return "".join(line for line in capsys.readouterr().out.splitlines(True) if "speech " in line or "vocoder" in line)


def test_codes_that_fit_are_near_their_recordings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = check(folder, capsys, ["0.wav", "1.wav", "2.wav"])
    assert "speech     3 rows; of 3 turns the vocoder's sound is" in said
    assert "warning" not in said


def test_codes_that_do_not_fit_are_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = check(folder, capsys, ["1.wav", "2.wav", "0.wav"])
    assert "warning: these codes do not fit the checkpoint's vocoder" in said


def test_without_recordings_there_is_nothing_to_compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "2 rows of codes, and no recording beside them" in check(folder, capsys, [None, None])
    assert not check(folder, capsys, [None, None], speaks=False)


def test_the_distance_is_of_levels_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    sound = rng.standard_normal(RATE).astype(np.float32)
    assert spectral_distance(sound, sound) == 0
    assert spectral_distance(sound, -sound) == 0
    assert spectral_distance(sound, 10 * sound) == pytest.approx(20, abs=1e-3)
    assert spectral_distance(sound, sound[:-5000]) == 0
    assert spectral_distance(sound, rng.standard_normal(RATE)) < 8
    assert spectral_distance(sound[:10], sound[:20]) == 0
