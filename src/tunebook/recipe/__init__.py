"""YAML and the command line become a typed recipe; every key acts or is refused.

In: a recipe's path, the command line's words. Out: [`Recipe`]. Imports errors, environment and files only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .words import find_task, read_recipe

if TYPE_CHECKING:
    from .parser import TASKS, Recipe, parse, parse_command_line, read_command_line

__all__ = ["TASKS", "Recipe", "find_task", "parse", "parse_command_line", "read_command_line", "read_recipe"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a part of the parser
    # The parser loads torch, for which a wrong key (keys.py, words.py) need not wait
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(f"{__name__}.parser"))[name]
