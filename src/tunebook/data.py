"""Rows become TRL's processed columns here, once: loaded, mapped, rendered, tokenized in batches, masked, cut, counted.

SFT: `input_ids`, `labels`; reward models: `chosen_ids`, `rejected_ids` (`margin`, `subset`); DPO: `prompt_ids`,
`chosen_ids`, `rejected_ids`. The trainers take such a data set as it is. Every row has an outcome: kept, cut, or the
reason why it was dropped; the counts go to the log and to data_report.json.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import extract_prompt

from .configs import DatasetConfig
from .models import set_chatml
from .recipe import RecipeError

logger = logging.getLogger(__name__)

FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "arrow": "arrow"}
COMPRESSIONS = {"gz", "bz2", "xz", "zst"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}
KEPT, CUT = "kept", "cut"

Messages = list[dict[str, Any]]


class Dropped(Exception):
    """A row that cannot be trained on; the message is the reason."""


# ---- Loading -------------------------------------------------------------------------------------------------------


def load_source(
    path: str, split: str, name: str | None = None, data_dir: str | None = None, data_files=None
) -> Dataset:
    """Rows of one split of a Hub data set, a local file, a folder of files, or a folder of `save_to_disk`.

    Raises:
        RecipeError: when it does not exist, cannot be reached or read (with file and line for JSON lines), has no rows,
            or has no such split.
    """
    location = Path(path).expanduser()
    try:
        if location.is_file():
            kind, options = file_format(location), {}
            if location.stat().st_size == 0:
                raise RecipeError(f"{path} is empty.")
            if kind == "csv":  # all columns are text, or one of answers such as 42 would become numbers
                options = {"sep": "\t" if ".tsv" in location.name else ",", "keep_default_na": False}
                columns = pd.read_csv(location, sep=options["sep"], nrows=0).columns
                options["features"] = Features({name: Value("string") for name in columns})
            dataset = datasets.load_dataset(kind, data_files=str(location), split=split, **options)
        elif location.is_dir() and any((location / f).is_file() for f in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(str(location))
            if isinstance(dataset, DatasetDict):
                if split not in dataset:
                    raise RecipeError(f"{path} has no split {split!r}. It has: {', '.join(dataset)}.")
                dataset = dataset[split]
        elif location.is_dir() or looks_like_hub_id(path):
            dataset = datasets.load_dataset(
                str(location) if location.is_dir() else path,
                name,
                data_dir=data_dir,
                data_files=data_files,
                split=split,
            )
        else:
            raise RecipeError(f"{path}: no such file or folder, and not a Hub id (owner/name).")
    except RecipeError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        broken = broken_json_line(location)
        raise RecipeError(broken or f"{path} cannot be loaded: {error}") from error
    if len(dataset) == 0:
        raise RecipeError(f"{path} has no rows in split {split!r}.")
    return dataset


def looks_like_hub_id(path: str) -> bool:
    return (
        not path.startswith((".", "/", "~")) and path.count("/") <= 1 and Path(path).suffix.lstrip(".") not in FORMATS
    )


def file_format(path: Path) -> str:
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in FORMATS:
        raise RecipeError(
            f"{path}: unknown kind of file. Known: {', '.join(FORMATS)} (also as {'/'.join(COMPRESSIONS)})."
        )
    return FORMATS[suffixes[-1]]


def broken_json_line(path: Path) -> str | None:
    """Which line of a JSON lines file is not JSON, if any: the readers name a position in a block of rows only."""
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    json.loads(line)
            except json.JSONDecodeError as error:
                return f"{path}, line {number}: not JSON ({error.msg}): {line.strip()[:80]}"
    return None


def load_evaluation(path: str, split: str) -> Dataset:
    """As [`load_source`]; a data set with one split is taken whatever the split is called, since it was named for this."""
    try:
        return load_source(path, split)
    except RecipeError as error:
        if "split" not in str(error):
            raise
        return load_source(path, "train")


# ---- Rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendering:
    """How rows become text and tokens: everything the token cache depends on, beside the rows."""

    task: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    columns: Mapping[str, str | None]  # prompt, completion, messages, text, chosen, rejected, margin, subset
    prompt_template: str | None = None
    system_prompt: str | None = None
    apply_chat_template: bool | None = None
    assistant_only_loss: bool = False
    last_turn_only_loss: bool = False
    completion_only_loss: bool | None = None
    pretraining: bool = False

    def fingerprint(self, dataset: Dataset) -> str:
        keys = {name: value for name, value in vars(self).items() if name != "tokenizer"}
        tokenizer = (self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.tokenizer.eos_token)
        return Hasher.hash((dataset._fingerprint, keys, tokenizer, Path(__file__).read_bytes()))

    def features(self) -> Features:
        extra = {"margin": Value("float32"), "subset": Value("string")}
        return Features(
            {name: List(Value("int32")) for name in TOKEN_COLUMNS[self.task]}
            | {"outcome": Value("string")}
            | {name: feature for name, feature in extra.items() if self.columns.get(name)}
        )


def choose_columns(task: str, names: Sequence[str], keys: Mapping[str, str | None]) -> dict[str, str | None]:
    """Role -> column name, from the recipe's keys and, where they are silent, TRL's names.

    Raises:
        RecipeError: when a named column does not exist, none of the known layouts is there, or two are.
    """
    for role, column in keys.items():
        if column is not None and column not in names:
            raise RecipeError(f"`{role}_column`: there is no column {column!r}. Columns: {', '.join(names)}.")

    def find(role: str, *usual: str) -> str | None:
        return keys.get(role) or next((name for name in usual if name in names), None)

    if task != "sft":
        columns = {"chosen": find("chosen", "chosen"), "rejected": find("rejected", "rejected")}
        if None in columns.values():
            raise RecipeError(
                f"A preference row needs chosen and rejected; columns: {', '.join(names)}. Set chosen_column and "
                "rejected_column."
            )
        columns["prompt"] = find("prompt", "prompt")
        if keys.get("subset"):
            columns["subset"] = keys["subset"]
        if "margin" in keys:
            columns["margin"] = find("margin", "margin")
            if columns["margin"] is None:
                raise RecipeError(
                    f"`use_margin` needs a column margin; columns: {', '.join(names)}. Set margin_column."
                )
        return columns

    layouts = {
        "messages": {"messages": find("messages", "messages", "conversations")},
        "prompt and completion": {"prompt": find("prompt", "prompt"), "completion": find("completion", "completion")},
        "text": {"text": find("text", "text")},
    }
    named = {role for role, column in keys.items() if column is not None}
    found = {name: columns for name, columns in layouts.items() if None not in columns.values()}
    if named:
        found = {name: columns for name, columns in found.items() if named <= columns.keys()}
    if len(found) != 1:
        problem = f"fits {' and '.join(found)}" if found else "has none of messages, prompt and completion, text"
        raise RecipeError(
            f"The data set {problem}; columns: {', '.join(names)}. Set messages_column, prompt_column and "
            "completion_column, or text_column."
        )
    return next(iter(found.values()))


def read_messages(value: Any, role: str) -> Messages:
    """A conversation from messages, ShareGPT turns or a plain text said by `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = []
    for turn in value:
        if not isinstance(turn, dict):
            raise Dropped(f"a turn is {type(turn).__name__}, not a mapping with role and content")
        if "from" in turn:
            turn = {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        turn = {name: value for name, value in turn.items() if value is not None}
        if "role" not in turn:
            raise Dropped("a turn has no role")
        messages.append(turn)
    if not messages:
        raise Dropped("empty conversation")
    return messages


def read_field(row: Mapping[str, Any], column: str, types: tuple[type, ...] = (str, list)) -> Any:
    value = row[column]
    if value is None:
        raise Dropped(f"missing {column}")
    if not isinstance(value, types):
        raise Dropped(f"{column} is {type(value).__name__}, not {' or '.join(t.__name__ for t in types)}")
    return value


@dataclass
class Text:
    """A row's text, and the parts of it (in characters) that are trained on; None: all of it."""

    text: str
    spans: list[tuple[int, int]] | None = None
    templated: bool = False


class Renderer:
    """Rows of text or messages to [`Text`], by one recipe's keys."""

    def __init__(self, how: Rendering):
        self.how = how
        self.training_template = None
        if how.assistant_only_loss and how.tokenizer.chat_template is not None:
            self.training_template = training_template(how.tokenizer)

    def is_templated(self, *parts: Any) -> bool:
        if any(isinstance(part, list) for part in parts):
            if self.how.apply_chat_template is False:
                raise Dropped("messages need a chat template, but apply_chat_template is false")
            return True
        return bool(self.how.apply_chat_template)

    def add_system(self, messages: Messages) -> Messages:
        if self.how.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.how.system_prompt}, *messages]

    def template(self, messages: Messages, row: Mapping[str, Any], generation: bool = False) -> str:
        tools = row.get("tools")
        try:
            return self.how.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                **(row.get("chat_template_kwargs") or {}),
            )
        except TemplateError as error:
            raise Dropped(f"the chat template rejects it: {error}") from error

    def prompt_text(self, prompt: str) -> str:
        return prompt if self.how.prompt_template is None else self.how.prompt_template.replace("{}", prompt)

    def end(self, text: str) -> str:
        eos = self.how.tokenizer.eos_token
        return text if text.endswith(eos) else text + eos

    def prompted(self, prompt: Any, answers: Sequence[Any], row: Mapping[str, Any]) -> tuple[list[Text], bool]:
        """Prompt + answer for each answer, trained on what follows the prompt."""
        if any(len(answer) == 0 for answer in answers):
            raise Dropped("empty answer")
        if self.is_templated(prompt, *answers):
            prompt = self.prompt_text(prompt) if isinstance(prompt, str) else prompt
            before = self.add_system(read_messages(prompt, "user")) if prompt else []
            texts = [self.template(before + read_messages(answer, "assistant"), row) for answer in answers]
            start = self.template(before, row, generation=True) if before else ""
        else:
            start = self.prompt_text(prompt)
            texts = [self.end(start + answer) for answer in answers]
        templated = self.is_templated(prompt, *answers)
        # A template may render the prompt alone otherwise than inside the conversation: the answer starts where they part
        starts = [len(os.path.commonprefix([start, text])) for text in texts]
        return [Text(text, [(cut, len(text))], templated) for cut, text in zip(starts, texts, strict=True)]

    def sft(self, row: Mapping[str, Any]) -> Text:
        columns = self.how.columns
        if "text" in columns:
            text = read_field(row, columns["text"], (str,))
            if not text:
                raise Dropped("empty text")
            return Text(text if self.how.pretraining else self.end(text))
        if "messages" in columns:
            messages = self.add_system(read_messages(read_field(row, columns["messages"], (list,)), "user"))
            if not self.how.last_turn_only_loss:
                if self.how.apply_chat_template is False:
                    raise Dropped("messages need a chat template, but apply_chat_template is false")
                text, spans = self.assistant_turns(messages, row)
                return Text(text, spans if self.how.assistant_only_loss else None, templated=True)
            prompt, completion = messages[:-1], messages[-1:]
            if completion[0]["role"] != "assistant":
                raise Dropped("the last turn is not the assistant's")
        else:
            prompt = read_field(row, columns["prompt"])
            completion = read_field(row, columns["completion"])
        [text] = self.prompted(prompt, [completion], row)
        if self.how.completion_only_loss is False and "messages" not in columns:
            text.spans = None
        return text

    def assistant_turns(self, messages: Messages, row: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """A whole conversation, and where the assistant speaks in it, end of turn included."""
        if not self.how.assistant_only_loss:
            return self.template(messages, row), []
        if self.training_template is not None:
            texts, spans = self.marked(messages, row)
        else:
            texts, spans = self.turn_by_turn(messages, row)
        if not spans:
            raise Dropped("no assistant turn")
        return texts, spans

    def marked(self, messages: Messages, row: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """By the template's own {% generation %} marks."""
        tools = row.get("tools")
        try:
            [text], [spans] = render_jinja_template(
                conversations=[messages],
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                chat_template=self.training_template,
                return_assistant_tokens_mask=True,
                **{**self.how.tokenizer.special_tokens_map, **(row.get("chat_template_kwargs") or {})},
            )
        except TemplateError as error:
            raise Dropped(f"the chat template rejects it: {error}") from error
        return text, [tuple(span) for span in spans]

    def turn_by_turn(self, messages: Messages, row: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """By rendering the conversation up to each assistant turn, and through it. Refused where the template renders
        the beginning of a conversation otherwise than inside the whole, since then no turn has a certain place."""
        text = self.template(messages, row)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.template(messages[:i], row, generation=True) if i else ""
                through = self.template(messages[: i + 1], row)
                if not text.startswith(before) or not text.startswith(through):
                    raise Dropped(
                        "the chat template renders a turn differently inside a longer conversation, so assistant turns "
                        "cannot be told apart: use last_turn_only_loss, or a template with {% generation %} marks"
                    )
                spans.append((len(before), len(through)))
        return text, spans

    def pair(self, row: Mapping[str, Any]) -> list[Text]:
        """Chosen and rejected, each with its prompt; trained from where the prompt ends."""
        columns = self.how.columns
        chosen, rejected = read_field(row, columns["chosen"]), read_field(row, columns["rejected"])
        prompt = read_field(row, columns["prompt"]) if columns["prompt"] else None
        if type(chosen) is not type(rejected):
            raise Dropped("chosen and rejected are of different kinds")
        if chosen == rejected:
            raise Dropped("chosen equals rejected")
        if isinstance(chosen, list):
            chosen, rejected = read_messages(chosen, "assistant"), read_messages(rejected, "assistant")
            # Some data sets repeat the prompt inside both sides, beside a prompt column of text
            whole = chosen[0]["role"] != "assistant"
            prompt = None if whole else prompt
        if prompt is None:
            split = extract_prompt({"chosen": chosen, "rejected": rejected})
            prompt, chosen, rejected = split["prompt"], split["chosen"], split["rejected"]
        return self.prompted(prompt, [chosen, rejected], row)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template with {% generation %} marks: the tokenizer's own, or TRL's version of it; None where TRL has none."""
    if has_generation_markers(tokenizer.chat_template):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


# ---- Tokens --------------------------------------------------------------------------------------------------------


def tokenize(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """`(ids, spans in tokens)` of each text. A token that lies across the border of a span belongs to it."""
    result: list[Any] = [None] * len(texts)
    for templated in (True, False):  # a template writes the special tokens itself
        chosen = [i for i, text in enumerate(texts) if text.templated is templated]
        if not chosen:
            continue
        batch = tokenizer(
            [texts[i].text for i in chosen], add_special_tokens=not templated, return_attention_mask=False
        )
        for row, (i, ids) in enumerate(zip(chosen, batch["input_ids"], strict=True)):

            def token_at(char: int, row=row, text=texts[i].text, length=len(ids)) -> int:
                # Characters that the tokenizer drops have no token: the next one that has
                for position in range(char, len(text)):
                    token = batch.char_to_token(row, position)
                    if token is not None:
                        return token
                return length

            spans = texts[i].spans
            result[i] = (
                ids,
                [(0, len(ids))]
                if spans is None
                else [
                    (token_at(start), token_at(end - 1) + 1 if end < len(texts[i].text) else len(ids))
                    for start, end in spans
                ],
            )
    return result


def finish_sft(rows: Iterable[Any], how: Rendering) -> Iterable[dict[str, Any]]:
    for ids, spans in rows:
        labels = [-100] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        outcome = KEPT
        if how.max_length is not None and len(ids) > how.max_length:
            ids, labels, outcome = ids[: how.max_length], labels[: how.max_length], CUT
        if labels.count(-100) == len(labels):
            outcome = f"nothing to train on{' within max_length' if outcome == CUT else ''}"
        yield {"input_ids": ids, "labels": labels, "outcome": outcome}


def finish_rm(rows: Iterable[Any], how: Rendering) -> Iterable[dict[str, Any]]:
    for (chosen, _), (rejected, _) in rows:
        outcome = KEPT
        if chosen == rejected:
            outcome = "chosen equals rejected"
        elif how.max_length is not None and max(len(chosen), len(rejected)) > how.max_length:
            outcome = "longer than max_length"
        yield {"chosen_ids": chosen, "rejected_ids": rejected, "outcome": outcome}


def finish_dpo(rows: Iterable[Any], how: Rendering) -> Iterable[dict[str, Any]]:
    for (chosen, [(chosen_start, _)]), (rejected, [(rejected_start, _)]) in rows:
        prompt = min(chosen_start, rejected_start)
        while chosen[:prompt] != rejected[:prompt]:
            prompt -= 1
        outcome = KEPT
        if how.max_length is not None and max(len(chosen), len(rejected)) > how.max_length:
            chosen, rejected, outcome = chosen[: how.max_length], rejected[: how.max_length], CUT
        if min(len(chosen), len(rejected)) <= prompt:
            outcome = "the prompt fills max_length" if outcome == CUT else "empty answer"
        elif chosen == rejected:
            outcome = "chosen equals rejected" + (" within max_length" if outcome == CUT else "")
        yield {
            "prompt_ids": chosen[:prompt],
            "chosen_ids": chosen[prompt:],
            "rejected_ids": rejected[prompt:],
            "outcome": outcome,
        }


FINISH = {"sft": finish_sft, "rm": finish_rm, "dpo": finish_dpo}
TOKEN_COLUMNS = {
    "sft": ["input_ids", "labels"],
    "rm": ["chosen_ids", "rejected_ids"],
    "dpo": ["prompt_ids", "chosen_ids", "rejected_ids"],
}


def process_batch(batch: Mapping[str, list[Any]], how: Rendering) -> dict[str, list[Any]]:
    """Columns of raw rows to columns of tokens, an outcome for each row, none left out (a dropped row is empty)."""
    renderer = Renderer(how)
    count = len(next(iter(batch.values())))
    rows = [{name: values[i] for name, values in batch.items()} for i in range(count)]
    rendered: list[Any] = []
    for row in rows:
        try:
            rendered.append([renderer.sft(row)] if how.task == "sft" else renderer.pair(row))
        except Dropped as reason:
            rendered.append(str(reason))
    tokens = iter(tokenize([text for texts in rendered if isinstance(texts, list) for text in texts], how.tokenizer))
    kept = [[next(tokens) for _ in texts] for texts in rendered if isinstance(texts, list)]
    finished = iter(FINISH[how.task]((row[0] for row in kept) if how.task == "sft" else kept, how))
    empty = {name: [] for name in TOKEN_COLUMNS[how.task]}
    result = [next(finished) if isinstance(texts, list) else {**empty, "outcome": texts} for texts in rendered]
    for row, out in zip(rows, result, strict=True):
        if how.columns.get("margin"):
            out["margin"] = read_margin(row[how.columns["margin"]], out)
        if how.columns.get("subset"):
            out["subset"] = str(row[how.columns["subset"]])
    return {name: [out[name] for out in result] for name in result[0]}


def read_margin(value: Any, out: dict[str, Any]) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        out["outcome"] = "margin is not a number"
        return 0.0


@dataclass
class Report:
    """What became of the rows of one split. `dropped`: reason -> rows, and the first of them (counted from 0)."""

    read: int = 0
    kept: int = 0
    cut: int = 0
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, outcomes: pa.StringArray) -> "Report":
        counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(outcomes).to_pylist()}
        dropped = {
            reason: {"rows": rows, "first_row": pc.index(outcomes, reason).as_py()}
            for reason, rows in counts.items()
            if reason not in (KEPT, CUT)
        }
        return cls(len(outcomes), counts.get(KEPT, 0) + counts.get(CUT, 0), counts.get(CUT, 0), dropped)

    def __add__(self, other: "Report") -> "Report":
        dropped = {reason: dict(entry) for reason, entry in self.dropped.items()}
        for reason, entry in other.dropped.items():
            seen = dropped.setdefault(reason, {"rows": 0, "first_row": entry["first_row"]})
            seen["rows"] += entry["rows"]
        return Report(self.read + other.read, self.kept + other.kept, self.cut + other.cut, dropped)

    def __str__(self) -> str:
        reasons = "".join(
            f"; {entry['rows']:,} dropped: {reason} (first: row {entry['first_row']:,})"
            for reason, entry in self.dropped.items()
        )
        return f"{self.kept:,} of {self.read:,} rows kept, {self.cut:,} of them cut{reasons}"


def process(dataset: Dataset, how: Rendering, num_proc: int | None = None, name: str = "") -> tuple[Dataset, Report]:
    """Tokenize a data set in batches, from the cache where the same rows were tokenized in the same way before.

    All ranks share the cache: rank 0 writes it, the others read it.

    Raises:
        RecipeError: when no row is left.
    """
    fingerprint = how.fingerprint(dataset)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tunebook"
    folder.mkdir(parents=True, exist_ok=True)
    with PartialState().main_process_first():
        tokens = dataset.map(
            process_batch,
            batched=True,
            fn_kwargs={"how": how},
            remove_columns=dataset.column_names,
            features=how.features(),
            num_proc=num_proc,
            new_fingerprint=fingerprint,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            load_from_cache_file=True,
            desc=f"Tokenizing {name}",
        )
    outcomes = tokens.data.column("outcome").combine_chunks()
    report = Report.of(outcomes)
    logger.log(logging.WARNING if report.dropped else logging.INFO, "%s: %s", name, report)
    if not report.kept:
        raise RecipeError(f"No row of {name} can be trained on: {report}.")
    if report.dropped:
        tokens = tokens.select(
            np.flatnonzero(pc.is_in(outcomes, pa.array([KEPT, CUT])).to_numpy(zero_copy_only=False))
        )
    return tokens.remove_columns("outcome"), report


# ---- The whole data set of a run -----------------------------------------------------------------------------------


@dataclass
class Data:
    train: Dataset
    eval: Dataset | None
    reports: dict[str, Report]
    raw_eval: Dataset | None = None

    def write_report(self, path: Path) -> None:
        path.write_text(json.dumps({split: vars(report) for split, report in self.reports.items()}, indent=2) + "\n")


def load_data(task: str, script_args, training_args, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Training and evaluation rows of a recipe, tokenized.

    Evaluation rows come from eval_dataset_name, else from test_split_size of the training rows, else from
    dataset_test_split of the same data set; there are none where the recipe does not evaluate. In a mixture each
    source is split before it is mixed, so that a row that is drawn twice is never on both sides.

    Raises:
        RecipeError: for a source, split, column or row layout that does not fit; see [`load_source`],
            [`choose_columns`] and [`process`].
    """
    recipe = {**vars(script_args), **vars(training_args)}
    roles = {
        "sft": ("text",) if recipe.get("pretraining") else ("prompt", "completion", "messages", "text"),
        "rm": ("prompt", "chosen", "rejected", "subset", *(["margin"] if recipe.get("use_margin") else [])),
        "dpo": ("prompt", "chosen", "rejected"),
    }[task]
    keys = {role: recipe[f"{role}_column"] for role in roles if recipe.get(f"{role}_column") or role != "subset"}
    splits_long_rows = recipe.get("packing") and recipe.get("packing_strategy") in ("bfd_split", "wrapped")
    seed, reports = training_args.seed, {"train": Report(), "eval": Report()}

    def tokens_of(dataset: Dataset, name: str, split: str) -> Dataset:
        columns = choose_columns(task, dataset.column_names, keys)
        if tokenizer.chat_template is None and (recipe["apply_chat_template"] or has_messages(dataset, columns)):
            set_chatml(tokenizer)
        if task == "rm" and not recipe["use_margin"] and "margin" in dataset.column_names:
            logger.warning("%s has a column margin that is not used. Set use_margin: true to use it.", name)
        how = Rendering(
            task=task,
            tokenizer=tokenizer,
            max_length=None if splits_long_rows else training_args.max_length,
            columns=columns,
            **{f.name: recipe[f.name] for f in fields(Rendering) if f.name in recipe and f.name != "max_length"},
        )
        tokens, report = process(dataset, how, training_args.dataset_num_proc, f"{name} ({split})")
        reports[split] += report
        return tokens

    sources = script_args.datasets or [
        DatasetConfig(
            path=script_args.dataset_name,
            name=script_args.dataset_config,
            split=script_args.dataset_train_split,
            max_samples=script_args.max_train_samples if script_args.test_split_size is None else None,
        )
    ]
    trains, held_out = [], []
    for source in sources:
        rows = load_source(source.path, source.split, source.name, source.data_dir, source.data_files)
        rows = first(select_columns(rows, source.columns, source.path), source.max_samples)
        if script_args.test_split_size is not None and training_args.do_eval:
            parts = split_rows(rows, script_args.test_split_size, seed, source.path)
            rows = parts["train"]
            held_out.append(tokens_of(parts["test"], source.path, "eval"))
        trains.append(tokens_of(rows, source.path, "train"))
    train = first(mix(trains, sources, script_args.mixture_stopping, seed), script_args.max_train_samples)
    if "subset" in train.column_names:
        train = train.remove_columns("subset")

    evaluation = raw = None
    if training_args.do_eval:
        if held_out:
            evaluation = datasets.concatenate_datasets(held_out)
        elif name := script_args.eval_dataset_name or script_args.dataset_name:
            split = script_args.dataset_test_split
            if script_args.eval_dataset_name:
                raw = load_evaluation(name, split)
            else:
                raw = load_source(name, split, script_args.dataset_config)
            raw = first(raw, script_args.max_eval_samples)
            evaluation = tokens_of(raw, name, "eval")
        else:
            raise RecipeError("To evaluate a mixture, set eval_dataset_name or test_split_size.")
        evaluation = first(evaluation, script_args.max_eval_samples)
        if "subset" in evaluation.column_names:
            evaluation = evaluation.class_encode_column("subset")
    return Data(train, evaluation, {split: report for split, report in reports.items() if report.read}, raw)


def has_messages(dataset: Dataset, columns: Mapping[str, str | None]) -> bool:
    return any(isinstance(dataset[0][name], list) for name in columns.values() if name is not None)


def first(dataset: Dataset, count: int | None) -> Dataset:
    return dataset if count is None or count >= len(dataset) else dataset.select(range(count))


def select_columns(dataset: Dataset, columns: list[str] | dict[str, str] | None, path: str) -> Dataset:
    missing = [name for name in columns or [] if name not in dataset.column_names]
    if missing:
        raise RecipeError(
            f"`datasets`: {path} has no column {', '.join(missing)}. Columns: {', '.join(dataset.column_names)}."
        )
    if isinstance(columns, dict):
        dataset = dataset.remove_columns(
            [c for c in columns.values() if c in dataset.column_names and c not in columns]
        )
        return dataset.rename_columns(columns)
    return dataset if columns is None else dataset.select_columns(columns)


def split_rows(dataset: Dataset, test_size: float, seed: int, path: str) -> DatasetDict:
    size = int(test_size) if test_size >= 1 else test_size
    try:
        return dataset.train_test_split(test_size=size, seed=seed)
    except ValueError as error:
        raise RecipeError(f"`test_split_size` {test_size} of the {len(dataset):,} rows of {path}: {error}") from error


def mix(parts: Sequence[Dataset], sources: Sequence[DatasetConfig], stopping: str, seed: int) -> Dataset:
    """Sources into one: drawn by probability, or in shares (`fraction`, TRL's meaning: the shares of a mixture that is
    as large as it can be without using a row twice), or all rows of all."""
    if len(parts) == 1:
        return parts[0]
    if sources[0].probability is not None:
        total = sum(source.probability for source in sources)
        return datasets.interleave_datasets(
            list(parts), [source.probability / total for source in sources], seed=seed, stopping_strategy=stopping
        )
    if sources[0].fraction is not None:
        shares = [source.fraction / sum(source.fraction for source in sources) for source in sources]
        size = min(len(part) / share for part, share in zip(parts, shares, strict=True))
        parts = [
            part.shuffle(seed=seed).select(range(round(size * share)))
            for part, share in zip(parts, shares, strict=True)
        ]
    return datasets.concatenate_datasets(list(parts))


def fingerprint(dataset: Dataset) -> str:
    """Hash of the rows themselves, in order: the same for the same rows out of another file."""
    digest = xxhash.xxh64()
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        for column in table.columns:
            for chunk in column.chunks:
                values = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
                digest.update(np.diff(chunk.offsets).tobytes() if pa.types.is_list(chunk.type) else b"")
                digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
