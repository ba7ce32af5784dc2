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
from typing import Any, TypeVar

from ..environment import free_build_locks, uses_deepspeed
from ..errors import RecipeError, brief, plain
from . import configs
from .command_line import overridden, read_command_line
from .content import check_content
from .keys import help_text, saved_keys
from .schema import TASKS, Training, faults, keys_of, list_keys, read_values
from .words import read_recipe

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
        sys.stdout.write(help_text(task, saved_keys() or list_keys()))
        raise SystemExit(0)
    config, overrides = read_command_line(arguments)
    return parse(task, read_recipe(config) if config else {}, overrides)
