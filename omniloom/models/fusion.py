"""A model that reads text, images, video and sound: towers, decoder, and the order of their work.

Pure tensor functions of a `PackedBatch`. Towers and decoder meet only in `TowerRows`, so that between `encode` and
`decode` rows may be exchanged, detached and have their gradients sent back.
"""

from __future__ import annotations

from torch import Tensor, nn

from omniloom.models.decoder import Decoder
from omniloom.models.talker import Talker
from omniloom.types import LossTerms, PackedBatch, TowerRows


class OmniModel(nn.Module):
    def __init__(
        self, *, vision: nn.Module | None, audio: nn.Module | None, text: Decoder, talker: Talker | None = None
    ) -> None:
        super().__init__()
        # whether nothing but the talker trains: then the text is read only as far as the talker needs it
        self.trains_speech_alone = False
        self.vision = vision
        self.audio = audio
        self.text = text
        self.talker = talker

    def encode(self, batch: PackedBatch) -> TowerRows:
        """One call of each tower that is built, on all of the batch's media and its null segments."""
        vision, deepstack, audio = None, (), None
        if self.vision is not None:
            assert batch.vision is not None, "the model has a vision tower: the batch needs at least a null segment"
            vision, deepstack = self.vision(batch.vision, batch.draw_key)
        if self.audio is not None:
            assert batch.audio is not None, "the model has an audio tower: the batch needs at least a null segment"
            audio = self.audio(batch.audio, batch.draw_key)
        return TowerRows(vision=vision, deepstack=deepstack, audio=audio)

    def decode(self, batch: PackedBatch, media: TowerRows) -> LossTerms:
        if self.talker is None:
            return self.text(batch, media)
        alone = self.trains_speech_alone and self.training
        terms = self.text(batch, media, want="speech" if alone else "loss")
        sums, counts = self.talker(batch, terms.speech)
        for name, value in terms.sums.items():
            sums[name] = sums[name] + value if name in sums else value  # both have routers
        return LossTerms(sums=sums, expert_counts=counts if alone else terms.expert_counts)

    def forward(self, batch: PackedBatch) -> LossTerms:
        return self.decode(batch, self.encode(batch))

    def best_tokens(self, batch: PackedBatch, media: TowerRows) -> Tensor:
        """The likeliest next token of the rows in `loss_index`: int64 [L]."""
        return self.text(batch, media, want="best_tokens")

    def logits(self, batch: PackedBatch) -> Tensor:
        """Logits of every row, float32 [T, V]; for tests, scoring and generation."""
        return self.text(batch, self.encode(batch), want="logits")
