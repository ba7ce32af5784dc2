"""A path becomes rows: which files belong to a split, how they are opened, and the rows of all as one data set.

A path that exists is taken as it is written: only `data_files` has patterns.
"""

import bz2
import codecs
import glob
import gzip
import io
import json
import logging
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, cast

import datasets
import pyarrow as pa
from datasets import Dataset, Features, ReadInstruction
from datasets.fingerprint import Hasher
from filelock import FileLock
from huggingface_hub import metadata_load

from ..errors import RecipeError
from .formats import JSON, READERS, Open, json_array

logger = logging.getLogger(__name__)

VERSION = 1  # of the rows in the cache; raise it when a file becomes different rows
SPLITS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

Patterns = str | list[str]


# ---- Which files ----


def find_splits(
    folder: Path, name: str | None = None, data_dir: str | None = None, data_files: object = None
) -> dict[str, list[Path]]:
    """Return the files of each split of a folder.

    They are those of `data_files`, else of the configuration `name` in the folder's README.md, else all that can be
    read. A split is then known by the name of the file or of a folder above it (train.jsonl, test/part.csv); other
    files are for training.

    Args:
        data_files: a path or pattern in the folder, several, or those of each split, as `datasets` takes them.

    Raises:
        RecipeError: when there is no such configuration, or no file.
    """
    config = read_config(folder, name)
    folder = folder / (data_dir or config.get("data_dir") or "")
    wanted = data_files or config.get("data_files")
    if isinstance(wanted, list) and all(isinstance(entry, dict) for entry in wanted):
        wanted = {entry["split"]: entry["path"] for entry in wanted}
    if isinstance(wanted, dict):
        return {split: match_files(folder, patterns) for split, patterns in wanted.items()}
    if wanted is not None:
        return {"train": match_files(folder, cast(Patterns, wanted))}
    splits: dict[str, list[Path]] = {}
    for path in list_files(folder):
        splits.setdefault(split_of(path.relative_to(folder)), []).append(path)
    unnamed = splits.pop("", [])
    if unnamed and "train" in splits:
        names = ", ".join(path.name for path in unnamed)
        logger.warning("%s: not read, since other files are named train: %s. List them in `data_files`.", folder, names)
    elif unnamed:
        splits["train"] = unnamed
    if not splits:
        raise RecipeError(f"{folder} has no data file. Known kinds: {', '.join(READERS)}.")
    return splits


def read_config(folder: Path, name: str | None) -> Mapping[str, Any]:
    """Return a configuration of a folder's README.md; the default one if it has no name."""
    readme = folder / "README.md"
    metadata = (metadata_load(readme) if readme.is_file() else None) or {}
    configs = {config["config_name"]: config for config in metadata.get("configs", [])}
    default = [config for config in configs.values() if config.get("default") or len(configs) == 1]
    if name is None and (default or not configs):
        return default[0] if default else {}
    if (name or "default") not in configs:
        known = f"Known: {', '.join(configs)}." if configs else "Its README.md lists none."
        raise RecipeError(f"{folder} has no configuration {name or 'default'!r}. {known} Set it as `name`.")
    return configs[name or "default"]


def match_files(folder: Path, patterns: Patterns) -> list[Path]:
    """Return the files of paths and patterns, of which a path that exists is taken as it is."""
    found = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = folder / pattern
        if path.is_dir():
            paths = list_files(path)
        elif path.is_file():
            paths = [path]
        else:
            paths = [folder / name for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True))]
        if not any(path.is_file() for path in paths):
            raise RecipeError(f"`data_files`: there is no file {pattern} in {folder}.")
        found += [path for path in paths if path.is_file()]
    return found


def list_files(folder: Path) -> list[Path]:
    """Return the files below a folder that can be read, but for hidden ones and what describes a data set."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in NO_DATA)
    return [
        path
        for path in paths
        if kind_of(path.name) and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    ]


def split_of(path: Path) -> str:
    """Return the split that a file's name tells, else the folders above it, as `datasets` reads them; "" if none."""
    if path.parent.name == "data" and (shard := re.match(r"(\w+)-\d{5}-of-\d{5}", path.name)):
        return shard[1]
    for part in (path.name, *(parent.name for parent in path.parents)):
        for split, words in SPLITS.items():
            if re.search(rf"(?:^|[-._ 0-9])(?:{words})(?:$|[-._ 0-9])", part, re.IGNORECASE):
                return split
    return ""


# ---- Rows ----


