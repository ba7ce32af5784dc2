"""docs/scaling.md: its tables are what `tunebook check` estimates."""

import pytest
import scaling

LINES = scaling.PAGE.read_text().splitlines()
ROWS = [line for line in LINES if scaling.ROW.fullmatch(line)]
CONTEXT_ROWS = [line for line in LINES if scaling.CONTEXT_ROW.fullmatch(line)]


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith(("| 1B | 1 |", "| 8B | 1 |", "| 8B | 8 |"))])
def test_a_row_of_the_table_is_the_estimate(row):
    assert scaling.fill(row) == row


def test_activations_by_length_are_the_estimate():
    assert scaling.fill(CONTEXT_ROWS[0]) == CONTEXT_ROWS[0]


def test_every_recommended_run_leaves_a_tenth_of_80_gb():
    numbers = [int(cell) for row in ROWS for cell in row.split("|")[6:9]]
    assert len(numbers) == 3 * len(ROWS) and max(numbers) <= 72


def test_every_row_is_read_and_each_size_has_runs_on_1_8_and_64_gpus():
    assert len([line for line in LINES if line.startswith("| ") and "B |" in line[:7]]) == len(ROWS) + len(CONTEXT_ROWS)
    assert {scaling.ROW.fullmatch(row).groups()[:2] for row in ROWS} == {
        (size, gpus) for size in scaling.MODELS for gpus in ("1", "8", "64")
    }
