"""Speech of Qwen3-Omni against transformers' stepped generation with forced codes, on tiny models of odd sizes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from omniloom.config import Config, DataConfig, ModelConfig
from omniloom.data.sources import open_sources
from omniloom.run.opening import open_workshop
from omniloom.run.rows import open_rows
from omniloom.tools.generate import read_prompt
from omniloom.tools.score import score_rows
from omniloom.tools.tiny import make_tiny
from omniloom.types import CODE0, CODES
from tests.media_rows import write_media_rows
from tests.parity.speech_oracle import SpokenLogits, forced_speech, reference_losses
from tests.parity.speech_steps import load_pack

OPTIONS = ("model.dtype=float32", "data.workers=0", "data.pack_tokens=1024")
TALKER = "talker_config"
DIMS: dict[str, dict[str, Any]] = {
    "as_tiny": {},
    "odd": {
        f"{TALKER}.accept_hidden_layer": 2,
        f"{TALKER}.text_config.hidden_size": 24,
        f"{TALKER}.text_config.intermediate_size": 20,
        f"{TALKER}.text_config.head_dim": 12,
        f"{TALKER}.text_config.num_attention_heads": 3,
        f"{TALKER}.text_config.num_key_value_heads": 1,
        f"{TALKER}.text_config.rope_scaling.mrope_section": [2, 2, 2],
        f"{TALKER}.text_config.norm_topk_prob": False,
        f"{TALKER}.text_config.num_experts": 5,
        f"{TALKER}.text_config.num_hidden_layers": 3,
        f"{TALKER}.text_config.shared_expert_intermediate_size": 12,
        f"{TALKER}.code_predictor_config.hidden_size": 24,
        f"{TALKER}.code_predictor_config.intermediate_size": 28,
        f"{TALKER}.code_predictor_config.head_dim": 10,
        f"{TALKER}.code_predictor_config.num_code_groups": 6,
        f"{TALKER}.num_code_groups": 6,
        f"{TALKER}.code_predictor_config.vocab_size": 48,
    },
    "embeddings_are_heard": {f"{TALKER}.accept_hidden_layer": 0},
    "the_last_layer_is_heard": {f"{TALKER}.accept_hidden_layer": 3, f"{TALKER}.num_code_groups": 4},
}


def spoken_rows(folder: Path, num_groups: int, num_codes: int = 40, seed: int = 0) -> Path:
    """Rows of all media, each answer spoken, by more frames than words or fewer; several spoken turns, and none."""
    rng = random.Random(seed)
    rows = json.loads(write_media_rows(folder, hears=True).read_text())

    def codes(num_frames: int) -> list[list[int]]:
        return [[rng.randrange(num_codes) for _ in range(num_frames)] for _ in range(num_groups)]

    for number, row in enumerate(rows):
        row["id"] = str(number)
        row["messages"][-1] |= {
            "speech": codes([9, 2, 5, 3, 11, 4][number]),
            "speaker": ["Ethan", "chelsie"][number % 2],
        }
        if number % 2:
            row["messages"].insert(0, {"role": "system", "content": "Speak slowly."})
    several = [
        {"role": "system", "content": "You talk."},
        {"role": "user", "content": "<image>what?"},
        {"role": "assistant", "content": "a picture of it", "speech": codes(6), "speaker": "AIDEN"},
        {"role": "user", "content": "and then"},
        {"role": "assistant", "content": "nothing was said"},
        {"role": "user", "content": "<audio>this <image>"},
        {"role": "assistant", "content": "so", "speech": codes(3), "speaker": "ethan"},
    ]
    rows.append({"id": "6", "messages": several, "images": ["0.png", "1.png"], "audios": ["sound.wav"]})
    np.save(folder / "codes.npy", np.array(codes(4)))
    named = {"role": "assistant", "content": "of a file", "speech": "codes.npy"}
    rows.append({"id": "7", "messages": [{"role": "user", "content": "codes?"}, named]})
    rows.append(
        {"id": "8", "messages": [{"role": "user", "content": "silent?"}, {"role": "assistant", "content": "yes"}]}
    )
    path = folder / "spoken.json"
    path.write_text(json.dumps(rows))
    return path


def oracle(
    directory: Path,
    data: Path,
    whole: Any = transformers.Qwen3OmniMoeForConditionalGeneration,
    forced: Callable[..., SpokenLogits] = forced_speech,
    usual: str = "Ethan",
) -> dict[str, dict[str, float]]:
    """What transformers' own steps say of every row, turn by turn, put together as means over all turns."""
    model = whole.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    config = Config(model=ModelConfig(path=str(directory)), data=DataConfig(train=(str(data),)))
    source = open_sources(config.data.train, config.data)
    reader = open_rows(open_workshop(config), source, cache=False)().readers[0]
    found = {}
    for index, row in enumerate(json.loads(data.read_text())):
        sums, counts = [0.0, 0.0], [0, 0]
        conversation = reader.parse(*source.read_row(index))
        for number, message in enumerate(row["messages"]):
            if "speech" not in message:
                continue
            given = message["speech"]
            codes = torch.tensor(np.load(data.parent / given) if isinstance(given, str) else given)
            inputs = read_prompt(
                reader, replace(conversation, turns=conversation.turns[: number + 1]), str(data)
            ).inputs
            answer = tokenizer(message["content"] + "<|im_end|>", add_special_tokens=False).input_ids
            logits = forced(model, inputs, answer, codes, message.get("speaker", usual))
            frames = codes.shape[1]
            others = 0.0 if logits.loss_codes is None else frames * float(logits.loss_codes)
            sums = [sums[0] + (frames + 1) * float(logits.loss_code0), sums[1] + others]
            counts = [counts[0] + frames + 1, counts[1] + frames]
        if counts[1]:
            found[row["id"]] = {
                "loss_code0": sums[0] / counts[0],
                **({"loss_codes": sums[1] / counts[1]} if sums[1] else {}),
                "num_code_frames": counts[1],
            }
    return found


