"""Data sets as other tools name them become sources and column keys; the functions are named in migrations/*.yaml.

The layouts of the data room read most rows as they are. Columns of other names are renamed in each source.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..recipe.command_line import read_word
from .conversions import DIFFERS, TO_DO, Settings, share_of, word_list

# The names of columns and roles in dataset_info.json -> ours
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
PAIRS = {"chosen": "chosen", "rejected": "rejected", "tools": "tools"}
TURNS = {"messages": "conversations", "system": "system"}
ROLE_TAGS = {"user": "user", "assistant": "assistant", "observation": "tool", "function": "call", "system": "system"}
PARTS = {"hf_hub_url": "path", "subset": "name", "folder": "data_dir", "split": "split", "num_samples": "max_samples"}
NOT_TEXT = ("images", "videos", "audios")
NATURAL = ({"role": "from", "content": "value"}, {"role": "role", "content": "content"})


def as_keys(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the keys of a recipe for its sources: those of one data set where that suffices."""
    names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
    names["max_samples"] = "max_train_samples"
    if not sources:
        raise ValueError("there is no data set")
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
    source = {PARTS[key]: info[key] for key in PARTS if key in info}
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
        chances = map(float, word_list(settings.get("interleave_probs", ["1"] * len(sources))))
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


# ---- axolotl ----

# Fields of a data set that are read, and those of conversations
READ = {"path", "name", "split", "data_files", "type", "ds_type", "trust_remote_code", "train_on_eos", "train_on_eot"}
TURN_FIELDS = {"message_field_role": "role", "message_field_content": "content"}
READ_OF_TURNS = {"message_property_mappings", "roles", "roles_to_train", *TURN_FIELDS}
READ_OF_TURNS |= {"field_messages", "field_chosen", "field_rejected", "field_tools"}


