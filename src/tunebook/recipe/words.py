"""What the user wrote, read before the libraries load: a recipe's file, the flags of a command line."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError, exit_on_error
from ..files import read_yaml, shipped
from .keys import TASK_NAMES, help_text, is_wrong, saved_keys, unknown_key


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
    task = task or next((name for name in (path.stem, path.absolute().parent.name) if name in TASK_NAMES), None)
    if task not in TASK_NAMES:
        raise RecipeError(f"{path}: which task? Give --task {', --task '.join(TASK_NAMES)}; got {task}.")
    return task


def split_flags(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Return the words of each `--key value`, `--key=value`, `--flag` and `--list a b`, of the last where a key stands
    twice.

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
    return words


def refuse_wrong_keys(task: str, arguments: Sequence[str]) -> None:
    """Refuse a key that the task does not have, in the recipe of `--config` or typed, as far as keys.jsonl knows.

    Raises:
        RecipeError: with a line for each wrong key; for a recipe that cannot be read.
    """
    if (keys := saved_keys()) is None:
        return
    flags = split_flags(arguments)
    recipe = {name: value for path in flags.pop("config", []) for name, value in read_recipe(path).items()}
    if "debug" in (recipe.get("log_level"), *flags.get("log_level", ())):
        logging.getLogger("tunebook").setLevel(logging.DEBUG)
    known = {other: {key.name for key in keys if other in key.tasks} for other in TASK_NAMES}
    names = dict.fromkeys([*recipe, *(name.partition(".")[0] for name in flags)])
    wrong = [name for name in names if isinstance(name, str) and is_wrong(name, known[task])]
    if wrong:
        raise RecipeError("\n".join(unknown_key(task, name, known) for name in wrong))


def answer_early(task: str, arguments: Sequence[str]) -> None:
    """Answer a script's `--help` and wrong keys before torch is loaded, and end the process."""
    with exit_on_error():
        if {"--help", "-h"} & set(arguments) and (keys := saved_keys()) is not None:
            sys.stdout.write(help_text(task, keys))
            raise SystemExit(0)
        refuse_wrong_keys(task, arguments)
