"""Conditions on a recipe's keys, in the words in which they are shown.

`eval_strategy: steps or epoch, or do_eval: true; explanation` holds where one of its alternatives does. An alternative
is a list of terms joined by " and ". A term is `key: value or value`, `key other than value or value`,
`key of 2 or more`, `key` (it is set) or `no key` (it is unset: null, false, empty, or not above 0). `task` is a key,
too.
"""

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

# Every key of a recipe, with its default where it was not given, and `task`
Values = Mapping[str, Any]

TERM = re.compile(
    r"(?P<no>no )?(?P<key>[\w.]+)(?:: (?P<values>.+)| other than (?P<other>.+)| of (?P<least>\d+) or more)?"
)


def holds(condition: str, values: Values) -> bool:
    """Return whether a condition holds; a key that the task does not have is false."""
    return any(all(holds_term(term, values) for term in terms) for terms in alternatives(condition))


def alternatives(condition: str) -> list[list[str]]:
    """Return the terms of each alternative of a condition."""
    return [terms.split(" and ") for terms in condition.partition("; ")[0].split(", or ")]


def holds_term(term: str, values: Values) -> bool:
    parts = TERM.fullmatch(term)
    assert parts is not None, term
    value = values.get(parts["key"], False)
    if parts["values"]:
        return bool(set(wanted_values(parts)) & {written(v) for v in (value if isinstance(value, list) else [value])})
    if parts["other"]:
        return written(value) not in re.split(", | or ", parts["other"])
    if parts["least"]:
        return value >= int(parts["least"])
    return is_set(value) != bool(parts["no"])


def wanted_values(parts: re.Match[str]) -> list[str]:
    """Return the values of a term `key: value or value`; none where it has another form."""
    return re.split(", | or ", parts["values"]) if parts["values"] else []


def written(value: object) -> str:
    """Return a value as a recipe has it."""
    if isinstance(value, Enum):
        return str(value.value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_set(value: object) -> bool:
    return value > 0 if isinstance(value, int | float) else bool(value)


def is_benchmark(metric: str | None) -> bool:
    """Return whether a metric_for_best_model is a benchmark's score."""
    return (metric or "").removeprefix("eval_").startswith("bench_")
