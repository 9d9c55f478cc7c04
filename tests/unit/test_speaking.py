"""Answers aloud: wav files, voices, what a command hears, and what is refused."""

from __future__ import annotations

import json
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omniloom import cli
from omniloom.config import DataConfig
from omniloom.tools.chat import chat
from omniloom.tools.check_speech import open_vocoder
from omniloom.tools.generate import Sampling, ask, open_asking, open_model, read_prompt
from omniloom.tools.speak import Speaker, Voice, code_match, spoken_answers
from omniloom.tools.tiny import make_tiny
from omniloom.tools.trained_model import by_hand
from tests.unit.media_files import tone, write_audio

GREEDY = Sampling()
DRAWN = pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")  # transformers' own default, in its own words


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_omni", tmp_path_factory.mktemp("speaking") / "model")


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["omniloom", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    written = capsys.readouterr()
    return stop.value.code or 0, written.out, written.err


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.astype(np.float32) / 32767, file.getframerate()


def test_the_command_line_speaks_an_answer_and_a_command_hears_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.wav"
    words = ["generate", str(model), "Say it.", "--speech", str(out), "--speaker", "CHELSIE", "--max-new-tokens", "4"]
    words += ["--speech-temperature", "0", "--speech-seconds", "0.4"]
    listen = f"{sys.executable} -c \"import sys; print('heard ' + sys.argv[1][-7:])\""
    code, text, told = run(monkeypatch, capsys, *words, "--listen", listen)
    assert code == 0
    assert text.strip()
    assert "5 frames, heard as 'heard out.wav'" in told
    sound, rate = read_wav(out)
    assert rate == 24_000
    assert 0 <= 5 * 1920 - len(sound) < 1920  # a causal vocoder lets a few samples go at the end of a chunk
    first = out.read_bytes()
    assert run(monkeypatch, capsys, *words)[0] == 0
    assert out.read_bytes() == first
    words[words.index("CHELSIE")] = "aiden"
    assert run(monkeypatch, capsys, *words)[0] == 0
    assert out.read_bytes() != first
    for wrong, reason in (
        (["--speaker", "bob"], "--speaker: unknown speaker 'bob'; the checkpoint knows chelsie, ethan, aiden"),
        (["--speech-temperature", "-1"], "expected --speech-temperature of at least 0"),
        (["--listen", "no-such-command"], "--listen: no-such-command cannot be run"),
        (["--listen", "false"], "ended with code 1"),
    ):
        code, _, told = run(monkeypatch, capsys, *words, *wrong)
        assert code == 2
        assert reason in told
    for where in (tmp_path, tmp_path / "gone" / "out.wav"):
        code, _, told = run(monkeypatch, capsys, "generate", str(model), "Say it.", "--speech", str(where))
        assert code == 2
        assert f"--speech: {where}: expected a wav file" in told
    code, _, told = run(monkeypatch, capsys, "generate", str(model), "--speech", str(out))
    assert code == 2
    assert "expected either a prompt or --data FILE" in told
    code, _, told = run(monkeypatch, capsys, "generate", str(model), "Say it.", "--speaker", "ethan")
    assert code == 2
    assert "name a wav file with --speech" in told


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("qwen3_vl", "there is no talker to speak, the checkpoint holds none"),
        ("qwen2_5_omni", "that of qwen2_5_omni is not run here"),
    ],
)
def test_a_model_without_a_talker_is_refused_in_one_message(family: str, why: str, tmp_path: Path) -> None:
    other = make_tiny(family, tmp_path / "model")
    with pytest.raises(ValueError, match=f"--speech: {why}"):
        list(spoken_answers(other, "Hello", {}, Voice(target=tmp_path / "out.wav"), sampling=GREEDY))


@DRAWN
def test_sound_beside_pictures_is_answered_aloud(model: Path, tmp_path: Path) -> None:
    """Where the talker of transformers 5.23 by itself lacks the config of the sound."""
    Image.new("RGB", (48, 40), "red").save(tmp_path / "red.png")
    write_audio(tmp_path / "tone.wav", "pcm_s16le", 16_000, tone(8_000, 16_000))
    media = {"image": [tmp_path / "red.png"], "audio": [tmp_path / "tone.wav"]}
    voice = Voice(target=tmp_path / "out.wav", seconds=0.2)
    (line,) = spoken_answers(model, "What is it?", media, voice, sampling=Sampling(max_new_tokens=3))
    assert line["num_code_frames"] == 2


def test_rows_are_spoken_into_a_folder_and_compared_with_their_codes(model: Path, tmp_path: Path) -> None:
    voice = Voice(target=tmp_path / "first", temperature=0, seconds=0.3)
    question = {"messages": [{"role": "user", "content": "What do you say?"}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(question))
    options = {"data": rows, "sampling": Sampling(max_new_tokens=4)}
    (line,) = spoken_answers(model, None, {}, voice, **options)
    assert line["speech"] == str(tmp_path / "first" / "000000.wav")
    assert "code_match" not in line
    answer = {"role": "assistant", "content": line["answer"], "speech": [[1, 2]] * 4, "speaker": "chelsie"}
    bad = {"messages": [*question["messages"], {**answer, "speech": [[1], [2, 3]]}]}
    rows.write_text(json.dumps({"messages": [*question["messages"], answer]}) + "\n" + json.dumps(bad))
    found, wrong = spoken_answers(model, None, {}, voice, **options)
    assert (found["expected_frames"], found["num_code_frames"]) == (2, 3)
    assert 0 <= found["code_match"] < 1
    assert "lists of several lengths" in wrong["error"]
    assert found["id"] == f"{rows}:1"


def test_codes_match_by_their_share_and_missing_frames_count(model: Path) -> None:
    codes = np.arange(8).reshape(2, 4)
    assert code_match(codes, codes) == 1
    assert code_match(codes[:, :3], codes) == code_match(codes, codes[:, :3]) == 0.75
    assert code_match(codes, np.add(codes, [[0], [1]])) == 0.5


def test_a_conversation_is_spoken_turn_by_turn(model: Path, tmp_path: Path) -> None:
    voice, pieces = Voice(target=tmp_path / "said", speaker="Ethan", temperature=0, seconds=0.2), list[str]()
    chat(model, {}, lines=["hello", "again"], write=pieces.append, sampling=Sampling(max_new_tokens=3), voice=voice)
    files = sorted((tmp_path / "said").iterdir())
    assert [file.name for file in files] == ["answer_001.wav", "answer_002.wav"]
    assert all(f"[{file}, 0." in "".join(pieces) for file in files)


@DRAWN
def test_the_talker_of_an_export_is_what_is_heard(model: Path, tmp_path: Path) -> None:
    """A sound is the vocoder's, of the codes that the talker drew."""
    workshop = open_model(model, by_hand(DataConfig()), speaks=True)
    reader = open_asking(workshop)
    speaker = Speaker(workshop, Voice(target=tmp_path, seconds=0.4), reader.processor.tokenizer)
    prompt = read_prompt(reader, ask(reader, "Hello", {}), "here")
    spoken = speaker.say(prompt, Sampling(max_new_tokens=4))
    with torch.no_grad():
        sound = open_vocoder(workshop.checkpoint).chunked_decode(torch.tensor(spoken.codes)[None])
    np.testing.assert_allclose(spoken.waveform, sound.flatten().numpy(), atol=1e-6)
