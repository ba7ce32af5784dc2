"""The formats of files: JSON, CSV, text, Parquet and Arrow become tables, each with the types of its own values.

What a row says stays as it is. Text is never taken for a number or a date. A column whose values are of several types,
or nested so that rows differ in their keys, keeps them as JSON. Parquet and Arrow have types of their own.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import IO, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ..errors import RecipeError

BLOCK = 16 << 20  # bytes of JSON lines, or characters, that are parsed at a time
AHEAD = 2  # of them, at the same time
BATCH = 10_000  # rows of other formats

JSON = pa.json_()
LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB]\w\w(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]\w\w)\\u[dD][c-fC-F]\w\w|[\ud800-\udfff]"
)
Open = Callable[[], IO[bytes]]
encode = json.JSONEncoder(ensure_ascii=False, default=str).encode
decode = json.JSONDecoder(strict=False).decode


# PATCH(datasets<6): `Json` reads some numbers not to their last digit, and fails on integers beyond 64 bits. Waits for
# datasets/features/features.py:1318. Delete when it reads JSON as `json` does.
def read_exactly(self: datasets.Json, example_data: str | None, token_per_repo_id: object = None) -> object:
    return None if example_data is None else decode(example_data)


datasets.Json.decode_example = read_exactly


def json_array(values: Sequence[Any]) -> pa.Array:
    texts = pa.array([None if value is None else encode(value) for value in values], pa.string())
    return pa.ExtensionArray.from_storage(JSON, texts)


# ---- JSON ----


def read_json(open_file: Open, name: str, as_lines: bool = False) -> Iterator[pa.Table]:
    """Read objects of a line each, a list of objects, or an object that holds one.

    Args:
        as_lines: a single line is a row, too, and no object that holds rows.
    """
    file = open_file()
    line, block = 1, file.readline().removeprefix(codecs.BOM_UTF8)
    while block.isspace():
        line, block = line + 1, file.readline()
    block += file.read(BLOCK) + file.readline()
    first, _, rest = block.partition(b"\n")
    if not block:
        return
    if not is_object(first) or not (as_lines or rest.strip()):
        yield from read_document((block + file.read()).decode(), name, line)
        return
    waiting: deque[tuple[int, bytes, Future[pa.Table | None]]] = deque()
    with ThreadPoolExecutor() as pool:
        while block or waiting:
            if block:
                waiting.append((line, block, pool.submit(simple_table, block)))
                line += block.count(b"\n")
                block = file.read(BLOCK) + file.readline()
            if len(waiting) > AHEAD or not block:
                number, lines, table = waiting.popleft()
                yield table.result() or parse_lines(lines.decode(), name, number)


def is_object(line: bytes) -> bool:
    try:
        return isinstance(decode(line.decode().strip()), dict)
    except (ValueError, RecursionError):
        return False


def simple_table(block: bytes) -> pa.Table | None:
    """Parse JSON lines with Arrow, which is faster, where that changes nothing of what they say; else return None."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    characters = np.frombuffer(block := b"\n" + block.rstrip() + b"\n", np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    if (characters[ends[:-1] + 1] != ord("{")).any() or (characters[ends[1:] - 1] != ord("}")).any():
        return None  # a blank line, or one that is `null`, at which Arrow (26.0) crashes
    try:
        options = pa.json.ReadOptions(block_size=len(block))  # Arrow crashes at a row that is larger
        table = pa.json.read_json(pa.BufferReader(block), options)
        if any("timestamp" in str(column.type) for column in table.schema):  # as which Arrow reads text
            schema = pa.schema([column.with_type(without_times(column.type)) for column in table.schema])
            table = pa.json.read_json(pa.BufferReader(block), options, pa.json.ParseOptions(explicit_schema=schema))
        table.validate(full=True)
    except pa.ArrowException:
        return None
    is_simple = len(table) == len(ends) - 1 and all(is_uniform(column) for column in table.columns)
    return table if is_simple else None


