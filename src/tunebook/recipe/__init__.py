"""YAML and the command line become a typed recipe; every key acts or is refused.

In: a recipe's path, the command line's words. Out: [`Recipe`]. Imports errors, environment and files only.
"""

from .parser import TASKS, Recipe, find_task, parse, parse_command_line, read_command_line, read_recipe

__all__ = ["TASKS", "Recipe", "find_task", "parse", "parse_command_line", "read_command_line", "read_recipe"]
