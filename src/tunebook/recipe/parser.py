"""A YAML recipe and the command line become dataclasses; no key is ever ignored.

Unknown keys fail with the nearest names, renamed keys with the new one, wrong types and ranges with what is allowed,
and keys without effect in this combination with what would give them one. One message names all that is wrong.
"""

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..environment import free_build_locks, uses_deepspeed
from ..errors import RecipeError, brief, plain
from ..files import read_yaml, shipped
from . import configs
from .command_line import overridden, read_command_line
from .content import check_content
from .schema import TASKS, Training, default, describe, faults, keys_of, old_keys, read_values

logger = logging.getLogger(__name__)

# What the configs of TRL and transformers raise for a value that they do not take, if they look at it at all
UNFIT = (ValueError, TypeError, ImportError, OSError, AssertionError, AttributeError)
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe."""

    task: str  # sft, rm or dpo
    script: configs.ScriptArguments  # the data, and how a row becomes text
    training: Training
    model: configs.ModelConfig  # the model, LoRA and quantization
    given: dict[str, Any]  # the keys that were given, in the order of the file


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the keys of a recipe file, the user's or a shipped one. Top-level keys that begin with an underscore only
    hold YAML anchors.

    Raises:
        RecipeError: when the file does not exist, is not YAML, is not a mapping or names a key twice.
    """
    path = shipped(path)
    if not path.is_file():
        raise RecipeError(f"--config {path}: no such file.")
    recipe = read_yaml(path.read_bytes(), str(path))
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


def parse(task: str, recipe: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Build a task's dataclasses from a recipe's keys and overrides of them.

    Raises:
        RecipeError: with every mistake, a line each.
    """
    for keys in (recipe, overrides or {}):
        check_content(keys)
    recipe, overrides = set_push_key(recipe), set_push_key(overrides or {})
    if {**recipe, **overrides}.get("log_level") == "debug":
        logging.getLogger("tunebook").setLevel(logging.DEBUG)
    given = overridden(task, recipe, overrides)
    values, mistakes = read_values(task, given)
    if messages := list(mistakes.values()) or faults(given, values):
        raise RecipeError("\n".join(messages))
    script, training, model = TASKS[task]
    if uses_deepspeed():
        free_build_locks()

    def build_part(cls: type[T]) -> T:
        return build(cls, {name: values[name] for name in keys_of(cls) if name in given})

    return Recipe(task, build_part(script), build_part(training), build_part(model), given)


def build(cls: type[T], keys: Mapping[str, Any]) -> T:
    """Build a config of TRL's or transformers'.

    Raises:
        RecipeError: with their message, after the key that has to go, where they do not name one.
    """
    try:
        return cls(**keys)
    except UNFIT as error:
        message = plain(error, 1000)
        if not any(re.search(rf"\b{name}\b", message) for name in keys):
            unfit = (name for name in keys if accepts(cls, {k: v for k, v in keys.items() if k != name}))
            message = "".join(f"`{name}` {brief(keys[name])}: " for name in [*unfit][:1]) + (
                message or "not understood"
            )
        raise RecipeError(message) from error


def accepts(cls: type[object], keys: Mapping[str, Any]) -> bool:
    with suppress(*UNFIT):
        cls(**keys)
        return True
    return False


def set_push_key(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Replace push_to_hub_revision in `callbacks`, where Open-R1's recipes have it, by the key of that name."""
    name, callbacks = "push_to_hub_revision", keys.get("callbacks")
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    if name not in callbacks:
        return dict(keys)
    logger.info("`callbacks: [%s]` sets `%s: true`.", name, name)
    return {**keys, "callbacks": [other for other in callbacks if other != name], name: True}


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
