"""`omniloom plan --gpus N --memory GIB`: what a run takes and how fast it is, on machines that are not at hand.

Prints what `run/layouts.py` ranks. Reads the checkpoint's headers alone: no weights, no rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from omniloom.config import config_from_words
from omniloom.parallel.degrees import resolve_degrees
from omniloom.run.footprint import ModelSizes
from omniloom.run.layouts import Candidate, rank_layouts
from omniloom.run.opening import open_workshop
from omniloom.run.step_time import Clock, Machine

GIB = 2**30
SHOWN = 8  # layouts
MOST_DEVICES = 4096  # that are tried where nothing fits
COLUMNS = ("weights", "grads", "states", "kept", "working", "sum")
ASSUMED = (
    "a pack of four samples of one length, half of it media of the costliest kind, half with a loss; H200s, {devices} "
    "a machine; times are estimates by a roofline that no accelerator has confirmed"
)


def show_layouts(words: Sequence[str], gpus: int, memory_gib: float | None, nodes: int | None) -> None:
    """Print the layouts of so many devices, best first. Raises: ValueError where none fits, with what would."""
    if memory_gib is None or not 0 < memory_gib < math.inf:
        raise ValueError(f"--memory: expected the GiB of each device, as 80, got {memory_gib}")
    if nodes is not None and (nodes < 1 or gpus % nodes):
        raise ValueError(f"--nodes: expected a divisor of --gpus {gpus}, got {nodes}")
    machine = Machine(devices=gpus // nodes if nodes else min(gpus, Machine().devices))
    config = config_from_words(words)
    sizes = ModelSizes(open_workshop(config))
    trained = sum(weight.trains for weight in sizes.weights)
    print(f"model      {sizes.workshop.spec.name}, {sizes.num_parameters():,} parameters, "
          f"{sizes.num_parameters(trains=True):,} of them train" + ("" if trained else ": nothing does"))  # fmt: skip
    print(f"step       {config.train.packs_per_step} packs of {config.data.pack_tokens:,} tokens on {gpus} devices of "
          f"{memory_gib:g} GiB")  # fmt: skip
    print(f"assumed    {ASSUMED.format(devices=machine.devices)}")
    if sizes.model.talker is not None:
        print(
            "speech     the talker's weights, gradients and states are counted; what its layers keep and compute is not"
        )
    found = rank_layouts(sizes, gpus, memory_gib * GIB, machine, vary_memory=True)
    fitting = [candidate for candidate in found if candidate.fits(memory_gib * GIB)]
    if not fitting:
        raise ValueError(_nothing_fits(sizes, gpus, memory_gib, machine, found))
    print("\nGiB of a device at the fullest moment, seconds of a step, tokens/s of a device, share of the peak:")
    print("".join(f"{name:>9}" for name in (*COLUMNS, "s/step")) + f"{'tok/s':>12}{'MFU':>9}  set")
    for candidate in fitting[:SHOWN]:
        print(_line(candidate, machine))
    if config.parallel.layout == "given":
        print(_as_configured(sizes, gpus, memory_gib, machine))
    print(f"\n{len(found) - len(fitting)} of {len(found)} layouts do not fit. The first sends, GB a step and device:")
    print("           " + (", ".join(f"{axis} {sent / 1e9:,.2f}" for axis, sent in fitting[0].time.sent.items())
                           or "nothing"))  # fmt: skip


def _as_configured(sizes: ModelSizes, gpus: int, memory_gib: float, machine: Machine) -> str:
    """The line of the layout that the config asks for, or why so many ranks cannot have it."""
    config = sizes.config
    try:
        degrees = resolve_degrees(config.parallel, gpus, packs_per_step=config.train.packs_per_step)
    except ValueError as error:
        return f"as configured it does not run: {error}"
    time = Clock(sizes, machine).step(degrees, config.memory)
    given = Candidate(degrees=degrees, memory=config.memory, footprint=sizes.footprint(degrees), time=time)
    verdict = "as configured" if given.fits(memory_gib * GIB) else "as configured, which does not fit"
    return f"{_line(given, machine)}  ({verdict})"


def _line(candidate: Candidate, machine: Machine) -> str:
    figures = [*asdict(candidate.footprint).values(), candidate.footprint.total]
    cells = "".join(f"{figure / GIB:>9.1f}" for figure in figures)
    time = candidate.time
    speed = f"{time.seconds:>9.3g}{time.tokens_per_second:>12,.0f}{time.utilisation(machine):>9.1%}"
    return f"{cells}{speed}  {' '.join(f'{key}={value}' for key, value in candidate.settings().items())}"


def _nothing_fits(sizes: ModelSizes, gpus: int, memory_gib: float, machine: Machine, found: list[Candidate]) -> str:
    if not found:
        return (
            f"--gpus {gpus}: no layout of so many ranks divides model and packs; train.packs_per_step is "
            f"{sizes.config.train.packs_per_step}, data.pack_tokens {sizes.config.data.pack_tokens}"
        )
    least = found[0]
    settings = " ".join(f"{key}={value}" for key, value in least.settings().items())
    words = (
        f"--memory {memory_gib:g}: no layout of {gpus} devices fits; the smallest takes "
        f"{least.footprint.total / GIB:.3g} GiB ({settings})"
    )
    more = gpus
    while (more := 2 * more) <= MOST_DEVICES:
        other = rank_layouts(sizes, more, memory_gib * GIB, machine, vary_memory=True)
        if other and other[0].fits(memory_gib * GIB):
            return f"{words}; {more} devices of this size would do, or LoRA, or a shorter data.pack_tokens"
    return f"{words}; use larger devices, LoRA, or a shorter data.pack_tokens"
