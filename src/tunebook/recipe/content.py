"""What the keys and values of any recipe may hold, whatever they are for: no secrets, and no more than a file can."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..environment import secrets
from ..errors import RecipeError, brief, mask

MAX_ELEMENTS = 100_000  # of a value with its aliases written out
# Hugging Face, OpenAI and Anthropic, GitHub, GitLab, AWS, Slack, Google
TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|A[KS]IA[A-Z0-9]{16}|xox[abeoprs]-[\w-]{10,}|AIza[\w-]{35})"
)


def check_content(keys: Mapping[Any, object]) -> None:
    """Refuse, before any value is shown or written, what a recipe must not hold.

    Raises:
        RecipeError: a key is not text, a value holds a secret, holds itself, or has more than `MAX_ELEMENTS` elements.
    """
    known = secrets()
    for key, value in keys.items():
        if not isinstance(key, str):
            raise RecipeError(f"A recipe's keys are text; {brief(key)} is a {type(key).__name__}.")
        if count_elements(value, key, {}) > MAX_ELEMENTS:
            raise RecipeError(f"`{key}` has more than {MAX_ELEMENTS:,} elements. Put them into a file.")
        for text in texts(value):
            names = [name for name, secret in known.items() if secret in text]
            if names or TOKEN.search(text):
                what = f"the value of {names[0]}" if names else "what looks like a token"
                raise RecipeError(
                    f"`{key}` holds {what}. A recipe is written to files and pushed. Take the secret out, and set it "
                    "as an environment variable (HF_TOKEN, WANDB_API_KEY, ...)."
                )


def count_elements(value: object, key: str, counts: dict[int, int | None]) -> int:
    """Return how many elements a value has with its aliases written out; `counts` has those of its parts, by id."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counts:
        counts[id(value)] = None  # it is being counted
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        counts[id(value)] = 1 + sum(count_elements(part, key, counts) for part in parts)
    count = counts[id(value)]
    if count is None:
        raise RecipeError(f"`{key}` holds itself. Remove the alias.")
    return count


def texts(value: object) -> Iterator[str]:
    """Yield all text in a value."""
    if isinstance(value, dict):
        for part in (*value.keys(), *value.values()):
            yield from texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)
    elif isinstance(value, str):
        yield value


def masked(value: object) -> object:
    """Return a value with the passwords in its addresses masked, to be written to files."""
    if isinstance(value, dict):
        return {masked(name): masked(part) for name, part in value.items()}
    if isinstance(value, list):
        return [masked(part) for part in value]
    return mask(value) if isinstance(value, str) else value
