"""The keys of every task, known without loading torch: from keys.jsonl, which `make keys` writes from the classes.

Its first line has what it was made from. Where that is another now, [`saved_keys`] is None, and the classes are asked.
The second has the words of other tools, from the tables of `tunebook migrate`.
"""

import difflib
import json
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..files import read_yaml

TASK_NAMES = ("sft", "rm", "dpo")
FILE = Path(__file__).with_name("keys.jsonl")
DECLARE_KEYS = ("trl", "transformers", "accelerate")
# What other tools call our keys: their name -> our key -> the tools
Words = dict[str, dict[str, list[str]]]
HELP = "usage: accelerate launch src/{task}.py --config RECIPE.yaml [--key value ...]\n"


@dataclass(frozen=True)
class Key:
    """A key of one task or several."""

    name: str
    tasks: list[str]
    owner: str  # tunebook, trl or transformers
    kind: str  # its type, as --help shows it
    default: object
    help: str
    schema: dict[str, Any]  # JSON schema of a value; its "$defs" are those of the whole recipe's schema

    @property
    def choices(self) -> list[str]:
        """Return what a key of text, or of a list of texts, may be; nothing where it is free."""
        alternatives = [self.schema, *self.schema.get("anyOf", [])]
        return [choice for schema in alternatives for choice in schema.get("enum", []) if choice is not None]

    def text(self) -> str:
        """Return what --help says of the key."""
        choices = f"\n      One of {', '.join(self.choices)}." if self.choices else ""
        return f"  --{self.name}  {self.kind} (default: {self.default})\n      {self.help}{choices}\n"


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


def origins() -> dict[str, str | None]:
    """Return what the keys follow from: the version of each package whose classes declare some, None for one that is
    not installed, and a checksum of our own declarations."""
    ours = b"".join(FILE.with_name(name).read_bytes() for name in ("configs.py", "rules.yaml"))
    versions: dict[str, str | None] = {"tunebook": f"{zlib.crc32(ours):08x}"}
    for name in DECLARE_KEYS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def write_keys(keys: Iterable[Key], words: Words, path: Path = FILE) -> None:
    """Write keys.jsonl: a line of [`origins`], one of words, and one for each key."""
    lines = [origins(), words, *map(asdict, keys)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@cache
def saved_keys(path: Path = FILE) -> list[Key] | None:
    """Return the keys of keys.jsonl; None where it was written from other [`origins`] than those installed."""
    written_from, _, *lines = path.read_text(encoding="utf-8").splitlines()
    if json.loads(written_from) != origins():
        return None
    return [Key(**json.loads(line)) for line in lines]


@cache
def words_of_others() -> Words:
    words: Words = json.loads(FILE.read_text(encoding="utf-8").splitlines()[1])
    return words


def unknown_key(task: str, name: str, known: Mapping[str, Collection[str]]) -> str:
    """Return the message for a key that the task does not have.

    Args:
        known: the names of every task's keys.
    """
    if name in old_keys():
        return old_keys()[name].message(name)
    if name == "benchmarks":  # of reward models, before they had a name of their own
        return f"`benchmarks` of {task} was renamed. Set `pair_benchmarks` instead."
    owners = [other for other in TASK_NAMES if name in known[other]]
    if owners:
        return f"`{name}` is a key of {' and '.join(owners)}, not of {task}. Remove it."
    if ours := {key: tools for key, tools in words_of_others().get(name, {}).items() if key in known[task]}:
        tools = dict.fromkeys(tool for names in ours.values() for tool in names)
        return f"`{name}` is a word of {' and '.join(tools)}. Set `{'` or `'.join(ours)}`."
    near = difflib.get_close_matches(name, known[task], n=3, cutoff=0.6)
    return f"`{name}` is not a key." + (f" Did you mean {' or '.join(near)}?" if near else " See --help for all keys.")


def is_wrong(name: str, known: Collection[str]) -> bool:
    """Return whether a recipe may not have this key."""
    return name in old_keys() or name not in known


def help_text(task: str, keys: Iterable[Key]) -> str:
    """Return every key with its type, default and help: tunebook's first, then TRL's and transformers'."""
    groups = {owner: f"\n{owner}'s keys\n\n" for owner in ("tunebook", "trl", "transformers")}
    for key in keys:
        if task in key.tasks and key.name not in old_keys():
            groups[key.owner] += key.text()
    return HELP.format(task=task) + "".join(groups.values())


def json_schema(task: str, keys: Iterable[Key]) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a task's recipe, by which editors complete and check its keys."""
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for key in keys:
        if task in key.tasks and key.name not in old_keys():
            value = dict(key.schema)
            definitions |= value.pop("$defs", {})
            properties[key.name] = value | {"description": key.help, "default": key.default}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"tunebook {task}",
        "type": "object",
        "properties": properties,
        "patternProperties": {"^_": {"description": "Holds YAML anchors only."}},
        "additionalProperties": False,
        "$defs": definitions,
    }
