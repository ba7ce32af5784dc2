"""Functions that migrations/*.yaml name, for what its tables cannot express: above all data sets.

Each takes a setting's value and all settings, and returns keys of the recipe: none where nothing corresponds to it.
They raise a TypeError, ValueError, KeyError or AttributeError where the setting does not have such a value.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from ..following.benchmarks import find_benchmark
from . import peers

Settings = Mapping[str, Any]


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


FUNCTIONS = (handbook_mixture, handbook_mixer, handbook_test_split, known_benchmarks, openrlhf_sources)
CONVERSIONS = {function.__name__: function for function in (*FUNCTIONS, *peers.FUNCTIONS)}
