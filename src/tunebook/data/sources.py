"""The rows that a recipe reads: training and evaluation, from files, folders, save_to_disk folders and the Hub."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from ..errors import RecipeError
from ..files import shipped
from ..recipe import Recipe
from ..recipe.configs import DatasetConfig
from .files import find_splits, kind_of, saved_splits, take_split
from .layouts import Layout, choose_layout
from .turns import looks_like_turns


@dataclass(frozen=True)
class Source:
    """The rows of one source and split as they were read."""

    name: str
    rows: Dataset
    layout: Layout

    @cached_property
    def has_turns(self) -> bool:
        """Return whether any row has turns: lists, or the JSON text of one."""
        roles = ("messages", "prompt", "completion", "chosen", "rejected")
        columns = [self.layout.columns[role] for role in roles if role in self.layout.columns]
        return self.layout.of_turns or any(has_turns(self.rows, column) for column in columns)


def has_turns(rows: Dataset, column: str) -> bool:
    """Return whether a column holds turns in any row."""
    table = rows.with_format("arrow").select_columns(column)
    for values in (batch[column] for batch in table.iter(batch_size=100_000)):
        if pa.types.is_nested(values.type):
            return True
        if isinstance(values.type, pa.BaseExtensionType):  # JSON, in which a text stands in quotes
            texts = pa.chunked_array([chunk.storage for chunk in values.chunks])
            if pc.any(pc.match_substring_regex(texts, r"^\s*[\[{]")).as_py():
                return True
        elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            candidates = values.filter(pc.match_substring_regex(values, r"^\s*\[\s*\{"))
            if any(looks_like_turns(text) for text in candidates[:100].to_pylist()):
                return True
    return False


@dataclass(frozen=True)
class Sources:
    """What a recipe reads."""

    train: list[Source]  # one per entry of `datasets`
    eval: list[Source]  # the evaluation set, or what was held out of each training source; may be empty
    share: float  # the fraction of the training rows that was read
    raw_eval: Dataset | None = None  # all rows of the evaluation set; None if it was held out

    @property
    def have_turns(self) -> bool:
        return any(source.has_turns for source in (*self.train, *self.eval))


def read_sources(recipe: Recipe, sample: int | None = None) -> Sources:
    """Read the training and evaluation rows of a recipe.

    Evaluation rows come from `eval_dataset_name`, else from `test_split_size` of the training rows, else from
    `dataset_test_split` of the same data set; there are none if the recipe does not evaluate. In a mixture each source
    is split before it is mixed, so that a row that is drawn twice is never on both sides.

    Args:
        sample: read about this many training rows, the same share of each source, and evaluation rows, by the seed.

    Raises:
        RecipeError: for a source, split, column or row layout that does not fit.
    """
    script, args = recipe.script, recipe.training
    entries = list_entries(recipe)
    loaded = [load_entry(entry) for entry in entries]
    count = math.inf if sample is None else sample
    share = min(1.0, count / sum(map(len, loaded)))
    holds_out = args.do_eval and not script.eval_dataset_name and script.test_split_size is not None
    train, held_out = [], []
    for entry, rows in zip(entries, loaded, strict=True):
        if holds_out and script.test_split_size is not None:
            parts = split_rows(rows, script.test_split_size, args.seed, entry.path)
            rows = parts["train"]
            held_out.append(choose_source(recipe, entry.path, parts["test"], share))
        train.append(choose_source(recipe, entry.path, rows, share))
    if holds_out or not args.do_eval:
        return Sources(train, held_out, share)
    name, rows = read_evaluation(recipe)
    return Sources(train, [choose_source(recipe, name, rows, min(1.0, count / len(rows)))], share, rows)


def list_entries(recipe: Recipe) -> list[DatasetConfig]:
    """Return the entries of `datasets`, or one made of `dataset_name` and its keys."""
    script = recipe.script
    return script.datasets or [
        DatasetConfig(
            path=script.dataset_name or "",
            name=script.dataset_config,
            split=script.dataset_train_split,
            max_samples=script.max_train_samples if script.test_split_size is None else None,
        )
    ]


def load_entry(entry: DatasetConfig) -> Dataset:
    """Load the rows and columns of an entry of `datasets`."""
    rows = load_source(entry.path, entry.split, entry.name, entry.data_dir, entry.data_files)
    columns = entry.columns or rows.column_names
    if missing := [name for name in columns if name not in rows.column_names]:
        raise RecipeError(
            f"`datasets`: {entry.path} has no column {', '.join(missing)}. Columns: {', '.join(rows.column_names)}."
        )
    if isinstance(columns, dict):
        replaced = [new for new in columns.values() if new in rows.column_names and new not in columns]
        rows = rows.remove_columns(replaced).rename_columns(columns)
    else:
        rows = rows.select_columns(columns)
    return first(rows, entry.max_samples)


def read_evaluation(recipe: Recipe) -> tuple[str, Dataset]:
    """Read `eval_dataset_name`, else `dataset_test_split` of `dataset_name`; return its name and rows."""
    script, split = recipe.script, recipe.script.dataset_test_split
    if name := script.eval_dataset_name:
        location = shipped(Path(name).expanduser())
        is_one = location.is_file() or (location / "state.json").is_file()  # one split, whatever it is for
        rows = load_source(name, "train" if is_one else split)
    elif name := script.dataset_name:
        rows = load_source(name, split, script.dataset_config)
    else:
        raise RecipeError("To evaluate a mixture, set `eval_dataset_name` or `test_split_size`.")
    return name, first(rows, script.max_eval_samples)


def choose_source(recipe: Recipe, name: str, rows: Dataset, share: float) -> Source:
    """Find the columns of a source's rows, and draw a share of the rows, at least one, in their order."""
    if share < 1:
        generator = np.random.default_rng(recipe.training.seed)
        rows = rows.select(np.sort(generator.choice(len(rows), max(1, round(share * len(rows))), replace=False)))
    return Source(name, rows, choose_layout(recipe.task, rows.column_names, all_keys(recipe)))


