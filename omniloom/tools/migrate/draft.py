"""What a migration gathers: the settings that were read, the config that they come to, and what they cannot come to.

Every setting ends in one of three places, each with the file and key it came from: a key of ours, the list of what
needs no key here, or the list of what has no counterpart. Two settings that ask one key for two values are a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeVar

import yaml

from omniloom.config import OTHER_TRAINERS, keys_of
from omniloom.tools.migrate.readers import FLAGS, READERS, NotNeeded, NotOffered, Value
from omniloom.tools.migrate.shell import is_open


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    value: Value
    origin: str  # file and key as its author finds them

    def __str__(self) -> str:
        return self.origin if self.value is None else f"{self.origin} {self.value}"


T = TypeVar("T")
Rules = Mapping[str, "Rule"]  # names, or patterns of names, which the first that fits decides


@dataclass(frozen=True)
class Rule:
    """What becomes of a setting: a key of ours takes it, or `why` says that nothing does."""

    why: str = ""
    lost: bool = False  # without counterpart, where nothing here does its work either
    key: str = ""
    reads: str = ""  # of `readers.READERS`
    note: str = ""
    value: Value = None  # what a switch that is on sets, where that is not true
    values: Mapping[str, str] = field(default_factory=dict)  # why a value that a pattern fits comes to no key

    def reason(self, value: Value) -> str | None:
        """Why this value comes to no key, with a `!` in front where nothing does its work."""
        if self.lost and str(value).lower() == "false":
            return "off"
        found = (why for pattern, why in self.values.items() if fnmatchcase(str(value).lower(), pattern))
        unread = not self.key and is_open(str(value))  # it may stand for more words
        return next(found, ("!" if self.lost or unread else "") + self.why if not self.key else None)


def read_rules(system: str) -> Rules:
    """The rules of `other_trainers.yaml` for one system; exact names stand before patterns."""
    tree = yaml.safe_load(OTHER_TRAINERS.read_text(encoding="utf-8"))[system]
    fields = ("key", "reads", "note", "value")
    rules = {name: Rule(**dict(zip(fields, row, strict=False))) for name, row in tree["keys"].items()}
    for kind in ("needless", "lost"):
        rules |= {
            name: Rule(why=why, lost=kind == "lost") for why, names in tree[kind].items() for name in names.split()
        }
    for names, values in tree.get("values", {}).items():
        rules |= {name: replace(rules.get(name, Rule()), values=values) for name in names.split()}
    return dict(sorted(rules.items(), key=lambda item: "*" in item[0]))


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

    def set_aside(self, settings: Iterable[Setting], why: str) -> None:
        """Settings that need no key here."""
        self.needless += [(one, why) for one in settings]

    def first(self, *names: str) -> Setting | None:
        """The setting of one of these names; all that are there must say the same."""
        found = self.take(*names)
        for other in found[1:]:
            if other.value != found[0].value:
                self.faults.append(f"{found[0]} and {other} contradict each other; keep one")
        return found[0] if found else None

    def read(self, setting: Setting | None, reader: Callable[[Value], T], usual: T, value: Value = None) -> T:
        """What `reader` makes of a setting's value, or of `value` out of it; `usual` where that is a fault."""
        if setting is None:
            return usual
        value = setting.value if value is None else value
        try:
            return reader(value)
        except (TypeError, ValueError) as error:
            self._not_usable(replace(setting, value=value), error)
        return usual

    def product(self, *names: str) -> int:
        """The product of settings that stay where they are; 1 for those that are not there."""
        product = 1
        for one in (one for one in self.settings if one.name in names and one.value is not None):
            if str(one.value).isdigit():
                product *= max(int(one.value), 1)
            else:
                self._not_usable(one, "a whole number")
        return product

    def put_defaults(self, values: Mapping[str, Value], whose: Setting | str) -> None:
        """What holds where nothing is said and differs from what holds here, so that the run stays the same."""
        for key in [key for key in values if key not in self.entries]:
            self.put(key, values[key], [whose])

    def put_betas(self, usual: Sequence[float]) -> None:
        """AdamW's, which are two settings there."""
        betas = [self.first("adam_beta1"), self.first("adam_beta2")]
        if any(betas):
            values = [self.read(one, float, beta) for one, beta in zip(betas, usual, strict=True)]
            self.put("train.betas", values, [one for one in betas if one])

    def put_warmup_share(self, *names: str) -> None:
        """A warm-up given as a share of the steps, once these are known."""
        share, steps = self.first(*names), self.entries.get("train.steps")
        if share is None:
            return
        part = self.read(share, lambda value: float(value or 0), 0.0)
        if "train.warmup_steps" in self.entries or not part:
            self.needless.append((share, "the number of steps is given, or there is no warm-up"))
        elif steps is None:
            self.lost.append((str(share), "of how many steps, only the run itself tells: set train.warmup_steps"))
        else:
            self.put("train.warmup_steps", round(part * steps.value), [share], f"of {steps.value} steps")

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

    def drop(self, key: str, why: str) -> None:
        """Leave one of our keys out after all, if it is set."""
        if (entry := self.entries.pop(key, None)) is not None:
            self.needless.append((Setting(name=key, value=None, origin=", ".join(entry.origins)), why))

    def apply(self, rules: Rules) -> None:
        """Deal with every setting that a rule knows."""
        rest = []
        for setting in self.settings:
            rule = rules.get(setting.name) or next(
                (rule for name, rule in rules.items() if fnmatchcase(setting.name, name)), None
            )
            if rule is None:
                rest.append(setting)
            elif (why := rule.reason(setting.value)) is not None:
                if why.startswith("!"):
                    self.lost.append((str(setting), why[1:]))
                else:
                    self.needless.append((setting, why))
            elif setting.value is None and rule.reads not in FLAGS:
                self.needless.append((setting, "not set there either"))
            else:
                self._convert(setting, rule)
        self.settings = rest

    @property
    def num_known(self) -> int:
        """How many settings were dealt with."""
        return len(self.entries) + len(self.needless) + len(self.lost)

    def finish(self) -> None:
        """Whatever is left over has no counterpart that we know of."""
        self.lost += [(str(setting), "not known to migrate; look it up and set what it means by hand")
                      for setting in self.settings]  # fmt: skip
        self.settings = []

    def _convert(self, setting: Setting, rule: Rule) -> None:
        if isinstance(setting.value, str) and is_open(setting.value):
            self._not_usable(setting, "a value that the script itself gives")
            return
        key = rule.key.replace("*", setting.name.rpartition(".")[2])
        if key != rule.key and key not in {name for name, *_ in keys_of()}:
            self.lost.append((str(setting), f"{rule.key} has no such key"))
            return
        try:
            value = READERS[rule.reads](setting.value)
            self.put(key, value if rule.value is None else rule.value, [setting], rule.note)
        except NotNeeded as reason:
            self.needless.append((setting, str(reason)))
        except NotOffered as reason:
            self.lost.append((str(setting), str(reason)))
        except (TypeError, ValueError) as error:
            self._not_usable(setting, error)

    def _not_usable(self, setting: Setting, why: str | Exception) -> None:
        """`why`: what is expected, in words or as a reader raised them."""
        expected = "another kind of value" if isinstance(why, TypeError) else str(why)
        hint, expected = "", "a number" if expected.startswith("could not convert") else expected
        if isinstance(setting.value, str) and is_open(setting.value):
            hint = (
                "; only a running shell could tell it, so give NAME=VALUE behind the files or write it into the script"
            )
        self.faults.append(f"{setting.origin}: expected {expected}, got {setting.value!r}{hint}")


def flatten(tree: Mapping[str, Value], where: str, prefix: str = "") -> Iterator[Setting]:
    """The leaves of a nested mapping by their dotted paths; lists are leaves."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, where, f"{prefix}{name}.")
        else:
            yield Setting(name=f"{prefix}{name}", value=value, origin=f"{where}: {prefix}{name}")
