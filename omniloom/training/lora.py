"""Low-rank adapters beside frozen weights, installed into a built model before it is parallelised.

Owns the modules that take the place of linears and stacked experts, their initial values, dropout by key, and merging.
Base parameters keep their names (`q_proj.weight`), adapters lie beside them (`q_proj.lora_a`), so that sharding plans
and key maps hold as they are. Knows no family: what may be adapted, and its name in transformers, is handed in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from omniloom.config import LoraConfig, PolicyRule
from omniloom.ops.gated_experts import Copies
from omniloom.ops.linear_map import Dropout, LinearMap, keyed_seed, linears
from omniloom.ops.nf4 import is_packed
from omniloom.training.policy import ParameterPolicy, covers
from omniloom.types import Adapter


class _Addition(NamedTuple):
    """What of an adapter a layer computes with. Alike for all layers, each of which would be compiled anew otherwise:
    dropout draws by a key that knows the layer, so its salt need not."""

    scaling: float
    dropout: float
    salt: int

    @classmethod
    def of(cls, adapter: Adapter) -> _Addition:
        salt = keyed_seed(re.sub(r"(?<=\.layers\.)\d+\.", "", adapter.base))
        return cls(adapter.scaling, adapter.dropout, salt)

    def to(
        self, linear: LinearMap, lora_a: Tensor, lora_b: Tensor, draw_key: Tensor | None, *, training: bool
    ) -> LinearMap:
        """The map with its addition, in the dtype of its weight; dropout in training only."""
        # a packed weight's dtype is not that of compute, which `LinearMap.dense` knows
        dtype = lora_a.dtype if is_packed(linear.weight) else linear.weight.dtype
        dropout, scaling = None, self.scaling
        if self.dropout and training:
            assert draw_key is not None, "the batch has no draw_key, which the dropout of adapters follows"
            dropout, scaling = Dropout(self.dropout, self.salt, draw_key), scaling / (1 - self.dropout)
        return linear._replace(low=lora_a.to(dtype), up=(scaling * lora_b).to(dtype), dropout=dropout)


class LoraLinear(nn.Module):
    """A linear with frozen weight and bias and a trained low-rank addition; with DoRA also trained row norms.

    Source: Hu et al. 2021 (arXiv 2106.09685); DoRA: Liu et al. 2024 (arXiv 2402.09353), the norm taken as a constant
    as in section 4.3. Dropout is on the way into the addition only.
    """

    def __init__(self, base: nn.Linear, adapter: Adapter, dtype: torch.dtype) -> None:
        super().__init__()
        out_features, in_features = base.weight.shape
        self.weight = base.weight
        self.bias = base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(adapter.rank, in_features, dtype=dtype))
        self.lora_b = nn.Parameter(base.weight.new_empty(out_features, adapter.rank, dtype=dtype))
        self.magnitude = (
            None if adapter.magnitude is None else nn.Parameter(base.weight.new_empty(out_features, dtype=dtype))
        )
        if self.magnitude is not None:
            self.whole_rows = nn.Identity()  # a sum stands here where ranks divide the columns
        self.addition = _Addition.of(adapter)

    def forward(self, x: Tensor, draw_key: Tensor | None = None) -> Tensor:
        """[N, in] -> [N, out]."""
        (out,) = linears(x, self.as_map(draw_key))
        return out

    def as_map(self, draw_key: Tensor | None) -> LinearMap:
        linear, dtype = LinearMap(self.weight, self.bias), self.weight.dtype
        if self.magnitude is not None:
            with torch.no_grad():
                factors = self.lora_a.to(dtype), self.lora_b.to(dtype)
                squares = self.whole_rows(row_squares(self.weight, self.addition.scaling, *factors))
                norms = squares.sqrt().to(self.magnitude.dtype)
            linear = linear._replace(scale=(self.magnitude / norms).to(dtype))
        return self.addition.to(linear, self.lora_a, self.lora_b, draw_key, training=self.training)


class LoraExperts(nn.Module):
    """Stacked gated experts with frozen weights and a low-rank addition to one or both of their products."""

    def __init__(self, base: nn.Module, adapters: Mapping[str, Adapter], dtype: torch.dtype) -> None:
        """`adapters` by the base's own name, `gate_up` or `down`."""
        super().__init__()
        assert isinstance(base.product, nn.Module)
        self.product = base.product
        self.gate_up = base.gate_up
        self.down = base.down
        self.additions = {name: _Addition.of(adapter) for name, adapter in adapters.items()}
        for name, adapter in adapters.items():
            weight = getattr(base, name)
            num_experts, out_features, in_features = weight.shape
            a_shape, b_shape = (num_experts, adapter.rank, in_features), (num_experts, out_features, adapter.rank)
            self.register_parameter(f"{name}_lora_a", nn.Parameter(weight.new_empty(a_shape, dtype=dtype)))
            self.register_parameter(f"{name}_lora_b", nn.Parameter(weight.new_empty(b_shape, dtype=dtype)))

    def forward(self, tokens: Tensor, offsets: Tensor, copies: Copies, draw_key: Tensor | None = None) -> Tensor:
        """As the experts' own: tokens [T, C] -> the weighted sums of their copies [T, C]."""
        maps = (self._as_map(name, draw_key) for name in ("gate_up", "down"))
        out: Tensor = self.product(tokens, *maps, offsets, copies)
        return out

    def _as_map(self, name: str, draw_key: Tensor | None) -> LinearMap:
        linear = LinearMap(getattr(self, name))
        if name not in self.additions:
            return linear
        factors = getattr(self, f"{name}_lora_a"), getattr(self, f"{name}_lora_b")
        return self.additions[name].to(linear, *factors, draw_key, training=self.training)


