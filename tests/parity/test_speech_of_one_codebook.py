"""Speech of Qwen2.5-Omni, one code a frame, against transformers' stepped generation with forced codes."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor

from omniloom.tools.score import score_rows
from omniloom.tools.tiny import make_tiny
from omniloom.types import CODE0
from tests.parity.speech_oracle import SpokenLogits
from tests.parity.speech_steps import load_pack
from tests.parity.test_speech import OPTIONS, oracle, spoken_rows

WHOLE = transformers.Qwen2_5OmniForConditionalGeneration
TALKER = "talker_config"
ODD: dict[str, Any] = {
    f"{TALKER}.hidden_size": 24,
    f"{TALKER}.head_dim": 12,
    f"{TALKER}.num_attention_heads": 3,
    f"{TALKER}.num_key_value_heads": 1,
    f"{TALKER}.intermediate_size": 20,
    f"{TALKER}.num_hidden_layers": 3,
    f"{TALKER}.rope_scaling.mrope_section": [3, 1, 2],
}


def rows_of(folder: Path) -> Path:
    """Those of the other family, of one group, by the voices that this one has."""
    path = spoken_rows(folder, 1)
    path.write_text(path.read_text().replace("AIDEN", "CHELSIE"))
    return path


def forced(model: Any, inputs: dict[str, Any], answer: list[int], codes: Tensor, speaker: str) -> SpokenLogits:
    """Logits of the codes int64 [1, F] and of the end, as `speech_oracle.forced_speech`.

    transformers 5's `generate` drops a mask of ones, without which its talker, as written, adds no token of the codec
    and counts media like text; here it is put back.
    """
    talker, said = model.talker, iter(answer)
    wanted = [*codes[0].tolist(), model.config.talker_config.tts_codec_end_token_id]
    code0: list[Tensor] = []

    def only(scores: Tensor, token: int) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)

    forward, generate = type(talker).forward, type(talker).generate
    prepare = type(talker).prepare_inputs_for_generation
    thinker_generate = type(model.thinker).generate

    @wraps(forward)
    def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        code0.append(out.logits[0, -1])
        return out

    @wraps(prepare)
    def with_mask(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        return prepare(self, input_ids, **kwargs) | {"attention_mask": torch.ones_like(input_ids)}

    def force_thinker(_: Tensor, scores: Tensor) -> Tensor:
        return only(scores, next(said))

    def force_talker(_: Tensor, scores: Tensor) -> Tensor:
        return only(scores, wanted[len(code0) - 1])

    def with_processor(original: Any, processor: Any, *dropped: str) -> Any:
        def call(self: Any, **kwargs: Any) -> Any:
            taken = {key: value for key, value in kwargs.items() if key not in dropped}
            return original(self, **taken, logits_processor=[processor])

        return call

    pixels = ("pixel_values", "pixel_values_videos")  # handed to the talker, which refuses them

    with ExitStack() as stack:
        for owner, name, value in (
            (type(talker), "forward", keep),
            (type(talker), "prepare_inputs_for_generation", with_mask),
            (type(model.thinker), "generate", with_processor(thinker_generate, force_thinker)),
            (type(talker), "generate", with_processor(generate, force_talker, *pixels)),
            (type(model.token2wav), "forward", lambda self, *args, **kwargs: torch.zeros(1)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        model.generate(
            **inputs,
            speaker=speaker.capitalize(),
            thinker_eos_token_id=answer[-1],
            thinker_max_new_tokens=len(answer),
            thinker_do_sample=False,
            talker_do_sample=False,
            talker_eos_token_id=wanted[-1:],
            talker_repetition_penalty=1.0,
            talker_max_new_tokens=len(wanted),
        )
    logits = torch.stack(code0)
    assert len(logits) == len(wanted)
    return SpokenLogits(code0=logits, loss_code0=torch.nn.functional.cross_entropy(logits, torch.tensor(wanted)))


@pytest.mark.parametrize("name", ["odd", pytest.param("as_tiny", marks=pytest.mark.full)])
def test_score_of_one_codebook_equals_stepped_generation(tmp_path: Path, name: str) -> None:
    directory = make_tiny("qwen2_5_omni", tmp_path / "model", overrides=ODD if name == "odd" else {}, seed=3)
    data = rows_of(tmp_path)
    scores, bad = score_rows(directory, data, OPTIONS)
    assert bad == []
    wanted = oracle(directory, data, WHOLE, forced, "Chelsie")
    assert len(wanted) == 8
    for score in scores:
        speech = {key: value for key, value in score.items() if "code" in key}
        assert speech == pytest.approx(wanted.get(str(score["id"]), {}), rel=1e-5), score["id"]


def reference_loss(model: Any, inputs: dict[str, Any], answer: list[int], codes: list[int], voice: int) -> Tensor:
    """The sum of the cross entropies of the codes and the end, with gradients, by transformers' modules at once."""
    thinker, talker, config = model.thinker, model.talker, model.config.talker_config
    asked, words = inputs["input_ids"], torch.tensor([answer[:-1]])
    ids = torch.cat((asked, words), dim=1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    states = thinker(**whole, output_hidden_states=True).hidden_states
    heard = torch.tensor([config.audio_token_index, config.image_token_index, config.video_token_index])
    read = states[0].masked_fill(torch.isin(ids, heard)[..., None], 0.0) + states[-1]
    before, reply = read[:, : asked.shape[1]], read[:, asked.shape[1] :]
    marks = torch.tensor([[voice, config.tts_text_end_token_id, config.tts_text_pad_token_id]])
    begin, end, pad = thinker.get_input_embeddings()(marks).chunk(3, dim=1)
    spoken = torch.cat((reply[:, 1:], end, pad.expand(1, len(codes), -1)), dim=1)[:, : len(codes)]
    of_codec = talker.get_input_embeddings()(
        torch.tensor([[config.tts_codec_pad_token_id, config.tts_codec_start_token_id, *codes]])
    )
    rows = torch.cat((before, torch.cat((begin, reply[:, :1], spoken), dim=1) + of_codec), dim=1)
    text_ids = torch.cat((asked, torch.zeros(1, 2 + len(codes), dtype=torch.int64)), dim=1)
    lengths = inputs["feature_attention_mask"].sum(dim=1) if "feature_attention_mask" in inputs else None
    of_media = (inputs.get(name) for name in ("image_grid_thw", "video_grid_thw"))
    places, _ = talker.get_rope_index(
        text_ids,
        *of_media,
        torch.ones_like(text_ids),
        inputs.get("use_audio_in_video", False),
        lengths,
        inputs.get("video_second_per_grid"),
    )
    rows = talker.thinker_to_talker_proj(rows)
    hidden = talker.model(inputs_embeds=rows, position_ids=places).last_hidden_state[0, -len(codes) - 1 :]
    wanted = torch.tensor([*codes, config.tts_codec_end_token_id])
    return torch.nn.functional.cross_entropy(talker.codec_head(hidden), wanted, reduction="sum")


def test_gradients_of_one_codebook_equal_those_of_transformers(tmp_path: Path) -> None:
    """Of the whole model: thinker, towers and talker train together."""
    directory = make_tiny("qwen2_5_omni", tmp_path / "model", overrides=ODD, seed=4)
    rows = json.loads(rows_of(tmp_path).read_text())
    data = tmp_path / "few.json"
    data.write_text(json.dumps([rows[6], rows[5]]))
    pack = load_pack(directory, data)
    found = pack.model(pack.batch).sums[CODE0]
    found.backward()

    reference = WHOLE.from_pretrained(directory, dtype=torch.float32)
    total = torch.zeros(())
    for message, inputs, answer in pack.answers():
        voice = reference.speaker_map[message["speaker"].capitalize()]["bos_token"]
        loss = reference_loss(reference, inputs, answer, message["speech"][0], voice)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(found.detach(), total, rtol=1e-5, atol=0)
    # the states' gradient reaches the thinker
    pack.assert_gradients_of(reference, nonzero="text.layers.0.mlp.down_proj.weight")
