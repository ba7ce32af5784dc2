"""The keys of a task's recipe, from the classes that declare them: what a value may be, and what has an effect."""

import dataclasses
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from enum import Enum
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..errors import RecipeError, brief
from . import configs
from .keys import Key, is_wrong, unknown_key
from .needs import holds
from .rules import CHOICES, NEEDS, RANGES, contradictions

Training = configs.SFTConfig | configs.RewardConfig | configs.DPOConfig

# Keys that are a path, or may be one
PATHS = {
    *("output_dir", "model_name_or_path", "ref_model_name_or_path", "dataset_name", "datasets", "eval_dataset_name"),
    *("chat_template_path", "resume_from_checkpoint", "benchmarks", "pair_benchmarks", "deepspeed", "fsdp_config"),
    *("accelerator_config", "eval_prompts", "adapter_name_or_path"),
}

TASKS: dict[str, tuple[type[configs.ScriptArguments], type[Training], type[configs.ModelConfig]]] = {
    "sft": (configs.ScriptArguments, configs.SFTConfig, configs.ModelConfig),
    "rm": (configs.ScriptArguments, configs.RewardConfig, configs.RewardModelConfig),
    "dpo": (configs.ScriptArguments, configs.DPOConfig, configs.ModelConfig),
}


def keys_of(cls: type) -> dict[str, tuple[dataclasses.Field[object], type]]:
    """Return name -> (dataclass field, resolved type) for every key of a config."""
    hints = get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


@cache
def task_keys(task: str) -> dict[str, tuple[dataclasses.Field[object], type]]:
    """Return [`keys_of`] all three configs of a task."""
    return {name: entry for cls in TASKS[task] for name, entry in keys_of(cls).items()}


def known_names() -> dict[str, Collection[str]]:
    """Return the names of every task's keys."""
    return {task: task_keys(task).keys() for task in TASKS}


