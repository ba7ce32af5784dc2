"""Settings of other training systems become a recipe, in which comments show each renamed key's original setting.

What becomes of a setting stands in migrations/*.yaml, a file per system in the format that openrlhf.yaml describes.
What cannot be carried over is listed, never dropped. docs/migrating.md is written from the same files.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template

from ..errors import RecipeError
from ..files import read_text, read_yaml, write_yaml
from ..recipe import needs, parser, schema
from ..recipe.keys import old_keys
from ..recipe.words import find_task
from . import conversions, foreign_data
from .commands import Command, find_commands
from .conversions import DIFFERS, LAUNCH, TO_DO, Settings, sharding

CONVERSIONS = {function.__name__: function for function in (*conversions.FUNCTIONS, *foreign_data.FUNCTIONS)}
FALLBACK = "trl"  # whose keys other tools share


def systems() -> list[str]:
    """Return the names of the tables in migrations/."""
    return sorted(path.stem for path in Path(__file__).with_name("migrations").glob("*.yaml"))


def titles() -> str:
    return ", ".join(read_table(tool)["title"] for tool in systems())


@cache
def read_table(system: str) -> dict[str, Any]:
    path = Path(__file__).with_name("migrations") / f"{system}.yaml"
    table = read_yaml(path.read_text(encoding="utf-8"), path.name)
    if table["renamed"]:
        renamed = {name: {"keys": old.new or "", "note": old.note} for name, old in old_keys().items()}
        table["settings"] = renamed | table["settings"]
    return table


@cache
def new_names(system: str) -> dict[str, str]:
    """Return old name -> name, for the settings of a system that were renamed."""
    settings = read_table(system)["settings"]
    return {old: name for name, entry in settings.items() for old in entry.get("older", "").split()}


def list_keys(entry: Mapping[str, Any]) -> str:
    """Return the recipe's keys that a setting may become, as the documentation lists them."""
    fixed = [key for case in (entry, *entry.get("cases", ())) for key in case.get("set", ())]
    fixed = [key for key in fixed if key not in (DIFFERS, TO_DO)]
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
    """A recipe; the setting that each of its keys was; settings that are not carried over, and why; what differs in
    spite of them; what is to do."""

    task: str
    source: str
    recipe: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    to_do: list[str] = field(default_factory=list)
    sharding: str = ""

    def carry_over(self, system: str, given: Settings, context: Settings, flags: bool) -> None:
        """Add the given settings, and the defaults of their system for the others.

        Args:
            context: what conditions and conversions know in addition: the command, the folder of the file, ...
            flags: the settings are flags of a command.
        """
        table, newer = read_table(system), new_names(system)
        settings, shown = {"task": self.task, **context}, {}
        for written, value in given.items():
            name = newer.get(written, written)
            text = show(written, "***" if name in table["secrets"] else value, flags)
            if flags and re.search(r"\$[\w{(]", str(value)):
                self.left[text] = "It holds a variable of the shell. Fill in the value."
            else:
                settings[name], shown[name] = value, text
        for name, value in {**table["defaults"].get("all", {}), **table["defaults"].get(self.task, {})}.items():
            settings.setdefault(name, value)
            shown.setdefault(name, f"default of {'--' * flags}{name}")
        # A table of all settings has the order of a recipe; else the user's order is kept
        for name in dict.fromkeys([*table["settings"], *shown] if table["unlisted"] else shown):
            entry = table["settings"].get(name, {"note": table["unlisted"]} if table["unlisted"] else {"keys": name})
            if name in shown:
                self.add(name, entry, settings, shown[name])
        self.sharding = self.recipe.pop(LAUNCH, table["sharding"])

    def add(self, name: str, entry: Mapping[str, Any], settings: Settings, shown: str) -> None:
        """Add one setting; `shown` is the setting in one line."""
        try:
            keys = convert(entry, settings[name], settings)
        except RecipeError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError):
            self.left[shown] = entry.get("otherwise", f"This is not a value of `{name}`.")
            return
        says_nothing = shown.startswith("default of ") or (settings[name] is False and "otherwise" not in entry)
        if keys == {} and not says_nothing:
            off = "It is off, or has no effect in this combination."
            self.left[shown] = entry.get("otherwise", off if list_keys(entry) else entry.get("note", off))
        origin = f"{shown}. {entry['caveat']}" if "caveat" in entry else shown
        for key, new in (keys or {}).items():
            if key in (DIFFERS, TO_DO):
                (self.differs if key == DIFFERS else self.to_do).extend(new)
            elif self.recipe.setdefault(key, new) != new and shown.startswith("default of "):
                continue
            elif self.recipe[key] != new:
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
            shown = self.origins.pop(name, shown)
            if not shown.startswith("default of "):
                self.left[shown] = why

    def remarks(self) -> list[str]:
        """Return what is not carried over and what is to do, in lines."""
        left = [f"{shown}: {why}" for shown, why in self.left.items()]
        lists = {"Not carried over": left, "Different here": self.differs, "To do": self.to_do}
        return [line for title, lines in lists.items() if lines for line in (f"{title}:", *(f"  {x}" for x in lines))]

    def __str__(self) -> str:
        """Return the recipe in YAML, with its comments."""
        text = f"# From {self.source}. Trailing comments show each renamed key's original setting.\n"
        text += f"# {LAUNCH} {self.sharding} src/{self.task}.py --config RECIPE.yaml\n"
        for line in write_yaml(self.recipe).removesuffix("\n").split("\n"):
            origin = self.origins.get(line.partition(":")[0])
            text += f"{line}  # {origin}\n" if origin else f"{line}\n"
        return text + "".join(f"# {line}\n" for line in self.remarks())


