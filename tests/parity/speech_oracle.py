"""transformers' stepped generation of speech, forced to given codes: the oracle of everything about the talker.

The thinker answers with the given tokens and the talker with the given codes, each step being transformers' own: its
`generate` of the whole model lays out the prompt, and its loops feed what comes back. The logits of each step are
kept.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpokenLogits:
    code0: Tensor  # float32 [F + 1, V]
    loss_code0: Tensor
    codes: Tensor | None = None  # float32 [F, G - 1, V]; None, as its loss, where a frame has one code
    loss_codes: Tensor | None = None


def forced_speech(model: Any, inputs: dict[str, Any], answer: list[int], codes: Tensor, speaker: str) -> SpokenLogits:
    """Logits of every code of `codes` int64 [G, F], spoken for `answer`, tokens with their <|im_end|>.

    `inputs` are those of transformers' `generate` for the prompt.
    """
    talker = model.talker
    code0: list[Tensor] = []
    others: list[list[Tensor]] = []
    end = model.config.talker_config.codec_eos_token_id
    wanted = [*codes[0].tolist(), end]

    def force_thinker(_: Tensor, scores: Tensor) -> Tensor:
        token = answer[force_thinker.step]
        force_thinker.step += 1
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)

    force_thinker.step = 0

    def force_talker(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([wanted[len(code0) - 1]]), 0.0)

    def force_predictor(_: Tensor, scores: Tensor) -> Tensor:
        frame, group = len(others) - 1, len(others[-1])
        return torch.full_like(scores, -torch.inf).index_fill(1, codes[group, frame][None], 0.0)

    talker_forward, predictor_forward = type(talker).forward, type(talker.code_predictor).forward

    @wraps(talker_forward)
    def keep_talker(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = talker_forward(self, *args, **kwargs)
        code0.append(out.logits[0, -1])
        return out

    @wraps(predictor_forward)
    def keep_predictor(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = predictor_forward(self, *args, **kwargs)
        if (rows := kwargs.get("inputs_embeds")) is not None and rows.shape[1] > 1:
            others.append([])
        others[-1].append(out.logits[0, -1])
        return out

    thinker_generate = type(model.thinker).generate
    talker_generate, predictor_generate = type(talker).generate, type(talker.code_predictor).generate

    def positions(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The talker's own function fails for sound beside pictures, its config having no `audio_config`."""
        return type(model.thinker).get_rope_index(model.thinker, *args, **kwargs)

    def with_processor(original: Any, processor: Any) -> Any:
        return lambda self, *args, **kwargs: original(self, *args, **kwargs, logits_processor=[processor])

    with ExitStack() as stack:
        for owner, name, value in (
            (type(talker), "forward", keep_talker),
            (type(talker.code_predictor), "forward", keep_predictor),
            (type(talker), "get_rope_index", positions),
            (type(model.thinker), "generate", with_processor(thinker_generate, force_thinker)),
            (type(talker), "generate", with_processor(talker_generate, force_talker)),
            (type(talker.code_predictor), "generate", with_processor(predictor_generate, force_predictor)),
            (type(model.code2wav), "chunked_decode", lambda self, codes, **_: torch.zeros(1)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        model.generate(
            **inputs,
            speaker=speaker,
            thinker_eos_token_id=model.config.im_end_token_id,
            thinker_max_new_tokens=len(answer),
            thinker_do_sample=False,
            talker_do_sample=False,
            talker_suppress_tokens=None,
            talker_repetition_penalty=1.0,
            talker_max_new_tokens=len(wanted),
        )
    stacked = torch.stack(code0), torch.stack([torch.stack(frame) for frame in others])
    assert stacked[0].shape[0] == len(wanted)
    assert stacked[1].shape[:2] == (codes.shape[1], codes.shape[0] - 1)
    cross_entropy = torch.nn.functional.cross_entropy
    return SpokenLogits(
        code0=stacked[0],
        codes=stacked[1],
        loss_code0=cross_entropy(stacked[0], torch.tensor(wanted)),
        loss_codes=cross_entropy(stacked[1].flatten(0, 1), codes[1:].T.flatten()),
    )


def reference_losses(
    model: Any, inputs: dict[str, Any], answer: list[int], codes: Tensor, speaker: str
) -> tuple[Tensor, Tensor]:
    """Sums of the cross entropies of first codes and of the others, with gradients, by transformers' modules at once.

    Each of its parts lays out its own rows; the last token of `answer`, <|im_end|>, is not spoken.
    """
    config, talker = model.config, model.talker
    asked = inputs["input_ids"].shape[1]
    ids = torch.cat((inputs["input_ids"][0], torch.tensor(answer[:-1])))[None]
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    states = model.thinker(**whole, output_hidden_states=True).hidden_states
    heard = [config.thinker_config.audio_token_id, config.thinker_config.image_token_id]
    is_media = torch.isin(ids, torch.tensor([*heard, config.thinker_config.video_token_id]))
    embedded, hidden = states[0], states[config.talker_config.accept_hidden_layer]
    is_user, at = [], 0
    for position, token in enumerate(ids[0, :asked].tolist()):
        at = position if token == config.im_start_token_id else at
        is_user.append(int(ids[0, at + 1]) == config.user_token_id)
    users = torch.tensor(is_user).nonzero().flatten()
    user_rows = model._get_talker_user_parts(0, asked, is_media, hidden, embedded)[:, users]
    marks = torch.tensor([[config.tts_bos_token_id, config.tts_eos_token_id, config.tts_pad_token_id]])
    begin, end, pad = talker.text_projection(model.thinker.get_input_embeddings()(marks)).chunk(3, dim=1)
    voice = config.talker_config.speaker_id[speaker.lower()]
    opening, own_ids, words = model._get_talker_assistant_parts(
        asked - 3, ids.shape[1], voice, embedded, pad, begin, end
    )
    num_frames = codes.shape[1]
    words = torch.cat((words, pad.expand(1, num_frames, -1)), dim=1)[:, :num_frames]
    tables = [talker.get_input_embeddings(), *talker.code_predictor.get_input_embeddings()]
    of_codes = torch.stack([table(group) for table, group in zip(tables, codes, strict=True)], dim=1)  # [F, G, C]
    rows = torch.cat((user_rows, opening, of_codes.sum(dim=1)[None] + words), dim=1)
    talker_ids = torch.cat((ids[:, users], own_ids, own_ids[:, :1].expand(1, num_frames)), dim=1)
    positions, _ = model.thinker.get_rope_index(
        talker_ids,
        inputs.get("image_grid_thw"),
        inputs.get("video_grid_thw"),
        torch.ones_like(talker_ids),
        False,
        None if "feature_attention_mask" not in inputs else inputs["feature_attention_mask"].sum(dim=1),
        inputs.get("video_second_per_grid"),
    )
    last = talker.model(inputs_embeds=rows, position_ids=positions).last_hidden_state[0]
    predicting = last[-num_frames - 1 :]
    wanted = torch.cat((codes[0], torch.tensor([config.talker_config.codec_eos_token_id])))
    cross_entropy = torch.nn.functional.cross_entropy
    code0 = cross_entropy(talker.codec_head(predicting), wanted, reduction="sum")
    of_frames = torch.cat((predicting[:-1, None], of_codes[:, :-1]), dim=1)
    out = talker.code_predictor.model(inputs_embeds=of_frames).last_hidden_state
    heads = enumerate(talker.code_predictor.lm_head, start=1)
    others = torch.stack([cross_entropy(head(out[:, group]), codes[group], reduction="sum") for group, head in heads])
    return code0, others.sum() / len(others)
