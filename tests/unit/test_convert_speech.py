"""Recordings become codes by a codec of random weights, once, and rows name them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MimiConfig, MimiModel

from omniloom.cli import convert
from omniloom.tools.convert_speech import convert_speech
from tests.unit.media_files import tone, write_audio


def make_codec(folder: Path) -> MimiModel:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = MimiConfig(num_filters=4, num_quantizers=6, codebook_size=32, upsample_groups=16, **small, **heads)
    codec = MimiModel(config).eval()
    codec.save_pretrained(folder)
    return codec


def test_each_recording_is_encoded_alone_and_once(tmp_path: Path) -> None:
    codec = make_codec(tmp_path / "codec")
    write_audio(tmp_path / "a.wav", "pcm_s16le", 24_000, tone(24_000, 24_000))
    (tmp_path / "b.wav").write_bytes(b"no sound")

    def row(speech: object) -> dict[str, object]:
        answer = {"role": "assistant", "content": "a", "speech": speech}
        return {"messages": [{"role": "user", "content": "q"}, answer]}

    rows = [row("a.wav"), row("b.wav"), row("gone.wav"), row("codes.npy"), row([[1], [2]]), row("a.wav")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    target = tmp_path / "coded.jsonl"
    num_written, left_out = convert_speech(tmp_path / "rows.jsonl", target, tmp_path / "codec", num_groups=4)
    assert (num_written, len(left_out)) == (4, 2)
    assert "rows.jsonl:2: b.wav: " in left_out[0]
    assert left_out[1].endswith("rows.jsonl:3: gone.wav: does not exist")
    written = [json.loads(line)["messages"][1]["speech"] for line in target.read_text().splitlines()]
    assert written[1:3] == ["codes.npy", [[1], [2]]]
    assert written[0] == written[3]
    file = tmp_path / written[0]
    codes = np.load(file)
    assert codes.shape == (4, 13)  # 12.5 frames a second, the last one begun
    with torch.no_grad():
        wave = torch.from_numpy(tone(24_000, 24_000)).float()[None, None]
        assert codec.encode(wave.reshape(1, 1, -1), num_quantizers=4).audio_codes.shape == (1, *codes.shape)
    before = file.stat().st_mtime_ns
    convert_speech(tmp_path / "rows.jsonl", target, tmp_path / "codec", num_groups=4)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="name a file in that folder"):
        convert_speech(tmp_path / "rows.jsonl", tmp_path / "codec" / "x.jsonl", tmp_path / "codec")


def test_a_codec_is_refused_where_nothing_is_encoded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--codec is for `convert speech`, not for `convert llava`"):
        convert("llava", tmp_path / "rows.jsonl", tmp_path / "out.jsonl", codec=tmp_path)
