"""Functions that migrations/*.yaml name, for what its tables cannot express: above all data sets.

Each takes a setting's value and all settings, and returns keys of the recipe: none where nothing corresponds to it.
They raise a TypeError, ValueError, KeyError or AttributeError where the setting does not have such a value.
"""

import json
import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from ..following.benchmarks import find_benchmark

Settings = Mapping[str, Any]
LAUNCH = "accelerate launch --config_file"  # keys of the tables that are not of the recipe
DIFFERS, TO_DO = "differs", "to do"  # lists of sentences
CONFIGS = {  # what a file or a name of DeepSpeed or FSDP has in it -> the file in configs/accelerate
    r"(z(ero)?_?-?|stage_?)3(?!.*no_offload).*offload": "zero3_offload",
    r"z(ero)?_?-?3|stage_?3": "zero3",
    r"z(ero)?_?-?2|stage_?2": "zero2",
    r"z(ero)?_?-?1|stage_?1": "zero1",
    r"fsdp.*offload": "fsdp2_offload",
    r"fsdp": "fsdp2",
    r"multi_gpu|ddp|z(ero)?_?-?0": "ddp",
    r"single_gpu": "single",
}


def sharding(value: object, settings: Settings) -> dict[str, Any]:
    """Return the config to launch with, by what another tool calls its own."""
    name = next((name for pattern, name in CONFIGS.items() if re.search(pattern, str(value).lower())), None)
    return {LAUNCH: f"configs/accelerate/{name}.yaml"} if name else {}


def share_of(split: str, share: float) -> str:
    """Return the first rows of a split as `datasets` writes it, in whole percent."""
    return split if share >= 1 else f"{split}[:{ceil(100 * share)}%]"


