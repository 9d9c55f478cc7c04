"""Real recordings as answers, through a codec of random weights: killed, resumed, and as if nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from omniloom.exit_codes import LOST_RANK
from omniloom.tools.convert_speech import convert_speech
from omniloom.training.metrics import read_lines
from tests.faults.test_kills import assert_same_end
from tests.parity.test_memorised_speech import make_codec
from tests.run_server import Hook, RunServer

MEDIA = Path(__file__).parents[3] / "shared" / "real" / "mllm_demo_data"
RECORDINGS = ("1.mp3", "2.wav", "3.flac", "4.mp3")
STEPS = 4
pytestmark = pytest.mark.skipif(not MEDIA.is_dir(), reason="the real recordings are not at hand")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that ask by text, picture and sound, answered by recordings of several rates."""
    folder = tmp_path_factory.mktemp("real_speech")
    rows = []
    for number, recording in enumerate(RECORDINGS):
        question = ("Read it out.", "<image>What is it?", "<audio>Say that again.", "And now?")[number]
        answer = {"role": "assistant", "content": f"This is recording {number}.", "speech": str(MEDIA / recording)}
        row = {"messages": [{"role": "user", "content": question}, answer]}
        row |= {"images": [str(MEDIA / "1.jpg")]} if "<image>" in question else {}
        row |= {"audios": [str(MEDIA / "2.wav")]} if "<audio>" in question else {}
        rows.append(row)
    (folder / "recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = folder / "rows.jsonl"
    written = convert_speech(folder / "recorded.jsonl", target, make_codec(folder / "codec"), num_groups=4)
    assert written == (len(rows), [])
    return target


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_talker_of_real_recordings_is_killed_and_goes_on_bit_for_bit(
    server: RunServer, checkpoint: Path, spoken: Path, tmp_path: Path, num_ranks: int
) -> None:
    def words(name: str) -> list[str]:
        return [
            *(f"model.path={checkpoint}", "model.dtype=float32", "policy.talker.freeze=false"),
            *(f"data.train={spoken}", "data.pack_tokens=512", "data.workers=0", "data.image.max_pixels=20000"),
            "data.allow_outside_media_dir=true",
            *(f"train.run_dir={tmp_path / name}", f"train.steps={STEPS}", "train.packs_per_step=2"),
            *("train.learning_rate=1e-3", "checkpoint.every=1", "checkpoint.export=false", "log.tensorboard=false"),
        ]

    whole = server.run(words("whole"), tmp_path / "whole_log", num_ranks=num_ranks)
    assert whole.wait() == [0] * num_ranks, whole.tail()
    metrics = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert metrics[0]["num_bad_samples"] == 0
    assert metrics[0]["code0_loss"] > metrics[-1]["code0_loss"] > 0
    hook = Hook(step=2, action="signal", target="SIGKILL", rank=num_ranks - 1)
    killed = server.run(words("killed"), tmp_path / "killed_log", num_ranks=num_ranks, hooks=[hook])
    assert killed.wait() == [*[LOST_RANK] * (num_ranks - 1), -signal.SIGKILL], killed.tail()
    resumed = server.run(words("killed"), tmp_path / "resumed_log", num_ranks=num_ranks)
    assert resumed.wait() == [0] * num_ranks, resumed.tail()
    assert "resumed after step" in resumed.log()
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
