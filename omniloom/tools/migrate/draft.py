"""What a migration gathers: the settings that were read, the config that they come to, and what they cannot come to.

Every setting ends in one of three places, each with the file and key it came from: a key of ours, the list of what
needs no key here, or the list of what has no counterpart. Two settings that ask one key for two values are a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from omniloom.tools.migrate.shell import is_open

Value = Any  # what JSON, YAML or a command line holds


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    value: Value
    origin: str  # file and key as its author finds them

    def __str__(self) -> str:
        return self.origin if self.value is None else f"{self.origin} {self.value}"


Rules = Mapping[str, "Rule"]  # names, or patterns of names, which the first that fits decides


@dataclass(frozen=True)
class Rule:
    """What becomes of a setting: a key of ours takes it, or `why` says that nothing does."""

    why: str = ""
    lost: bool = False  # without counterpart, where nothing here does its work either
    key: str = ""
    reads: str = ""  # of `READERS`
    note: str = ""


def read_rules(system: str) -> Rules:
    """The rules of `rules.yaml` for one system; exact names stand before patterns."""
    tree = yaml.safe_load((Path(__file__).parent / "rules.yaml").read_text(encoding="utf-8"))[system]
    rules = {name: Rule(key=row[0], reads=row[1], note=row[2] if row[2:] else "") for name, row in tree["keys"].items()}
    for kind in ("needless", "lost"):
        rules |= {
            name: Rule(why=why, lost=kind == "lost") for why, names in tree[kind].items() for name in names.split()
        }
    return dict(sorted(rules.items(), key=lambda item: "*" in item[0]))


def switch(value: Value) -> bool:
    """A flag without value, or a word."""
    if value is None or isinstance(value, bool):
        return value is not False
    return bool(_one_of(str(value).lower(), {"true": True, "false": False, "1": True, "0": False}))


def whole(value: Value) -> int:
    if float(value) != int(float(value)):
        raise ValueError("a whole number")
    return int(float(value))


def files(value: Value) -> list[str]:
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part) for part in parts if part]


def _one_of(value: Value, known: Mapping[str, Value]) -> Value:
    if value not in known:
        raise ValueError(f"one of {', '.join(known)}")
    return known[value]


SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
             "cosine_with_min_lr": "cosine"}  # fmt: skip
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attn", "fa2", "auto")  # auto is flash wherever it runs
KERNELS = {**dict.fromkeys(FLASH, "auto"), "sdpa": "sdpa", "eager": "eager", "disabled": "eager"}
READERS: dict[str, Callable[[Value], Value]] = {
    "text": str,
    "number": float,
    "whole": whole,
    "bound": lambda value: whole(value) or None,  # 0 there is no bound, null here
    "switch": switch,
    "negated": lambda value: not switch(value),
    "files": files,
    "minutes": lambda value: 60.0 * float(value),
    "seconds": lambda value: min(float(value), 86_400.0),
    "schedule": lambda value: _one_of(value, SCHEDULES),
    "kernel": lambda value: _one_of(value, KERNELS),
    "dtype": lambda value: _one_of(value, {"bf16": "bf16", "fp32": "float32", "float32": "float32"}),
    "shard": lambda value: value if value == "auto" else whole(value),
}


@dataclass(kw_only=True)
class Entry:
    value: Value
    origins: list[str]
    note: str


@dataclass(kw_only=True)
class Draft:
    """One migration under way. `settings` are those that nothing has taken yet."""

    settings: list[Setting] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    needless: list[tuple[Setting, str]] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_ranks: int | None = None  # processes of the old run, where the files say so

    def take(self, *names: str) -> list[Setting]:
        """The settings of these names (patterns), which are then dealt with."""
        taken = [one for one in self.settings if any(fnmatchcase(one.name, name) for name in names)]
        self.settings = [one for one in self.settings if one not in taken]
        return taken

    def first(self, *names: str) -> Setting | None:
        """The setting of one of these names; all that are there must say the same."""
        found = self.take(*names)
        for other in found[1:]:
            if other.value != found[0].value:
                self.faults.append(f"{found[0]} and {other} contradict each other; keep one")
        return found[0] if found else None

    def number_of(self, *names: str) -> int:
        """The product of settings that stay where they are; 1 for those that are not there."""
        product = 1
        for one in self.settings:
            if one.name in names and str(one.value).isdigit():
                product *= max(int(one.value), 1)
        return product

    def put(self, key: str, value: Value, origins: Sequence[Setting | str], note: str = "") -> None:
        """Give one of our keys its value. A second, different one is a fault that names both."""
        where = [origin if isinstance(origin, str) else origin.origin for origin in origins]
        known = self.entries.get(key)
        if known is None:
            self.entries[key] = Entry(value=value, origins=where, note=note)
        elif known.value == value:
            known.origins += [origin for origin in where if origin not in known.origins]
        else:
            self.faults.append(
                f"{', '.join(known.origins)} and {', '.join(where)} contradict each other: {key} would be "
                f"{known.value!r} and {value!r}; keep one"
            )

    def apply(self, rules: Rules) -> None:
        """Deal with every setting that a rule knows."""
        rest = []
        for setting in self.settings:
            rule = rules.get(setting.name) or next(
                (rule for name, rule in rules.items() if fnmatchcase(setting.name, name)), None
            )
            if rule is None:
                rest.append(setting)
            elif rule.lost:
                self.lost.append((str(setting), rule.why))
            elif not rule.key:
                self.needless.append((setting, rule.why))
            elif setting.value is None and rule.reads != "switch":
                self.needless.append((setting, "not set there either"))
            else:
                self._convert(setting, rule)
        self.settings = rest

    def finish(self) -> None:
        """Whatever is left over has no counterpart that we know of."""
        self.lost += [(str(setting), "not known to migrate; look it up and set what it means by hand")
                      for setting in self.settings]  # fmt: skip
        self.settings = []

    def _convert(self, setting: Setting, rule: Rule) -> None:
        if isinstance(setting.value, str) and is_open(setting.value):
            self._not_usable(setting, "a value that the script itself gives")
            return
        try:
            self.put(rule.key, READERS[rule.reads](setting.value), [setting], rule.note)
        except (TypeError, ValueError) as error:
            known = ", ".join(map(str, error.args)) if isinstance(error, ValueError) else "another kind of value"
            self._not_usable(setting, known)

    def _not_usable(self, setting: Setting, expected: str) -> None:
        hint = ""
        if isinstance(setting.value, str) and is_open(setting.value):
            hint = (
                "; only a running shell could tell it, so give NAME=VALUE behind the files or write it into the script"
            )
        self.faults.append(f"{setting.origin}: expected {expected}, got {setting.value!r}{hint}")


def flatten(tree: Mapping[str, Value], where: str, prefix: str = "") -> Iterable[Setting]:
    """The leaves of a nested mapping by their dotted paths; lists are leaves."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, where, f"{prefix}{name}.")
        else:
            yield Setting(name=f"{prefix}{name}", value=value, origin=f"{where}: {prefix}{name}")
