"""Write recipe/keys.jsonl: python -m tunebook.tools.keys."""

from ..recipe.keys import Words, write_keys
from ..recipe.schema import TASKS, list_keys, task_keys
from .migrate import read_table, systems


def list_words() -> Words:
    """Return what other tools call our keys, where the value stays as it is: their name -> our key -> the tools."""
    ours = {name for task in TASKS for name in task_keys(task)}
    words: Words = {}
    for system in systems():
        table = read_table(system)
        for name, entry in table["settings"].items():
            key, others = entry.get("keys"), entry.keys() & {"convert", "cases", "set"}
            for word in (name, *entry.get("older", "").split()):
                if key in ours and not others and word.isidentifier() and word not in ours:
                    tools = words.setdefault(word, {}).setdefault(key, [])
                    if table["title"] not in tools:
                        tools.append(table["title"])
    return words


if __name__ == "__main__":
    write_keys(list_keys(), list_words())
