"""Model FLOPs utilisation: what the model's arithmetic asks for, over what the device has shown that it can do and over
what its maker says."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from omniloom.types import Extent

# Dense FLOP/s of products in bfloat16, by words of the device's name. Source: NVIDIA's data sheets, which give twice as
# much for matrices half of which are zeros.
NOMINAL_PEAKS: Mapping[str, float] = MappingProxyType(
    {
        "GB200": 2.5e15,
        "B200": 2.25e15,
        "GH200": 989e12,
        "H200 NVL": 835e12,
        "H200": 989e12,
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H100": 989e12,
        "H800 PCIe": 756e12,
        "H800": 989e12,
        "H20": 148e12,
        "A100": 312e12,
        "A800": 312e12,
        "L40S": 362e12,
        "A10G": 70e12,
        "A10": 125e12,
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainingWork:
    """What of a model trains, as far as its arithmetic is concerned.

    Backward costs one product for the input's gradient and one for the weight's, each as much as the forward one.
    Frozen towers have neither; a decoder whose own weights are frozen has the first only.
    Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1.
    """

    decoder_weights: bool
    towers: bool
    speech: bool = False  # the talker's own weights
    speech_alone: bool = False  # nothing but the talker's: of the text then nothing is counted, little of it being read

    def megaflops(self, extents: Iterable[Extent]) -> float:
        """FLOPs / 1e6 of forward and backward over these samples; recompute is not counted."""
        return sum(self.by_component(extents).values())

    def by_component(self, extents: Iterable[Extent]) -> dict[str, float]:
        """The same of decoder and towers; attention by the length of each sample, frame and window."""
        decoder = towers = speech = 0
        for extent in extents:
            decoder += extent.cost - extent.tower_cost - extent.speech_cost
            towers += extent.tower_cost
            speech += extent.speech_cost
        of_text = 0 if self.speech_alone else 3 if self.decoder_weights else 2
        found: dict[str, float] = {"decoder": of_text * decoder, "towers": (3 if self.towers else 1) * towers}
        return {**found, "speech": (3 if self.speech else 2) * speech} if speech else found


def training_work(changed: Collection[str], adapters: Collection[str]) -> TrainingWork:
    """By the names of the parameters that train, those of adapters among them."""
    return TrainingWork(
        decoder_weights=any(name.startswith("text.") and name not in adapters for name in changed),
        towers=any(name.startswith(("vision.", "audio.")) for name in changed),
        speech=any(name.startswith("talker.") and name not in adapters for name in changed),
        speech_alone=all(name.startswith("talker.") for name in changed),
    )


def measure_matmul_peak(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """FLOP/s of square matrix products on this device in this dtype, the best of several timed rounds."""
    size = 1024 if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    left @ right
    best, deadline = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        _synchronise(device)
        start = time.perf_counter()
        left @ right
        _synchronise(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


def nominal_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of products as the device's maker has it; None for devices and dtypes that are not in the table."""
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    if name_of is None or dtype != torch.bfloat16:
        return None
    name = name_of(device)
    return next((peak for words, peak in NOMINAL_PEAKS.items() if re.search(rf"\b{words}\b", name)), None)


def model_flops_utilisation(megaflops: float, seconds: float, peak: float, world_size: int) -> float:
    """Share of the peak that a step's model FLOPs (recompute not counted) amount to.

    Args: megaflops: the step's work over all ranks, see `TrainingWork`; peak: FLOP/s of one rank.
    """
    return megaflops * 1e6 / (seconds * peak * world_size)


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