def choose_adapted(
    model: nn.Module,
    policies: Mapping[str, ParameterPolicy],
    adaptable: Mapping[str, str],
    rules: Mapping[str, PolicyRule],
    sizes: Mapping[str, tuple[int, float]],
) -> dict[str, LoraConfig]:
    """The weights that the policy asks adapters for, by name, with the settings of each.

    Args:
        policies: by parameter name of the bare model.
        adaptable: weights that transformers may hold as a linear or as stacked experts, with their name there.
        rules: the policy table, each of whose `lora` sections must find something.
        sizes: rank and alpha of single weights, in place of their rule's.

    Raises: ValueError for rules that match nothing, and for what PEFT could not express.
    """
    linears = {name: end for name, end in adaptable.items() if name in policies and is_linear(model, name)}
    chosen = {
        name: settings
        for name, end in linears.items()
        if (settings := policies[name].lora) is not None and _is_named(end, settings.modules)
    }
    _check_choice(model, chosen, policies, linears, rules)
    return {
        name: replace(settings, rank=sizes[name][0], alpha=sizes[name][1]) if name in sizes else settings
        for name, settings in chosen.items()
    }


def install_lora(model: nn.Module, chosen: Mapping[str, LoraConfig]) -> tuple[Adapter, ...]:
    """Put adapters beside weights of the bare model, in place; their values are undefined until they are loaded."""
    adapters = {name: _describe(model, name, settings) for name, settings in chosen.items()}
    for holder_name in dict.fromkeys(name.rpartition(".")[0] for name in chosen):
        own = {name.rpartition(".")[2]: name for name in chosen if name.rpartition(".")[0] == holder_name}
        holder = model.get_submodule(holder_name)
        dtype = _dtype(chosen[next(iter(own.values()))])
        if isinstance(holder, nn.Linear):
            model.set_submodule(holder_name, LoraLinear(holder, adapters[own["weight"]], dtype))
        else:
            of_experts = {short: adapters[name] for short, name in own.items()}
            model.set_submodule(holder_name, LoraExperts(holder, of_experts, dtype))
    return tuple(adapters.values())


def adapter_policies(
    adapters: Collection[Adapter], policies: Mapping[str, ParameterPolicy]
) -> dict[str, ParameterPolicy]:
    """The policy of every adapter's parameters: their base's, but trained."""
    return {
        name: ParameterPolicy(
            component=policies[adapter.base].component,
            trainable=True,
            learning_rate=policies[adapter.base].learning_rate,
            weight_decay=policies[adapter.base].weight_decay,
            lora=policies[adapter.base].lora,
        )
        for adapter in adapters
        for name in adapter.names
    }


def initial_lora_a(adapter: Adapter, shape: tuple[int, ...], seed: int) -> Tensor:
    """Uniform within 1 / sqrt(in), float32, by seed and name alone; `lora_b` starts at zero.

    Source: peft's default, torch.nn.init.kaiming_uniform_ with a = sqrt(5) as of a linear's weight.
    """
    generator = torch.Generator().manual_seed(keyed_seed(adapter.lora_a, seed))
    bound = shape[-1] ** -0.5
    lora_a: Tensor = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return lora_a


