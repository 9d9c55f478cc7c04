"""How the values of other trainers' settings read here, by the names that `other_trainers.yaml` has for it.

A reader takes what JSON, YAML or a command line holds and returns what our key takes. Raises: ValueError saying what
was expected; NotNeeded and NotOffered for what comes to no key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Value = Any  # what JSON, YAML or a command line holds


class NotNeeded(Exception):
    """A value for which no key has to be set; the words say why."""


class NotOffered(Exception):
    """A value that nothing here comes to; the words say what there is."""


def switch(value: Value) -> bool:
    """A flag without value, or a word."""
    if value is None or isinstance(value, bool):
        return value is not False
    return bool(_one_of(str(value).lower(), {"true": True, "false": False, "1": True, "0": False}))


def _if_on(value: Value) -> bool:
    if not switch(value):
        raise NotNeeded("off")
    return True


def _degree(value: Value) -> int:
    if whole(value) == 1:
        raise NotNeeded("1 is the default")
    return whole(value)


def _stages(value: Value) -> list[int]:
    """Layers of each stage; a list of lists is of stages that take turns."""
    if not isinstance(value, list):
        raise ValueError("a list with the number of layers of each stage")
    if any(isinstance(part, list) for part in value):
        raise NotOffered("stages that take turns are parallel.pipeline_schedule: interleaved, balanced by cost")
    if len(value) == 1:
        raise NotNeeded("one stage is the default")
    return [whole(part) for part in value]


def _no_half(value: Value) -> None:
    if _if_on(value):
        raise ValueError("bf16, which is the same size: fp16 is not offered, since it overflows")


def _quantisation(value: Value) -> str:
    if not value:
        raise NotNeeded("off")
    if str(value) != "4":
        raise NotOffered("frozen weights are held in bf16, or in 4 bits by model.quantize: nf4")
    return "nf4"


def _granularity(value: Value) -> str:
    if value != "full":
        raise NotOffered(
            "what of a block is recomputed is not chosen there; memory.recompute: full recomputes blocks whole, and is "
            "not needed where memory is enough"
        )
    return "full"


def _loss(value: Value) -> str:
    if value == "default":
        raise NotNeeded("train.loss follows the flags; where they say nothing, it weighs as there")
    if value not in LOSSES:
        raise NotOffered("a loss of one's own; train.loss knows token, sample, sqrt and batch")
    return LOSSES[value]


def _modules(value: Value) -> list[str]:
    if value in ("all", "all-linear"):
        raise NotNeeded("every linear is the default")
    return list(dict.fromkeys(part for name in files(value) for part in LORA_MODULES.get(name, [name])))


def whole(value: Value) -> int:
    if float(value) != int(float(value)):
        raise ValueError("a whole number")
    return int(float(value))


def files(value: Value) -> list[str]:
    parts = value if isinstance(value, list) else re.split(r"[\s,]+", str(value))
    return [str(part) for part in parts if part]


def _one_of(value: Value, known: Mapping[str, Value]) -> Value:
    if value not in known:
        raise ValueError(f"one of {', '.join(known)}")
    return known[value]


SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
             "cosine_with_min_lr": "cosine"}  # fmt: skip
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attn", "fa2", "auto")  # auto is flash wherever it runs
KERNELS = {**dict.fromkeys(FLASH, "auto"), "sdpa": "sdpa", "eager": "eager", "disabled": "eager"}
LOSSES = {"per_sample_loss": "sample", "per_token_loss": "token", "square": "sqrt", "square_loss": "sqrt",
          "token": "token", "sample": "sample"}  # fmt: skip
LORA_MODULES = {  # Megatron's names
    "linear_qkv": ["q_proj", "k_proj", "v_proj"],
    "linear_proj": ["o_proj"],
    "linear_fc1": ["gate_proj", "up_proj"],
    "linear_fc2": ["down_proj"],
}
FLAGS = ("switch", "if_on", "no_half", "checkpointing")  # readers for which a name without a value says yes
READERS: dict[str, Callable[[Value], Value]] = {
    "text": str,
    "number": float,
    "whole": whole,
    "bound": lambda value: whole(value) or None,  # 0 there is no bound, null here
    "any": lambda value: value,
    "switch": switch,
    "choice": switch,  # null leaves it open
    "if_on": _if_on,
    "no_half": _no_half,
    "quantisation": _quantisation,
    "degree": _degree,
    "stages": _stages,
    "checkpointing": lambda value: "full" if switch(value) else "none",
    "granularity": _granularity,
    "loss": _loss,
    "modules": _modules,
    "negated": lambda value: not switch(value),
    "files": files,
    "minutes": lambda value: 60.0 * float(value),
    "seconds": lambda value: min(float(value), 86_400.0),
    "schedule": lambda value: _one_of(value, SCHEDULES),
    "kernel": lambda value: _one_of(value, KERNELS),
    "dtype": lambda value: _one_of(value, {"bf16": "bf16", "fp32": "float32", "float32": "float32"}),
    "shard": lambda value: value if value == "auto" else whole(value),
}
