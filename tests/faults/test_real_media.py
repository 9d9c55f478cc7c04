"""The main job on real input: train on photographs, sound and video, die half-way, go on, export, speak the answers.

Skipped where the demo rows of LLaMA-Factory are not at hand (`../shared/real`); nothing of them is copied here.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omniloom.config import load_config
from omniloom.data.sources import open_sources
from omniloom.tools.generate import Sampling, answer, load_model, open_reader, read_prompts
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines

REAL = Path(__file__).parents[3] / "shared" / "real"
FILES = [REAL / f"mllm_{name}demo.json" for name in ("", "audio_", "video_", "video_audio_")]
STEPS, SAVE_EVERY = 64, 8
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real demo rows are not at hand")


def words(model: Path, run_dir: Path) -> list[str]:
    return [
        f"model.path={model}",
        f"data.train={','.join(map(str, FILES))}",
        f"train.run_dir={run_dir}",
        f"train.steps={STEPS}",
        "train.packs_per_step=2",
        "train.learning_rate=6e-3",
        "train.warmup_steps=5",
        "data.pack_tokens=1024",
        "data.image.max_pixels=20000",
        "data.video.max_frames=4",
        "data.video.min_pixels=1024",
        "data.video.max_pixels=9000",
        "data.workers=1",
        "model.dtype=float32",
        f"checkpoint.every={SAVE_EVERY}",
        "log.tensorboard=false",
    ]


def start(arguments: list[str], nproc: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "omniloom.cli", "train", *arguments, "--nproc", str(nproc)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny("qwen3_omni", tmp_path_factory.mktemp("real") / "model")


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.full, id="one rank"), pytest.param(2, id="two ranks")]
)
def trained(request, model, tmp_path_factory) -> Path:
    """A run that was killed with all its processes after its half, and then resumed by the same command."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    arguments = words(model, run_dir)
    process = start(arguments, request.param)
    deadline = time.monotonic() + 400
    while len(read_lines(run_dir / "metrics.jsonl")) < STEPS // 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not reach its half"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    resumed = start(arguments, request.param)
    output = resumed.communicate(timeout=400)[0]
    assert resumed.returncode == 0, output
    step = re.search(r"resumed after step (\d+)", output)
    assert step is not None, output
    assert int(step.group(1)) in range(SAVE_EVERY, STEPS, SAVE_EVERY)
    return run_dir


def test_real_media_are_learnt_through_a_kill_and_a_resume(trained) -> None:
    metrics = read_lines(trained / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(STEPS))
    assert metrics[-1]["loss"] < 0.1
    first = metrics[0]
    assert (first["num_samples"], first["num_images"], first["num_bad_samples"]) == (15, 8, 0)
    assert first["audio_seconds"] == pytest.approx(4.03 + 2.90 + 5.855 + 3 * 5.0, abs=0.2)
    assert first["video_frames"] == 6 * 4


def test_transformers_speaks_the_memorised_answers(trained) -> None:
    data = load_config(trained / "config.yaml").data
    reader = open_reader(trained / "hf", data, open_sources(tuple(map(str, FILES))))
    prompts = read_prompts(reader)
    model = load_model(trained / "hf")
    answers = answer(model, _tokenizer(trained / "hf"), prompts, Sampling(max_new_tokens=160))
    wrong = [(prompt.expected, said) for prompt, said in zip(prompts, answers, strict=True) if said != prompt.expected]
    assert not wrong, wrong


def _tokenizer(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)