def all_keys(recipe: Recipe) -> dict[str, Any]:
    return {**vars(recipe.script), **vars(recipe.training)}


def first(dataset: Dataset, count: int | None) -> Dataset:
    return dataset if count is None or count >= len(dataset) else dataset.select(range(count))


def split_rows(dataset: Dataset, test_size: float, seed: int, path: str) -> DatasetDict:
    size = int(test_size) if test_size >= 1 else test_size
    try:
        return dataset.train_test_split(test_size=size, seed=seed)
    except ValueError as error:
        raise RecipeError(f"`test_split_size` {test_size} of the {len(dataset):,} rows of {path}: {error}") from error


def load_source(
    path: str, split: str, name: str | None = None, data_dir: str | None = None, data_files: object = None
) -> Dataset:
    """Load one split of a local file, a folder of files, a folder of `save_to_disk`, or a Hub data set.

    Args:
        split: its name, or an expression of `datasets`, such as train[:1000] or train+test.

    Raises:
        RecipeError: when it does not exist, cannot be reached or read (with file, line and column where the format has
            them), has no rows, or has no such split.
    """
    location = shipped(Path(path).expanduser())
    is_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or kind_of(path) is not None
    is_loader = path in ("json", "csv", "text", "parquet", "arrow")  # of `datasets`, for `data_files`
    try:
        if location.is_file():
            if name or data_dir or data_files:
                raise RecipeError(f"{path} is a file: `name`, `data_dir` and `data_files` are for folders and the Hub.")
            dataset = take_split({"train": [location]}, split)
        elif location.is_dir():
            dataset = take_split(saved_splits(location) or find_splits(location, name, data_dir, data_files), split)
        elif is_path or (is_loader and not data_files):
            raise RecipeError(f"{path}: no such file or folder, and not a Hub id (owner/name).")
        else:
            dataset = datasets.load_dataset(path, name, data_dir=data_dir, data_files=data_files, split=split)
    except RecipeError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RecipeError(f"{path} cannot be loaded: {error}") from error
    if len(dataset) == 0:
        raise RecipeError(f"{path} has no rows in split {split!r}.")
    return dataset