def default(field: dataclasses.Field[object]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def read_values(task: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return every key of a task with its given or default value, and the mistakes: key -> message."""
    known = task_keys(task)
    values = {"task": task, **{name: default(field) for name, (field, _) in known.items()}}
    mistakes = {}
    for name, value in given.items():
        if is_wrong(name, known):
            mistakes[name] = unknown_key(task, name, known_names())
            continue
        try:
            values[name] = read_value(name, value, *known[name])
        except RecipeError as error:
            mistakes[name] = str(error)
    return values, mistakes


type_adapter = cache(TypeAdapter)


def read_value(name: str, value: object, field: dataclasses.Field[object], hint: type) -> Any:  # noqa: ANN401 - the user's
    """Return the value in the key's type.

    Raises:
        RecipeError: when it has another type, is out of range or not one of the choices.
    """
    if isinstance(value, bool) and "bool" not in str(hint) and hint is not Any:
        raise RecipeError(f"`{name}`: {str(value).lower()} is not a {describe(hint)}.")
    unquoted = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int | float | date)]
    if takes_text(hint) and unquoted:
        raise RecipeError(f"`{name}`: {unquoted[0]} is a number or a date in YAML, where text is needed. Quote it.")
    if takes_list(hint) and isinstance(value, str | int | float):
        value = [value]
    try:
        value = type_adapter(limited(name, field, hint)).validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"[{part}]" for part in fault["loc"] if part not in describe(hint).split(" | "))
        message = fault["msg"][0].lower() + fault["msg"][1:]
        raise RecipeError(f"`{name}{where}`: {message}, got {brief(fault['input'])} ({describe(hint)}).") from error
    check_size(name, value)
    if name in PATHS:
        value = [expand_paths(name, v) for v in value] if isinstance(value, list) else expand_paths(name, value)
    choices = list_choices(name, field, hint)
    given = value if isinstance(value, list) else [] if value is None else [value]
    if choices and (wrong := [choice for choice in given if choice not in choices]):
        raise RecipeError(f"`{name}`: {brief(wrong[0])} is not one of {', '.join(choices)}.")
    return value


def expand_paths(name: str, value: object) -> object:
    """Return a path with `~` and variables of the environment replaced, also those of an entry of `datasets`; another
    value as it is.

    Raises:
        RecipeError: for a variable or a user that is not there.
    """
    if isinstance(value, configs.DatasetConfig):
        places = {place: expand_paths(f"{name}: {place}", vars(value)[place]) for place in ("path", "data_dir")}
        return dataclasses.replace(value, **places)  # type: ignore[arg-type] # a path stays a path
    if not isinstance(value, str) or (name == "eval_prompts" and not value.endswith((".txt", ".jsonl"))):
        return value
    expanded = os.path.expanduser(os.path.expandvars(value))
    if lost := re.search(r"\$\{?\w+\}?|^~[^/]*", expanded):
        raise RecipeError(f"`{name}` {value}: {lost[0]} is not set in the environment. Set it, or write the path.")
    return expanded


def check_size(name: str, value: object) -> None:
    """Refuse a number that is not finite, or that 32 bits would not hold."""
    if isinstance(value, int | float) and not abs(value) < 2**32:
        raise RecipeError(f"`{name}`: {value} is not a number below 2^32.")


def limited(name: str, field: dataclasses.Field[object], hint: type) -> Any:  # noqa: ANN401 - types have no type
    """Return a key's type with the range of its number."""
    limits = field.metadata.get("range") or RANGES.get(name)
    return Annotated[hint, limits] if limits else hint


def list_choices(name: str, field: dataclasses.Field[object], hint: type) -> Sequence[str]:
    """Return what a key of text may be, by the rules or an enumeration of transformers'; nothing where it is free."""
    if get_origin(hint) is Literal:
        return ()
    enums = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    return field.metadata.get("choices") or CHOICES.get(name) or [choice.value for kind in enums for choice in kind]


def takes_list(hint: type) -> bool:
    """Return whether a key of this type has a list, for which one value may stand."""
    return "list" in str(hint) and "str |" not in str(hint)


def takes_text(hint: type) -> bool:
    """Return whether a key of this type has text, and neither numbers nor flags."""
    kinds = list_kinds(hint)
    return any(issubclass(kind, str) for kind in kinds) and not kinds & {bool, int, float}


def takes_structure(hint: type) -> bool:
    """Return whether a key of this type may have a list or a mapping."""
    return bool(list_kinds(hint) & {list, dict})


def list_kinds(hint: type) -> set[type]:
    """Return the plain types of a hint, those of a list's elements among them."""
    if get_origin(hint) is Literal:
        return {type(choice) for choice in get_args(hint)}
    if get_origin(hint) is dict:
        return {dict}
    kinds = {hint if isinstance(hint, type) else get_origin(hint)} & {list} if get_args(hint) else {hint}
    return kinds.union(*map(list_kinds, get_args(hint)))


def describe(hint: type) -> str:
    if get_origin(hint) is Literal:
        return "str"
    return getattr(hint, "__name__", str(hint)).replace("typing.", "").replace("tunebook.recipe.configs.", "")


def list_keys() -> list[Key]:
    """Return the keys of all tasks as their classes declare them. One that differs between tasks stands for each."""
    keys: dict[str, Key] = {}
    for task, classes in TASKS.items():
        for cls in classes:
            for name, (field, hint) in keys_of(cls).items():
                key = declared_key(cls, name, field, hint)
                same = keys.setdefault(json.dumps(dataclasses.asdict(key)), key)
                same.tasks.append(task)
    return list(keys.values())


def declared_key(cls: type, name: str, field: dataclasses.Field[object], hint: type) -> Key:
    """Return a key as a config declares it, for no task yet."""
    owner = next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))
    value, choices = default(field), list_choices(name, field, hint)
    schema: dict[str, Any] = {}
    if choices:
        schema = one = {"enum": [*choices, None] if NoneType in get_args(hint) else [*choices]}
        if takes_list(hint):
            schema = {"anyOf": [one, {"type": "array", "items": one}]}
    elif "ParallelismConfig" not in str(hint):  # the launcher's, of which there is no schema
        schema = type_adapter(limited(name, field, hint)).json_schema()
        if takes_list(hint) and list_kinds(hint) & {str, float}:
            schema = {"anyOf": [{"type": ["string", "number"]}, schema]}
    return Key(
        name,
        [],
        owner.__module__.partition(".")[0],
        describe(hint),
        value.value if isinstance(value, Enum) else value,
        " ".join(field.metadata.get("help", "").split()),
        schema,
    )


def dead_keys(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> what it needs, for every given key that has no effect in this combination."""
    fields = {name: field for name, (field, _) in task_keys(values["task"]).items()}
    needs = [(name, need) for name, field in fields.items() for need in field.metadata.get("needs", ())]
    return {name: need for name, need in needs + NEEDS if name in given and not holds(need, values)}


def faults(given: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with valid keys in combination, a message each. A key that is set to its default may be
    without effect, since it asks for nothing."""
    fields = {name: field for name, (field, _) in task_keys(values["task"]).items()}
    dead = {name: need for name, need in dead_keys(given, values).items() if values[name] != default(fields[name])}
    idle = [f"`{name}` has no effect here. It needs {need}." for name, need in dead.items()]
    return idle + list(contradictions(values))
