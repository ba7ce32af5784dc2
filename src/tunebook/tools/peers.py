"""Data sets of LLaMA-Factory and axolotl as keys of a recipe; see conversions.py, which names these functions.

Their rows are read by the layouts of the data room, so only what a layout does not know by itself becomes a key.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError

Settings = Mapping[str, Any]
INFO = "dataset_info.json"  # and the name of its content among the settings
# LLaMA-Factory's names of columns and tags -> the names by which our layouts and `message_mapping` know them
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
COLUMNS = {"messages": "conversations", "tools": "tools", "chosen": "chosen", "rejected": "rejected"}
TAGS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
# axolotl's `type` of plain columns -> keys of the recipe
TYPES: dict[str, dict[str, Any]] = {
    "alpaca": {},
    "alpaca:chat": {},
    "alpaca:phi": {},
    "alpaca.load_no_prompt": {},
    "chat_template": {},
    "sharegpt": {},
    "chat_template.default": {},
    "chat_template.argilla": {},
    "bradley_terry.chat_template": {"prompt_column": "input", "apply_chat_template": True},
    "jeopardy": {"prompt_column": "question", "completion_column": "answer"},
    "chatml.intel": {"prompt_column": "question", "system_column": "system", "apply_chat_template": True},
    "chatml.prompt_pairs": {"prompt_column": "prompt", "system_column": "system", "apply_chat_template": True},
    "chatml.icr": {"prompt_column": "input", "system_column": "system", "apply_chat_template": True},
    "chatml.ultra": {},
    "chatml.argilla": {
        "prompt_column": "instruction",
        "chosen_column": "chosen_response",
        "rejected_column": "rejected_response",
        "apply_chat_template": True,
    },
}
FIELDS = {"field_messages": "messages_column", "field_chosen": "chosen_column", "field_rejected": "rejected_column"}
READ = {"path", "name", "split", "data_files", "ds_type", "type", "field", "roles", *FIELDS}
READ |= {"message_property_mappings", "message_field_role", "message_field_content", "trust_remote_code"}


def find_info(source: Path, settings: Settings) -> dict[str, Any] | None:
    """Return LLaMA-Factory's list of data sets, which is sought from the settings' file upwards; None if there is
    none."""
    folder = str(settings.get("dataset_dir", "data"))
    for above in (Path(), *source.absolute().parents):
        if (path := above / folder / INFO).is_file():
            try:
                info = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise RecipeError(f"{path} is not JSON: {error}") from error
            return {name: entry | {"folder_of_info": str(path.parent)} for name, entry in info.items()}
    return None


def llamafactory_source(name: str, info: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the source of a data set by its name, and the keys that hold for all of the recipe's rows."""
    if info is None:  # the name stays, which the recipe's list of what is to do says
        return {"path": name}, {}
    entry = info[name]
    source: dict[str, Any] = {}
    if "hf_hub_url" in entry:
        source["path"] = entry["hf_hub_url"]
    else:
        source["path"] = str(Path(entry["folder_of_info"], entry["file_name"]))
    ours = {"subset": "name", "split": "split", "folder": "data_dir", "num_samples": "max_samples"}
    source |= {ours[key]: entry[key] for key in ours if key in entry}
    known = {**COLUMNS, **(ALPACA if entry.get("formatting", "alpaca") == "alpaca" else {"system": "system"})}
    renamed = {theirs: known[key] for key, theirs in entry.get("columns", {}).items() if known[key] != theirs}
    tags = entry.get("tags", {})
    if renamed.get("messages") == "conversations" and tags.get("role_tag") == "role":
        del renamed["messages"]  # OpenAI's layout
    if renamed:
        source["columns"] = renamed
    mapping = {"role": tags.get("role_tag", "from"), "content": tags.get("content_tag", "value")}
    roles = {tags[tag]: ours for tag, ours in TAGS.items() if tags.get(tag, ours) != ours}
    usual = mapping in ({"role": "from", "content": "value"}, {"role": "role", "content": "content"})
    keys = {} if usual and not roles else {"message_mapping": mapping | ({"roles": roles} if roles else {})}
    return source, keys


def llamafactory_sources(value: object, settings: Settings) -> dict[str, Any]:
    names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
    found = [llamafactory_source(name, settings.get(INFO)) for name in names]
    sources, rows = [source for source, _ in found], settings.get("max_samples")
    keys = found[0][1]
    if any(other != keys for _, other in found):
        raise ValueError("The data sets have different tags.")
    if rows is not None and len(sources) == 1:
        keys = keys | {"max_train_samples": rows}
    elif rows is not None:
        sources = [{"max_samples": rows} | source for source in sources]
    if len(sources) == 1 and set(sources[0]) <= {"path", "name", "split"}:
        ours = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
        return {ours[key]: part for key, part in sources[0].items()} | keys
    shares = [float(share) for share in str(settings.get("interleave_probs", "")).split(",") if share]
    if str(settings.get("mix_strategy", "concat")).startswith("interleave") and len(shares) == len(sources):
        stop = "all_exhausted" if settings["mix_strategy"] == "interleave_over" else "first_exhausted"
        sources = [source | {"probability": share} for source, share in zip(sources, shares, strict=True)]
        keys = keys | {"mixture_stopping": stop}
    return {"datasets": sources} | keys


