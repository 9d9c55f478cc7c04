"""A training script as its author would read it: variables resolved, flags collected, nothing executed.

Knows of the shell what such scripts use: assignments, arrays, quotes, arithmetic, `${NAME:-default}`. What only a
running shell could tell (`$(command)`, a variable that nobody sets, what lies in an `if` or a loop) stays as it is
written and is recognised by `is_open`; whoever needs such a value says so.
"""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

LAUNCHERS = ("torchrun", "python", "python3", "swift", "megatron", "llamafactory-cli", "accelerate", "deepspeed")
OPENERS, CLOSERS = ("if", "for", "while", "until", "case"), ("fi", "done", "esac")
ENDS = "\n;&|"
PARENTHESES = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
EXPANSION = rf"\$(?:{PARENTHESES}|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[A-Za-z_]\w*|[0-9@*#?])|`[^`]*`"
TOKEN = re.compile(
    "|".join((
        rf"(?P<gap>[ \t]+|[{ENDS}]|(?<![^\s;&|(])#[^\n]*)",  # parts words; a `#` at the beginning of one is a comment
        r"'(?P<single>[^']*)'",
        rf'"(?P<double>(?:\\.|{EXPANSION}|[^"\\])*+)"',
        rf"(?P<expansion>{EXPANSION})",
        r"""(?P<plain>\\.|[^\s;&|'"\\$`()]+|.)""",
    )),
    re.DOTALL,
)  # fmt: skip
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=")
VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)(?:\[[@*]\])?(?::?([-+])([^}]*))?\}|([A-Za-z_]\w*|[0-9@*#?]))")


def is_open(text: str) -> bool:
    """Whether a value depends on something that the script does not say."""
    return "$" in text or "`" in text


@dataclass(kw_only=True)
class Script:
    """What a script says: its variables, and the words of the commands that launch training."""

    variables: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    exported: dict[str, str] = field(default_factory=dict)  # and what stands before a command: NAME=value torchrun ...
    commands: list[tuple[str, ...]] = field(default_factory=list)

    def flags(self) -> Iterator[tuple[str, str | None]]:
        """`--name value`, `--name=value`, `--name a b` (joined by a space) and `--name` (None) of all commands."""
        for command in self.commands:
            script = next((place for place, word in enumerate(command) if word.endswith(".py")), 0)
            for words in (command[:script], command[script:]):
                yield from _flags(words)

    def arguments(self) -> Iterator[str]:
        """The words that a command's program is given before its first flag: a configuration file, or a sub-command."""
        for command in self.commands:
            script = next((place for place, word in enumerate(command) if word.endswith(".py")), 0)
            yield from itertools.takewhile(lambda word: not word.startswith("-"), command[script + 1 :])


def _flags(words: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    name: str | None = None
    values: list[str] = []
    for word in (*words, "--"):
        if not word.startswith("--"):
            values.append(word)
            continue
        if name is not None:
            yield name, " ".join(values) if values else None
        name, separator, value = word.removeprefix("--").partition("=")
        values = [value] if separator else []


def read_script(text: str, given: Mapping[str, str]) -> Script:
    """Read a whole script. `given` are variables that its user sets outside, positional ones by number (`1`)."""
    script = Script(variables=dict(given))
    # a comment behind a continuation, as guides print it, is no comment to the shell: drop it with its backslash
    text = re.sub(r"\\[ \t]*(?:#[^\n]*)?\n", " ", text)
    text = re.sub(r"(?<=\s)\d?>>?\s*(?:&\d|\S+)", "", text)  # where output goes
    depth = 0  # within if, for, case and functions: what is set there depends on what only a run tells
    for words in _commands(text, script.variables):
        head = words[0] if words else ""
        depth += head in OPENERS or head.endswith("()") or words[1:2] == ["()"]
        depth -= head in CLOSERS or head == "}"
        _take(words, script, certain=depth == 0)
    return script


def _take(words: list[str], script: Script, *, certain: bool) -> None:
    exports = words[:1] in (["export"], ["declare"], ["local"])
    words = [word for word in words[exports:] if word not in ("then", "else", "do", "{")]
    number = 0
    for number, word in enumerate([*words, ""]):
        if not (match := ASSIGNMENT.match(word)):
            break
        name, value = match[1], word[match.end() :]
        if not certain and script.variables.get(name) != value:
            value = f"${name}"  # set in a branch: not known
        elements = tuple(value[1:-1].split("\0")[1:]) if value.startswith("(\0") else None
        script.variables[name] = value if elements is None else elements
        if exports or words[number + 1 :]:
            script.exported[name] = value
    rest = [part for word in words[number:] for part in word.split("\0")]
    if rest[:1] == ["eval"]:
        rest = " ".join(rest[1:]).split()
    if rest and rest[0].rsplit("/", 1)[-1] in LAUNCHERS:
        script.commands.append(tuple(rest))


def _commands(text: str, variables: Mapping[str, str | tuple[str, ...]]) -> Iterator[list[str]]:
    """The simple commands of a script, each as its words, variables put in as they stand at that point."""
    words: list[str] = []
    elements: list[str] | None = None  # of the array that is open
    name, word, splits = "", None, False  # the array's `NAME=`, the word under way, whether a bare variable is in it
    for match in TOKEN.finditer(f"{text}\n"):
        kind, token = match.lastgroup, match[0]
        if kind == "gap" or (token == ")" and elements is not None):
            if word is not None:
                (words if elements is None else elements).extend(
                    word.split() if splits and not is_open(word) else [word]
                )
            word, splits = None, False
            if token == ")" and elements is not None:
                words.append(f"{name}(" + "".join(f"\0{element}" for element in elements) + ")")
                elements = None
            elif token[0] in ENDS and elements is None and words:
                yield words
                words = []
        elif token == "(" and ASSIGNMENT.fullmatch(word or ""):
            name, word, elements = word or "", None, []
        elif kind == "expansion":
            splits = splits or ASSIGNMENT.match(word or "") is None
            word = (word or "") + _value(token, variables)
        else:
            inner = token[1:-1] if kind in ("single", "double") else token.removeprefix("\\")
            word = (word or "") + (_expand(inner, variables) if kind == "double" else inner)


def _expand(text: str, variables: Mapping[str, str | tuple[str, ...]]) -> str:
    """`text` with variables and arithmetic put in; what cannot be known stays as it is written."""
    return re.sub(
        rf"\\(.)|{EXPANSION}",
        lambda match: _value(match[0], variables) if match[1] is None else match[1],
        text,
        flags=re.DOTALL,
    )


def _value(written: str, variables: Mapping[str, str | tuple[str, ...]]) -> str:
    if written.startswith("$((") and written.endswith("))"):
        return _arithmetic(written[3:-2], variables) or written
    match = VARIABLE.fullmatch(written)
    if match is None:
        return written  # $(command), `command`, ${NAME%.*}: only a shell can tell
    value = variables.get(match[1] or match[4])
    if match[2] == "-" and value in (None, ""):
        return _expand(match[3], variables)
    if value is None:
        return written
    return " ".join(value) if isinstance(value, tuple) else value


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,  # the shell's numbers are whole
    ast.Mod: operator.mod,
}


def _arithmetic(text: str, variables: Mapping[str, str | tuple[str, ...]]) -> str | None:
    """The number that `$((text))` comes to, None where it depends on what is not known."""
    bare = re.sub(r"\$\{?(\w+)\}?", r"\1", text)

    def number(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return int(str(variables[node.id]))
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return int(OPERATORS[type(node.op)](number(node.left), number(node.right)))
        raise ValueError("not a number")

    try:
        return str(number(ast.parse(bare.strip(), mode="eval").body))
    except (ValueError, KeyError, SyntaxError, ZeroDivisionError):
        return None