def row_squares(weight: Tensor, scaling: float, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Sum of squares of each row of weight + scaling x lora_b lora_a, float32 [out]."""
    return (weight.float() + scaling * (lora_b.float() @ lora_a.float())).square().sum(dim=-1)


def merging(gather: Callable[[str], Tensor], adapters: Collection[Adapter]) -> Callable[[str], Tensor]:
    """A `gather` for exports that adds adapters into the weights they belong to, in float32."""
    by_base = {adapter.base: adapter for adapter in adapters}

    def gather_merged(name: str) -> Tensor:
        adapter = by_base.get(name)
        if adapter is None:
            return gather(name)
        weight, lora_a, lora_b = (gather(part).float() for part in (name, adapter.lora_a, adapter.lora_b))
        merged: Tensor = weight + adapter.scaling * (lora_b @ lora_a)
        if adapter.magnitude is None:
            return merged
        ratio: Tensor = gather(adapter.magnitude).float() / torch.linalg.vector_norm(merged, dim=-1)
        return merged * ratio[:, None]

    return gather_merged


def _describe(model: nn.Module, base: str, settings: LoraConfig) -> Adapter:
    holder = base.rpartition(".")[0]
    stem = f"{base}_" if model.get_parameter(base).ndim == 3 else f"{holder}."
    return Adapter(
        base=base,
        lora_a=f"{stem}lora_a",
        lora_b=f"{stem}lora_b",
        magnitude=f"{stem}magnitude" if settings.dora else None,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        rslora=settings.rslora,
    )


def _check_choice(
    model: nn.Module,
    chosen: Mapping[str, LoraConfig],
    policies: Mapping[str, ParameterPolicy],
    linears: Mapping[str, str],
    rules: Mapping[str, PolicyRule],
) -> None:
    faults = []
    for rule_name, rule in rules.items():
        if rule.lora is None:
            continue
        under = [name for name, policy in policies.items() if covers(rule_name, policy.component)]
        ours = [linears[name] for name in under if name in linears]
        ends = ", ".join(sorted({target.rpartition(".")[2] for target in ours}))
        known = f"its modules: {ends}, in full such as {ours[0]}" if ours else "it holds no linear that LoRA can adapt"
        entries = (rule.lora.modules or ()) if ours else ()
        if absent := [entry for entry in entries if not any(_is_named(target, (entry,)) for target in ours)]:
            faults.append(f"policy.{rule_name}.lora.modules: {', '.join(absent)} matches nothing; {known}")
        elif under and not any(policies[name].lora == rule.lora for name in under if name in chosen):
            faults.append(f"policy.{rule_name}.lora matches nothing; {known}")
    if any(settings.dora for settings in chosen.values()):
        stacked = {policies[name].component for name in chosen if model.get_parameter(name).ndim == 3}
        for component in sorted(stacked | {"lm_head"} & {policies[name].component for name in chosen}):
            reason = "stacked experts have no DoRA in PEFT" if component in stacked else "the head has no DoRA here"
            faults.append(f"lora.dora: {reason}; set policy.{component} to {{freeze: true}}")
        if not all(settings.dora for settings in chosen.values()):
            faults.append("lora.dora: a PEFT adapter has DoRA everywhere or nowhere; set it alike in all rules")
    for root in dict.fromkeys(name.split(".")[0] for name in chosen):
        kinds = {_dtype(settings) for name, settings in chosen.items() if name.split(".")[0] == root}
        if any(policy.trainable for name, policy in policies.items() if name.split(".")[0] == root):
            kinds.add(torch.float32)
        if len(kinds) > 1:  # FSDP reduces the gradients of one group in one dtype
            faults.append(f"lora.dtype: all that trains in {root} must have one dtype; set policy's to float32")
    if faults:
        raise ValueError("\n".join(faults))


def is_linear(model: nn.Module, name: str) -> bool:
    """Whether a weight of the bare model is a linear's, or that of stacked experts."""
    stacked = model.get_parameter(name).ndim == 3
    return stacked or isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)


def _is_named(target: str, modules: tuple[str, ...] | None) -> bool:
    return modules is None or any(
        target == entry or target.endswith("." + entry) or re.fullmatch(entry, target) for entry in modules
    )


def _dtype(settings: LoraConfig) -> torch.dtype:
    return torch.bfloat16 if settings.dtype == "bf16" else torch.float32