def llamafactory_evaluation(value: object, settings: Settings) -> dict[str, Any]:
    source, _ = llamafactory_source(str(value).strip(), settings.get(INFO))
    if set(source) - {"path"}:
        raise ValueError("An evaluation set is a path.")
    return {"eval_dataset_name": source["path"], "eval_strategy": settings.get("eval_strategy", "steps")}


def llamafactory_rank(value: int, settings: Settings) -> dict[str, Any]:
    return {"lora_r": value, "lora_alpha": settings.get("lora_alpha", 2 * value)}


def split_list(value: object) -> list[str]:
    """Return the words of `a,b`."""
    return value if isinstance(value, list) else [word.strip() for word in str(value).split(",")]


def llamafactory_targets(value: object, settings: Settings) -> dict[str, Any]:
    words = split_list(value)
    return {"lora_target_modules": ["all-linear"] if words == ["all"] else words}


def llamafactory_head(value: object, settings: Settings) -> dict[str, Any]:
    return {"lora_modules_to_save": split_list(value)}


def llamafactory_tokens(value: object, settings: Settings) -> dict[str, Any]:
    return {"new_tokens": split_list(value)}


def llamafactory_adapter(value: object, settings: Settings) -> dict[str, Any]:
    [name] = split_list(value)
    return {"adapter_name_or_path": name}


