"""The talker: from what the decoder of text made of a conversation to the codes of a spoken answer.

A decoder of its own predicts the first code of each frame; where a frame has several, a small one, the code predictor,
predicts the others one after another, from the state that predicted the first. Which rows read what is laid out by the
processor and travels in the batch; nothing here knows a token. Sits behind the decoder of text, in the same packs.

Source: transformers, Qwen3OmniMoeTalkerForConditionalGeneration and Qwen2_5OmniTalkerForConditionalGeneration, and
`generate` of the whole models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from omniloom.models.decoder import CrossEntropy, Decoder
from omniloom.models.layers import MLP, Linear, RMSNorm
from omniloom.ops.linear_map import layer_key
from omniloom.types import CODE0, CODES, PackedBatch, Segments, SpeechInputs, SpeechRows, Targets, TowerRows

NO_MEDIA = TowerRows(vision=None, deepstack=(), audio=None)


class ProjectedRows(nn.Module):
    """A row is the embedding of a token or a hidden state, each projected; what the codec says is added to it."""

    hears_words = False  # hidden states of the answer: no, of media alone

    def __init__(self, *, text: MLP, hidden: MLP) -> None:
        super().__init__()
        self.text = text
        self.hidden = hidden

    def forward(
        self, inputs: SpeechInputs, rows: SpeechRows, tokens: Tensor, frames: Tensor, draw_key: Tensor | None
    ) -> Tensor:
        """Rows [T, C] with `tokens` [c, C] of the codec and `frames` [f, C] on top."""
        text, states = self.text(inputs.text, draw_key), self.hidden(inputs.hidden, draw_key)
        return _add_codec(text.index_copy(0, rows.state_index, states.to(text.dtype)), rows, tokens, frames)


class SummedRows(nn.Module):
    """A row is the embedding of a token, but of media, and the hidden state, and what the codec says: the sum is
    projected."""

    hears_words = True

    def __init__(self, *, in_size: int, out_size: int) -> None:
        super().__init__()
        self.sum = Linear(in_size, out_size)

    def forward(
        self, inputs: SpeechInputs, rows: SpeechRows, tokens: Tensor, frames: Tensor, draw_key: Tensor | None
    ) -> Tensor:
        """As `ProjectedRows`, `tokens` and `frames` as wide as the rows of text."""
        text = inputs.text.index_fill(0, rows.media_index, 0.0)
        text = text.index_add(0, rows.state_index, inputs.hidden.to(text.dtype))
        return self.sum(_add_codec(text, rows, tokens, frames), draw_key)


def _add_codec(hidden: Tensor, rows: SpeechRows, tokens: Tensor, frames: Tensor) -> Tensor:
    hidden = hidden.index_add(0, rows.codec_index, tokens.to(hidden.dtype))
    return hidden.index_add(0, rows.frame_index, frames.to(hidden.dtype))


class CodePredictor(nn.Module):
    """All codes of a frame but the first, each from those before it."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_groups: int,
        vocab_size: int,
        hidden_size: int,
        norm_eps: float,
        chunk: int | None,
    ) -> None:
        """`num_groups` are the codes of a frame, the first included; `chunk`: see `CrossEntropy`."""
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(vocab_size, hidden_size) for _ in range(num_groups - 1))
        self.decoder = decoder
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.heads = nn.ModuleList(Linear(hidden_size, vocab_size, bias=False) for _ in range(num_groups - 1))
        self.cross_entropy = CrossEntropy(chunk)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Frames int64 [F, G] -> embeddings of all codes but the first, [F, G - 1, C]."""
        return torch.stack([embed(codes[:, group]) for group, embed in enumerate(self.embed, start=1)], dim=1)

    def states(self, hidden: Tensor, first: Tensor, others: Tensor, batch: PackedBatch) -> Tensor:
        """States [F, G, C], that of position g predicting code g (position 0 predicts nothing).

        `hidden` [F, C] are the talker's states that predict the frames' first codes, `first` [F, C] the embeddings of
        those, `others` [F, G - 1, C] of the rest. A frame is a segment of G positions.
        """
        frames = torch.cat((hidden[:, None], first[:, None], others[:, :-1]), dim=1)
        num_frames, num_groups = frames.shape[0] + 1, frames.shape[1]
        # a frame that nothing reads: a rank without any would have no rows for the layers, and weights no gradient
        rows = pad(frames.flatten(0, 1), (0, 0, 0, num_groups))
        positions = torch.arange(num_groups, device=rows.device).repeat(num_frames).expand(3, -1)
        bounds = range(0, num_frames * num_groups + 1, num_groups)
        of_frames = replace(
            batch,
            position_ids=positions,
            is_padding=torch.zeros_like(positions[0], dtype=torch.bool),
            segments=Segments(
                cu_seqlens=torch.arange(0, bounds.stop, num_groups, dtype=torch.int32, device=rows.device),
                bounds=tuple(bounds),
                max_length=num_groups,
            ),
        )
        out, _, _ = self.decoder.run_layers(rows, of_frames, NO_MEDIA)
        states: Tensor = self.norm(out)
        return states.unflatten(0, (num_frames, num_groups))[:-1]

    def loss(self, states: Tensor, codes: Tensor, weights: Tensor, draw_key: Tensor | None) -> Tensor:
        """Weighted sum over frames of the mean cross entropy of their codes but the first, float32 []."""
        heads: Any = self.heads  # of linears, or of adapted ones
        losses = [
            self.cross_entropy(states[:, group], head.as_map(draw_key), codes[:, group], weights)
            for group, head in enumerate(heads, start=1)
        ]
        return torch.stack(losses).sum() / len(losses)


class Talker(nn.Module):
    def __init__(
        self,
        decoder: Decoder,
        code_predictor: CodePredictor | None,
        *,
        projection: ProjectedRows | SummedRows,
        vocab_size: int,
        codec_size: int,
        hidden_size: int,
        norm_eps: float,
        chunk: int | None,
    ) -> None:
        """`decoder` has layers alone, `projection` makes their rows, `codec_size` is the width of embedded codes.

        Without a code predictor a frame has one code.
        """
        super().__init__()
        self.projection = projection
        self.codec_embed = nn.Embedding(vocab_size, codec_size)
        self.decoder = decoder
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.head = Linear(hidden_size, vocab_size, bias=False)
        self.cross_entropy = CrossEntropy(chunk)
        self.code_predictor = code_predictor

    def forward(self, batch: PackedBatch, inputs: SpeechInputs) -> tuple[dict[str, Tensor], Tensor]:
        """Sums of the losses CODE0, CODES and ROUTER, as far as there are, float32 scalars, and expert counts int64
        [layers, E]. When nothing is trained also `right`.
        """
        hidden, states, sums, counts = self.run(batch, inputs)
        sums |= self.losses(hidden, states, batch.targets, layer_key(batch.draw_key))
        return sums if self.training else sums | self.right(hidden, states, batch.targets), counts

    def run(self, batch: PackedBatch, inputs: SpeechInputs) -> tuple[Tensor, Tensor | None, dict[str, Tensor], Tensor]:
        """States [T, C] and, of a code predictor, [F, G, C]; the routers' losses and counts, see `Decoder`."""
        assert batch.speech is not None, "the model has a talker: the batch needs rows for it, if only padding"
        read = batch.speech.rows.frames
        if self.code_predictor is None:
            hidden, sums, counts = self._run_layers(batch, inputs, self.codec_embed(read[:, 0]))
            return hidden, None, sums, counts
        codes = batch.targets[CODES]
        # frames that are read and frames that are predicted: the same, but where ranks share a pack
        both, num_read = torch.cat((read, codes.values)), len(read)
        first, others = self.codec_embed(both[:, 0]), self.code_predictor.embed_codes(both)
        hidden, sums, counts = self._run_layers(batch, inputs, first[:num_read] + others[:num_read].sum(dim=1))
        # the state that predicted a frame's first code, in the row before the frame's own, predicts the others
        predicting = hidden[codes.token_index]
        states = self.code_predictor.states(predicting, first[num_read:], others[num_read:], batch)
        return hidden, states, sums, counts

    def losses(
        self, hidden: Tensor, states: Tensor | None, targets: Mapping[str, Targets], draw_key: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Sums of weight x cross entropy of CODE0 and, with a code predictor, CODES: float32 scalars.

        `targets` may be a part of the batch's, `states` then those of the same frames.
        """
        code0, head = targets[CODE0], self.head.as_map(draw_key)
        sums = {CODE0: self.cross_entropy(hidden[code0.token_index], head, code0.values, code0.weights)}
        if self.code_predictor is not None and states is not None:
            codes = targets[CODES]
            sums[CODES] = self.code_predictor.loss(states, codes.values, codes.weights, draw_key)
        return sums

    def right(self, hidden: Tensor, states: Tensor | None, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """Of each code of a frame the sum of the weights where it, or the end, is the likeliest: float32 scalars.

        Each is named by the loss whose weights these are, a dot, and the code's number: `code0.0`, `codes.1`, ...
        """
        code0 = targets[CODE0]
        best = self.head(hidden[code0.token_index]).argmax(dim=-1)
        found = {f"{CODE0}.0": ((best == code0.values) * code0.weights).sum()}
        if self.code_predictor is None or states is None:
            return found
        codes = targets[CODES]
        for group, head in enumerate(self.code_predictor.heads, start=1):
            best = head(states[:, group]).argmax(dim=-1)
            found[f"{CODES}.{group}"] = ((best == codes.values[:, group]) * codes.weights).sum()
        return found

    def _run_layers(
        self, batch: PackedBatch, inputs: SpeechInputs, frames: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Of rows with `frames` [F, C] in their places the last states, normed, and what `Decoder.run_layers` gives."""
        speech = batch.speech
        assert speech is not None
        tokens = self.codec_embed(speech.rows.codec_ids)
        hidden = self.projection(inputs, speech.rows, tokens, frames, layer_key(batch.draw_key))
        own = replace(
            batch,
            position_ids=speech.rows.position_ids,
            segments=speech.segments,
            is_padding=speech.is_padding,
        )
        hidden, sums, counts = self.decoder.run_layers(hidden, own, NO_MEDIA)
        return self.norm(hidden), sums, counts
