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
    codes: Tensor  # float32 [F, G - 1, V]
    loss_code0: Tensor
    loss_codes: Tensor


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
