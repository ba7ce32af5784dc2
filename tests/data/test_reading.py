"""A path becomes rows: the same rows from every format, from names of any characters, or a refusal that says where."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import read_cases, write_rows
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tunebook.data.sources import load_source
from tunebook.errors import RecipeError

CASES = read_cases("data/reading.yaml")
ROW = {"prompt": "what is 2?", "completion": "42"}


def read(path, split="train", **keys) -> list[dict]:
    return list(load_source(str(path), split, **keys))


# ---- Every format ----


def zip_file(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr(name, data)
        archive.writestr(f"__MACOSX/{name}", b"")
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    with pa.CompressedOutputStream(sink := pa.BufferOutputStream(), "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def delimited(rows, delimiter: str) -> str:
    form = {"delimiter": delimiter, "lineterminator": "\n", "quoting": csv.QUOTE_ALL}
    writer = csv.DictWriter(out := io.StringIO(newline=""), rows[0], **form)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


TEXTS = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "raw.jsonl": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "ndjson": lambda rows: "\n" + "\n\n".join(map(json.dumps, rows)) + "\n \n",
    "json": json.dumps,
    "indented.json": lambda rows: json.dumps(rows, indent=2),
    "object.json": lambda rows: json.dumps({"version": "1.0", "data": rows}, indent=2),
    "only.json": lambda rows: json.dumps({"rows": rows}),
    "csv": lambda rows: delimited(rows, ","),
    "tsv": lambda rows: delimited(rows, "\t"),
}


def arrow_bytes(rows, new) -> bytes:
    table = pa.Table.from_pylist(rows)
    with new(sink := pa.BufferOutputStream(), table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet_bytes(rows) -> bytes:
    pa.parquet.write_table(pa.Table.from_pylist(rows), sink := pa.BufferOutputStream())
    return sink.getvalue().to_pybytes()


BINARY = {
    "parquet": parquet_bytes,
    "arrow": lambda rows: arrow_bytes(rows, pa.ipc.new_stream),
    "feather": lambda rows: arrow_bytes(rows, pa.ipc.new_file),
}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(CASES["texts"])
plain_rows = st.lists(
    st.fixed_dictionaries({"prompt": text, "completion": text, "none or not": st.none() | text}), min_size=1, max_size=5
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
top = values.filter(
    lambda value: not isinstance(value, int) or abs(value) < 2**53
)  # a column of numbers is of one type
any_rows = st.lists(st.dictionaries(st.sampled_from("abcd"), top, min_size=1), min_size=1, max_size=5)
slow = {"deadline": None, "suppress_health_check": list(HealthCheck)}
examples = settings(**slow, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes


@settings(examples, max_examples=12)
@given(plain_rows, st.sampled_from([*COMPRESS, ".zip"]), st.booleans(), st.booleans())
def test_every_format_gives_the_same_rows(tmp_path_factory, rows, compression, bom, crlf):
    """Whatever characters, byte order mark, line ends and compression; a cell of CSV is text, never None."""
    folder = tmp_path_factory.mktemp("rows")
    without_none = [{name: value or "" for name, value in row.items()} for row in rows]
    files = {}
    for name, write in TEXTS.items():
        has_breaks = name in ("csv", "tsv") and any("\n" in value for row in without_none for value in row.values())
        content = write(rows).replace("\n", "\r\n" if crlf and not has_breaks else "\n")
        files[name] = codecs.BOM_UTF8 * bom + content.encode()
    files |= {name: write(rows) for name, write in BINARY.items()}
    for name, data in files.items():
        path = folder / f"rows.{name}{compression}"
        path.write_bytes(zip_file(data, path.stem) if compression == ".zip" else COMPRESS[compression](data))
        assert read(path) == (without_none if name in ("csv", "tsv") else rows), path
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder / "splits")
    assert read(folder / "saved") == read(folder / "splits") == rows


@settings(examples, max_examples=60)
@given(any_rows, st.integers(1, 200), st.booleans())
def test_a_row_of_json_is_what_it_says_whatever_the_others_are(tmp_path_factory, monkeypatch, rows, block, aslist):
    """At every depth: types, numbers, key order, no keys of other rows; also where types change far into the file."""
    monkeypatch.setattr("tunebook.data.formats.BLOCK", block)
    monkeypatch.setattr("tunebook.data.formats.BATCH", 1)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps(rows) if aslist else "".join(json.dumps(row) + "\n" for row in rows))
    names = {name for row in rows for name in row}
    given = [{name: row.get(name) for name in names} for row in rows]
    found = [{name: row[name] for name in names} for row in read(path)]
    nested = [[value for value in row.values() if isinstance(value, list | dict)] for row in (*found, *given)]
    assert found == given and list(map(json.dumps, nested[: len(rows)])) == list(map(json.dumps, nested[len(rows) :]))


def test_a_single_line_of_json_lines_is_a_row(tmp_path):
    """In a .json file, an object that has a list of objects and nothing else holds rows."""
    rows = [{"b": [{"a": 1}]}]
    for name, expected in (("rows.jsonl", rows), ("rows.json", [{"a": 1}])):
        (tmp_path / name).write_text(json.dumps(rows[0]) + "\n")
        assert read(tmp_path / name) == expected


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_text_stays_text(kind, tmp_path):
    rows = [{"text": value} for value in CASES["texts"]]
    (tmp_path / f"rows.{kind}").write_bytes(parquet_bytes(rows) if kind == "parquet" else TEXTS[kind](rows).encode())
    assert read(tmp_path / f"rows.{kind}") == rows


def test_lines_of_text_are_rows(tmp_path):
    (tmp_path / "rows.txt").write_bytes("\ufeffone\r\ntwo\u2028still two\r\n".encode())
    assert read(tmp_path / "rows.txt") == [{"text": "one"}, {"text": "two\u2028still two"}]


# ---- Columns that not all rows have, or that no row needs ----


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("unused", CASES["unused"], ids=str)
def test_a_column_that_changes_late_in_a_file_is_no_reason_to_fail(unused, compression, tmp_path, monkeypatch):
    monkeypatch.setattr("tunebook.data.formats.BLOCK", 1000)
    rows = [ROW | {"n": i} for i in range(300)]
    rows[-1] |= json.loads(unused)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / f"rows.jsonl{compression}").write_bytes(COMPRESS[compression](content))
    assert [{name: value for name, value in row.items() if value is not None} for row in read(tmp_path)] == rows


def test_files_of_a_folder_may_have_different_columns_types_and_formats(tmp_path):
    write_rows(tmp_path / "a.jsonl", [ROW | {"id": 1, "late": None}])
    write_rows(tmp_path / "b.jsonl", [ROW | {"id": "x", "late": {"k": [1]}}])
    (tmp_path / "c.csv").write_text("completion,prompt\n42,what is 2?\n")
    (tmp_path / "d.parquet").write_bytes(parquet_bytes([ROW | {"id": 2.5, "tags": [{"a": 1}]}]))
    (tmp_path / "README.md").write_text("About these rows.")
    assert read(tmp_path) == [
        ROW | {"id": 1, "late": None, "tags": None},
        ROW | {"id": "x", "late": {"k": [1]}, "tags": None},
        ROW | {"id": None, "late": None, "tags": None},
        ROW | {"id": 2.5, "late": None, "tags": [{"a": 1}]},
    ]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())),
        pa.array(["x"], pa.dictionary(pa.int32(), pa.string())),
        pa.array([b"\xff"]),
        pa.array([1], pa.duration("s")),
        pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("others", [True, False])
def test_a_column_of_any_type_of_arrow_is_no_reason_to_fail(column, others, tmp_path):
    table = pa.table({"prompt": ["one"], "unused": column})
    pa.parquet.write_table(table, tmp_path / "a.parquet") if column.type != pa.month_day_nano_interval() else None
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    if others:
        write_rows(tmp_path / "c.jsonl", [{"prompt": "one", "unused": 5}])
    assert {row["prompt"] for row in read(tmp_path)} == {"one"}


def test_a_short_line_of_csv_lacks_its_last_cells(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,completion,prompt\na,b,c\n\n"d\ne"\nf,g,h,,\n')
    assert read(tmp_path / "rows.csv") == [
        {"prompt": "a", "completion": "b", "prompt.2": "c"},
        {"prompt": "d\ne", "completion": None, "prompt.2": None},
        {"prompt": "f", "completion": "g", "prompt.2": "h"},
    ]


# ---- Paths ----


names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=8)
odd_names = (names | st.lists(st.sampled_from(CASES["names"]), min_size=1).map("".join)).filter(
    lambda name: not name.startswith((".", "__")) and len(name.encode()) < 80
)


@settings(examples, max_examples=20)
@given(odd_names, odd_names)
def test_a_path_that_exists_is_taken_as_written(tmp_path_factory, folder, name):
    root = tmp_path_factory.mktemp("rows")
    (root / folder).mkdir()
    for other in ("a", "b", "train"):
        write_rows(root / f"{other}.jsonl", [{"prompt": "another file"}])
    path = write_rows(root / folder / f"{name}.jsonl", [ROW])
    Dataset.from_list([ROW]).save_to_disk(root / "saved")
    (root / "saved").rename(root / f"saved {folder}")
    assert read(path) == read(root / f"saved {folder}") == read(root, data_files=f"{folder}/{name}.jsonl") == [ROW]
    assert read(root, data_files={"test": [f"{folder}/{name}.jsonl"]}, split="test") == [ROW]


@pytest.mark.parametrize("name", ["json", "csv", "text", "parquet", "imagefolder"])
def test_a_folder_named_like_a_loader_is_that_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "other.jsonl", [{"prompt": "another file"}])
    (tmp_path / name).mkdir()
    write_rows(tmp_path / name / "rows.jsonl", [ROW])
    assert read(name) == read(f"./{name}") == [ROW]


def test_a_loader_alone_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "other.jsonl", [ROW])
    with pytest.raises(RecipeError, match="json: no such file or folder"):
        read("json")
    assert read("json", data_files="other.jsonl") == [ROW]


@pytest.mark.parametrize(("files", "splits"), CASES["splits"], ids=str)
def test_no_file_of_a_split_is_left_out(files, splits, tmp_path, caplog):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"file\n{name}\n" if name.endswith("csv") else json.dumps({"file": name}))
    for split, expected in splits.items():
        if split == "unread":
            assert "not read" in caplog.text and all(name in caplog.text for name in expected)
        else:
            assert [row["file"] for row in read(tmp_path, split)] == expected


@pytest.mark.parametrize(
    ("split", "expected"), [("train[1:3]", [1, 2]), ("train[:50%]", [0, 1]), ("test+train[:1]", [9, 0])]
)
def test_a_split_may_be_an_expression(split, expected, tmp_path):
    (tmp_path / "files").mkdir()
    write_rows(tmp_path / "files" / "train.jsonl", [{"n": n} for n in range(4)])
    write_rows(tmp_path / "files" / "test.jsonl", [{"n": 9}])
    splits = DatasetDict(
        {"train": Dataset.from_list([{"n": n} for n in range(4)]), "test": Dataset.from_list([{"n": 9}])}
    )
    splits.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "files"):
        assert [row["n"] for row in read(path, split)] == expected


def test_the_configurations_of_a_readme_are_those_of_a_cloned_data_set(tmp_path):
    for name in ("en/a.jsonl", "en/b.jsonl", "de/c.jsonl", "held.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, [{"file": name}])
    (tmp_path / "README.md").write_text(CASES["readme"])
    assert [row["file"] for row in read(tmp_path)] == ["en/a.jsonl", "en/b.jsonl"]
    assert [row["file"] for row in read(tmp_path, "test")] == ["held.jsonl"]
    assert [row["file"] for row in read(tmp_path, name="de")] == ["de/c.jsonl"]
    with pytest.raises(RecipeError, match="no configuration 'fr'. Known: en, de"):
        read(tmp_path, name="fr")


# ---- Refusals ----


@pytest.mark.parametrize(("name", "content", "message"), CASES["unreadable"])
def test_what_cannot_be_read_is_refused_with_its_place(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RecipeError, match=f"^[^\n]*{message}"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "txt"])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_another_encoding_is_refused_with_line_and_column(encoding, kind, compression, tmp_path):
    path = tmp_path / f"rows.{kind}{compression}"
    content = "the caf\xe9\n" if kind == "txt" else TEXTS[kind]([{"text": "caf\xe9"}]).replace("\\u00e9", "\xe9")
    path.write_bytes(COMPRESS[compression](content.encode(encoding)))
    line = 2 if kind in ("csv", "tsv") and encoding == "latin-1" else 1
    column = 1 if encoding == "utf-16" else content.split("\n")[line - 1].index("\xe9") + 1
    with pytest.raises(RecipeError, match=rf"rows\.{kind}.*, line {line}, column {column}: .*UTF-8"):
        read(path)


CHECKED = [".gz", ".bz2", ".xz", ".zip"]  # formats with a checksum: in the others nothing tells of a changed byte


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
@pytest.mark.parametrize(
    ("compression", "damage"), [*((name, damage) for name in CHECKED for damage in ("cut", "changed")), (".zst", "cut")]
)
def test_a_damaged_file_is_refused_by_name(kind, compression, damage, tmp_path):
    rows = [{"text": f"row {i} {i * 7919 % 1000}"} for i in range(2000)]
    data = BINARY[kind](rows) if kind in BINARY else TEXTS[kind](rows).encode()
    name = f"rows.{kind}{compression}"
    data = zip_file(data, f"rows.{kind}") if compression == ".zip" else COMPRESS[compression](data)
    middle = len(data) // 2
    data = data[:middle] if damage == "cut" else data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RecipeError, match=name.replace(".", r"\.")):
        read(tmp_path / name)


def test_a_file_that_was_changed_is_read_again(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"n": 1}])
    assert read(path) == read(path) == [{"n": 1}]
    write_rows(path, [{"n": 23}])
    assert read(path) == [{"n": 23}]
    assert load_source(str(path), "train")._fingerprint == load_source(str(path), "train")._fingerprint
