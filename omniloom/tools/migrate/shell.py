"""A training script as its author would read it: variables resolved, flags collected, nothing executed.

Knows of the shell what such scripts use: assignments, arrays, quotes, arithmetic, `${NAME:-default}`, `source FILE`.
What only a running shell could tell (`$(command)`, a variable that nobody sets, what an `if` or a loop sets) stays as
it is written and is recognised by `is_open`; whoever needs such a value says so.
"""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PYTHON = ("python", "python3")
LAUNCHERS = ("torchrun", *PYTHON, "swift", "megatron", "llamafactory-cli", "accelerate", "deepspeed", "msrun")
PREFIXES = ("nohup", "exec", "time", "env", "srun", "sudo", "numactl", "taskset", "nice", "stdbuf", "mpirun")
OPENERS, CLOSERS = ("if", "for", "while", "until", "case"), ("fi", "done", "esac")
TESTS = ("[", "[[", "test")
ENDS = "\n;&|"
PARENTHESES = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
EXPANSION = rf"\$(?:{PARENTHESES}|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[A-Za-z_]\w*|[0-9@*#?])|`[^`]*`"
WORD = re.compile(rf"(?:{EXPANSION}|\S)+")  # of a bare variable's value; what is not known in it is not split
EXPR = re.compile(r"(?:\$\(|`)\s*expr\s+(.*)[)`]")
TOKEN = re.compile(
    "|".join((
        # parts words; a `#` at the beginning of one is a comment
        rf"(?P<gap>[ \t]+|&&|\|\||[{ENDS}]|(?<![^\s;&|(])#[^\n]*)",
        r"'(?P<single>[^']*)'",
        rf'"(?P<double>(?:\\.|{EXPANSION}|[^"\\])*+)"',
        rf"(?P<expansion>{EXPANSION})",
        r"""(?P<plain>\\.|[^\s;&|'"\\$`()]+|.)""",
    )),
    re.DOTALL,
)  # fmt: skip
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
VARIABLE = re.compile(
    r"\$(?:\{(#?)(\w+|[@*])(?:\[[@*]\])?(?::?([-+=?])((?:[^{}]|\{[^{}]*\})*))?\}|([A-Za-z_]\w*|[0-9@*#?]))"
)
HEREDOC = re.compile(r"(?<!<)<<-?[ \t]*(['\"]?)(\w+)\1(?!<)([^\n]*)\n.*?^\s*\2[ \t]*$", re.DOTALL | re.MULTILINE)
Variables = dict[str, str | tuple[str, ...]]


def is_open(text: str) -> bool:
    """Whether a value depends on something that the script does not say."""
    return "$" in text or "`" in text


