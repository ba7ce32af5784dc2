"""Commands in a shell script: which tool each calls, and its flags, with the script's variables filled in."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..errors import RecipeError, user_errors
from ..recipe.command_line import read_words
from ..recipe.words import split_flags

NAME = r"[A-Za-z_]\w*"
ASSIGNMENT = re.compile(rf"(?<![^\s;])({NAME})=(\"[^\"]*\"|'[^']*'|\$\(\(?[^()]*\)?\)|[^\s;&|]*)")
LOOP = re.compile(rf"(?<!\S)for\s+({NAME})\s+in\s+(.*)")
ARRAY = re.compile(rf"(?<![^\s;])({NAME})=\(([^()]*)\)")
VARIABLE = re.compile(rf"\$(?:\{{(\w+)(?:\[@\]|:?-([^{{}}]*))?\}}|({NAME}))")
ARITHMETIC = re.compile(r"\$\(\(\s*(\d[\d\s*/+-]*)\)\)|\$\(expr\s+(\d[\d\s*/+-]*)\)")
ENDS = ";<>|&()\n"


@dataclass(frozen=True)
class Command:
    """A command of one of the tools."""

    tool: str
    word: str  # which of the tool's commands it is: sft, rlhf, ...
    launcher: str  # what stands before it: accelerate launch --config_file ...
    files: list[str]  # the files from which it reads settings
    flags: dict[str, Any]
    variables: dict[str, str]  # of the environment, as the script sets them
    remarks: list[str]


def find_commands(text: str, patterns: Mapping[str, str]) -> list[Command]:
    """Return the commands of a script, or of a line, in their order.

    Args:
        patterns: tool -> regular expression of the words by which it is called; its groups say for what.

    Raises:
        RecipeError: when the words of one cannot be read.
    """
    text = re.sub(r"\\[ \t]*\n", " ", text)
    settings = re.sub(r"(?m)(^|\s)#.*$", "", text)
    found = [(m.start(), tool, m) for tool, words in patterns.items() for m in re.finditer(words, text)]
    begins = {start: text.rfind("\n", 0, start) + 1 for start, _, _ in found}
    found = [(start, tool, m) for start, tool, m in found if "#" not in text[begins[start] : start]]
    variables = read_variables(settings)
    loops = [name for name, _ in LOOP.findall(settings) if name in variables]
    environment = {name: value for name, value in variables.items() if name.isupper()}
    commands = []
    for start, tool, match in sorted(found, key=lambda one: one[0]):
        launcher, rest = (expand(part, variables) for part in (text[begins[start] : start], text[match.end() :]))
        if launcher.count('"') % 2:  # it stands in quotes, alone or with its flags
            rest = rest.removeprefix('"') if rest.startswith('"') else rest.partition('"')[0]
        files, flags = read_words_of(rest)
        word = next(filter(None, match.groups()), "")
        said = [f"The script loops over {name}; this is for its first value, {variables[name]}." for name in loops]
        commands.append(Command(tool, word, launcher, files, flags, environment, said))
    return commands


def read_variables(text: str) -> dict[str, str]:
    """Return the variables that a script sets to texts that are known; those of its loops have their first value."""
    variables = {name: " ".join(words.split()) for name, words in ARRAY.findall(text)}
    for match in sorted([*ASSIGNMENT.finditer(text), *LOOP.finditer(text)], key=re.Match.start):
        value = expand(expand(match[2].strip("\"'"), variables), variables)  # one may hold another
        words = re.sub(r'"|;.*', " ", value).split()
        if match.re is LOOP:
            value = "".join(words[:1])
        if "$(" not in value:
            variables.setdefault(match[1], " ".join(words) if "\n" in value else value)
    return variables


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Fill in the variables that are known, or have a default there; compute what `$((...))` and `$(expr ...)` say."""

    def fill(found: re.Match[str]) -> str:
        braced, default, bare = found.groups()
        return variables.get(braced or bare, found[0] if default is None else default)

    return ARITHMETIC.sub(lambda found: compute(found[1] or found[2]), VARIABLE.sub(fill, text))


def compute(text: str) -> str:
    """Return the value of `a / b * c`, from left to right; the text itself where that is not its form."""
    first, *rest = re.findall(r"\d+|[*/]", text)
    if "".join([first, *rest]) != re.sub(r"\s", "", text) or len(rest) % 2 or not first.isdigit():
        return text
    value = int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = value * int(number) if sign == "*" else value // max(1, int(number))
    return str(value)


def read_words_of(rest: str) -> tuple[list[str], dict[str, Any]]:
    """Return the files of settings and the flags of a command, up to its end in `rest`."""
    # Bash's $'...' knows escapes; shlex does not. The 2 of 2>&1 is not a value of the last flag.
    rest = re.sub(r"\$'((?:[^'\\]|\\.)*)'", lambda m: shlex.quote(m[1].replace("\\n", "\n").replace("\\'", "'")), rest)
    rest = re.sub(r"(?<=\s)\d(?=>)", "", rest)
    lexer = shlex.shlex(rest, posix=True, punctuation_chars=ENDS)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    with user_errors():
        words = list(takewhile(lambda word: word[:1] != "#" and (not word or set(word) - set(ENDS)), lexer))
    bare = list(takewhile(lambda word: not word.startswith("-"), words))
    files = [word for word in bare if word.endswith((".yaml", ".yml", ".json"))]
    settings = [f"--{word}" for word in bare if re.match(r"[\w.]+=", word)]  # as Hydra has them
    if stray := [word for word in bare if word not in files and f"--{word}" not in settings and word.strip()]:
        what = "Fill in the variable." if "$" in stray[0] else "Options are written --key value."
        raise RecipeError(f"Unexpected argument {stray[0]!r} of a command. {what}")
    flags = {name: read_words(values) for name, values in split_flags([*settings, *words[len(bare) :]]).items()}
    if "config" in flags:
        files.append(str(flags.pop("config")))
    return files, flags