def axolotl_source(entry: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the source of one of axolotl's data sets, and the keys that hold for all of the recipe's rows."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        keys = user_defined(kind)
    elif kind == "completion":
        keys = {"text_column": entry.get("field", "text")}
    else:
        keys = {} if kind is None else dict(TYPES[str(kind).replace("llama3.", "chatml.")])
    if unknown := set(entry) - READ:
        raise ValueError(f"{', '.join(sorted(unknown))} of a data set is not read.")
    source = {key: entry[key] for key in ("path", "name", "split", "data_files") if entry.get(key) is not None}
    keys |= {ours: entry[theirs] for theirs, ours in FIELDS.items() if theirs in entry}
    if "chosen_column" in keys and "messages_column" in keys:
        keys["prompt_column"] = keys.pop("messages_column")
    if keys.get("messages_column") in ("messages", "conversations"):
        del keys["messages_column"]
    mapping = dict(entry.get("message_property_mappings", {}))
    mapping |= {key: entry[f"message_field_{key}"] for key in ("role", "content") if f"message_field_{key}" in entry}
    roles = {theirs: ours for ours, names in (entry.get("roles") or {}).items() for theirs in names if theirs != ours}
    mapping = {key: name for key, name in mapping.items() if key in ("role", "content")}
    if mapping not in ({}, {"role": "from", "content": "value"}, {"role": "role", "content": "content"}) or roles:
        keys["message_mapping"] = {"role": "role", "content": "content"} | mapping | ({"roles": roles} if roles else {})
    return source, keys


def user_defined(kind: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a `type` that names the fields of an instruction, with the text around them."""
    if unknown := set(kind) - {"field_instruction", "field_output", "field_system", "format", "field_input"}:
        raise ValueError(f"{', '.join(sorted(unknown))} of a type is not read.")
    question, more = kind["field_instruction"], kind.get("field_input")
    text = str(kind.get("format", "{instruction}\n{input}" if more else "{instruction}"))
    keys = {"prompt_template": text.replace("{instruction}", f"{{{question}}}").replace("{input}", f"{{{more}}}")}
    if text == "{instruction}":
        keys = {"prompt_column": question}
    return (
        keys
        | {"completion_column": kind["field_output"]}
        | ({"system_column": kind["field_system"]} if kind.get("field_system") else {})
    )


def axolotl_sources(value: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    found = [axolotl_source(entry) for entry in value]
    if any(keys != found[0][1] for _, keys in found):
        raise ValueError("The data sets have different types.")
    sources, keys = [source for source, _ in found], found[0][1]
    if len(sources) == 1 and "data_files" not in sources[0]:
        ours = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
        return {ours[key]: part for key, part in sources[0].items()} | keys
    return {"datasets": sources} | keys


def evaluations(settings: Settings) -> dict[str, Any]:
    """Return when axolotl evaluates: each epoch, unless it says how often."""
    if (number := settings.get("evals_per_epoch")) is not None:
        if not number:
            return {}
        return {"eval_strategy": "epoch"} if number == 1 else steps_of_run("eval", number, settings)
    if (steps := settings.get("eval_steps")) is not None:
        return {"eval_strategy": "steps", "eval_steps": steps}
    return {"eval_strategy": settings.get("eval_strategy", settings.get("evaluation_strategy", "epoch"))}


def steps_of_run(what: str, number: float, settings: Settings) -> dict[str, Any]:
    """Return how often an event comes, from its number per epoch: after a share of all steps."""
    share = 1 / (float(number) * float(settings["num_epochs"]))
    if settings.get("max_steps") or share >= 1:
        return {f"{what}_strategy": "epoch"}
    return {f"{what}_strategy": "steps", f"{what}_steps": round(share, 6)}


def axolotl_split(value: float, settings: Settings) -> dict[str, Any] | None:
    when = evaluations(settings)
    return {"test_split_size": value} | when if value and when else None


def axolotl_evaluation(value: list[dict[str, Any]], settings: Settings) -> dict[str, Any] | None:
    [entry] = value
    if set(entry) - {"path", "type", "split"} or entry.get("split", "train") != "train":
        raise ValueError("An evaluation set is a path.")
    when = evaluations(settings)
    return {"eval_dataset_name": entry["path"]} | when if when else None


def axolotl_tokens(value: Mapping[str, str], settings: Settings) -> dict[str, Any] | None:
    if value.get("eos_token"):
        return {"eos_token": value["eos_token"]}
    if set(value) - {"eos_token", "pad_token"}:
        raise ValueError("They cannot be set.")
    return None


def axolotl_plugins(value: list[str], settings: Settings) -> dict[str, Any] | None:
    names = {name.rpartition(".")[2] for name in value}
    if names - {"LigerPlugin", "CutCrossEntropyPlugin"}:
        raise ValueError("There are no plugins.")
    return {"use_liger_kernel": True} if "LigerPlugin" in names else None


def axolotl_saves(value: float, settings: Settings) -> dict[str, Any]:
    if not value:
        return {"save_strategy": "no"}
    return {"save_strategy": "epoch"} if value == 1 else steps_of_run("save", value, settings)


def swift_source(text: str) -> dict[str, Any]:
    """Return the source of `id:subset#rows`."""
    name, _, rows = text.partition("#")
    name, _, subset = name.partition(":") if not Path(name).exists() else (name, "", "")
    return {"path": name} | ({"name": subset} if subset else {}) | ({"max_samples": int(rows)} if rows else {})


def swift_sources(value: object, settings: Settings) -> dict[str, Any]:
    sources = [swift_source(str(text)) for text in (value if isinstance(value, list) else [value])]
    if len(sources) > 1:
        return {"datasets": sources}
    ours = {"path": "dataset_name", "name": "dataset_config", "max_samples": "max_train_samples"}
    return {ours[key]: part for key, part in sources[0].items()}


def swift_evaluation(value: object, settings: Settings) -> dict[str, Any]:
    source = swift_source(str(value))
    if isinstance(value, list) or set(source) - {"path"}:
        raise ValueError("An evaluation set is a path.")
    return {"eval_dataset_name": source["path"], "eval_strategy": settings.get("eval_strategy", "steps")}


def word_list(value: object, settings: Settings) -> dict[str, Any]:
    return {"lora_target_modules": value if isinstance(value, list) else [value]}


def json_value(value: object, settings: Settings) -> dict[str, Any]:
    return {"activation_checkpointing_kwargs": json.loads(value) if isinstance(value, str) else value}


def open_instruct_mixer(value: Mapping[str, float], settings: Settings) -> dict[str, Any]:
    """Convert shares and numbers of rows."""
    sources: list[dict[str, Any]] = []
    for name, amount in value.items():
        amount = float(amount)
        if amount > 1 and amount % 1:
            raise ValueError("Rows cannot be repeated.")
        sources.append({"path": name} | ({"max_samples": int(amount)} if amount > 1 else {}))
        if 0 < amount < 1:
            sources[-1]["split"] = f"train[:{round(100 * amount) or 1}%]"
    return {"dataset_name": sources[0]["path"]} if len(sources) == 1 and len(sources[0]) == 1 else {"datasets": sources}


def open_instruct_list(value: object, settings: Settings) -> dict[str, Any]:
    words = value if isinstance(value, list) else str(value).split()
    amounts = {str(name): float(amount) for name, amount in zip(words[::2], words[1::2], strict=True)}
    return open_instruct_mixer(amounts, settings)


FUNCTIONS = (
    *(llamafactory_sources, llamafactory_evaluation, llamafactory_rank, llamafactory_targets, llamafactory_head),
    *(llamafactory_tokens, llamafactory_adapter, axolotl_sources, axolotl_evaluation, axolotl_tokens),
    *(axolotl_split, axolotl_plugins, axolotl_saves, swift_sources, swift_evaluation),
    *(word_list, json_value, open_instruct_mixer, open_instruct_list),
)
