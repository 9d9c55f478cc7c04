"""Qwen2.5-Omni's talker: its dims, its tensor names, its voices, and how a spoken answer is laid out for it.

It reads the whole conversation: of each token the embedding and the thinker's last state, added up. A frame has one
code; what makes such codes of sound was never published.

Source: transformers, Qwen2_5OmniForConditionalGeneration.generate and Qwen2_5OmniTalkerForConditionalGeneration.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omniloom.families.config_fields import ConfigSection, TalkerConfig, read_decoder
from omniloom.families.cost import speech_cost
from omniloom.families.decoder import make_layers
from omniloom.families.hf_rules import layer_rules, linears
from omniloom.keymap import Rule
from omniloom.models.talker import SummedRows, Talker
from omniloom.processors.positions import sample_positions
from omniloom.processors.speech import NUM_HEADER, ChatTokens, SpeechLayout, SpeechTokens, SpokenTurn
from omniloom.types import Kernel, SpeechRows

NUM_PREFIX = 2  # rows of an answer after its header and before its first frame; the last of them predicts it
VOICES = "spk_dict.pt"


def read_talker(config: ConfigSection) -> TalkerConfig:
    """From the whole config.json. Demands are noted in the section."""
    talker, thinker = config.section("talker_config"), config.section("thinker_config")
    decoder = replace(read_decoder(talker, qwen2_5=True, flat=True), tie_word_embeddings=False)
    text, width = thinker.section("text_config"), talker.field("embedding_size")
    tokens = _read_tokens(talker, config.section("token2wav_config").section("dit_config").field("num_embeds"))
    special = (*tokens.prefix, tokens.codec_eos)
    demands = {
        "talker_config.embedding_size is thinker_config.text_config.hidden_size": width == text.field("hidden_size"),
        f"talker_config: its codec's own ids {list(special)} come after the {tokens.num_codes} codes and before its "
        f"vocab_size {decoder.vocab_size}": tokens.num_codes <= min(special) <= max(special) < decoder.vocab_size,
        **{
            f"{name} of talker_config and of thinker_config are the same": talker.field(name) == thinker.field(name)
            for name in ("position_id_per_seconds", "seconds_per_chunk")
        },
    }
    talker.demands.update(demands)
    return TalkerConfig(
        decoder=decoder,
        code_predictor=None,
        thinker_hidden_size=width,
        accept_hidden_layer=text.field("num_hidden_layers"),
        tokens=tokens,
    )


def _read_tokens(talker: ConfigSection, num_codes: int) -> SpeechTokens:
    """Without those of turns and voices, which config.json does not name."""
    return SpeechTokens(
        turn=(),
        tts=tuple(talker.field(f"tts_text_{name}_token_id") for name in ("pad", "start", "end")),
        prefix=tuple(talker.field(f"tts_codec_{name}_token_id") for name in ("pad", "start")),
        codec_eos=talker.field("tts_codec_end_token_id"),
        media=tuple(talker.field(f"{name}_token_id", f"{name}_token_index") for name in ("audio", "image", "video")),
        speakers={},
        usual_speaker="chelsie",
        num_code_groups=1,
        num_codes=num_codes,
        positions_per_second=float(talker.field("position_id_per_seconds")),
        of_recordings="what makes codes of recordings for Qwen2.5-Omni was never published, so its talker trains on "
        "codes alone that you have",
    )


def talker_rules() -> list[Rule]:
    return [
        *linears("talker", "talker", {"thinker_to_talker_proj": "projection.sum"}, bias=True),
        Rule(published="talker.model.embed_tokens.weight", ours="talker.codec_embed.weight"),
        *layer_rules("talker.model", "talker.decoder"),
        Rule(published="talker.model.norm.weight", ours="talker.norm.weight"),
        Rule(published="talker.codec_head.weight", ours="talker.head.weight"),
    ]


def make_talker(config: TalkerConfig, *, kernel: Kernel, loss_chunk_tokens: int | None) -> Talker:
    """The talker on the current default device, weights not yet read."""
    decoder = config.decoder
    return Talker(
        make_layers(decoder, kernel=kernel),
        None,
        projection=SummedRows(in_size=config.thinker_hidden_size, out_size=decoder.hidden_size),
        vocab_size=decoder.vocab_size,
        codec_size=config.thinker_hidden_size,
        hidden_size=decoder.hidden_size,
        norm_eps=decoder.rms_norm_eps,
        chunk=loss_chunk_tokens,
    )


def open_speech(config: TalkerConfig, directory: Path, tokenizer: Any) -> SpeechLayout:
    """The layout for a checkpoint's tokens and voices. Raises: ValueError for a file of voices that is damaged."""
    names = ("<|im_start|>", "<|im_end|>", "user", "assistant")
    tokens = replace(
        config.tokens,
        turn=tuple(tokenizer.convert_tokens_to_ids(list(names))),
        speakers=_read_voices(directory / VOICES),
    )
    return Qwen25OmniSpeech(tokens, partial(speech_cost, config.decoder, None))


def _read_voices(path: Path) -> dict[str, int]:
    """By name in lower case the token of text that stands for a voice; none where the file is not there."""
    if not path.is_file():
        return {}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name).lower(): int(voice["bos_token"]) for name, voice in found.items()}
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: expected voices by name, each with a bos_token: {reason}; download it again"
        ) from None


class Qwen25OmniSpeech(SpeechLayout):
    def num_rows(self, turn: SpokenTurn, chat: ChatTokens) -> int:
        return turn.start + NUM_HEADER + NUM_PREFIX + turn.num_frames

    def lay_out(self, turn: SpokenTurn, chat: ChatTokens, rate: float) -> SpeechRows:
        asked, num_frames = turn.start + NUM_HEADER, turn.num_frames
        pad, _, end = self.tokens.tts
        first, *words = chat.ids[asked : turn.end]
        spoken = [*words, end, *[pad] * num_frames][:num_frames]
        own = np.array([turn.speaker, first, *spoken], np.int64)
        num_rows = asked + len(own)
        # of all that was said before, of the first word in the row that opens the frames, and of the words beside them
        heard = np.r_[0:asked, asked + 1 : num_rows][: turn.end]
        return SpeechRows(
            text_ids=torch.from_numpy(np.concatenate([chat.ids[:asked], own])),
            position_ids=sample_positions([*_runs_before(asked, chat), len(own)]),
            media_index=torch.from_numpy(np.flatnonzero(np.isin(chat.ids[:asked], self.tokens.media))),
            state_index=torch.from_numpy(heard),
            hidden_index=torch.arange(len(heard)),
            codec_index=torch.tensor([asked, asked + 1]),
            codec_ids=torch.tensor(self.tokens.prefix),
            frame_index=torch.arange(asked + NUM_PREFIX, num_rows),
            frames=torch.from_numpy(turn.codes.T),
        )


def _runs_before(end: int, chat: ChatTokens) -> list[int | np.ndarray]:
    """The runs of the first `end` tokens, at which a run of text may be cut."""
    kept: list[int | np.ndarray] = []
    for run in chat.runs:
        kept.append(min(run, end) if isinstance(run, int) else run)
        end -= run if isinstance(run, int) else run.shape[1]
        if end <= 0:
            break
    return kept
