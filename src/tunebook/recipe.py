"""A YAML recipe and the command line become dataclasses; no key is ever ignored.

Unknown keys fail with the nearest names, renamed keys with the new one, wrong types and ranges with what is allowed,
and keys without effect in this combination with what would give them one. All that is wrong is said in one message.
"""

import dataclasses
import difflib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from . import configs
from .rules import CONTRADICTIONS, NEEDS, RANGES

logger = logging.getLogger(__name__)

TASKS = {
    "sft": (configs.ScriptArguments, configs.SFTConfig, configs.ModelConfig),
    "rm": (configs.ScriptArguments, configs.RewardConfig, configs.RewardModelConfig),
    "dpo": (configs.ScriptArguments, configs.DPOConfig, configs.ModelConfig),
}

# Keys of public recipes (Open-R1, alignment-handbook, older TRL and transformers) that are gone, and what to write now.
RENAMED = {
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps (a number below 1 is a share of all steps)",
    "overwrite_output_dir": "resume_from_checkpoint: never",
    "dataset_mixture": "datasets (path, name, split, columns, fraction or probability)",
    "dataset_mixer": "datasets (path, name, split, columns, fraction or probability)",
    "dataset_splits": "dataset_train_split and dataset_test_split",
    "dataset_split": "dataset_train_split",
    "dataset_configs": "dataset_config, or name in each entry of datasets",
    "dataset_prompt_column": "prompt_column",
    "dataset_text_field": "text_column",
    "max_seq_length": "max_length",
    "max_prompt_length": "nothing: max_length is that of prompt and answer together",
    "max_completion_length": "nothing: max_length is that of prompt and answer together",
    "hub_model_revision": "hub_revision",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "evaluation_strategy": "eval_strategy",
    "preprocessing_num_workers": "dataset_num_proc",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "group_by_length": "packing: true",
    "tokenizer_name_or_path": "chat_template_path (the tokenizer is the model's)",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "HF_TOKEN in the environment, or `hf auth login`",
    "wandb_api_key": "WANDB_API_KEY in the environment, or `wandb login`",
    "pad_token": "nothing: a pad token is chosen with the tokenizer",
    "no_cuda": "use_cpu",
    "fsdp_transformer_layer_cls_to_wrap": "configs/accelerate/fsdp2.yaml",
    "label_smoothing_factor": "nothing in SFT; label_smoothing in DPO",
    "streaming": "nothing: rows are tokenized once and cached on disk",
    "skip_prepare_dataset": "nothing: rows are tokenized before the trainer is built",
}


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe: the task, its three dataclasses, and the keys that were given, in the order of the file."""

    task: str
    args: tuple[Any, Any, Any]  # script_args, training_args, model_args
    given: dict[str, Any]


class RecipeError(ValueError):
    """A user's mistake. The scripts print it without a traceback and exit with code 2."""

    exit_code = 2


class Loader(yaml.SafeLoader):
    """YAML in which a key stands once, and as in YAML 1.2 2e-5 is a number and `no` a word (save_strategy: no). PyYAML
    reads YAML 1.1, where they are a string and false."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for name in keys:
            if keys.count(name) > 1:
                raise RecipeError(
                    f"`{name}` stands twice ({node.start_mark.name}, line {node.start_mark.line + 1} on)."
                )
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {error}") from error


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Keys of a recipe file. Top-level keys that begin with an underscore only hold YAML anchors.

    Raises:
        RecipeError: when the file does not exist, is not YAML, is not a mapping or names a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"--config {path}: no such file.")
    recipe = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, not a {type(recipe).__name__}.")
    return {name: value for name, value in recipe.items() if not str(name).startswith("_")}


def find_task(path: str | Path, task: str | None = None) -> str:
    """`task`, or the one that the path names: recipes/<model>/<task>/<variant>.yaml, or <task>.yaml.

    Raises:
        RecipeError: when `task` is not one of ours, or neither names one.
    """
    path = Path(path)
    task = task or next((name for name in (path.stem, path.absolute().parent.name) if name in TASKS), None)
    if task not in TASKS:
        raise RecipeError(f"{path}: which task? Give --task {', --task '.join(TASKS)}; got {task}.")
    return task


def read_command_line(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """`--config FILE`, and overrides: `--key value`, `--key=value`, `--flag`, `--list a b`, `--dict.key value`.

    Values are read as YAML. Returns the config file and the overrides.

    Raises:
        RecipeError: for an argument that does not belong to a --key.
    """
    words: dict[str, list[str]] = {}
    current = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            current = words[name.replace("-", "_")] = [value] if equals else []
        elif current is None:
            raise RecipeError(f"Unexpected argument {argument!r}: options are written --key value.")
        else:
            current.append(argument)
    overrides: dict[str, Any] = {}
    for name, values in words.items():
        parsed = [read_word(value) for value in values]
        target, *path = name.split(".")
        holder = overrides
        for step in path:
            holder, target = holder.setdefault(target, {}), step
        holder[target] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    config = overrides.pop("config", None)
    return config, overrides


def read_word(word: str) -> Any:
    """A number, flag or null, a {mapping} or [list]; everything else is text, whatever YAML makes of it (a: b)."""
    try:
        value = yaml.load(word, Loader)
    except yaml.YAMLError:
        return word
    if isinstance(value, dict | list):
        return value if word.lstrip().startswith(("{", "[")) else word
    return value if isinstance(value, bool | int | float) or (value is None and word.strip()) else word


def merge(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with the overrides in place; mappings are merged key by key."""
    merged = dict(recipe)
    for name, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