@pytest.mark.parametrize("name", ["odd", *(pytest.param(n, marks=pytest.mark.full) for n in DIMS if n != "odd")])
def test_score_of_speech_equals_stepped_generation(tmp_path: Path, name: str) -> None:
    directory = make_tiny("qwen3_omni", tmp_path / "model", overrides=DIMS[name], seed=3)
    groups = DIMS[name].get(f"{TALKER}.num_code_groups", 4)
    data = spoken_rows(tmp_path, groups)
    scores, bad = score_rows(directory, data, OPTIONS)
    assert bad == []
    wanted = oracle(directory, data)
    assert len(wanted) == 8
    for score in scores:
        speech = {key: value for key, value in score.items() if "code" in key}
        assert speech == pytest.approx(wanted.get(str(score["id"]), {}), rel=1e-5), score["id"]


def test_gradients_of_speech_equal_those_of_transformers_modules(tmp_path: Path) -> None:
    """Of every weight of talker, thinker and towers, two spoken turns of one row and another row in one pack."""
    directory = make_tiny("qwen3_omni", tmp_path / "model", overrides=DIMS["odd"], seed=4)
    data = tmp_path / "few.json"
    rows = json.loads(spoken_rows(tmp_path, 6).read_text())
    data.write_text(json.dumps([rows[6], rows[2]]))
    pack = load_pack(directory, data)
    sums = pack.model(pack.batch).sums
    (sums[CODE0] + 0.3 * sums[CODES]).backward()

    reference = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    totals = torch.zeros(2)
    for message, inputs, answer in pack.answers():
        inputs.pop("use_audio_in_video", None)
        codes_given = torch.tensor(message["speech"])
        code0, codes = reference_losses(reference, inputs, answer, codes_given, message["speaker"])
        (code0 + 0.3 * codes).backward()
        totals += torch.tensor([float(code0.detach()), float(codes.detach())])
    torch.testing.assert_close(torch.stack([sums[CODE0], sums[CODES]]).detach(), totals, rtol=1e-5, atol=0)
    # the hidden states' gradient reaches the thinker
    pack.assert_gradients_of(reference, nonzero="text.layers.0.moe.experts.down")
