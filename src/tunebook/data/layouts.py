"""The layouts of a data set: which columns hold what."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError

# Layout -> role -> the columns that hold it unless a key names another. A role with a question mark may be missing.
SFT_LAYOUTS = {
    "conversations": {"messages": ["messages", "conversations", "conversation"], "tools?": ["tools"]},
    "prompt and completion": {"prompt": ["prompt"], "completion": ["completion"], "tools?": ["tools"]},
    "Alpaca": {
        "prompt": ["instruction"],
        "completion": ["output"],
        **{"input?": ["input"], "history?": ["history"], "system?": ["system"], "tools?": ["tools"]},
    },
    "query and response": {
        "prompt": ["query"],
        "completion": ["response"],
        **{"history?": ["history"], "system?": ["system"], "tools?": ["tools"]},
    },
    "text": {"text": ["text"]},
    "tokens": {"input_ids": ["input_ids"], "labels?": ["labels"], "completion_mask?": ["completion_mask"]},
}
PAIR_LAYOUTS = {
    "pairs": {
        **{"chosen": ["chosen"], "rejected": ["rejected"]},
        **{"prompt?": ["prompt", "messages", "conversations", "conversation"], "tools?": ["tools"]},
    },
    "Alpaca pairs": {
        **{"prompt": ["instruction"], "chosen": ["chosen"], "rejected": ["rejected"]},
        **{"input?": ["input"], "history?": ["history"], "system?": ["system"], "tools?": ["tools"]},
    },
    "conversations with a rejected answer": {
        "chosen": ["messages", "conversations"],
        "rejected": ["rejected_response", "rejected_messages"],
        "tools?": ["tools"],
    },
}
OF_TURNS = ("Alpaca", "query and response", "Alpaca pairs")  # their texts are turns of a conversation
KNOWN = "images image videos audios input history system tools margin weight labels input_ids".split()
COLUMN_KEYS = ("messages", "prompt", "completion", "text", "chosen", "rejected", "system", "history")
ALPACA_PROMPT = "{instruction}[[\n\n{input}]]"
OPTIONAL, NAMED = re.compile(r"\[\[(.*?\{\w*\}.*?)\]\]", re.DOTALL), re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class Layout:
    """What the columns of a data set hold."""

    name: str
    columns: Mapping[str, str]  # role -> column
    prompt_template: str | None = None  # makes the prompt of columns; see [`fill_template`]
    has_prompts: bool = True  # False: its pairs are meant to have none

    @property
    def of_turns(self) -> bool:
        """Return whether texts are turns of a conversation."""
        return self.name in OF_TURNS

    def unused(self, names: Sequence[str]) -> list[str]:
        """Return the columns that have a known meaning and are not read."""
        used = {*self.columns.values(), *NAMED.findall(self.prompt_template or "")}
        return [name for name in names if name in KNOWN and name not in used]


def choose_layout(task: str, names: Sequence[str], given: Mapping[str, Any]) -> Layout:
    """Find the layout of a data set by its columns, and by the columns that the recipe names.

    Args:
        names: the columns of the data set.
        given: the recipe's keys.

    Raises:
        RecipeError: when a named column does not exist, no known layout fits, or more than one does.
    """
    listed = f"Columns: {', '.join(names)}."
    named = {role: given[f"{role}_column"] for role in COLUMN_KEYS if given.get(f"{role}_column")}
    extra = {"subset": given.get("subset_column"), "margin": given.get("use_margin") and given.get("margin_column")}
    if no_prompt := task != "sft" and named.get("prompt") == "none":
        del named["prompt"]
    template = given.get("prompt_template")
    for role, column in (named | {role: column for role, column in extra.items() if column}).items():
        if column not in names:
            raise RecipeError(f"`{role}_column`: there is no column {column!r}. {listed}")
    for column in filter(None, NAMED.findall(template or "")):
        if column not in names:
            raise RecipeError(f"`prompt_template`: there is no column {column!r}. {listed}")
    layouts = SFT_LAYOUTS if task == "sft" else PAIR_LAYOUTS
    if given.get("pretraining"):
        layouts = {"text": layouts["text"]}
    if {"prompt", "completion"} & named.keys():
        layouts = {name: roles for name, roles in layouts.items() if name not in OF_TURNS}
    makes_prompt = any(NAMED.findall(template or ""))
    fits = {
        name: columns
        for name, roles in layouts.items()
        if (columns := fit(roles, names, named, makes_prompt)) is not None
    }
    if len(fits) > 1:
        fits.pop("tokens", None)
        has_prompt = "prompt" in fits.get("pairs", {})
        best = "Alpaca pairs" if "Alpaca pairs" in fits and not has_prompt else "pairs"
        fits = {best: fits[best]} if best in fits else fits
    if len(fits) != 1:
        raise RecipeError(describe_misfit(task, list(fits), listed))
    [(name, columns)] = fits.items()
    if columns.get("messages", "").startswith("conversation") and "system" in names:
        columns = {"system": "system"} | columns
    if no_prompt:
        columns.pop("prompt", None)
    if extra["subset"]:
        columns["subset"] = extra["subset"]
    if task == "rm" and given.get("use_margin"):
        columns["margin"] = extra["margin"] or "margin"
        if columns["margin"] not in names:
            raise RecipeError(f"`use_margin` needs a column of margins. Set `margin_column`. {listed}")
    if name in ("Alpaca", "Alpaca pairs") and template is None:
        template = ALPACA_PROMPT if "input" in columns else "{instruction}"
        template = template.replace("{instruction}", f"{{{columns['prompt']}}}")
    return Layout(name, columns, template, not no_prompt)


def fit(
    roles: Mapping[str, Sequence[str]], names: Sequence[str], named: Mapping[str, str], makes_prompt: bool
) -> dict[str, str] | None:
    """Return role -> column of a layout; None where a role has no column, or a named column no role."""
    columns = dict(named)
    for role, usual in roles.items():
        column = next((name for name in usual if name in names), None)
        if column is not None and role.removesuffix("?") not in columns:
            columns[role.removesuffix("?")] = column
        elif role not in columns and not role.endswith("?") and not (role == "prompt" and makes_prompt):
            return None
    known = {role.removesuffix("?") for role in roles} | (set() if "text" in roles else {"system", "history"})
    return columns if columns.keys() <= known else None


def describe_misfit(task: str, fits: Sequence[str], listed: str) -> str:
    """Return what to set where no layout fits, or several do."""
    if task != "sft":
        return f"Pairs need chosen and rejected. Set `chosen_column` and `rejected_column`. {listed}"
    known = [f"{name} ({', '.join(r for r in SFT_LAYOUTS[name] if r[-1] != '?')})" for name in fits or SFT_LAYOUTS]
    return (
        f"The data set fits {'more than one' if fits else 'none'} of these layouts: {'; '.join(known)}. Set "
        f"`messages_column`, or `prompt_column` and `completion_column`, or `text_column`. {listed}"
    )


def template_columns(template: str) -> Iterator[tuple[str, bool]]:
    """Yield the columns that a prompt template names, each with whether the text is left out where it is empty."""
    needed = set(NAMED.findall(OPTIONAL.sub("", template)))
    for name in dict.fromkeys(NAMED.findall(template)):
        yield name, name not in needed


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Put values into a prompt template at `{name}`; `[[text with {name}]]` is left out where a value is empty."""

    def keep(part: re.Match[str]) -> str:
        return part[1] if all(values[name] for name in NAMED.findall(part[1])) else ""

    return NAMED.sub(lambda name: values[name[1]], OPTIONAL.sub(keep, template))
