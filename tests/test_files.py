"""Rows on disk: each stands once, and what cannot be read is kept, named and stops nothing."""

import json

import pytest

from tunebook.files import append_rows, read_rows
from tunebook.following.generations import GENERATION
from tunebook.following.scores import SCORED_ROW, BenchmarkRow, read_scored_rows, write_scored_rows

LINES = {"cut": b'{"step": 1, "pro', "empty object": b"{}", "list": b"[1]", "null": b"null", "bytes": b"\xff\xfe{}"}
LINES |= {"zeros": bytes(9), "text": b"Traceback", "types": b'{"step": [], "prompt": 1, "output": 2, "benchmark": 3}'}


def generation(step: int, prompt: str, output: str = "five") -> dict:
    return {"step": step, "prompt": prompt, "output": output, "length": 4.0}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_that_is_no_row_is_named_kept_aside_and_ends_nothing(line, place, tmp_path, caplog):
    path, rows = tmp_path / "generations.jsonl", [generation(1, "a"), generation(1, "b")]
    lines = [json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join([*lines[:place], line, *lines[place:]]))
    assert [row.model_dump() for row in read_rows(path, GENERATION)] == rows
    assert f"line {place + 1} is not a row" in caplog.text
    append_rows(path, [generation(2, "a")], "step", kind=GENERATION)
    assert read_rows(path) == [*rows, generation(2, "a")]
    assert (tmp_path / "generations.jsonl.unreadable").read_bytes() == line + b"\n"


def test_rows_of_a_step_that_is_repeated_replace_those_before(tmp_path):
    path = tmp_path / "generations.jsonl"
    for step, output in ((1, "x"), (2, "x"), (2, "y")):
        append_rows(path, [generation(step, prompt, output) for prompt in "aab"], "step", kind=GENERATION)
    assert [(row["step"], row["prompt"], row["output"]) for row in read_rows(path)] == [
        *((1, prompt, "x") for prompt in "aab"),
        *((2, prompt, "y") for prompt in "aab"),
    ]


def test_a_benchmark_has_one_row_per_step(tmp_path):
    path = tmp_path / "benchmarks.jsonl"
    rows = [BenchmarkRow(1, "a", "m", status="failed"), BenchmarkRow(1, "b", "m"), BenchmarkRow(2, "a", "m")]
    for row in [*rows, done := BenchmarkRow(1, "a", "m", scores={"a": {"acc": 0.5}})]:
        write_scored_rows(path, [row])
    assert read_scored_rows(path) == [rows[1], rows[2], done]
    assert SCORED_ROW.validate_python(vars(done)) == done


def test_a_disk_that_fills_leaves_the_rows_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}])
    monkeypatch.setattr("pathlib.Path.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        append_rows(path, [{"a": 2}])
    assert read_rows(path) == [{"a": 1}] and [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
