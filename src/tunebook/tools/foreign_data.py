"""Data sets as other tools name them become sources and column keys; the functions are named in migrations/*.yaml.

The layouts of the data room read most rows as they are. Columns of other names are renamed in each source.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .conversions import DIFFERS, TO_DO, Settings, word_list

# The names of columns and roles in dataset_info.json -> ours
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
PAIRS = {"chosen": "chosen", "rejected": "rejected", "tools": "tools"}
TURNS = {"messages": "conversations", "system": "system"}
ROLE_TAGS = {"user": "user", "assistant": "assistant", "observation": "tool", "function": "call", "system": "system"}
NOT_TEXT = ("images", "videos", "audios")
NATURAL = ({"role": "from", "content": "value"}, {"role": "role", "content": "content"})


def as_keys(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the keys of a recipe for its sources: those of one data set where that suffices."""
    names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
    names["max_samples"] = "max_train_samples"
    if len(sources) > 1 or sources[0].keys() - names:
        return {"datasets": sources}
    return {names[key]: value for key, value in sources[0].items()}


def common(keys: Iterable[dict[str, Any]], what: str) -> dict[str, Any]:
    """Return the keys that all data sets need; a recipe has one value for all of them.

    Raises:
        RecipeError: when they need different ones.
    """
    first, *others = keys
    if any(other != first for other in others):
        raise RecipeError(f"Its data sets differ in {what}, which a recipe has once. Migrate them one by one.")
    return first


# ---- LLaMA-Factory ----


def read_info(settings: Settings) -> tuple[dict[str, Any] | None, Path]:
    """Return dataset_info.json and its folder, from here or a folder above the settings; None where it is not there."""
    name = str(settings.get("dataset_dir", "data"))
    for above in (Path(), Path(settings["folder"]), *Path(settings["folder"]).parents):
        path = above / name / "dataset_info.json"
        if path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8"))), path.parent
            except ValueError as error:
                raise RecipeError(f"{path} is not JSON: {error}") from error
    return None, Path()


def llamafactory_source(
    name: str, info: Mapping[str, Any], folder: Path, settings: Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the source of an entry of dataset_info.json, and the message_mapping that it needs.

    Raises:
        RecipeError: when it holds no text, or what no layout reads.
    """
    columns, tags = info.get("columns", {}), info.get("tags", {})
    if info.get("formatting", "alpaca") == "alpaca":
        ours, given = ALPACA | PAIRS, columns or {"prompt": "instruction", "query": "input", "response": "output"}
        if settings.get("stage") == "pt":
            ours, given = {"prompt": "text"}, {"prompt": given.get("prompt")}
        elif not info.get("ranking") and "response" not in given:
            raise RecipeError(f"The data set {name} has no answers; it is for `stage: pt`.")
    else:
        ours, given = TURNS | PAIRS, {"messages": "conversations"} | columns
    for column in (*NOT_TEXT, "kto_tag"):
        if column in columns:
            raise RecipeError(f"The data set {name} has {column}, which tunebook does not train on.")
    known = {
        "hf_hub_url": "path",
        "subset": "name",
        "folder": "data_dir",
        "split": "split",
        "num_samples": "max_samples",
    }
    source = {known[key]: info[key] for key in known if key in info}
    if "path" not in source and "file_name" in info:
        source = {"path": str(folder / info["file_name"])} | source
    if "path" not in source:
        raise RecipeError(f"The data set {name} is not on the Hugging Face Hub, but behind {', '.join(info)}.")
    if (rows := settings.get("max_samples")) is not None:
        source["max_samples"] = min(rows, source.get("max_samples", rows))
    renamed = {theirs: ours[key] for key, theirs in given.items() if key in ours and theirs not in (None, ours[key])}
    if given.get("messages") == "messages":
        renamed.pop("messages", None)
    fields = {"role": tags.get("role_tag", "from"), "content": tags.get("content_tag", "value")}
    if info.get("formatting") == "openai":
        fields = {"role": "role", "content": "content"}
    roles = {tags[f"{tag}_tag"]: role for tag, role in ROLE_TAGS.items() if tags.get(f"{tag}_tag", role) != role}
    mapping = {} if fields in NATURAL and not roles else fields | ({"roles": roles} if roles else {})
    return source | ({"columns": renamed} if renamed else {}), mapping


def llamafactory_sources(value: object, settings: Settings) -> dict[str, Any]:
    info, folder = read_info(settings)
    names = word_list(value)
    if info is None:
        rows = {"max_samples": settings["max_samples"]} if "max_samples" in settings else {}
        to_do = f"{', '.join(names)}: dataset_info.json was not found. Set the paths of these data sets, and `columns`."
        unread = {} if settings.get("dataset_dir") == "ONLINE" else {TO_DO: [to_do]}
        return as_keys([{"path": name} | rows for name in names]) | unread
    if unknown := [name for name in names if name not in info]:
        raise RecipeError(f"There is no data set {', '.join(unknown)} in {folder}/dataset_info.json.")
    found = [llamafactory_source(name, info[name], folder, settings) for name in names]
    sources, mapping = [source for source, _ in found], common((mapping for _, mapping in found), "tags")
    keys: dict[str, Any] = {"message_mapping": mapping} if mapping else {}
    if "text" not in (sources[0].get("columns") or {}).values():
        keys |= llamafactory_prompt([info[name] for name in names])
    mixing = str(settings.get("mix_strategy", "concat"))
    if mixing != "concat" and len(sources) > 1:
        chances = [
            float(chance) for chance in word_list(settings.get("interleave_probs", ",".join("1" * len(sources))))
        ]
        sources = [source | {"probability": chance} for source, chance in zip(sources, chances, strict=True)]
        keys["mixture_stopping"] = "all_exhausted" if mixing == "interleave_over" else "first_exhausted"
    if "val_size" in settings and len(sources) == 1 and "max_samples" in sources[0]:
        return {"datasets": sources} | keys  # its rows are taken before some are held out
    return as_keys(sources) | keys


def llamafactory_prompt(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the template that joins instruction and input by a line break, where all data sets have both."""
    has_input = [
        entry.get("formatting", "alpaca") == "alpaca" and "query" in entry.get("columns", {"query": "input"})
        for entry in entries
    ]
    if all(has_input):
        return {"prompt_template": "{instruction}[[\n{input}]]"}
    joined = "An instruction and its input are joined by an empty line; LLaMA-Factory has a line break."
    return {DIFFERS: [joined]} if any(has_input) else {}


def llamafactory_evaluation(value: object, settings: Settings) -> dict[str, Any]:
    info, folder = read_info(settings)
    [name] = word_list(value)
    if info is None:
        return {"eval_dataset_name": name, TO_DO: [f"{name}: dataset_info.json was not found. Set its path."]}
    source, _ = llamafactory_source(name, info[name], folder, settings)
    if source.keys() - {"path", "max_samples"}:
        raise ValueError("an evaluation set has a path only")
    names = {"path": "eval_dataset_name", "max_samples": "max_eval_samples"}
    return {names[key]: part for key, part in source.items()}


FUNCTIONS = (llamafactory_sources, llamafactory_evaluation)
