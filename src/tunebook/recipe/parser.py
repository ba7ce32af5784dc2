"""A YAML recipe and the command line become dataclasses; no key is ever ignored.

Unknown keys fail with the nearest names, renamed keys with the new one, wrong types and ranges with what is allowed,
and keys without effect in this combination with what would give them one. One message names all that is wrong.
"""

import dataclasses
import difflib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..errors import RecipeError, user_errors
from ..files import read_yaml, shipped
from . import configs
from .needs import holds
from .rules import NEEDS, RANGES, contradictions

logger = logging.getLogger(__name__)

TASKS = {
    "sft": (configs.ScriptArguments, configs.SFTConfig, configs.ModelConfig),
    "rm": (configs.ScriptArguments, configs.RewardConfig, configs.RewardModelConfig),
    "dpo": (configs.ScriptArguments, configs.DPOConfig, configs.ModelConfig),
}


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe."""

    task: str  # sft, rm or dpo
    script: configs.ScriptArguments  # the data, and how a row becomes text
    training: configs.SFTConfig | configs.RewardConfig | configs.DPOConfig
    model: configs.ModelConfig  # the model, LoRA and quantization
    given: dict[str, Any]  # the keys that were given, in the order of the file


@dataclass(frozen=True)
class OldKey:
    """A key of public recipes that ours do not have (renamed.yaml)."""

    kind: str  # "renamed", "removed", or "chosen": a live key of TRL or transformers that tunebook sets
    new: str | None = None  # the key to set instead
    note: str = ""  # a sentence on what to do, or how the values differ

    def message(self, name: str) -> str:
        forms = {
            "renamed": f"`{name}` was renamed. Set `{self.new}` instead.",
            "removed": f"`{name}` was removed.",
            "chosen": f"`{name}` follows from `{self.new}`. Set that key." if self.new else f"Tunebook sets `{name}`.",
        }
        return f"{forms[self.kind]} {self.note}".rstrip()


@cache
def old_keys() -> dict[str, OldKey]:
    path = Path(__file__).with_name("renamed.yaml")
    kinds = read_yaml(path.read_text(encoding="utf-8"), path.name)
    return {name: OldKey(kind, **entry) for kind, entries in kinds.items() for name, entry in entries.items()}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the keys of a recipe file, the user's or a shipped one. Top-level keys that begin with an underscore only
    hold YAML anchors.

    Raises:
        RecipeError: when the file does not exist, is not YAML, is not a mapping or names a key twice.
    """
    path = shipped(path)
    if not path.is_file():
        raise RecipeError(f"--config {path}: no such file.")
    recipe = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, not a {type(recipe).__name__}.")
    return {name: value for name, value in recipe.items() if not str(name).startswith("_")}


def find_task(path: str | Path, task: str | None = None) -> str:
    """Return `task`, or the one that the path names: recipes/<model>/<task>/<variant>.yaml, or <task>.yaml.

    Raises:
        RecipeError: when `task` is not one of ours, or neither names one.
    """
    path = Path(path)
    task = task or next((name for name in (path.stem, path.absolute().parent.name) if name in TASKS), None)
    if task not in TASKS:
        raise RecipeError(f"{path}: which task? Give --task {', --task '.join(TASKS)}; got {task}.")
    return task