def handbook_mixture(value: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    names = {"id": "path", "config": "name", "columns": "columns"}
    sources = [
        {ours: source[theirs] for theirs, ours in names.items() if source.get(theirs) is not None}
        | {"split": share_of(source.get("split", "train"), source.get("weight", 1))}
        for source in value["datasets"]
    ]
    size = value.get("test_split_size")
    if size is not None and size >= 1:  # rows of the whole mixture, where tunebook holds out rows of each source
        size = max(1, round(size / len(sources)))
    return {"datasets": sources} | ({} if size is None else {"test_split_size": size})


def handbook_mixer(value: object, settings: Settings) -> dict[str, Any]:
    """Convert dataset_mixer with dataset_splits and dataset_configs."""
    train = next((name for name in settings.get("dataset_splits", []) if "train" in name), "train")
    mixer = settings["dataset_mixer"]
    configs = settings.get("dataset_configs") or [None] * len(mixer)
    sources = [
        {"path": path} | ({"name": name} if name is not None else {}) | {"split": share_of(train, share)}
        for (path, share), name in zip(mixer.items(), configs, strict=True)
    ]
    if len(sources) > 1:
        return {"datasets": sources}
    names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
    return {names[name]: part for name, part in sources[0].items()}


def handbook_test_split(value: Sequence[str], settings: Settings) -> dict[str, Any]:
    tests = [name for name in value if "test" in name]
    return {"dataset_test_split": tests[0]} if len(tests) == 1 == len(settings.get("dataset_mixer", {})) else {}


def known_benchmarks(value: Sequence[str], settings: Settings) -> dict[str, Any]:
    return {"benchmarks": [name for name in value if find_benchmark(name)]}


def openrlhf_sources(value: object, settings: Settings) -> dict[str, Any]:
    """Convert data.dataset, such as `a,b@folder`, with data.dataset_split and data.dataset_probs."""
    parts = [part.strip().split("@") for part in str(settings["data.dataset"]).split(",")]
    split = settings["data.dataset_split"]
    if len(parts) == 1 == len(parts[0]):
        return {"dataset_name": parts[0][0]} | ({} if split == "train" else {"dataset_train_split": split})
    other_split = {} if split == "train" else {"split": split}
    sources = [dict(zip(("path", "data_dir"), part, strict=False)) | other_split for part in parts]
    shares = [float(share) for share in str(settings.get("data.dataset_probs", "")).split(",") if share]
    if len(sources) == 1 or len(shares) != len(sources):
        return {"datasets": sources}
    shared = [source | {"probability": share / sum(shares)} for source, share in zip(sources, shares, strict=True)]
    return {"datasets": shared, "mixture_stopping": "all_exhausted"}


def fsdp(value: object, settings: Settings) -> dict[str, Any]:
    """Return the config to launch with, where the settings shard with FSDP and may offload."""
    fsdp_config = settings.get("fsdp_config")
    asked = fsdp_config if isinstance(fsdp_config, dict) else {}
    offloads = asked.get("offload_params") or asked.get("fsdp_offload_params") or "offload" in str(settings.get("fsdp"))
    return {LAUNCH: f"configs/accelerate/fsdp2{'_offload' * bool(offloads)}.yaml"}


def word_list(value: object) -> list[str]:
    """Return the parts of `a,b`, or of a list."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts]


def same_as_model(value: object, settings: Settings) -> dict[str, Any]:
    """Return nothing to write for the model that is trained; for another one, that it is not carried over."""
    return {DIFFERS: []} if value == settings.get("model_name_or_path") else {}


def module_names(value: object, settings: Settings) -> dict[str, Any]:
    names = word_list(value)
    return {"lora_target_modules": ["all-linear"] if {"all", "all-linear"} & set(names) else names}


def rank_and_alpha(value: int, settings: Settings) -> dict[str, Any]:
    return {"lora_r": value, "lora_alpha": 2 * value}


def modules_to_save(value: object, settings: Settings) -> dict[str, Any]:
    return {"lora_modules_to_save": word_list(value)}


def new_tokens(value: object, settings: Settings) -> dict[str, Any]:
    if isinstance(value, dict):
        raise ValueError("these tokens have a meaning")
    return {"new_tokens": word_list(value)}


def special_tokens(value: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    names = ", ".join(name for name in value if name != "eos_token")
    others = {DIFFERS: [f"The {names} is the tokenizer's own."]} if names else {}
    return {key: value[key] for key in ("eos_token",) if key in value} | others


def steps_per_epoch(name: str, count: float, settings: Settings) -> dict[str, Any]:
    """Return when something is done `count` times an epoch: after each, or after a share of all steps."""
    if count == 1 or "max_steps" in settings:
        return {f"{name}_strategy": "epoch"}
    return {f"{name}_strategy": "steps", f"{name}_steps": round(1 / (count * settings["num_epochs"]), 6)}


def evaluations_per_epoch(value: float, settings: Settings) -> dict[str, Any]:
    return steps_per_epoch("eval", value, settings) | {"eval_on_start": True}


def saves_per_epoch(value: float, settings: Settings) -> dict[str, Any]:
    return steps_per_epoch("save", value, settings)


def axolotl_modules(value: object, settings: Settings) -> dict[str, Any]:
    """Convert lora_target_modules, of which axolotl also takes a pattern of paths, such as `layers.*.(q|k|v)_proj`."""
    if settings.get("lora_target_linear"):
        return {DIFFERS: []}
    if not isinstance(value, str) or not re.search(r"[\[\]()|*\\]", value):
        return module_names(value, settings)
    last = re.search(r"\((\w+(?:\|\w+)*)\)(\w*)$", value)
    if last and "|" not in re.sub(r"\([^()]*\)", "", value):
        modules = [f"{name}{last[2]}" for name in last[1].split("|")]
        return {"lora_target_modules": modules, DIFFERS: ["Modules of these names are adapted wherever they are."]}
    return {TO_DO: ["`lora_target_modules` is a pattern of paths there. Set a list of names, or leave PEFT's own."]}


def axolotl_plugins(value: Sequence[str], settings: Settings) -> dict[str, Any]:
    names = [name.rpartition(".")[2] for name in value]
    unknown = [name for name in names if name not in ("LigerPlugin", "CutCrossEntropyPlugin")]
    liger = {"use_liger_kernel": True} if "LigerPlugin" in names else {}
    return liger | {DIFFERS: [f"The plugin {name} has no counterpart." for name in unknown]}


def checkpointing_kwargs(value: object, settings: Settings) -> dict[str, Any]:
    return {"activation_checkpointing_kwargs": json.loads(value) if isinstance(value, str) else value}


FUNCTIONS = (
    *(handbook_mixture, handbook_mixer, handbook_test_split, known_benchmarks, openrlhf_sources),
    *(sharding, fsdp, same_as_model, rank_and_alpha, module_names, modules_to_save, new_tokens, special_tokens),
    *(evaluations_per_epoch, saves_per_epoch, axolotl_modules, axolotl_plugins, checkpointing_kwargs),
)
