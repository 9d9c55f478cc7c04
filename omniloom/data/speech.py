"""How an answer sounds: codes that a row holds or names, read and brought into one form.

Knows rows and files, no codec and no model: whether codes fit a checkpoint is its processor's to say.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from omniloom.data.row_media import RowMedia
from omniloom.types import Conversation, MediaSource, MissingFile, SampleError, Speech, Turn

NPY_START = b"\x93NUMPY"
CODE_FILE_LIMIT = 2**28  # bytes; 16 codes a frame of eight bytes each make days of speech


def read_speech(message: Mapping[str, Any], where: str, media: RowMedia) -> Speech:
    """What an answer says of its sound: `speech`, `speaker` and `recording`. Raises: SampleError."""
    given, speaker = message.get("speech"), message.get("speaker")
    if given is None:
        raise SampleError(f"{where}.speech", f"a speaker ({str(speaker)[:60]!r}) and no speech; give codes or a file")
    if not isinstance(speaker, str | None):
        raise SampleError(f"{where}.speaker", f"expected the name of a voice, got {str(speaker)[:60]!r}")
    recording = message.get("recording", "")
    if not isinstance(recording, str):
        raise SampleError(f"{where}.recording", f"expected the name of a file, got {str(recording)[:60]!r}")
    speech = Speech(speaker=speaker or "", recording=recording)
    if isinstance(given, list | tuple | np.ndarray):
        return replace(speech, codes=_as_codes(given, f"{where}.speech"))
    return replace(speech, source=media.clip("audio", given, f"{where}.speech").media)


def with_codes(conversation: Conversation, of_recordings: str) -> Conversation:
    """The conversation with the codes of its spoken turns read; `of_recordings` says how recordings become codes.

    Raises: SampleError.
    """
    if all(turn.speech is None or turn.speech.codes for turn in conversation.turns):
        return conversation
    turns = tuple(
        _load(turn, f"messages[{index}].speech", of_recordings) for index, turn in enumerate(conversation.turns)
    )
    return replace(conversation, turns=turns)


def _load(turn: Turn, where: str, of_recordings: str) -> Turn:
    if turn.speech is None or turn.speech.source is None:
        return turn
    codes = _as_codes(_read(turn.speech.source, where, of_recordings), where)
    return replace(turn, speech=replace(turn.speech, source=None, codes=codes))


def _read(source: MediaSource, where: str, of_recordings: str) -> np.ndarray:
    content = source.data
    if content is None:
        assert source.path is not None
        try:
            with open(source.path, "rb") as file:
                content = file.read(len(NPY_START))
                if content == NPY_START:
                    content += file.read(CODE_FILE_LIMIT)
        except FileNotFoundError:
            raise MissingFile(where, source.path) from None
        except OSError as error:
            raise SampleError(where, f"{source.path}: {error.strerror}") from None
    if not content.startswith(NPY_START):
        raise SampleError(where, f"expected codes as a list or a .npy file, got another kind of file; {of_recordings}")
    try:
        found: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise SampleError(where, f"not a whole .npy file: {error}") from None
    return found


def _as_codes(given: Any, where: str) -> tuple[tuple[int, ...], ...]:
    """Whole numbers [groups, frames], whatever holds them; of [frames] there is one group."""
    wanted = "expected codes as whole numbers, a list of one length for each group [groups, frames]"
    try:
        codes = np.asarray(given)
    except ValueError:  # lists of several lengths
        raise SampleError(where, f"{wanted}, got lists of several lengths or depths") from None
    codes = codes[None] if codes.ndim == 1 else codes
    if codes.ndim != 2 or codes.dtype.kind not in "iu" or math.prod(codes.shape) == 0:
        raise SampleError(where, f"{wanted}, got shape {list(codes.shape)} of {codes.dtype}")
    return tuple(tuple(group) for group in codes.tolist())