def read_command_line(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Split arguments into the file of `--config FILE` and overrides; `--dict.key value` sets a key of a mapping.

    Raises:
        RecipeError: for an argument that does not belong to a --key.
    """
    overrides: dict[str, Any] = {}
    for name, value in read_flags(arguments).items():
        target, *path = name.split(".")
        holder = overrides
        for step in path:
            holder, target = holder.setdefault(target, {}), step
        holder[target] = value
    config = overrides.pop("config", None)
    return config, overrides


def read_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `--key value`, `--key=value`, `--flag` and `--list a b`. Values are read as YAML.

    Raises:
        RecipeError: for an argument that does not belong to a --key.
    """
    words: dict[str, list[str]] = {}
    current = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            current = words[name.replace("-", "_")] = [value] if equals else []
        elif current is None:
            raise RecipeError(f"Unexpected argument {argument!r}: options are written --key value.")
        else:
            current.append(argument)
    parsed = {name: [read_word(value) for value in values] for name, values in words.items()}
    return {name: True if not values else values[0] if len(values) == 1 else values for name, values in parsed.items()}


def read_word(word: str) -> Any:
    """Read a number, flag or null, a {mapping} or [list]; everything else is text, whatever YAML makes of it (a: b)."""
    try:
        value = read_yaml(word, "")
    except RecipeError:
        return word
    if isinstance(value, dict | list):
        return value if word.lstrip().startswith(("{", "[")) else word
    return value if isinstance(value, bool | int | float) or (value is None and word.strip()) else word


def merge(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe with the overrides in place; mappings are merged key by key."""
    merged = dict(recipe)
    for name, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


@cache
def keys_of(cls: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    """Return name -> (dataclass field, resolved type) for every key of a config."""
    hints = get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def task_keys(task: str) -> dict[str, tuple[dataclasses.Field, Any]]:
    """Return [`keys_of`] all three configs of a task."""
    return {name: entry for cls in TASKS[task] for name, entry in keys_of(cls).items()}


def unknown_key(task: str, name: str) -> str:
    """Return the message for a key that the task does not have."""
    if name in old_keys():
        return old_keys()[name].message(name)
    if name == "benchmarks":  # of reward models, before they had a name of their own
        return f"`benchmarks` of {task} was renamed. Set `pair_benchmarks` instead."
    owners = [other for other, classes in TASKS.items() if any(name in keys_of(cls) for cls in classes)]
    if owners:
        return f"`{name}` is a key of {' and '.join(owners)}, not of {task}. Remove it."
    near = difflib.get_close_matches(name, task_keys(task), n=3, cutoff=0.6)
    return f"`{name}` is not a key." + (f" Did you mean {' or '.join(near)}?" if near else " See --help for all keys.")


def read_values(task: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return every key of a task with its given or default value, and the mistakes: key -> message."""
    known = task_keys(task)
    values = {"task": task, **{name: default(field) for name, (field, _) in known.items()}}
    mistakes = {}
    for name, value in given.items():
        if name in old_keys() or name not in known:
            mistakes[name] = unknown_key(task, name)
            continue
        try:
            values[name] = read_value(name, value, *known[name])
        except RecipeError as error:
            mistakes[name] = str(error)
    return values, mistakes


def read_value(name: str, value: Any, field: dataclasses.Field, hint: Any) -> Any:
    """Return the value in the key's type.

    Raises:
        RecipeError: when it has another type, is out of range or not one of the choices.
    """
    if isinstance(value, bool) and "bool" not in str(hint) and hint is not Any:
        raise RecipeError(f"`{name}`: {str(value).lower()} is not a {describe(hint)}.")
    if "list" in str(hint) and "str |" not in str(hint) and isinstance(value, str | int | float):
        value = [value]
    try:
        limits = field.metadata.get("range") or RANGES.get(name)
        value = TypeAdapter(Annotated[hint, limits] if limits else hint).validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"[{part}]" for part in fault["loc"] if part not in describe(hint).split(" | "))
        message = fault["msg"][0].lower() + fault["msg"][1:]
        raise RecipeError(f"`{name}{where}`: {message}, got {fault['input']!r} ({describe(hint)}).") from error
    choices = field.metadata.get("choices")
    if choices and value is not None and value not in choices:
        raise RecipeError(f"`{name}`: {value!r} is not one of {', '.join(choices)}.")
    return value


def describe(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)).replace("typing.", "").replace("tunebook.recipe.configs.", "")


def dead_keys(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> what it needs, for every given key that has no effect in this combination."""
    fields = {name: field for name, (field, _) in task_keys(values["task"]).items()}
    needs = [(name, need) for name, field in fields.items() for need in field.metadata.get("needs", ())]
    return {name: need for name, need in needs + NEEDS if name in given and not holds(need, values)}


def parse(task: str, recipe: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Build a task's dataclasses from a recipe's keys and overrides of them.

    Raises:
        RecipeError: with every mistake, a line each.
    """
    recipe, overrides = set_push_key(recipe), set_push_key(overrides or {})
    given = merge(recipe, overrides)
    if given.get("log_level") == "debug":
        logging.getLogger("tunebook").setLevel(logging.DEBUG)
    values, mistakes = read_values(task, given)
    if mistakes:
        raise RecipeError("\n".join(mistakes.values()))

    defaults, mistakes = read_values(task, {})[0], []
    dead_alone = dead_keys(recipe, {**defaults, **{name: values[name] for name in recipe}})
    for name, fix in dead_keys(given, values).items():
        if name in overrides or name in dead_alone:
            mistakes.append(f"`{name}` has no effect here. It needs {fix}.")
        else:
            logger.warning("`%s` has no effect with the command line's keys. It needs %s.", name, fix)
    mistakes += contradictions(values)
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    with user_errors(TypeError, ImportError):
        args = (cls(**{name: values[name] for name in keys_of(cls) if name in given}) for cls in TASKS[task])
        return Recipe(task, *args, given)


def set_push_key(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Replace push_to_hub_revision in `callbacks`, where Open-R1's recipes have it, by the key of that name."""
    name, callbacks = "push_to_hub_revision", keys.get("callbacks")
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    if name not in callbacks:
        return dict(keys)
    logger.info("`callbacks: [%s]` sets `%s: true`.", name, name)
    return {**keys, "callbacks": [other for other in callbacks if other != name], name: True}


def default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def parse_command_line(task: str, arguments: Sequence[str]) -> Recipe:
    """Call [`parse`] on the arguments of a script. `--help` prints every key and exits."""
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(help_text(task))
        raise SystemExit(0)
    config, overrides = read_command_line(arguments)
    return parse(task, read_recipe(config) if config else {}, overrides)


def help_text(task: str) -> str:
    """Return every key with its type, default and help: tunebook's first, then TRL's and transformers'."""
    groups: dict[str, str] = {owner: f"\n{owner}'s keys\n\n" for owner in ("tunebook", "trl", "transformers")}
    for cls in TASKS[task]:
        for name, (field, hint) in keys_of(cls).items():
            owner = next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))
            help = " ".join(field.metadata.get("help", "").split())
            if name not in old_keys():
                line = f"  --{name}  {describe(hint)} (default: {default(field)})\n      {help}\n"
                groups[owner.__module__.split(".")[0]] += line
    return f"usage: accelerate launch src/{task}.py --config RECIPE.yaml [--key value ...]\n" + "".join(groups.values())
