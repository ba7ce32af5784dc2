"""The layouts of a row: which columns hold what, and a row's messages as turns."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}

Messages = list[dict[str, Any]]


class Dropped(Exception):
    """A row that cannot be trained on; the message is the reason."""


def choose_columns(task: str, names: Sequence[str], keys: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return role -> column name, from the recipe's keys and, where they are silent, TRL's names.

    Raises:
        RecipeError: when a named column does not exist, none of the known layouts is there, or two are.
    """
    for role, column in keys.items():
        if column is not None and column not in names:
            raise RecipeError(f"`{role}_column`: there is no column {column!r}. Columns: {', '.join(names)}.")

    def find(role: str, *usual: str) -> str | None:
        return keys.get(role) or next((name for name in usual if name in names), None)

    if task != "sft":
        columns = {"chosen": find("chosen", "chosen"), "rejected": find("rejected", "rejected")}
        if None in columns.values():
            raise RecipeError(
                f"A preference row needs chosen and rejected; columns: {', '.join(names)}. Set chosen_column and "
                "rejected_column."
            )
        columns["prompt"] = find("prompt", "prompt")
        if keys.get("subset"):
            columns["subset"] = keys["subset"]
        if "margin" in keys:
            columns["margin"] = find("margin", "margin")
            if columns["margin"] is None:
                raise RecipeError(
                    f"`use_margin` needs a column margin; columns: {', '.join(names)}. Set margin_column."
                )
        return columns

    layouts = {
        "messages": {"messages": find("messages", "messages", "conversations")},
        "prompt and completion": {"prompt": find("prompt", "prompt"), "completion": find("completion", "completion")},
        "text": {"text": find("text", "text")},
    }
    named = {role for role, column in keys.items() if column is not None}
    found = {name: columns for name, columns in layouts.items() if None not in columns.values()}
    if named:
        found = {name: columns for name, columns in found.items() if named <= columns.keys()}
    if len(found) != 1:
        problem = f"fits {' and '.join(found)}" if found else "has none of messages, prompt and completion, text"
        raise RecipeError(
            f"The data set {problem}; columns: {', '.join(names)}. Set messages_column, prompt_column and "
            "completion_column, or text_column."
        )
    return next(iter(found.values()))


def read_messages(value: Any, role: str) -> Messages:
    """Read a conversation from messages, ShareGPT turns or a plain text of `role`.

    Raises:
        Dropped: a turn is not a mapping or has no role, or there is none.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = []
    for turn in value:
        if not isinstance(turn, dict):
            raise Dropped(f"a turn is {type(turn).__name__}, not a mapping with role and content")
        if "from" in turn:
            turn = {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        turn = {name: value for name, value in turn.items() if value is not None}
        if "role" not in turn:
            raise Dropped("a turn has no role")
        messages.append(turn)
    if not messages:
        raise Dropped("empty conversation")
    return messages


def read_field(row: Mapping[str, Any], column: str, types: tuple[type, ...] = (str, list)) -> Any:
    value = row[column]
    if value is None:
        raise Dropped(f"missing {column}")
    if not isinstance(value, types):
        raise Dropped(f"{column} is {type(value).__name__}, not {' or '.join(t.__name__ for t in types)}")
    return value
