"""Which parameters train, and how: the `policy` table resolved against the model's components.

A rule named `text` holds for `text` and everything below it (`text.router`, `text.experts`, ...); a rule for a longer
name overrides it field by field, where `freeze` and `lora` are one choice: full weights, adapters, or neither. Without
a word about it a component trains, unless some other has adapters, or the talker trains; then it is frozen. Knows
component names as strings only, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from omniloom.config import LoraConfig, PolicyRule
from omniloom.types import suggest


@dataclass(frozen=True, kw_only=True)
class ParameterPolicy:
    component: str
    trainable: bool  # where `lora` is set: True for adapters, False for the weights beside them
    learning_rate: float
    weight_decay: float
    lora: LoraConfig | None = None


@dataclass(frozen=True, kw_only=True)
class TrainableRow:
    """One line of the table that is printed before training and written to `trainable.json`."""

    component: str
    num_parameters: int
    num_trainable: int
    learning_rate: float
    weight_decay: float
    lora_rank: int | None


def resolve_policy(
    rules: Mapping[str, PolicyRule],
    components: Mapping[str, str],
    *,
    learning_rate: float,
    weight_decay: float,
    roots: tuple[str, ...],
    known: tuple[str, ...] = (),
    tied: Mapping[str, str] | None = None,
) -> dict[str, ParameterPolicy]:
    """Give every parameter its policy: by `rules` of components, `components` of parameters, both by name.

    `learning_rate` and `weight_decay` hold where no rule says otherwise. Of components, `recompute` can be chosen for
    `roots`; those `known` are in the checkpoint and were not built; `tied` have another's weight, which is named there.

    Raises: ValueError for rules that match nothing, and when nothing at all would train.
    """
    present = sorted(set(components.values()))
    _check_rules(rules, present, roots, known, tied or {})
    # of adapters, and of speech, what no rule names is left as it is
    is_choosy = any(
        rule.lora or (name.split(".")[0] == "talker" and rule.freeze is False) for name, rule in rules.items()
    )
    merged = {component: _merge(rules, component) for component in present}
    policies = {}
    for name, component in components.items():
        rule = merged[component]
        policies[name] = ParameterPolicy(
            component=component,
            trainable=not rule.freeze and rule.lora is None and not (is_choosy and _is_silent(rule)),
            learning_rate=learning_rate if rule.learning_rate is None else rule.learning_rate,
            weight_decay=weight_decay if rule.weight_decay is None else rule.weight_decay,
            lora=rule.lora,
        )
    if not any(policy.trainable or policy.lora for policy in policies.values()):
        raise ValueError(
            "nothing would train: policy freezes every component that is built "
            f"({', '.join(present)}); set freeze: false for at least one, or give it a lora section"
        )
    return policies


def _check_rules(
    rules: Mapping[str, PolicyRule],
    present: Sequence[str],
    roots: tuple[str, ...],
    known: tuple[str, ...],
    tied: Mapping[str, str],
) -> None:
    faults = []
    for name, rule in rules.items():
        if rule.recompute is not None and name not in roots:
            hint = f"; set policy.{name.split('.')[0]}.recompute" if name.split(".")[0] in roots else "; remove it"
            faults.append(f"policy.{name}.recompute: only {', '.join(roots)} can be recomputed, each as a whole{hint}")
        if name in tied:
            faults.append(f"policy.{name}: the model has no such weight, it uses {tied[name]}'s (tied); name that one")
        elif not any(covers(name, component) for component in (*present, *known)):
            faults.append(f"policy.{name} matches no component of this model{suggest(name, present)}")
    if faults:
        raise ValueError("\n".join(faults))


def check_rates(rules: Mapping[str, PolicyRule], policies: Mapping[str, ParameterPolicy]) -> None:
    """Raises: ValueError for a learning rate or weight decay of what does not train, with the rule that freezes it.

    `policies` of all parameters, adapters included.
    """
    faults = []
    for name, rule in rules.items():
        keys = [key for key in ("learning_rate", "weight_decay") if getattr(rule, key) is not None]
        under = [policy for policy in policies.values() if covers(name, policy.component)]
        if keys and under and not any(policy.trainable for policy in under):
            freezing = [other for other, its in rules.items() if its.freeze or its.lora]
            cause = max(freezing, key=lambda other: (covers(other, name) or covers(name, other), len(other)))
            faults.append(
                f"policy.{name}.{keys[0]}: nothing of {name} trains, it is frozen by policy.{cause}."
                f"{'freeze' if rules[cause].freeze else 'lora'}; add policy.{name}.freeze: false, or remove {keys[0]}"
            )
    if faults:
        raise ValueError("\n".join(faults))


def trainable_table(policies: Mapping[str, ParameterPolicy], sizes: Mapping[str, int]) -> list[TrainableRow]:
    """Sum the parameters (global sizes by name) per component, in order of first appearance."""
    by_component: dict[str, list[str]] = {}
    for name, policy in policies.items():
        by_component.setdefault(policy.component, []).append(name)
    rows = []
    for component, names in by_component.items():
        trained = [name for name in names if policies[name].trainable]
        some = policies[(trained or names)[-1]]
        rows.append(
            TrainableRow(
                component=component,
                num_parameters=sum(sizes[name] for name in names),
                num_trainable=sum(sizes[name] for name in trained),
                learning_rate=some.learning_rate if trained else 0.0,
                weight_decay=some.weight_decay,
                lora_rank=next((lora.rank for name in reversed(trained) if (lora := policies[name].lora)), None),
            )
        )
    return rows


def table_lines(table: Sequence[TrainableRow]) -> list[str]:
    """The table in words, a line per component under a heading."""
    has_lora = any(row.lora_rank is not None for row in table)
    lines = [f"{'component':<18}{'parameters':>16}{'trainable':>16}{'lr':>10}" + ("  LoRA rank" if has_lora else "")]
    for row in table:
        rank = f"{row.lora_rank:>11}" if row.lora_rank is not None else ""
        line = f"{row.component:<18}{row.num_parameters:>16,}{row.num_trainable:>16,}{row.learning_rate:>10.1e}"
        lines.append(line + rank)
    return lines


def _is_silent(rule: PolicyRule) -> bool:
    return rule.freeze is None and rule.lora is None and rule.learning_rate is None


def covers(rule: str, component: str) -> bool:
    return component == rule or component.startswith(rule + ".")


def _merge(rules: Mapping[str, PolicyRule], component: str) -> PolicyRule:
    merged = PolicyRule()
    for name in sorted(rules, key=len):
        if covers(name, component):
            said = {item.name: getattr(rules[name], item.name) for item in fields(PolicyRule)}
            if said["freeze"] is not None and said["lora"] is None:
                merged = replace(merged, lora=None)
            merged = replace(merged, **{key: value for key, value in said.items() if value is not None})
    return merged
