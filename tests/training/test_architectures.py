"""Every causal language model of transformers trains exactly, or is refused by name, as docs/models.md says."""

import pytest
import torch
from architectures import CASES, NAMES, PAGE, build_tiny, page, table_row, tiny_config
from conftest import short_recipe
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunebook.errors import RecipeError
from tunebook.recipe import parse
from tunebook.tools.check import check

BUILT = [name for name in NAMES if name not in CASES["not_built"]]
TABLE = {line.split("`")[1]: line for line in PAGE.read_text().splitlines() if line.startswith("| `")}


@pytest.mark.parametrize("name", BUILT)
def test_an_architecture_is_exact_or_refused_as_the_page_says(name):
    assert table_row(name) == TABLE[name], "python tests/architectures.py writes the page"


def test_the_page_has_every_architecture_and_nothing_else():
    assert PAGE.read_text() == page([TABLE[name] for name in BUILT])


@pytest.mark.parametrize("name", CASES["not_built"])
def test_what_is_not_built_cannot_be_built_or_run(name):
    with pytest.raises(Exception):  # noqa: B017 - whatever the architecture raises
        with torch.device("meta"):  # some have no small form: 20 GB
            parameters = build_tiny(name).num_parameters()
        assert parameters < 1e8
        table_row(name)


def test_nearly_all_train_unpacked_and_most_in_every_way():
    cells = {name: [cell.strip() for cell in row.split(" | ")[1:7]] for name, row in TABLE.items()}
    refused = [name for name, row in cells.items() if row[0] != "yes"]
    assert len(refused) <= 15, refused
    assert sum("no" not in row for row in cells.values()) >= 95


@pytest.mark.parametrize("name", BUILT)
def test_check_reads_every_architecture(name, tiny, tokenizer, sft_rows, tmp_path):
    config = tiny_config(CONFIG_MAPPING[name], CASES["particular"].get(name, {}))
    config.get_text_config().vocab_size = len(tokenizer)
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    try:
        check(parse("sft", short_recipe(tmp_path, sft_rows, tmp_path / "o", max_length=32)), device="cpu")
    except RecipeError as error:
        assert name in str(error)