def recognize(settings: Settings, name: str) -> str:
    """Return the tool to which the settings of a file belong: the one that alone has such names.

    Raises:
        RecipeError: when they are of no tool, or of several.
    """
    marks = {tool: [mark for mark in read_table(tool)["marks"] if mark in settings] for tool in systems()}
    found = {tool: names for tool, names in marks.items() if names}
    if len(found) > 1:
        found.pop(FALLBACK, None)
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise RecipeError(f"{name} has no key by which a file of one of these is known: {titles()}.")
    shown = "; ".join(f"{', '.join(names)} of {read_table(tool)['title']}" for tool, names in found.items())
    raise RecipeError(f"{name} has keys of several tools: {shown}. Leave the settings of one.")


def find_file(name: str, folder: Path) -> Path:
    """Return a file that a command names, from here or from a folder above the script.

    Raises:
        RecipeError: when it is not there.
    """
    path = next((above / name for above in (Path(), folder, *folder.parents) if (above / name).is_file()), None)
    if path is None:
        raise RecipeError(f"The command reads its settings from {name}, which is not there. Migrate that file.")
    return path


def find_task_of(table: Mapping[str, Any], given: Settings, name: str, task: str | None) -> str:
    """Return the task of settings.

    Raises:
        RecipeError: when tunebook cannot train so, or it is another than `task`.
    """
    why = next((rule["why"] for rule in table["refused"] if needs.holds(rule["if"], given)), None)
    if why is not None:
        raise RecipeError(f"{name} cannot be migrated. {why}")
    found = next((task for task, condition in table["tasks"].items() if needs.holds(condition, given)), None)
    if None not in (found, task) and found != task:
        raise RecipeError(f"{name} is for --task {found}, not {task}.")
    words = [word for part in reversed(Path(name).parts) for word in re.split(r"[^a-z]+", part.lower())]
    return find_task(name, found or task or next((word for word in words if word in schema.TASKS), None))


def choose_command(text: str, task: str | None) -> Command:
    """Return the one command of a text, such as a shell script, that trains, or trains `task`.

    Raises:
        RecipeError: when there are none or several.
    """
    found = find_commands(text, {tool: read_table(tool)["commands"] for tool in systems()})
    if len(found) > 1 and task:
        conditions = {tool: read_table(tool)["tasks"][task] for tool in systems()}
        found = [one for one in found if needs.holds(conditions[one.tool], {"command": one.word, **one.flags})]
    if len(found) != 1:
        hint = " Choose one with --task, or put it into a file of its own." if found else ""
        raise RecipeError(f"One command of {titles()} is needed; found: {len(found)}.{hint}")
    return found[0]


def read_source(source: str, task: str | None) -> tuple[str, str, dict[str, Any], Command | None]:
    """Return the tool of settings, the name of their file, the settings, and the command if they are of one.

    Raises:
        RecipeError: when `source` is neither a file of settings nor a command, nor a script with one command.
    """
    path, patterns = Path(source), [read_table(tool)["commands"] for tool in systems()]
    is_command = any(re.search(pattern, source) for pattern in patterns) and not (len(source) < 255 and path.is_file())
    if not is_command and path.suffix in (".yaml", ".yml", ".json"):
        given = parser.set_push_key(parser.read_recipe(path))
        return recognize(given, path.name), path.name, given, None
    if not is_command and not path.is_file():
        raise RecipeError(f"{source} is neither a file nor a command of {titles()}.")
    command = choose_command(source if is_command else read_text(path), task)
    files = [find_file(name, Path() if is_command else path.absolute().parent) for name in command.files]
    given = {key: value for file in files for key, value in parser.read_recipe(file).items()} | command.flags
    return command.tool, read_table(command.tool)["title"] if is_command else path.name, given, command


def migrate(source: str, task: str | None = None) -> Migration:
    """Turn settings of another tool, a YAML or JSON file, a command or a script with one, into a recipe.

    Raises:
        RecipeError: when `source` is none of them, its task is not known, or tunebook cannot train so.
    """
    tool, name, given, command = read_source(source, task)
    table, newer = read_table(tool), new_names(tool)
    if not table["keeps_null"]:
        given = {key: value for key, value in given.items() if value not in (None, "", [], {})}
    where = Path(source).absolute().parent if name == Path(source).name else Path.cwd()
    context = {"command": command.word if command else "", "folder": str(where), "types": table.get("types", {})}
    context |= command.variables if command else {}
    known = context | {newer.get(key, key): value for key, value in given.items()}
    done = Migration(find_task_of(table, known, str(where / name), task), name)
    done.carry_over(tool, given, context, flags=command is not None and not command.files)
    if command:
        done.differs += command.remarks
        if done.sharding == table["sharding"]:
            done.sharding = sharding(command.launcher, {}).get(LAUNCH, done.sharding)
    done.check()
    return done


def tables() -> str:
    """Return docs/migrating.md from its first table on."""
    page = Path(__file__).with_name("migrations") / "page.jinja"
    template = Template(page.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    return template.render(tables=[read_table(tool) for tool in systems()], list_keys=list_keys)