def take_split(splits: Mapping[str, Sequence[Path] | Dataset], expression: str) -> Dataset:
    """Return the rows of a split, or of an expression of `datasets` such as train[:1000] or train+test.

    Args:
        splits: the files or rows of each.

    Raises:
        ValueError: when there is no such split, or the expression cannot be read.
        RecipeError: see [`read_files`].
    """
    named = [name for name in splits if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", expression)]
    rows = {name: read_files(splits[name]) for name in named}
    lengths = {name: len(rows.get(name, ())) for name in splits}
    parts = ReadInstruction.from_spec(expression).to_absolute(lengths)
    return datasets.concatenate_datasets([rows[part.splitname].select(range(part.from_, part.to)) for part in parts])


def saved_splits(folder: Path) -> dict[str, Dataset]:
    """Return the splits of a folder of `save_to_disk`, without a copy; none if it is not one. A data set that was saved
    without a split is for training."""
    index, state = folder / "dataset_dict.json", folder / "state.json"
    if index.is_file():
        return {name: saved_splits(folder / name)["train"] for name in json.loads(index.read_text())["splits"]}
    if not state.is_file():
        return {}
    names = [file["filename"] for file in json.loads(state.read_text())["_data_files"]]
    return {"train": datasets.concatenate_datasets([Dataset.from_file(str(folder / name)) for name in names])}


def read_files(paths: Sequence[Path] | Dataset) -> Dataset:
    """Read the rows of files, one after the other, or take them from the cache if the files did not change. Rows that
    were read already are returned as they are.

    A row has the columns of all files; those that its file lacks are None.

    Raises:
        RecipeError: when a file cannot be read, or all are empty. The message has the file and, for text formats, line
            and column.
    """
    if isinstance(paths, Dataset):
        return paths
    stats = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    rows = Path(datasets.config.HF_DATASETS_CACHE) / "tunebook" / f"rows-{Hasher.hash((stats, VERSION))}.arrow"
    rows.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{rows}.lock"):
        if not rows.exists():
            write_rows(paths, rows)
    return Dataset.from_file(str(rows))


def write_rows(paths: Sequence[Path], out: Path) -> None:
    """Write the rows of files to an Arrow file. It takes a second pass where the first table's types do not fit all."""
    partial_file = out.with_suffix(".partial")
    types: dict[str, pa.DataType] = {}
    while True:
        needed, writer = dict(types), None
        for table in (table for path in paths for table in read_file(path)):
            for column in table.schema:
                needed[column.name] = common_type(needed.get(column.name, pa.null()), column_type(column.type))
            if writer is None:
                types, schema = dict(needed), pa.schema(list(needed.items()))
                writer = pa.ipc.new_stream(partial_file, schema)
            if needed == types:
                writer.write_table(fit(table, schema))
        if writer is None:
            raise RecipeError(f"{paths[0]} is empty.")
        writer.close()
        if needed == types:
            partial_file.replace(out)
            return
        types = needed


@cache
def column_type(found: pa.DataType) -> pa.DataType:
    """Return the type in which a column of this type is kept: JSON where `datasets` has no such type."""
    if pa.types.is_dictionary(found):
        return column_type(found.value_type)
    try:
        features = Features.from_arrow_schema(pa.schema([("column", found)]))
    except ValueError:
        return JSON
    return features.arrow_schema.field("column").type


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other or pa.types.is_null(other):
        return one
    return other if pa.types.is_null(one) else JSON


def fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns of `schema`."""
    columns = []
    for wanted in schema:
        if wanted.name not in table.column_names:
            columns.append(null_array(len(table), wanted.type))
            continue
        column = table[wanted.name]
        if column.type == wanted.type:
            columns.append(column)
        elif pa.types.is_null(column.type):
            columns.append(null_array(len(table), wanted.type))
        elif wanted.type == JSON:
            columns.append(json_array(column.to_pylist()))
        else:
            columns.append(column.cast(wanted.type))
    return pa.Table.from_arrays(columns, schema=schema)


def null_array(size: int, type: pa.DataType) -> pa.Array:
    return json_array([None] * size) if type == JSON else pa.nulls(size, type)


# ---- Opening ----


def kind_of(name: str) -> str | None:
    """Return the kind of a file by its name, whether it is compressed or not; None if it cannot be read."""
    *suffixes, last = name.lower().split(".")[1:] or [""]
    if last in OPENERS and suffixes:
        last = suffixes[-1]
    return last if last in READERS or last == "zip" else None


def read_file(path: Path) -> Iterator[pa.Table]:
    """Read a file in tables of which each has the types of its own values.

    Raises:
        RecipeError: see [`read_files`].
    """
    kind = kind_of(path.name)
    if kind is None:
        known = f"{', '.join(READERS)}, each also as {', '.join(OPENERS)} or zip"
        raise RecipeError(f"{path}: unknown kind of file. Known: {known}.")
    if kind == "zip":
        with broken_file(path), zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                hidden = any(part.startswith((".", "__")) for part in Path(member).parts)
                if not hidden and kind_of(member) in READERS:
                    yield from read_opened(f"{path}, {member}", partial(archive.open, member), member)
    else:
        yield from read_opened(str(path), lambda: path.open("rb"), path.name)


def read_opened(name: str, open_raw: Open, file_name: str) -> Iterator[pa.Table]:
    opener = OPENERS.get(file_name.lower().rpartition(".")[2])

    def open_file() -> IO[bytes]:
        return open_raw() if opener is None else cast(IO[bytes], opener(open_raw()))

    with broken_file(name):
        try:
            yield from READERS[kind_of(file_name) or file_name](open_file, name)
        except UnicodeDecodeError as error:
            raise RecipeError(describe_undecodable(open_file, name)) from error


@contextmanager
def broken_file(name: str | Path) -> Iterator[None]:
    """Turn what the readers of formats and archives raise into a message that names the file."""
    try:
        yield
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        RuntimeError,
        pa.ArrowException,
    ) as error:
        raise RecipeError(f"{name} cannot be read, or is damaged: {error}") from error


def open_zstd(file: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"))


OPENERS: dict[str, Callable[..., object]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zst": open_zstd}


def describe_undecodable(open_file: Open, name: str) -> str:
    """Return where a file is not UTF-8."""
    for number, line in enumerate(open_file(), start=1):
        try:
            line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            column = len(line[: error.start].decode("utf-8", errors="replace")) + 1
            encoding = "UTF-16" if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None
            reason = f"in {encoding}, not in UTF-8" if encoding else f"not in UTF-8 ({error.reason})"
            return f"{name}, line {number}, column {column}: the file is {reason}. Save it in UTF-8."
    return f"{name} is not in UTF-8. Save it in UTF-8."
