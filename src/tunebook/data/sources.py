"""The rows that a recipe reads: training and evaluation, from files, folders, save_to_disk folders and the Hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, Features, Value

from ..errors import RecipeError
from ..files import shipped
from ..recipe import Recipe
from ..recipe.configs import DatasetConfig
from .layouts import choose_columns

FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "arrow": "arrow"}
COMPRESSIONS = {"gz", "bz2", "xz", "zst"}


@dataclass(frozen=True)
class Source:
    """The rows of one source and split as they were read, and the columns that a row's parts are in."""

    name: str
    rows: Dataset
    columns: dict[str, str | None]

    @property
    def has_turns(self) -> bool:
        return any(isinstance(self.rows[0][name], list) for name in self.columns.values() if name is not None)


@dataclass
class Sources:
    """What a recipe reads.

    Attributes:
        train: one per entry of `datasets`.
        eval: the evaluation set, or what was held out of each training source; empty where the recipe does not
            evaluate.
        share: how much of the training rows that is, where only a sample was wanted.
        raw_eval: the evaluation set with all of its rows; None where it was held out of the training rows.
    """

    train: list[Source]
    eval: list[Source]
    share: float = 1.0
    raw_eval: Dataset | None = None

    @property
    def have_turns(self) -> bool:
        return any(source.has_turns for source in (*self.train, *self.eval))


def read_sources(recipe: Recipe, sample: int | None = None) -> Sources:
    """Read the training and evaluation rows of a recipe.

    Evaluation rows come from eval_dataset_name, else from test_split_size of the training rows, else from
    dataset_test_split of the same data set; there are none where the recipe does not evaluate. In a mixture each
    source is split before it is mixed, so that a row that is drawn twice is never on both sides.

    Args:
        sample: read only about so many rows of either, drawn with the seed, the same share of each training source.

    Raises:
        RecipeError: for a source, split, column or row layout that does not fit; see [`load_source`] and
            [`choose_columns`].
    """
    script, args = recipe.script, recipe.training
    entries, sources = list_entries(recipe), Sources([], [])
    loaded = []
    for entry in entries:
        rows = load_source(entry.path, entry.split, entry.name, entry.data_dir, entry.data_files)
        loaded.append(first(select_columns(rows, entry.columns, entry.path), entry.max_samples))
    if sample is not None:
        sources.share = min(1.0, sample / sum(map(len, loaded)))
    holds_out = args.do_eval and script.test_split_size is not None and not script.eval_dataset_name
    for entry, rows in zip(entries, loaded, strict=True):
        if holds_out:
            parts = split_rows(rows, script.test_split_size, args.seed, entry.path)
            rows = parts["train"]
            sources.eval.append(choose_source(recipe, entry.path, parts["test"], sources.share))
        sources.train.append(choose_source(recipe, entry.path, rows, sources.share))
    if args.do_eval and not holds_out:
        name, sources.raw_eval = read_evaluation(recipe)
        share = 1.0 if sample is None else min(1.0, sample / len(sources.raw_eval))
        sources.eval.append(choose_source(recipe, name, sources.raw_eval, share))
    return sources


def list_entries(recipe: Recipe) -> list[DatasetConfig]:
    """Return the entries of `datasets`, or one made of dataset_name and its keys."""
    script = recipe.script
    return script.datasets or [
        DatasetConfig(
            path=script.dataset_name,
            name=script.dataset_config,
            split=script.dataset_train_split,
            max_samples=script.max_train_samples if script.test_split_size is None else None,
        )
    ]


def read_evaluation(recipe: Recipe) -> tuple[str, Dataset]:
    """Read eval_dataset_name, else dataset_test_split of dataset_name; return its name and rows."""
    script = recipe.script
    if script.eval_dataset_name:
        name, rows = script.eval_dataset_name, load_evaluation(script.eval_dataset_name, script.dataset_test_split)
    elif script.dataset_name:
        name = script.dataset_name
        rows = load_source(name, script.dataset_test_split, script.dataset_config)
    else:
        raise RecipeError("To evaluate a mixture, set eval_dataset_name or test_split_size.")
    return name, first(rows, script.max_eval_samples)


def choose_source(recipe: Recipe, name: str, rows: Dataset, share: float) -> Source:
    """Find the columns of a source's rows, or of a share of them."""
    rows = draw(rows, share, recipe.training.seed) if share < 1 else rows
    return Source(name, rows, choose_columns(recipe.task, rows.column_names, column_keys(recipe)))


def column_keys(recipe: Recipe) -> dict[str, str | None]:
    """Return role -> the column that the recipe names for it, None where it names none."""
    given = all_keys(recipe)
    roles = {
        "sft": ("text",) if given.get("pretraining") else ("prompt", "completion", "messages", "text"),
        "rm": ("prompt", "chosen", "rejected", "subset", *(["margin"] if given.get("use_margin") else [])),
        "dpo": ("prompt", "chosen", "rejected"),
    }[recipe.task]
    return {role: given[f"{role}_column"] for role in roles if given.get(f"{role}_column") or role != "subset"}


def all_keys(recipe: Recipe) -> dict[str, Any]:
    return {**vars(recipe.script), **vars(recipe.training)}


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


# ---- Files ---------------------------------------------------------------------------------------------------------


def load_source(
    path: str, split: str, name: str | None = None, data_dir: str | None = None, data_files=None
) -> Dataset:
    """Rows of one split of a Hub data set, a local file, a folder of files, or a folder of `save_to_disk`.

    Raises:
        RecipeError: when it does not exist, cannot be reached or read (with file and line for JSON lines), has no rows,
            or has no such split.
    """
    location = shipped(Path(path).expanduser())
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
    return load_source(path, "train" if shipped(Path(path).expanduser()).is_file() else split)