def without_times(type: pa.DataType) -> pa.DataType:
    """Return a type with text in the place of times, at every depth."""
    if pa.types.is_timestamp(type):
        return pa.string()
    if pa.types.is_list(type):
        return pa.list_(without_times(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([field.with_type(without_times(field.type)) for field in type])
    return type


def is_uniform(column: pa.ChunkedArray) -> bool:
    """Return whether a column holds plain values, or lists of such values or of objects that all have the same keys:
    what Arrow reads as it is written."""
    if not pa.types.is_nested(column.type):
        return True
    if not pa.types.is_list(column.type):
        return False
    items = column.combine_chunks().flatten()
    if not pa.types.is_struct(items.type):
        return not pa.types.is_nested(items.type) and not pa.types.is_floating(items.type)
    leaves = items.flatten()
    plain = (pa.types.is_string(leaf.type) or pa.types.is_boolean(leaf.type) for leaf in leaves)
    return all(plain) and not any(leaf.null_count for leaf in (items, *leaves))


def parse_lines(block: str, name: str, first: int) -> pa.Table:
    """Parse JSON lines, of which the first has the number `first`."""
    rows = []
    for number, line in enumerate(block.split("\n"), first):
        if line and not line.isspace():
            try:
                value = decode(line.strip())
            except (ValueError, RecursionError) as error:
                raise not_json(error, name, number, line) from error
            rows.append(as_row(value, f"{name}, line {number}"))
    return to_table(rows, block, name, first)


def read_document(text: str, name: str, first: int) -> Iterator[pa.Table]:
    """Read the rows of a JSON document: a list of them, an object with one such list, or a single row."""
    try:
        document = decode(text.strip())
    except (ValueError, RecursionError) as error:
        lines = text.split("\n")
        number = getattr(error, "lineno", 1)
        raise not_json(error, name, first + number - 1, lines[number - 1]) from error
    rows = [as_row(row, f"{name}, row {number}") for number, row in enumerate(find_rows(document), start=1)]
    for start in range(0, len(rows), BATCH):
        yield to_table(rows[start : start + BATCH], text, name, first)


def find_rows(document: object) -> list[object]:
    """Return the rows of a document: a list, or the list of objects that an object has under `data` or as all that it
    has. A list of turns is a part of a row."""
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        rows = document.get("data") or (list(document.values())[0] if len(document) == 1 else None)
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return [document] if {"role", "from"} & rows[0].keys() else rows
    return [document]


def as_row(value: object, place: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise RecipeError(f"{place}: a row is {type(value).__name__}, not an object with the columns' names.")
    return value


def not_json(error: Exception, name: str, line: int, text: str) -> RecipeError:
    reason, column = (error.msg, error.colno) if isinstance(error, json.JSONDecodeError) else (error, 1)
    return RecipeError(f"{name}, line {line}, column {column}: not JSON ({reason}): {text.strip()[:80]}")


def to_table(rows: Sequence[dict[str, Any]], text: str, name: str, first: int) -> pa.Table:
    """Return a table of rows; `text` is where they come from, for the message about what is no Unicode."""
    names = dict.fromkeys(key for row in rows for key in row)
    try:
        return pa.table({key: to_array([row.get(key) for row in rows]) for key in names})
    except UnicodeEncodeError as error:
        found = LONE_SURROGATE.search(text)
        start = found.start() if found else 0
        line, column = first + text.count("\n", 0, start), start - text.rfind("\n", 0, start)
        raise RecipeError(f"{name}, line {line}, column {column}: half of a surrogate pair.") from error


def to_array(values: Sequence[Any]) -> pa.Array:
    types = set(map(type, values)) - {type(None)}
    if not types:
        return pa.nulls(len(values))
    if len(types) > 1 or types & {list, dict}:
        return json_array(values)
    try:
        return pa.array(values)
    except (OverflowError, pa.ArrowInvalid):  # an integer of more than 64 bits
        return json_array(values)


# ---- Other formats ----


def read_csv(open_file: Open, name: str, delimiter: str = ",") -> Iterator[pa.Table]:
    """Read a table whose first line names the columns, all of text. A cell that a line lacks is None."""
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(io.TextIOWrapper(open_file(), "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    names = next(filter(None, lines), [])
    names = [name if names.index(name) == i else f"{name}.{i}" for i, name in enumerate(names)]
    if not names:
        return
    yield text_table(names, [])
    arrow = partial(arrow_csv, open_file, names, lines.line_num, delimiter)
    if reads_all(arrow) and count_quotes(open_file()) % 2 == 0:
        yield from arrow()
        return
    try:
        rows = (full_line(cells, len(names)) for cells in lines if cells)
        while batch := list(islice(rows, BATCH)):
            yield text_table(names, batch)
    except csv.Error as error:
        raise RecipeError(f"{name}, line {lines.line_num}: not CSV ({error}).") from error


def reads_all(read: Callable[[], Iterator[pa.Table]]) -> bool:
    """Return whether Arrow reads a file to its end. It refuses lines with too few cells, and has no line numbers."""
    try:
        return sum(map(len, read())) >= 0
    except pa.ArrowInvalid:
        return False


def count_quotes(file: IO[bytes]) -> int:
    """Return the number of quotes: where one is left open, it is odd, of which Arrow says nothing."""
    return sum(block.count(b'"') for block in iter(partial(file.read, BLOCK), b""))


def arrow_csv(open_file: Open, names: Sequence[str], skipped: int, delimiter: str) -> Iterator[pa.Table]:
    """Read CSV with Arrow, which is faster, after the lines that are skipped."""
    batches = pa.csv.open_csv(
        open_file(),
        pa.csv.ReadOptions(column_names=names, skip_rows=skipped, block_size=BLOCK),
        pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    return (pa.Table.from_batches([batch]) for batch in batches)


def full_line(cells: list[str], size: int) -> list[str | None]:
    if any(cells[size:]):
        raise csv.Error(f"{len(cells)} cells, but the first line names {size} columns")
    return [*cells[:size], *[None] * (size - len(cells))]


def read_text(open_file: Open, name: str) -> Iterator[pa.Table]:
    """Read lines, each a row of the column `text`."""
    lines = io.TextIOWrapper(open_file(), "utf-8-sig")
    while block := lines.readlines(BLOCK):
        yield text_table(["text"], [[line.removesuffix("\n")] for line in block])


def text_table(names: Sequence[str], rows: Sequence[Sequence[str | None]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return pa.table([pa.array(column, pa.string()) for column in columns], names=list(names))


def read_parquet(open_file: Open, name: str) -> Iterator[pa.Table]:
    parquet = pa.parquet.ParquetFile(seekable(open_file()))
    yield parquet.schema_arrow.empty_table()
    yield from map(plain_table, parquet.iter_batches(BATCH))


def read_arrow(open_file: Open, name: str) -> Iterator[pa.Table]:
    """Read a stream, as `datasets` writes them, or a file with an index (Feather)."""
    source = seekable(open_file())
    try:
        reader = batches = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(source)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    yield reader.schema.empty_table()
    yield from map(plain_table, batches)


def seekable(file: IO[bytes]) -> pa.NativeFile:
    """Return what Arrow reads in any order: the file itself, or all of it in memory where it is compressed."""
    plain = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)
    return pa.memory_map(file.name) if plain else pa.BufferReader(file.read())


def plain_table(batch: pa.RecordBatch) -> pa.Table:
    batch.validate(full=True)
    return pa.Table.from_batches([batch])


READERS: dict[str, Callable[[Open, str], Iterator[pa.Table]]] = {
    "json": read_json,
    **dict.fromkeys(("jsonl", "ndjson"), partial(read_json, as_lines=True)),
    **{"csv": read_csv, "tsv": partial(read_csv, delimiter="\t"), "txt": read_text},
    **{"parquet": read_parquet, "arrow": read_arrow, "feather": read_arrow},
}