@dataclass(kw_only=True)
class Script:
    """What a script says: its variables, and the words of the commands that launch training."""

    given: Mapping[str, str]  # variables that its user sets outside, which assignments leave as they are
    folder: Path  # where the script lies
    variables: Variables = field(default_factory=dict)
    exported: dict[str, str] = field(default_factory=dict)  # and what stands before a command: NAME=value torchrun ...
    commands: list[tuple[str, ...]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # files that it takes settings from and that are not here

    def flags(self) -> Iterator[tuple[str, str | None]]:
        """`--name value`, `--name=value`, `--name a b` (joined by a space) and `--name` (None) of all commands.

        Whatever words a variable that nobody knows stands for come as a name of their own, as it is written.
        """
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
            whole = re.fullmatch(EXPANSION, word) is not None
            if whole and (name is None or values or re.match(r"\$\{?[@*]", word)):
                yield word, None
            else:
                values.append(word)
            continue
        if name is not None:
            yield name, " ".join(values) if values else None
        name, separator, value = word.removeprefix("--").partition("=")
        values = [value] if separator else []


def read_script(text: str, given: Mapping[str, str], folder: Path = Path()) -> Script:
    """Read a whole script. `given` are variables that its user sets outside, positional ones by number (`1`)."""
    script = Script(given=given, folder=folder, variables=dict(given))
    _read(text, script)
    programs = [command for command in script.commands if _name(command[0]) not in PYTHON]
    if any("sft" in command or "train" in command for command in programs):  # not infer, export, chat
        programs = [command for command in programs if not {"infer", "export", "eval", "chat", "api"} & {*command[1:2]}]
    script.commands = programs or script.commands
    return script


def _read(text: str, script: Script) -> None:
    text = HEREDOC.sub(r"\3", text)
    text = re.sub(r"(?m)^[ \t]*#[^\n]*\n", "", text)
    # a comment behind a continuation, as guides print it, is no comment to the shell: drop it with its backslash
    text = re.sub(r"\\[ \t]*(?:#[^\n]*)?\n", " ", text)
    text = re.sub(r"(?<=\s)\d?>>?\s*(?:&\d|\S+)", "", text)  # where output goes
    depth = 0  # within if, for, case and functions: what is set there depends on what only a run tells
    for words, asked in _commands(text, script.variables):
        head = words[0]
        depth += head in OPENERS or "{" in words
        depth -= head in CLOSERS or head == "}"
        if head == "for":
            script.variables[words[1]] = f"${words[1]}"
        elif head in ("source", ".") and words[1:]:
            _read_other(words[1], script)
        else:
            _take(words, script, certain=depth == 0 and not asked)


def _read_other(name: str, script: Script) -> None:
    for path in (Path(name), script.folder / name):
        if path.is_file():
            _read(path.read_text(encoding="utf-8", errors="replace"), script)
            return
    script.missing.append(name)


def _take(words: list[str], script: Script, *, certain: bool) -> None:
    exports = words[:1] in (["export"], ["declare"], ["local"], ["readonly"], ["typeset"])
    words = [word for word in words[exports:] if word not in ("then", "else", "do", "{")]
    while not certain and words and words[0].endswith(")") and not ASSIGNMENT.match(words[0]):
        words = words[1:]  # a pattern of `case`
    number = 0
    for number, word in enumerate([*words, ""]):
        if not (match := ASSIGNMENT.match(word)):
            break
        value = _assign(match[1], word[match.end() :], script, adds=bool(match[2]), certain=certain)
        if exports or words[number + 1 :]:
            script.exported[match[1]] = value if isinstance(value, str) else " ".join(value)
    rest = [part for word in words[number:] for part in word.split("\0")]
    if rest and _name(rest[0]) in PREFIXES:
        rest = rest[next((place for place, word in enumerate(rest) if _name(word) in LAUNCHERS), 0) :]
    if rest[:1] == ["eval"] or (rest[:1] in (["bash"], ["sh"]) and rest[1:2] == ["-c"]):
        rest = " ".join(rest[1 + (rest[0] != "eval") :]).split()
    if rest and _name(rest[0]) in LAUNCHERS:
        script.commands.append(tuple(rest))


def _name(word: str) -> str:
    return word.rsplit("/", 1)[-1]


def _assign(name: str, written: str, script: Script, *, adds: bool, certain: bool) -> str | tuple[str, ...]:
    """The value of a variable once `name=written`, or `name+=written`, is done."""
    before = script.variables.get(name, "" if adds else None)
    value: str | tuple[str, ...] = written.replace("\0", " ")
    if written.startswith("(\0"):
        value = tuple(written[2:-1].split("\0")) if written != "(\0)" else ()
    if not certain and before != value:  # set in a branch: not known
        value = (f"${name}",) if isinstance(value, tuple) else f"${name}"
    if adds and isinstance(value, tuple):
        value = ((before,) if isinstance(before, str) and before else tuple(before or ())) + value
    elif adds:
        value = f"{before} {value}" if not certain else f"{before}{value}"
    if name not in script.given:
        script.variables[name] = value
    return script.variables[name]


def _commands(text: str, variables: Variables) -> Iterator[tuple[list[str], bool]]:
    """The simple commands of a script, each as its words, variables put in as they stand at that point.

    With each: whether it is done only if the one before it succeeded in a test, or failed.
    """
    words: list[str] = []
    elements: list[str] | None = None  # of the array that is open
    name, word, splits = "", None, False  # the array's `NAME=`, the word under way, whether a bare variable is in it
    asked = False
    for match in TOKEN.finditer(f"{text}\n"):
        kind, token = match.lastgroup, match[0]
        if kind == "gap" or (token == ")" and elements is not None):
            if word is not None:
                (words if elements is None else elements).extend(WORD.findall(word) if splits else [word])
            word, splits = None, False
            if token == ")" and elements is not None:
                words.append(f"{name}(\0" + "\0".join(elements) + ")")
                elements = None
            elif token[0] in ENDS and elements is None and words:
                yield words, asked
                asked = token == "||" or (token == "&&" and (asked or words[0] in TESTS))
                words = []
        elif token == "(" and ASSIGNMENT.fullmatch(word or ""):
            name, word, elements = word or "", None, []
        elif kind == "expansion":
            splits = splits or ASSIGNMENT.match(word or "") is None
            word = (word or "") + _value(token, variables)
        else:
            inner = token[1:-1] if kind in ("single", "double") else token.removeprefix("\\")
            word = (word or "") + (_expand(inner, variables) if kind == "double" else inner)


def _expand(text: str, variables: Variables) -> str:
    """`text` with variables and arithmetic put in; what cannot be known stays as it is written."""
    return re.sub(
        rf"\\(.)|{EXPANSION}",
        lambda match: _value(match[0], variables) if match[1] is None else match[1],
        text,
        flags=re.DOTALL,
    )


def _value(written: str, variables: Variables) -> str:
    """What an expansion comes to; the elements of an array are parted by NUL, so that quotes keep each whole."""
    if written.startswith("$((") and written.endswith("))"):
        return _arithmetic(written[3:-2], variables) or written
    if asked := EXPR.fullmatch(written):
        return _arithmetic(asked[1].replace("\\*", "*"), variables) or written
    match = VARIABLE.fullmatch(written)
    if match is None:
        return written  # $(command), `command`, ${NAME%.*}: only a shell can tell
    counts, braced, how, other, plain = match.groups()
    name = braced or plain
    value = variables.get(name)
    if counts:
        return str(len(value)) if isinstance(value, tuple) else written
    if how == "+":
        return _expand(other, variables) if value not in (None, "") else ""
    if how in ("-", "=") and value in (None, ""):
        value = _expand(other, variables)
        if how == "=":
            variables[name] = value
    if value is None:
        return written
    return "\0".join(value) if isinstance(value, tuple) else value


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,  # the shell's numbers are whole
    ast.Mod: operator.mod,
}


def _arithmetic(text: str, variables: Variables) -> str | None:
    """The number that `$((text))` comes to, None where it depends on what is not known."""
    bare = _expand(text, variables)

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
