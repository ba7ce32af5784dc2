"""The command line: its words become values, and a typed key wins over the recipe's keys that contradict it."""

import logging
import re
from collections.abc import Mapping, Sequence, Set
from textwrap import shorten
from typing import Any

from ..errors import RecipeError
from ..files import read_yaml
from .needs import TERM, Values, alternatives, holds_term, wanted_values, written
from .rules import contradictions
from .schema import TASKS, dead_keys, read_values, takes_structure, takes_text, task_keys
from .words import split_flags

logger = logging.getLogger(__name__)


def read_command_line(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Split arguments into the file of `--config FILE` and overrides; `--dict.key value` sets a key of a mapping. A key
    of text has the characters that were typed; other values are read as YAML.

    Raises:
        RecipeError: for an argument that does not belong to a --key.
    """
    hints = {name: hint for task in TASKS for name, (_, hint) in task_keys(task).items()}
    overrides: dict[str, Any] = {}
    for name, words in split_flags(arguments).items():
        target, *path = name.split(".")
        holder = overrides
        for step in path:
            holder, target = holder.setdefault(target, {}), step
        holder[target] = read_words(words, hints.get(name, object))
    config = overrides.pop("config", None)
    return config, overrides


def read_words(words: Sequence[str], hint: type = object) -> Any:  # noqa: ANN401 - what the user wrote
    """Return the value of a flag's words, for a key of the type `hint`: true where there is none."""
    values = [word if keeps_characters(word, hint) else read_word(word) for word in words]
    return True if not values else values[0] if len(values) == 1 else values


def keeps_characters(word: str, hint: type) -> bool:
    structure = word.lstrip().startswith(("{", "[")) and takes_structure(hint)
    return takes_text(hint) and word != "null" and not structure


def read_word(word: str) -> Any:  # noqa: ANN401 - what the user wrote
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


def overridden(task: str, recipe: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's keys with the typed ones in place, and without those that the typed ones make idle or
    contradict, which one line names. What contradicts itself within the recipe or within the command line stays."""
    given = merge(recipe, typed)
    if not typed or read_values(task, given)[1]:
        return given
    own = read_values(task, recipe)[0]
    settled = {*dead_keys(recipe, own), *contradictions(own)}
    changes: dict[str, Any] = {}  # None: dropped
    while change := find_change(task, given, {*typed, *changes}, settled):
        changes |= change
        given = {name: value for name, value in (given | change).items() if change.get(name, value) is not None}
    dropped = [f"{name}: {shorten(written(recipe[name]), 80)}" for name, value in changes.items() if value is None]
    put = [f"{name}: {written(value)}" for name, value in changes.items() if value is not None]
    verbs = [f"{verb} {', '.join(keys)}" for verb, keys in (("drops", dropped), ("sets", put)) if keys]
    if verbs:
        logger.warning("The command line wins over the recipe: it %s.", " and ".join(verbs))
    return given


def find_change(task: str, given: Mapping[str, Any], firm: Set[str], settled: Set[str]) -> dict[str, Any] | None:
    """Return a change of keys outside `firm` that takes away a fault outside `settled`; None where there is none."""
    values = read_values(task, given)[0]
    defaults = read_values(task, {})[0]
    for name, need in dead_keys(given, values).items():
        if name not in firm | settled:
            return {name: None}
        if name in firm and (change := displace(need, values, defaults, given.keys() - firm)):
            return change
    for message in contradictions(values):
        free = [name for name in re.findall(r"\w+", message) if name in given.keys() - firm]
        if message in settled or not free:
            continue
        advised = re.findall(r"`(\w+): (\w+)`", message)
        offered = [{name: read_word(value)} for name, value in advised if name not in firm]
        for change in (*offered, *({name: None} for name in free)):
            changed = {name: defaults[name] if value is None else value for name, value in change.items()}
            if message not in contradictions(values | changed):
                return change
    return None


def displace(need: str, values: Values, defaults: Values, free: Set[str]) -> dict[str, Any] | None:
    """Return the change of `free` keys that makes a condition hold: each dropped, or set to the one value that does
    where its default would not; None where there is no such change."""
    for terms in alternatives(need):
        change: dict[str, Any] = {}
        for term in terms:
            if holds_term(term, values):
                continue
            parts = TERM.fullmatch(term)
            assert parts is not None, term
            name, wanted = parts["key"], wanted_values(parts)
            if name in free and holds_term(term, {name: defaults[name]}):
                change[name] = None
            elif name in free and len(wanted) == 1:
                change[name] = read_word(wanted[0])
            else:
                break
        else:
            return change
    return None
