"""Write recipe/keys.jsonl and docs/keys.md: python -m tunebook.tools.keys, in a checkout."""

import re
from pathlib import Path

from ..files import markdown_table
from ..recipe.keys import Key, Words, old_keys, write_keys
from ..recipe.schema import TASKS, list_keys, task_keys
from .migrate import read_table, systems

PAGE = """# Keys

Every key of a recipe, made by `make keys` from its class. `tunebook schema sft --text` shows those of one task.
"""
TITLES = {"tunebook": "Keys of tunebook", "trl": "Keys of TRL", "transformers": "Keys of transformers"}
COMMON = {"lr": "learning_rate", "epochs": "num_train_epochs", "dataset": "dataset_name", "seq_len": "max_length"}


def list_words() -> Words:
    """Return what other tools call our keys: their name -> our key, the first of several -> the tools."""
    ours = {name for task in TASKS for name in task_keys(task)}
    words: Words = {word: {key: ["other tools"]} for word, key in COMMON.items()}
    for system in systems():
        table = read_table(system)
        for name, entry in table["settings"].items():
            key = re.split(", | or ", entry.get("keys", ""))[0]
            for word in (name, *entry.get("older", "").split()):
                if key in ours and word.isidentifier() and word not in {*ours, *COMMON}:
                    tools = words.setdefault(word, {}).setdefault(key, [])
                    if table["title"] not in tools:
                        tools.append(table["title"])
    return words


def write_page(keys: list[Key]) -> str:
    """Return docs/keys.md: every key with its tasks, type, default and help."""
    text = PAGE
    for owner, title in TITLES.items():
        rows = [
            (f"`{key.name}`", " ".join(key.tasks), show_type(key), f"`{key.default}`", key.help)
            for key in keys
            if key.owner == owner and key.name not in old_keys()
        ]
        text += f"\n## {title}\n\n{markdown_table(('key', 'tasks', 'type', 'default', 'meaning'), rows)}\n"
    return text


def show_type(key: Key) -> str:
    """Return what a key may be: its choices, if it has some, else its type."""
    return ", ".join(f"`{choice}`" for choice in key.choices) or key.kind.replace("|", "or")


if __name__ == "__main__":
    write_keys(list_keys(), list_words())
    Path("docs/keys.md").write_text(write_page(list_keys()), encoding="utf-8")