def axolotl_source(entry: Mapping[str, Any], settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the source of one of axolotl's data sets, and the keys that its rows need.

    Raises:
        RecipeError: when no layout reads rows of this type.
    """
    kind, types = entry.get("type"), settings["types"]
    if isinstance(kind, dict):
        spec, read = user_defined(kind, settings), set(READ)
    elif kind not in types and kind is not None:
        raise RecipeError(f"`type: {kind}` of the data set {entry['path']} is not one that tunebook reads.")
    else:
        spec, read = types[kind] if kind else {"columns": {}}, set(READ)
    columns, keys = dict(spec.get("columns", {})), dict(spec.get("keys", {}))
    if spec.get("text"):
        columns, read = {entry.get("field", "text"): "text"}, read | {"field"}
    if spec.get("chat"):
        turns = "prompt" if settings["task"] != "sft" else "messages"
        columns |= {entry.get("field_messages", "messages"): turns} if "field_messages" in entry else {}
        sides = [side for side in ("chosen", "rejected", "tools") if f"field_{side}" in entry]
        columns |= {entry[f"field_{side}"]: side for side in sides}
        keys |= axolotl_turns(entry, settings)
        read |= READ_OF_TURNS
    elif settings["task"] == "sft" and settings.get("train_on_inputs") and not spec.get("text"):
        keys["completion_only_loss"] = False
    natural = ("messages", "conversations", "conversation")
    known = {theirs for theirs, ours in columns.items() if theirs in natural and ours in (*natural, "prompt")}
    columns = {theirs: ours for theirs, ours in columns.items() if theirs != ours and theirs not in known}
    source = {key: entry[key] for key in ("path", "name", "split", "data_files") if entry.get(key) is not None}
    if ignored := sorted(entry.keys() - read):
        keys[DIFFERS] = [f"{', '.join(ignored)} of a data set is not read."]
    if "differs" in spec:
        keys[DIFFERS] = [*keys.get(DIFFERS, []), spec["differs"]]
    return source | ({"columns": columns} if columns else {}), keys


def axolotl_turns(entry: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the keys that conversations need: the names in them, and which turns are trained."""
    fields = {"role": "role", "content": "content"} if entry["type"] != "sharegpt" else dict(NATURAL[0])
    fields |= entry.get("message_property_mappings") or {}
    fields |= {ours: entry[theirs] for theirs, ours in TURN_FIELDS.items() if theirs in entry}
    others, fields = fields.keys() - {"role", "content"}, {name: fields[name] for name in ("role", "content")}
    roles = {their: ours for ours, theirs in (entry.get("roles") or {}).items() for their in theirs if their != ours}
    known = {"human": "user", "gpt": "assistant", "model": "assistant"}
    roles = {theirs: ours for theirs, ours in roles.items() if known.get(theirs) != ours}
    mapping = {} if fields in NATURAL and not roles else fields | ({"roles": roles} if roles else {})
    keys: dict[str, Any] = {"message_mapping": mapping} if mapping else {}
    trained = entry.get("roles_to_train", ["assistant"])
    said = [f"message_property_mappings: {name} is not read." for name in sorted(others)]
    if settings["task"] == "sft" and set(trained) <= {"assistant", "gpt"}:
        keys["assistant_only_loss"] = True
    elif settings["task"] == "sft" and "all" not in trained:
        said.append(f"roles_to_train: {', '.join(trained)} cannot be chosen; all turns are trained.")
    if entry.get("train_on_eos", "turn") not in ("turn", "last"):
        said.append("train_on_eos: the end of each trained turn is trained.")
    return keys | ({DIFFERS: said} if said else {})


def user_defined(kind: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return what a `type` that names fields and formats says, as an entry of `types` does."""
    if settings["task"] != "sft":
        named = [role for role in ("prompt", "chosen", "rejected") if kind.get(f"field_{role}")]
        columns = {kind[f"field_{role}"]: role for role in named}
        formats = {role: kind.get(f"{role}_format") for role in ("chosen", "rejected")}
        if any(text not in (None, f"{{{role}}}") for role, text in formats.items()) or kind.get("field_system"):
            raise RecipeError("`type` has formats of chosen and rejected, or a system field, which a recipe has not.")
        template = {"prompt_template": kind["prompt_format"]} if kind.get("prompt_format") else {}
        return {"columns": columns, "keys": template | {"apply_chat_template": False}}
    names = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
    columns = {kind[theirs]: ours for theirs, ours in names.items() if kind.get(theirs)}
    text = kind.get("format") or ("{instruction} {input}" if "field_input" in kind else "{instruction}")
    said = [f"{name} of a type is not read." for name in ("no_input_format", "system_format") if kind.get(name)]
    if kind.get("system_prompt"):
        text = f"{kind['system_prompt']}\n{text}"
    keys = {"prompt_template": text, "apply_chat_template": False}
    if kind.get("field_system"):
        keys["system_column"] = kind["field_system"]
    return {"columns": columns, "keys": keys} | ({"differs": " ".join(said)} if said else {})


def axolotl_sources(value: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    found = [axolotl_source(entry, settings) for entry in value]
    said = list(dict.fromkeys(words for _, keys in found for words in keys.pop(DIFFERS, [])))
    keys = common((keys for _, keys in found), "`type`")
    return as_keys([source for source, _ in found]) | keys | ({DIFFERS: said} if said else {})


def axolotl_corpus(value: list[dict[str, Any]] | str, settings: Settings) -> dict[str, Any]:
    sources = []
    for entry in value if isinstance(value, list) else [{"path": value}]:
        source = {key: entry[key] for key in ("path", "name", "split", "data_files") if entry.get(key) is not None}
        text = entry.get("text_column", "text")
        sources.append(source | ({"columns": {text: "text"}} if text != "text" else {}))
    return as_keys(sources) | {"pretraining": True}


def axolotl_evaluation(value: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    [entry] = value
    source, _ = axolotl_source(entry, settings)
    if source.keys() - {"path", "split"}:
        raise ValueError("an evaluation set has a path and a split only")
    return {"eval_dataset_name": source["path"], "dataset_test_split": source.get("split", "train")}


# ---- ms-swift and open-instruct ----


def swift_source(text: str, settings: Settings) -> dict[str, Any]:
    """Return the source of `HF::id:subset#rows`."""
    name, _, rows = text.removeprefix("HF::").removeprefix("MS::").partition("#")
    name, _, subset = (name, "", "") if Path(name).exists() else name.partition(":")
    columns = settings.get("columns") or {}
    columns = json.loads(columns) if isinstance(columns, str) else columns
    parts = {"path": name, "name": subset, "max_samples": int(rows) if rows else None, "columns": columns}
    return {key: part for key, part in parts.items() if part}


def swift_sources(value: object, settings: Settings) -> dict[str, Any]:
    sources = [swift_source(str(text), settings) for text in (value if isinstance(value, list) else [value])]
    if "interleave_prob" in settings and len(sources) > 1:
        chances = settings["interleave_prob"]
        sources = [source | {"probability": float(chance)} for source, chance in zip(sources, chances, strict=True)]
    if "split_dataset_ratio" in settings and len(sources) == 1 and "max_samples" in sources[0]:
        keys: dict[str, Any] = {"datasets": sources}  # its rows are taken before some are held out
    else:
        keys = as_keys(sources)
    pretraining = {"pretraining": True} if settings["command"] == "pt" else {}
    return keys | pretraining


def swift_split(value: float, settings: Settings) -> dict[str, Any]:
    return {"test_split_size": value, "eval_strategy": settings.get("eval_strategy", "steps")}


def swift_evaluation(value: object, settings: Settings) -> dict[str, Any]:
    source = swift_source(str(value), settings)
    if isinstance(value, list) or source.keys() - {"path", "max_samples"}:
        raise ValueError("an evaluation set has a path only")
    rows = {"max_eval_samples": source["max_samples"]} if "max_samples" in source else {}
    keys = {"eval_dataset_name": source["path"], "eval_strategy": settings.get("eval_strategy", "steps")}
    return keys | {"dataset_test_split": "train"} | rows


def open_instruct_sources(value: Mapping[str, float] | list[Any] | str, settings: Settings) -> dict[str, Any]:
    """Convert {path: share or rows}, or the same as a list; a share above 1 takes a data set more than once."""
    if isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        flat = [read_word(part) if isinstance(part, str) else part for part in flatten(value)]
        pairs = list(zip(map(str, flat[::2]), flat[1::2], strict=True))
    splits = flatten(settings.get("dataset_mixer_list_splits") or ["train"])
    splits = splits if len(splits) == len(pairs) else splits[:1] * len(pairs)
    sources: list[dict[str, Any]] = []
    for (path, amount), split in zip(pairs, splits, strict=True):
        whole = {"path": path} | ({"split": split} if split != "train" else {})
        if isinstance(amount, int):
            sources.append(whole | {"max_samples": amount})
        else:
            rest = amount % 1
            sources += [whole] * int(amount)
            sources += [whole | {"split": share_of(split, rest)}] if rest else []
    return as_keys(sources)


def flatten(value: list[Any] | str) -> list[Any]:
    return value.split() if isinstance(value, str) else list(value)


def open_instruct_evaluation(value: list[Any] | str, settings: Settings) -> dict[str, Any]:
    path, _ = flatten(value)
    [split] = flatten(settings.get("dataset_mixer_eval_list_splits") or ["test"])
    keys = {"eval_dataset_name": path, "eval_strategy": "epoch"}
    return keys | ({} if split == "test" else {"dataset_test_split": split})


FUNCTIONS = (
    *(swift_sources, swift_split, swift_evaluation, open_instruct_sources, open_instruct_evaluation),
    *(llamafactory_sources, llamafactory_evaluation),
    *(axolotl_sources, axolotl_corpus, axolotl_evaluation),
)
