"""Which families there are, and which one a checkpoint's `config.json` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omniloom.families.config_fields import THINKER_SUFFIX
from omniloom.families.qwen2_5_omni.spec import SPEC as QWEN2_5_OMNI
from omniloom.families.qwen2_5_vl.spec import SPEC as QWEN2_5_VL
from omniloom.families.qwen3_5.spec import SPEC as QWEN3_5
from omniloom.families.qwen3_5_moe.spec import SPEC as QWEN3_5_MOE
from omniloom.families.qwen3_omni.spec import SPEC as QWEN3_OMNI
from omniloom.families.qwen3_vl.spec import SPEC as QWEN3_VL
from omniloom.families.qwen3_vl_moe.spec import SPEC as QWEN3_VL_MOE
from omniloom.families.spec import ModelSpec
from omniloom.types import suggest

SPECS: tuple[ModelSpec, ...] = (QWEN3_OMNI, QWEN2_5_OMNI, QWEN3_VL, QWEN3_VL_MOE, QWEN2_5_VL, QWEN3_5, QWEN3_5_MOE)


def find_spec(config_json: Mapping[str, Any], *, where: str = "config.json") -> ModelSpec:
    """The family of a checkpoint. Raises: ValueError naming the known model types."""
    model_type = config_json.get("model_type")
    for spec in SPECS:
        if model_type in (spec.model_type, f"{spec.model_type}{THINKER_SUFFIX}"):
            return spec
    known = {spec.model_type: spec.name for spec in SPECS}
    hint = suggest(str(model_type), known, among="", before="a checkpoint of ")
    listed = ", ".join(f"{kind} ({name})" for kind, name in known.items())
    raise ValueError(f"{where}: model_type {model_type!r} is no known model; expected one of {listed}{hint}")


def spec_named(name: str) -> ModelSpec:
    """The family that calls itself `name`."""
    return next(spec for spec in SPECS if spec.name == name)
