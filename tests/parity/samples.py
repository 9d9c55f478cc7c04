"""Random samples that the processors of several families are tested on, and arrays for their clips."""

import numpy as np
from hypothesis import strategies as st

from omniloom.types import Conversation, DecodedClip, MediaHeader, MediaSource, Part, Turn

sides = st.integers(20, 200)
images = st.builds(
    lambda width, height: (
        Part(kind="image", media=MediaSource(path="x")),
        MediaHeader(kind="image", width=width, height=height),
    ),
    sides,
    sides,
)


def conversation_of(*parts, answer="yes"):
    """One question, the parts before its own, and one answer."""
    turns = (
        Turn(role="user", parts=(*parts, Part(kind="text", text="?"))),
        Turn(role="assistant", parts=(Part(kind="text", text=answer),)),
    )
    return Conversation(id="c", source="f:1", turns=turns)


def decode(clips, seed=0):
    """Arrays as a decoder would give them, of the planned counts."""
    generator = np.random.default_rng(seed)
    decoded = []
    for clip in clips:
        pixels = waveform = None
        if clip.grid_thw:
            shape = (40, 50, 3) if clip.kind == "image" else (len(clip.frame_indices), 40, 50, 3)
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        if clip.num_audio_samples:
            waveform = (0.1 * generator.standard_normal(clip.num_audio_samples)).astype(np.float32)
        decoded.append(DecodedClip(pixels=pixels, waveform=waveform))
    return tuple(decoded)
