"""What recipes of any content and any bytes give: one short message that shows no secret."""

import random
import re
import time

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from tunebook.errors import RecipeError, brief, plain
from tunebook.files import terminal
from tunebook.recipe import parse, read_recipe
from tunebook.recipe.content import masked
from tunebook.recipe.parser import TASKS
from tunebook.recipe.schema import keys_of

TOKENS = ["hf_" + "a1B2" * 9, "ghp_" + "a1B2" * 9, "sk-" + "a1B2" * 9, "AKIA" + "A1B2" * 4, "glpat-" + "a1B2" * 6]
SECRET = "correct horse battery"


def text_keys(task: str) -> list[str]:
    """The keys of a task that hold text, at any depth."""
    keys = {name: hint for cls in TASKS[task] for name, (_, hint) in keys_of(cls).items()}
    return [name for name, hint in keys.items() if re.search("str|dict|Any", str(hint))]


@pytest.mark.parametrize("task", TASKS)
def test_a_secret_is_refused_in_every_key_and_not_shown(task, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    draw = random.Random(0)
    for name in text_keys(task):
        secret = draw.choice([*TOKENS, SECRET])
        for value in (secret, f"a {secret} b", [secret], {"a": {"b": [secret]}}, {secret: 1}):
            with pytest.raises(RecipeError) as error:
                parse(task, {"model_name_or_path": "m", "dataset_name": "d", name: value})
            assert f"`{name}`" in str(error.value) and secret not in str(error.value)


def test_what_only_looks_like_a_secret_is_taken(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("API_KEY", "none")
    run = {"model_name_or_path": "org/hf_model", "dataset_name": "false", "output_dir": "none/sk-1", "bf16": False}
    assert parse("sft", run).given["output_dir"] == "none/sk-1"


def test_passwords_in_addresses_are_masked_in_messages_and_files():
    address = "https://me:pass@host/x?a=1&token=abc&b=2"
    shown = "https://me:***@host/x?a=1&token=***&b=2"
    assert plain(address) == shown and masked({"a": [address, 1], "b": None}) == {"a": [shown, 1], "b": None}
    assert plain("s3://bucket/a@b") == "s3://bucket/a@b" and plain("http://host:80/@x") == "http://host:80/@x"


@given(st.text())
def test_no_control_character_reaches_a_terminal(text):
    assert all(c.isprintable() or c in "\n\t" for c in plain(text))


def test_markup_of_others_is_shown_as_it_is():
    from rich.text import Text

    assert Text.from_markup(terminal("[/red] [bold]x[/]\x1b[2J")).plain == "[/red] [bold]x[/]\\x1b[2J"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "empty": b"",
    "null": b"null",
    "utf-16": "max_steps: x".encode("utf-16"),
    "not utf-8": b"max_steps: \xff\xfe\xfa",
    "zeros": bytes(50),
    "brackets": b"[" * 10_000,
    "null key": b"null: 1",
    "number as key": b"5: 1",
    "list as key": b"? [1, 2]\n: 1",
    "bomb": BOMB.encode(),
    "bomb in a key": BOMB.replace("i: &i", "model_init_kwargs: &i").encode(),
    "itself": b"model_init_kwargs: &a {b: *a}",
    "large number": b"learning_rate: 1" + b"0" * 400,
    "large integer": b"seed: 1" + b"0" * 5000,
    "infinite": b"save_steps: .inf",
    "date": b"run_name: 2026-99-99",
    "long": b"learning_rate: " + b"x" * 1_000_000,
    "escape": b'"\\e[31mkey": 1',
    "tag": b"run_name: !!python/object/apply:os.system [ls]",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_recipe_of_any_content_gives_a_short_message(content, tmp_path):
    (tmp_path / "r.yaml").write_bytes(content)
    start = time.process_time()
    with pytest.raises(RecipeError) as error:
        parse("sft", read_recipe(tmp_path / "r.yaml"))
    assert len(str(error.value)) < 5000 and time.process_time() - start < 20


@pytest.mark.parametrize("seed", range(40))
def test_a_recipe_with_bytes_changed_is_read_or_refused(seed, tmp_path):
    draw = random.Random(seed)
    path = draw.choice(sorted((ROOT / "recipes").rglob("*.yaml")))
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 12)):
        place, change = draw.randrange(len(content)), draw.randrange(4)
        if change == 0:
            content[place] = draw.randrange(256)
        elif change == 1:
            del content[place : place + draw.randint(1, 20)]
        else:
            content[place:place] = draw.choice([b"\n", b": ", b"- ", b"*a ", b"[", b"}", b"1e999", b"\x00", b"null"])
    (tmp_path / "r.yaml").write_bytes(content)
    try:
        parse(path.parent.name if path.parent.name in TASKS else path.stem, read_recipe(tmp_path / "r.yaml"))
    except RecipeError as error:
        assert len(str(error)) < 5000


@given(
    st.recursive(
        st.text() | st.binary() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_a_value_of_any_size_is_shown_in_200_characters(value):
    assert len(brief(value)) < 220 * 6  # an escaped character takes up to 6
