"""Settings of other training systems become a recipe, in which comments show each renamed key's original setting.

What becomes of a setting stands in migrations/*.yaml, a file per system in the format that openrlhf.yaml describes.
What cannot be carried over is listed, never dropped. docs/migrating.md is written from the same files.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import Template

from ..errors import RecipeError, user_errors
from ..files import read_yaml, write_yaml
from ..recipe import needs, parser, schema
from ..recipe.command_line import read_words
from ..recipe.keys import old_keys
from ..recipe.words import find_task, split_flags
from .conversions import CONVERSIONS, Settings
from .peers import INFO, find_info

ORDER = ("handbook", "openrlhf", "llamafactory", "axolotl", "swift", "open_instruct", "trl")  # of the documentation
LAUNCH = "accelerate launch --config_file"  # a key of the tables that is not one of the recipe
# A line of a script that sets a variable to one word
ASSIGNMENT = re.compile(r"""^[ \t]*(?:export[ \t]+)?(\w+)=(?:"([^"$`]*)"|'([^'$`]*)'|([^\s"'$`#;]*))[ \t]*$""", re.M)


@cache
def read_table(system: str) -> dict[str, Any]:
    path = Path(__file__).with_name("migrations") / f"{system}.yaml"
    table = read_yaml(path.read_text(encoding="utf-8"), path.name)
    if table["renamed"]:
        renamed = {name: {"keys": old.new or "", "note": old.note} for name, old in old_keys().items()}
        table["settings"] = renamed | table["settings"]
    return table


def list_keys(entry: Mapping[str, Any]) -> str:
    """Return the recipe's keys that a setting may become, as the documentation lists them."""
    fixed = [key for case in (entry, *entry.get("cases", ())) for key in case.get("set", ())]
    return entry.get("keys") or ", ".join(dict.fromkeys(fixed))


def convert(entry: Mapping[str, Any], value: Any, settings: Settings) -> dict[str, Any] | None:  # noqa: ANN401 - the user's value
    """Return the recipe's keys for a value: {} if it is not carried over, None if nothing needs to be written."""
    when = entry.get("when")
    if when and not needs.holds(when, settings) or not re.search(entry.get("matches", ""), str(value)):
        return {}
    if "cases" in entry:
        cases = (convert(case, value, settings) for case in entry["cases"])
        return next((keys for keys in cases if keys != {}), {})
    if "convert" in entry:
        return CONVERSIONS[entry["convert"]](value, settings)
    if "set" in entry:
        return fill(entry["set"], {**settings, "value": value}) or None
    keys = entry["keys"].split(", ") if entry.get("keys") else []
    values = value if len(keys) > 1 else [entry["values"].get(value, value) if "values" in entry else value]
    return dict(zip(keys, values, strict=True)) if keys else {}


def fill(template: Any, settings: Settings) -> Any:  # noqa: ANN401 - YAML and the user's values
    """Replace each `<name>` in an entry's `set` by the value of that setting."""
    if isinstance(template, dict):
        return {key: fill(value, settings) for key, value in template.items()}
    name = re.fullmatch("<(.+)>", template) if isinstance(template, str) else None
    return settings[name[1]] if name else template


def show(name: str, value: object, flag: bool = False) -> str:
    """Return a key or a flag in one line."""
    text = " ".join(map(str, value)) if isinstance(value, list) else value
    text = (text if isinstance(text, str) else json.dumps(text, default=str)).replace("\n", "\\n")
    text = text if len(text) < 80 else "..."
    return f"{name}: {text}" if not flag else f"--{name}" if value is True else f"--{name} {text}"


@dataclass
class Migration:
    """A recipe; the setting that each of its keys was; settings that are not carried over, and why; what is to do."""

    task: str
    source: str
    recipe: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    to_do: list[str] = field(default_factory=list)
    sharding: str = "configs/accelerate/zero3.yaml"

    def carry_over(self, table: Mapping[str, Any], given: Settings) -> None:
        """Add the given settings, and the defaults of their system for the others."""
        newer = {old: name for name, entry in table["settings"].items() for old in entry.get("older", "").split()}
        settings, shown = {"task": self.task}, {}
        for written, value in given.items():
            name = newer.get(written, written)
            if name == INFO:
                settings[name] = value
                continue
            text = show(written, "***" if name in table["secrets"] else value, bool(table["command"]))
            if table["command"] and re.search(r"\$([\w{(]|$)", str(value)):
                self.left[text] = "It holds a variable of the shell. Fill in the value."
            else:
                settings[name], shown[name] = value, text
        for name, value in {**table["defaults"].get("all", {}), **table["defaults"].get(self.task, {})}.items():
            settings.setdefault(name, value)
            shown.setdefault(name, f"default of {'--' if table['command'] else ''}{name}")
        # A table of all settings has the order of a recipe; else the user's order is kept
        for name in dict.fromkeys([*table["settings"], *shown] if table["unlisted"] else shown):
            entry = table["settings"].get(name, {"note": table["unlisted"]} if table["unlisted"] else {"keys": name})
            if "tasks" in table and name not in {*table["settings"], *schema.task_keys(self.task)}:
                entry = {"note": "It has no counterpart in tunebook."}
            if name in shown:
                self.add(name, entry, settings, shown[name])
        self.sharding = self.recipe.pop(LAUNCH, self.sharding)

    def add(self, name: str, entry: Mapping[str, Any], settings: Settings, shown: str) -> None:
        """Add one setting; `shown` is the setting in one line."""
        try:
            keys = convert(entry, settings[name], settings)
        except (TypeError, ValueError, KeyError, AttributeError):
            self.left[shown] = entry.get("otherwise", f"This is not a value of `{name}`.")
            return
        if keys == {} and not shown.startswith("default of "):
            off = "It is off, or has no effect in this combination."
            self.left[shown] = entry.get("otherwise", off) if list_keys(entry) else entry.get("note", off)
        origin = f"{shown}. {entry['caveat']}" if "caveat" in entry else shown
        for key, new in (keys or {}).items():
            if self.recipe.setdefault(key, new) != new:
                self.left[shown] = f"The recipe already has `{show(key, self.recipe[key])}`."
            elif shown != show(key, new):
                self.origins[key] = f"{self.origins[key]}, {origin}" if key in self.origins else origin

    def check(self) -> None:
        """Move keys that the recipe's parser refuses, or that have no effect, out of the recipe."""
        values, refused = schema.read_values(self.task, self.recipe)
        self.drop(refused)
        while dead := schema.dead_keys(self.recipe, values):
            self.drop({name: f"`{name}` would have no effect. It needs {need}." for name, need in dead.items()})
            values, _ = schema.read_values(self.task, self.recipe)
        try:
            # tf32 is checked where the recipe is launched: it depends on the GPU
            parser.parse(self.task, {name: value for name, value in self.recipe.items() if name != "tf32"})
        except RecipeError as error:
            self.to_do += str(error).splitlines()

    def drop(self, reasons: Mapping[str, str]) -> None:
        for name, why in reasons.items():
            shown = show(name, self.recipe.pop(name))
            self.left[self.origins.pop(name, shown)] = why

    def remarks(self) -> list[str]:
        """Return what is not carried over and what is to do, in lines."""
        lists = {"Not carried over": [f"{shown}: {why}" for shown, why in self.left.items()], "To do": self.to_do}
        return [line for title, lines in lists.items() if lines for line in (f"{title}:", *(f"  {x}" for x in lines))]

    def __str__(self) -> str:
        """Return the recipe in YAML, with its comments."""
        text = f"# From {self.source}. Trailing comments show each renamed key's original setting.\n"
        text += f"# {LAUNCH} {self.sharding} src/{self.task}.py --config RECIPE.yaml\n"
        for line in write_yaml(self.recipe).removesuffix("\n").split("\n"):
            origin = self.origins.get(line.partition(":")[0])
            text += f"{line}  # {origin}\n" if origin else f"{line}\n"
        return text + "".join(f"# {line}\n" for line in self.remarks())


def find_commands(text: str) -> list[tuple[str, re.Match[str]]]:
    """Return the system and the place of each training command in a text, outside of comments."""
    found = [
        (name, match)
        for name in ORDER
        if (pattern := read_table(name)["command"])
        for match in re.finditer(pattern, text)
    ]
    return [(name, m) for name, m in found if "#" not in text[text.rfind("\n", 0, m.start()) + 1 : m.start()]]


def fill_in(text: str) -> str:
    """Return a script with the variables that it sets to plain words replaced by them."""
    values = {name: next(filter(None, words), "") for name, *words in ASSIGNMENT.findall(text)}
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda m: values.get(m[1] or m[2], m[0]), text)


def read_command(text: str, task: str | None) -> tuple[str, dict[str, Any]]:
    """Return the system, and the flags with the name of the command, of the one training command in a text, such as a
    shell script."""
    text = fill_in(re.sub(r"\\\n", " ", text))
    found = [
        (name, match)
        for name, match in find_commands(text)
        if task is None or task in tasks_of(read_table(name), {"command": match["command"]})
    ]
    if len(found) != 1:
        known = ", ".join(read_table(name)["title"] for name in ORDER if read_table(name)["command"])
        hint = " Choose one with --task." if found else ""
        raise RecipeError(f"One training command is needed, of {known}; found: {len(found)}.{hint}")
    [(name, match)] = found
    rest = text[match.end() :]
    # Bash's $'...' knows escapes; shlex does not. The 2 of 2>&1 is not a value of the last flag.
    rest = re.sub(r"\$'((?:[^'\\]|\\.)*)'", lambda m: shlex.quote(m[1].replace("\\n", "\n").replace("\\'", "'")), rest)
    rest = re.sub(r"(?<=\s)\d(?=>)", "", rest)
    ends = ";<>|&()\n"
    lexer = shlex.shlex(rest, posix=True, punctuation_chars=ends)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    with user_errors():
        words = list(takewhile(lambda word: word[:1] != "#" and (not word or set(word) - set(ends)), lexer))
    flags = {flag: read_words(values) for flag, values in split_flags(words).items()}
    return name, {"command": match["command"], **flags}


def tasks_of(table: Mapping[str, Any], settings: Settings) -> list[str]:
    """Return the tasks that a system's settings may be for: by the command alone, more than one."""
    known = [task for task, condition in table["tasks"].items() if needs.holds(condition, settings)]
    alone = set(settings) == {"command"}
    return known or [
        task for task, text in table["tasks"].items() if alone and f"command: {settings['command']}" in text
    ]


def read_settings(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the one system that knows the names in a YAML file, and its settings.

    Raises:
        RecipeError: for a file of none.
    """
    settings = parser.read_recipe(path)
    conditions = {name: read_table(name).get("recognized") for name in ORDER}
    found = [name for name, condition in conditions.items() if condition and needs.holds(condition, settings)]
    if len(found) != 1:
        known = ", ".join(read_table(name)["title"] for name in ORDER if conditions[name])
        raise RecipeError(f"{path} is not recognized as a file of {known}: no key tells which.")
    return found[0], settings


def migrate(source: str, task: str | None = None) -> Migration:
    """Turn the settings of a system in migrations/ into a recipe: a YAML file, a command, or a script with one.

    Raises:
        RecipeError: when `source` is none of them, its task is not known, or it trains what tunebook does not.
    """
    path, is_command = Path(source), bool(find_commands(source))
    if not is_command and path.suffix in (".yaml", ".yml"):
        name, given = read_settings(path)
    elif is_command or path.is_file():
        name, given = read_command(source if is_command else path.read_text(encoding="utf-8"), task)
    else:
        raise RecipeError(f"{source} is neither a file nor a command of a system that can be migrated.")
    table, shown = read_table(name), read_table(name)["title"] if is_command else path.name
    if "files" in table and "command" not in given:
        words = {*re.split(r"[^a-z]+", path.as_posix().lower())}
        named = next((task for task in table["files"] if task in words), None)
        given = {"command": table["files"][find_task(path, task or named)], **given}
    if "tasks" not in table:
        done = Migration(find_task(path, task), shown)
        done.carry_over(table, parser.set_push_key(given))
    else:
        done = carry_over_task(table, given, shown, path)
    done.check()
    return done


def carry_over_task(table: Mapping[str, Any], settings: Settings, shown: str, path: Path) -> Migration:
    """Carry over settings that say which task they are for."""
    given = {name: value for name, value in settings.items() if value is not None}
    for rule in table["refused"]:
        if needs.holds(rule["if"], given):
            raise RecipeError(f"{shown}: {rule['why']}")
    if not (tasks := tasks_of(table, {**given, "": None})):
        which = ("command", "stage", "rl", "rlhf_type", "process_reward_model")
        what = ", ".join(show(name, given[name]) for name in which if name in given)
        raise RecipeError(f"{shown}: {what} is neither SFT nor a reward model nor DPO.")
    if (info := find_info(path, given)) is not None:
        given[INFO] = info
    done = Migration(tasks[0], shown)
    if info is None and {"dataset", "dataset_dir"} <= table["settings"].keys() and "dataset" in given:
        done.to_do.append(f"{INFO} was not found: replace the names of data sets by files, folders or Hub ids.")
    done.carry_over(table, given)
    return done


def tables() -> str:
    """Return docs/migrating.md from its first table on."""
    page = Path(__file__).with_name("migrations") / "page.jinja"
    template = Template(page.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    return template.render(tables=[read_table(name) for name in ORDER], list_keys=list_keys)
