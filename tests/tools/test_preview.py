"""A preview shows the rows that the trainer gets, token by token."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import short_recipe, write_rows
from PIL import Image
from rich.console import Console
from transformers import AutoTokenizer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from typer.testing import CliRunner

from tunebook.data import load_recipe_data
from tunebook.errors import RecipeError
from tunebook.recipe import parse
from tunebook.tools.cli import app, parse_recipe
from tunebook.tools.preview import CUT, MARKS, TRAINED, html_page, preview_rows, print_rows

EVIL = "<script>alert('1 & 2')</script>\n\tnaïve 🙂 日本"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    turns = [
        [("user", f"what is {i}?"), ("assistant", "five " * (1 + i)), ("user", "and?"), ("assistant", EVIL)]
        for i in range(6)
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    return write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


def recipe_of(task, tiny, rows, **keys):
    return parse(task, short_recipe(tiny, rows, "o", **keys))


def ids(tokens, *kinds):
    return [token.id for token in tokens if not kinds or token.marks[0] in kinds]


def trained(tokens):
    return [token.marks[0] == TRAINED for token in tokens if token.marks[0] != CUT]


@pytest.mark.parametrize(
    "keys",
    [{}, {"assistant_only_loss": True}, {"last_turn_only_loss": True}, {"assistant_only_loss": True, "max_length": 40}],
)
def test_what_is_marked_as_trained_are_the_labels_of_the_trainers_rows(tiny, chats, keys):
    recipe = recipe_of("sft", tiny, chats, **keys)
    train = load_recipe_data(recipe)[1].train
    rows, report = preview_rows(recipe, len(train))
    assert report.startswith(f"{len(train)} of 6 rows kept")
    for row, expected in zip(rows, train, strict=True):
        kept = [token for token in row["row"] if token.marks[0] != CUT]
        assert ids(kept) == expected["input_ids"]
        assert trained(kept) == [label != -100 for label in expected["labels"]]


def test_what_is_marked_as_trained_in_a_pair_is_the_collators_completion(tiny, pair_rows):
    recipe = recipe_of("dpo", tiny, pair_rows)
    train = load_recipe_data(recipe)[1].train
    rows, _ = preview_rows(recipe, 48)
    for row, expected in zip(rows, train, strict=True):
        batch = DataCollatorForPreference(pad_token_id=0)([expected])
        for side, tokens in enumerate(row.values()):
            length = int(batch["attention_mask"][side].sum())
            assert ids(tokens) == batch["input_ids"][side, :length].tolist()
            assert trained(tokens) == batch["completion_mask"][side, :length].bool().tolist()


def test_the_reward_is_read_at_the_last_token(tiny, pair_rows):
    for row in preview_rows(recipe_of("rm", tiny, pair_rows), 5)[0]:
        for tokens in row.values():
            assert trained(tokens) == [False] * (len(tokens) - 1) + [True]


def test_a_sample_is_rows_of_the_data_set(tiny, pair_rows):
    recipe = recipe_of("rm", tiny, pair_rows)
    every = load_recipe_data(recipe)[1].train["chosen_ids"]
    rows, _ = preview_rows(recipe, 3)
    assert len(rows) == 3 and all(ids(row["chosen"]) in list(every) for row in rows)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_what_max_length_cuts_off_is_shown_behind_what_is_kept(tiny, chats, pair_rows, task):
    source = chats if task == "sft" else pair_rows
    cut, _ = preview_rows(recipe_of(task, tiny, source, max_length=50 if task == "sft" else 15), 48)
    whole, _ = preview_rows(recipe_of(task, tiny, source, max_length=10**6), 48)
    assert any(CUT in {token.marks[0] for token in tokens} for row in cut for tokens in row.values())
    every = [{name: ids(tokens) for name, tokens in row.items()} for row in whole]
    assert all({name: ids(tokens) for name, tokens in row.items()} in every for row in cut)


def test_the_shared_prefix_ends_where_chosen_and_rejected_part(tiny, pair_rows):
    for row in preview_rows(recipe_of("dpo", tiny, pair_rows), 5)[0]:
        chosen, rejected = ids(row["chosen"]), ids(row["rejected"])
        part = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        for tokens in row.values():
            assert ["shared" in token.marks for token in tokens] == [i < part for i in range(len(tokens))]


def test_a_packed_row_shows_where_its_documents_begin(tiny, sft_rows):
    documents = [ids(row["row"]) for row in preview_rows(recipe_of("sft", tiny, sft_rows), 48)[0]]
    rows, report = preview_rows(recipe_of("sft", tiny, sft_rows, packing=True, max_length=100), 3)
    assert "packed into" in report
    for row in rows:
        tokens = row["row"]
        borders = [0, *(i for i, token in enumerate(tokens) if "document" in token.marks), len(tokens)]
        assert len(borders) > 2
        assert all(ids(tokens[a:b]) in documents for a, b in zip(borders, borders[1:], strict=False))


def test_the_tokens_texts_are_the_rows_text(tiny, chats):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for row in preview_rows(recipe_of("sft", tiny, chats), 6)[0]:
        tokens = row["row"]
        assert "".join(token.text for token in tokens) == tokenizer.decode(ids(tokens))
        assert {token.text for token in tokens if "special" in token.marks} == {"<|im_start|>", "<|im_end|>"}


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_rows_text_is_escaped_and_the_page_needs_nothing_else(tiny, chats):
    page = Page(html_page(*preview_rows(recipe_of("sft", tiny, chats), 2), "a <b> & c"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b", "link", "img"})
    assert not any(name in attributes for _, attributes in page.tags for name in ("src", "href"))
    assert "url(" not in page.text and "<script>alert('1 & 2')</script>↵\n⇥\tnaïve" in page.text.replace("◌", "")


def test_a_terminal_shows_the_text_of_both_sides_and_the_counts(tiny, pair_rows):
    rows, report = preview_rows(recipe_of("dpo", tiny, pair_rows), 1)
    console = Console(width=200, record=True, force_terminal=True, file=open("/dev/null", "w"))
    print_rows(rows, report, console)
    text = console.export_text()
    assert "1 of 1 rows kept" in text
    for side, tokens in rows[0].items():
        assert f"1. {side}: {len(tokens)} tokens, {sum(trained(tokens))} trained" in text
        assert all(line in text for line in "".join(token.text for token in tokens).split("\n"))


def test_the_command_takes_overrides_and_writes_a_page(tiny, pair_rows, tmp_path):
    recipe, page = tmp_path / "dpo.yaml", tmp_path / "page.html"
    recipe.write_text(f"model_name_or_path: {tiny}\noutput_dir: o\nbf16: false\ndataset_name: {pair_rows}\n")
    words = ["preview", str(recipe), "-n", "2", "--html", str(page), "--max_length", "15", "--beta=0.2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert len(re.findall("<section>", page.read_text())) == 2 and "15 tokens" in page.read_text()
    with pytest.raises(RecipeError, match="`bta` is not a key. Did you mean beta"):
        parse_recipe(recipe, None, ["--bta", "0.2"])
    with pytest.raises(RecipeError, match="first argument"):
        parse_recipe(recipe, None, ["--config", "other.yaml"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize(("scheme", "column"), [(1, "light"), (0, "dark")])
def test_a_browser_shows_the_legends_colours(tiny, pair_rows, tmp_path, scheme, column):
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(html_page(*preview_rows(recipe_of("dpo", tiny, pair_rows), 1), "rows"), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,300"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path}/profile"]
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    for name, mark in MARKS.items():
        colour = [int(mark[column][i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == colour).all(axis=1).sum() > 20, name
