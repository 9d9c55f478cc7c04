"""Whether codes of speech fit a checkpoint: what its own vocoder makes of them, beside the recordings they are of.

The codec is another model than the vocoder, and nothing in either's files says that they belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omniloom.checkpoint.files import read_json
from omniloom.checkpoint.tensor_files import HFCheckpoint
from omniloom.config import DataConfig
from omniloom.data.media_decode import decode_audio
from omniloom.data.media_files import MediaLimits
from omniloom.run.opening import Workshop
from omniloom.tools.speak import FRAMES_PER_SECOND
from omniloom.types import MediaSource, Speech

VOCODER = "code2wav."
FITS = 0.8  # own recordings are nearer than this share of the distance of others'
NUM_BANDS, WINDOW, STEP = 40, 1024, 512  # of the spectra; samples


def describe_speech(workshop: Workshop, turns: Sequence[tuple[Path, Speech]], num_spoken: int) -> list[str]:
    """Lines about the rows with speech, of some of whose turns the recordings are known.

    Raises: SampleError for a recording that cannot be read.
    """
    lacks = "no recording beside them" if not turns else "no vocoder here that makes sound of them"
    if not turns or not any(name.startswith(VOCODER) for name in workshop.checkpoint.shapes):
        return [f"speech     {num_spoken:,} rows of codes, and {lacks}: how they sound is not compared"]
    vocoder = open_vocoder(workshop.checkpoint)
    pairs = [_sounds(vocoder, recording, speech) for recording, speech in turns]
    own = float(np.mean([spectral_distance(made, real) for made, real in pairs]))
    line = (
        f"speech     {num_spoken:,} rows; of {len(pairs)} turns the vocoder's sound is {own:.1f} dB from the recordings"
    )
    if len(pairs) == 1:
        return [line]
    made, real = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    others = float(np.mean([spectral_distance(*pair) for pair in zip(made, [*real[1:], real[0]], strict=True)]))
    lines = [f"{line}, {others:.1f} dB from those of other turns"]
    if own > FITS * others:
        lines.append(
            "           warning: these codes do not fit the checkpoint's vocoder; are they of the codec that it was "
            "trained with (kyutai/mimi for published ones), and in the order of its groups?"
        )
    return lines


def open_vocoder(checkpoint: HFCheckpoint) -> Any:
    """transformers' code2wav with the checkpoint's weights, in float32."""
    import transformers

    config = transformers.AutoConfig.for_model(**read_json(checkpoint.directory / "config.json"))
    vocoder = transformers.Qwen3OmniMoeCode2Wav(config.code2wav_config)
    names = [name for name in checkpoint.shapes if name.startswith(VOCODER)]
    vocoder.load_state_dict({name.removeprefix(VOCODER): checkpoint.read_slice(name) for name in names})
    return vocoder.float().eval()


def _sounds(vocoder: Any, recording: Path, speech: Speech) -> tuple[np.ndarray, np.ndarray]:
    """What the vocoder makes of the codes, and the recording, float32 at the vocoder's rate."""
    rate = int(FRAMES_PER_SECOND * int(vocoder.total_upsample))
    real = decode_audio(MediaSource(path=str(recording)), MediaLimits(data=DataConfig(), sampling_rate=rate))
    with torch.no_grad():
        made = vocoder.chunked_decode(torch.tensor(speech.codes)[None])
    return made.flatten().numpy(), real


def spectral_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Decibels between two sounds of one rate: the mean over time of the root mean square over bands of frequency.

    Both are cut to the shorter one's length. Source: log-spectral distance, Gray and Markel 1976, on 40 bands that grow
    with frequency.
    """
    length = min(len(one), len(other))
    levels = [_levels(sound[:length]) for sound in (one, other)]
    return float(np.sqrt(((levels[0] - levels[1]) ** 2).mean(axis=1)).mean())


def _levels(sound: np.ndarray) -> np.ndarray:
    """Decibels [windows, bands]."""
    padded = np.pad(sound, (0, max(0, WINDOW - len(sound))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::STEP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(windows, axis=1)) ** 2
    edges = np.unique(np.geomspace(2, WINDOW // 2, NUM_BANDS + 1).astype(int))
    bands = np.add.reduceat(power, edges[:-1], axis=1) / np.diff(edges)
    return np.asarray(10 * np.log10(bands + 1e-4))  # below lies the noise of 16 bits
