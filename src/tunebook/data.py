"""The rows of a run, tokenized once: loaded, split, mixed, counted, cached.

They leave as TRL's processed columns, which the trainers take as they are. SFT: `input_ids`, `labels`; reward models:
`chosen_ids`, `rejected_ids` (`margin`, `subset`); DPO: `prompt_ids`, `chosen_ids`, `rejected_ids`. What was cut or
dropped, and why, goes to the log and to data_report.json.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, Value
from transformers import PreTrainedTokenizerBase

from .configs import DatasetConfig
from .models import set_chatml
from .recipe import RecipeError
from .rows import CUT, KEPT, Rendering, choose_columns, process_batch

logger = logging.getLogger(__name__)

FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "arrow": "arrow"}
COMPRESSIONS = {"gz", "bz2", "xz", "zst"}

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
    """As [`load_source`]; a file has one split, and all of its rows are for evaluation."""
    return load_source(path, "train" if Path(path).expanduser().is_file() else split)


class NothingToTrain(RecipeError):
    """No row of a data set is left."""


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
        NothingToTrain: when no row is left.
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
        raise NothingToTrain(f"No row of {name} can be trained on: {report}.")
    if report.dropped:
        tokens = tokens.select(np.flatnonzero(pc.is_in(outcomes, pa.array([KEPT, CUT])).to_numpy(zero_copy_only=False)))
    return tokens.remove_columns("outcome"), report


# ---- The whole data set of a run -----------------------------------------------------------------------------------


@dataclass
class Data:
    """`sources`: the rows of each training source as they were read, and how they were tokenized. `share`: how much of
    them that is, where only a sample was wanted."""

    train: Dataset
    eval: Dataset | None
    reports: dict[str, Report]
    raw_eval: Dataset | None = None
    sources: list[tuple[Dataset, Rendering]] = field(default_factory=list)
    share: float = 1.0

    def write_report(self, path: Path) -> None:
        path.write_text(json.dumps({split: vars(report) for split, report in self.reports.items()}, indent=2) + "\n")


def load_data(
    task: str, script_args, training_args, tokenizer: PreTrainedTokenizerBase, sample: int | None = None
) -> Data:
    """Training and evaluation rows of a recipe, tokenized; with `sample`, only about so many of either, drawn with the
    seed, the same share of each training source.

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
    idle: list[dict[str, str]] = []  # of each source
    raw: list[tuple[Dataset, Rendering]] = []

    def tokens_of(dataset: Dataset, name: str, split: str, share: float) -> Dataset:
        if share < 1:
            dataset = draw(dataset, share, seed)
        columns = choose_columns(task, dataset.column_names, keys)
        templated = recipe["apply_chat_template"] or has_messages(dataset, columns)
        if tokenizer.chat_template is None and templated:
            set_chatml(tokenizer)
        idle.append(idle_keys(recipe, columns, templated))
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
        if split == "train":
            raw.append((dataset, how))
        return tokens

    sources = script_args.datasets or [
        DatasetConfig(
            path=script_args.dataset_name,
            name=script_args.dataset_config,
            split=script_args.dataset_train_split,
            max_samples=script_args.max_train_samples if script_args.test_split_size is None else None,
        )
    ]
    holds_out = training_args.do_eval and script_args.test_split_size is not None and not script_args.eval_dataset_name
    loaded, trains, held_out = [], [], []
    for source in sources:
        rows = load_source(source.path, source.split, source.name, source.data_dir, source.data_files)
        loaded.append(first(select_columns(rows, source.columns, source.path), source.max_samples))
    share = 1.0 if sample is None else min(1.0, sample / sum(map(len, loaded)))
    for source, rows in zip(sources, loaded, strict=True):
        if holds_out:
            parts = split_rows(rows, script_args.test_split_size, seed, source.path)
            rows = parts["train"]
            held_out.append(tokens_of(parts["test"], source.path, "eval", share))
        trains.append(tokens_of(rows, source.path, "train", share))
    train = first(mix(trains, sources, script_args.mixture_stopping, seed), script_args.max_train_samples)
    if common := set(idle[0]).intersection(*idle):
        name = min(common)
        raise RecipeError(f"`{name}` has no effect on these rows ({sources[0].path}). It needs {idle[0][name]}.")
    if "subset" in train.column_names:
        train = train.remove_columns("subset")

    evaluation = raw_eval = None
    if training_args.do_eval:
        if held_out:
            evaluation = datasets.concatenate_datasets(held_out)
        elif name := script_args.eval_dataset_name or script_args.dataset_name:
            split = script_args.dataset_test_split
            if script_args.eval_dataset_name:
                raw_eval = load_evaluation(name, split)
            else:
                raw_eval = load_source(name, split, script_args.dataset_config)
            raw_eval = first(raw_eval, script_args.max_eval_samples)
            evaluation = tokens_of(raw_eval, name, "eval", 1.0 if sample is None else min(1.0, sample / len(raw_eval)))
        else:
            raise RecipeError("To evaluate a mixture, set eval_dataset_name or test_split_size.")
        evaluation = first(evaluation, script_args.max_eval_samples)
        if "subset" in evaluation.column_names:
            evaluation = evaluation.class_encode_column("subset")
    read = {split: report for split, report in reports.items() if report.read}
    return Data(train, evaluation, read, raw_eval, raw, share)


def idle_keys(recipe: Mapping, columns: Mapping[str, str | None], templated: bool) -> dict[str, str]:
    """Keys of the recipe that do nothing to rows of this layout -> what they need."""
    conversations = "conversations, or apply_chat_template: true"
    needs = {
        "assistant_only_loss": ("text" not in columns, "conversations, or prompts and completions"),
        "last_turn_only_loss": ("messages" in columns, "whole conversations (messages_column)"),
        "completion_only_loss": ("completion" in columns, "prompts and completions"),
        "prompt_template": (columns.get("prompt") is not None, "a column of plain prompts"),
        "system_prompt": (templated, conversations),
        "chat_template": (templated, conversations),
        "chat_template_path": (templated, conversations),
    }
    return {name: need for name, (live, need) in needs.items() if recipe.get(name) and not live}


def has_messages(dataset: Dataset, columns: Mapping[str, str | None]) -> bool:
    return any(isinstance(dataset[0][name], list) for name in columns.values() if name is not None)


def first(dataset: Dataset, count: int | None) -> Dataset:
    return dataset if count is None or count >= len(dataset) else dataset.select(range(count))


def draw(dataset: Dataset, share: float, seed: int) -> Dataset:
    """A share of the rows, at least one, drawn with the seed, in their order."""
    chosen = np.random.default_rng(seed).choice(len(dataset), max(1, round(share * len(dataset))), replace=False)
    return dataset.select(np.sort(chosen))


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
            column = column.combine_chunks()  # num_proc writes others
            values = column.flatten() if pa.types.is_list(column.type) else column
            digest.update(np.diff(column.offsets).tobytes() if pa.types.is_list(column.type) else b"")
            digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
