"""What a migration gathers: the settings that were read, the config that they come to, and what they cannot come to.

Every setting ends in one of three places, each with the file and key it came from: a key of ours, the list of what
needs no key here, or the list of what has no counterpart. Two settings that ask one key for two values are a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from omniloom.tools.migrate.shell import is_open

Value = Any  # what JSON, YAML or a command line holds


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    value: Value
    origin: str  # file and key as its author finds them

    def __str__(self) -> str:
        return self.origin if self.value is None else f"{self.origin} {self.value}"


@dataclass(frozen=True)
class Key:
    """A setting that one key of ours takes."""

    key: str
    convert: Callable[[Any], Value] = lambda value: value
    note: str = ""


@dataclass(frozen=True)
class Needless:
    """A setting that does its work elsewhere without one here."""

    why: str


@dataclass(frozen=True)
class Lost:
    """A setting without counterpart."""

    why: str


Rules = Mapping[str, "Key | Needless | Lost"]  # names or patterns of names


def named(why: Needless | Lost, names: str) -> dict[str, Key | Needless | Lost]:
    return dict.fromkeys(names.split(), why)


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
            rule = next((rule for name, rule in rules.items() if fnmatchcase(setting.name, name)), None)
            if rule is None:
                rest.append(setting)
            elif isinstance(rule, Needless):
                self.needless.append((setting, rule.why))
            elif isinstance(rule, Lost):
                self.lost.append((str(setting), rule.why))
            elif setting.value is None:
                self.needless.append((setting, "not set there either"))
            else:
                self._convert(setting, rule)
        self.settings = rest

    def finish(self) -> None:
        """Whatever is left over has no counterpart that we know of."""
        self.lost += [(str(setting), "not known to migrate; look it up and set what it means by hand")
                      for setting in self.settings]  # fmt: skip
        self.settings = []

    def _convert(self, setting: Setting, rule: Key) -> None:
        if isinstance(setting.value, str) and is_open(setting.value):
            self._not_usable(setting, "a value that the script itself gives")
            return
        try:
            self.put(rule.key, rule.convert(setting.value), [setting], rule.note)
        except (TypeError, ValueError, KeyError) as error:
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
