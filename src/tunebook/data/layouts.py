"""The layouts of a row: which columns hold what, and a row's messages as turns."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError

SFT_LAYOUTS = (["messages"], ["prompt", "completion"], ["text"])
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}

Messages = list[dict[str, Any]]


class Dropped(Exception):
    """A row that cannot be trained on; the message is the reason, for the report."""


def choose_columns(task: str, names: Sequence[str], given: Mapping[str, Any]) -> dict[str, str]:
    """Return role -> column name: the column that the recipe names, else the one that has TRL's name.

    Args:
        names: the columns of the data set.
        given: the recipe's keys.

    Raises:
        RecipeError: when a named column does not exist, no known layout fits, or more than one does.
    """
    if task == "sft":
        roles = ["text"] if given.get("pretraining") else [role for layout in SFT_LAYOUTS for role in layout]
    else:
        roles = ["prompt", "chosen", "rejected"]
        roles += [role for role, used in (("subset", "subset_column"), ("margin", "use_margin")) if given.get(used)]
    listed = f"Columns: {', '.join(names)}."
    named = {role: given[f"{role}_column"] for role in roles if given.get(f"{role}_column")}
    for role, column in named.items():
        if column not in names:
            raise RecipeError(f"`{role}_column`: there is no column {column!r}. {listed}")
    columns = {"messages": "conversations"} if "messages" in roles and "conversations" in names else {}
    columns |= {role: role for role in roles if role in names} | named

    if task != "sft":
        if not {"chosen", "rejected"} <= columns.keys():
            raise RecipeError(f"Pairs need chosen and rejected. Set `chosen_column` and `rejected_column`. {listed}")
        if "margin" in roles and "margin" not in columns:
            raise RecipeError(f"`use_margin` needs a column of margins. Set `margin_column`. {listed}")
        return columns
    fits = [layout for layout in SFT_LAYOUTS if named.keys() <= {*layout} <= columns.keys()]
    if len(fits) != 1:
        known = [" and ".join(layout) for layout in fits or SFT_LAYOUTS]
        raise RecipeError(
            f"The data set fits {'more than one' if fits else 'none'} of these layouts: {'; '.join(known)}. Set "
            f"`messages_column`, or `prompt_column` and `completion_column`, or `text_column`. {listed}"
        )
    return {role: columns[role] for role in fits[0]}


def read_messages(value: Any, role: str) -> Messages:  # noqa: ANN401 - of a row
    """Read a conversation from messages, ShareGPT turns or a plain text of `role`.

    Raises:
        Dropped: when a turn is not a mapping or has no role, or there is none.
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


def read_field(row: Mapping[str, Any], column: str, types: tuple[type, ...] = (str, list)) -> Any:  # noqa: ANN401
    """Return the value of a column; drop the row if it is missing or not of one of the types."""
    value = row[column]
    if value is None:
        raise Dropped(f"missing {column}")
    if not isinstance(value, types):
        raise Dropped(f"{column} is {type(value).__name__}, not {' or '.join(t.__name__ for t in types)}")
    return value