@cache
def fields(cls: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    """Name -> (dataclass field, resolved type) of every key of a config."""
    hints = get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def unknown_key(task: str, name: str) -> str:
    """What to say of a key that the task does not have."""
    if name in RENAMED:
        return f"`{name}` is gone. Write: {RENAMED[name]}."
    owners = [other for other, classes in TASKS.items() if any(name in fields(cls) for cls in classes)]
    if owners:
        return f"`{name}` is a key of {' and '.join(owners)}, not of {task}. Remove it."
    known = [known for cls in TASKS[task] for known in fields(cls)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"`{name}` is not a key." + (f" Did you mean {' or '.join(near)}?" if near else " See --help for all keys.")


def read_value(name: str, value: Any, field: dataclasses.Field, hint: Any) -> Any:
    """The value in the key's type.

    Raises:
        RecipeError: when it has another type, is out of range or not one of the choices.
    """
    if isinstance(value, bool) and "bool" not in str(hint) and hint is not Any:
        raise RecipeError(f"`{name}`: {str(value).lower()} is not a {describe(hint)}.")
    if "list" in str(hint) and "str |" not in str(hint) and isinstance(value, str | int | float):
        value = [value]
    try:
        value = TypeAdapter(Annotated[hint, RANGES[name]] if name in RANGES else hint).validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"[{part}]" for part in fault["loc"] if part not in describe(hint).split(" | "))
        message = fault["msg"][0].lower() + fault["msg"][1:]
        raise RecipeError(f"`{name}{where}`: {message}, got {fault['input']!r} ({describe(hint)}).") from error
    choices = field.metadata.get("choices")
    if choices and value is not None and value not in choices:
        raise RecipeError(f"`{name}`: {value!r} is not one of {', '.join(choices)}.")
    return value


def describe(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)).replace("typing.", "").replace("tunebook.configs.", "")


def dead_keys(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, str]:
    """Key -> what it needs, for every given key that has no effect in this combination."""
    return {name: fix for keys, holds, fix in NEEDS for name in keys.split() if name in given and not holds(values)}


def parse(task: str, recipe: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A task's dataclasses from a recipe's keys and overrides of them.

    Raises:
        RecipeError: with every mistake, a line each.
    """
    overrides = overrides or {}
    given = merge(recipe, overrides)
    known = {name: entry for cls in TASKS[task] for name, entry in fields(cls).items()}
    mistakes, values = [], {name: default(field) for name, (field, _) in known.items()}
    for name, value in given.items():
        if name in RENAMED or name not in known:
            mistakes.append(unknown_key(task, name))
            continue
        try:
            values[name] = read_value(name, value, *known[name])
        except RecipeError as error:
            mistakes.append(str(error))
    if mistakes:
        raise RecipeError("\n".join(mistakes))

    alone = {**{name: default(field) for name, (field, _) in known.items()}, **{n: values[n] for n in recipe}}
    dead_alone = dead_keys(recipe, alone)
    for name, fix in dead_keys(given, values).items():
        if name in overrides or name in dead_alone:
            mistakes.append(f"`{name}` has no effect here. It needs {fix}.")
        else:
            logger.warning("`%s` has no effect beside the command line's keys. It needs %s.", name, fix)
    mistakes += [message for wrong, message in CONTRADICTIONS if wrong(values)]
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    with as_mistake(TypeError, ImportError):
        args = tuple(cls(**{name: values[name] for name in fields(cls) if name in given}) for cls in TASKS[task])
    return Recipe(task, args, given)


def default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def parse_command_line(task: str, arguments: Sequence[str]) -> Recipe:
    """As [`parse`], from the arguments of a script. `--help` prints every key and exits."""
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(help_text(task))
        raise SystemExit(0)
    config, overrides = read_command_line(arguments)
    return parse(task, read_recipe(config) if config else {}, overrides)


def help_text(task: str) -> str:
    """Every key with its type, default and help: tunebook's first, then TRL's and transformers'."""
    groups: dict[str, list[str]] = {}
    for cls in TASKS[task]:
        for name, (field, hint) in fields(cls).items():
            if name in RENAMED:
                continue
            owner = next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))
            help = " ".join(field.metadata.get("help", "").split())
            groups.setdefault(owner.__module__.split(".")[0], []).append(
                f"  --{name}  {describe(hint)} (default: {default(field)})\n      {help}"
            )
    usage = f"usage: accelerate launch src/{task}.py --config RECIPE.yaml [--key value ...]\n"
    return usage + "".join(
        f"\n{owner}'s keys\n\n" + "\n".join(groups[owner]) + "\n" for owner in ("tunebook", "trl", "transformers")
    )


@contextmanager
def as_mistake(*errors: type[Exception]) -> Iterator[None]:
    """What is raised inside (ValueError, and `errors`) is the user's to mend: a [`RecipeError`]."""
    try:
        yield
    except RecipeError:
        raise
    except (ValueError, *errors) as error:
        raise RecipeError(str(error)) from error


@contextmanager
def report_mistakes() -> Iterator[None]:
    """End the script with one message, no traceback and the error's code when a [`RecipeError`] is raised inside.

    Under several processes rank 0 speaks. The others wait, since the launcher ends all processes with the first one
    that fails, and speak only when rank 0 found nothing wrong.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="trl|transformers")
    if int(os.environ.get("RANK", 0)) > 0:
        logging.getLogger("tunebook").setLevel(logging.ERROR)
    try:
        yield
    except RecipeError as error:
        logger.debug("", exc_info=True)
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(30)
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        sys.stderr.flush()
        os._exit(error.exit_code)  # a normal exit would wait for the other ranks in torch.distributed's clean-up
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from the last complete checkpoint\n")
        sys.stderr.flush()
        os._exit(130)
