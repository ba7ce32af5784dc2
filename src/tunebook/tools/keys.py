"""Write recipe/keys.jsonl: python -m tunebook.tools.keys."""

import re

from ..recipe.keys import Words, write_keys
from ..recipe.schema import TASKS, list_keys, task_keys
from .migrate import read_table, systems

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


if __name__ == "__main__":
    write_keys(list_keys(), list_words())
