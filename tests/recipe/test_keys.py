"""keys.jsonl: the keys of the installed classes, from which wrong keys are answered before torch is loaded."""

import resource
import subprocess
import sys

import pytest
from conftest import ROOT
from jsonschema import Draft202012Validator

from tunebook.errors import RecipeError
from tunebook.recipe import parse, read_recipe
from tunebook.recipe.keys import FILE, TASK_NAMES, help_text, json_schema, saved_keys, write_keys
from tunebook.recipe.schema import TASKS, list_keys, task_keys
from tunebook.recipe.words import find_task, refuse_wrong_keys
from tunebook.tools.keys import list_words, write_page

RECIPES = sorted(path for path in ROOT.glob("recipes/**/*.yaml"))
WITHOUT_TORCH = """
import sys
from tunebook.errors import RecipeError
from tunebook.recipe.words import refuse_wrong_keys
try:
    refuse_wrong_keys("sft", ["--learning_rat", "1"])
except RecipeError as error:
    print(error, [name for name in sys.modules if name in ("torch", "transformers", "trl")])
"""


def test_the_file_has_the_keys_of_the_installed_classes(tmp_path):
    write_keys(list_keys(), list_words(), tmp_path / "keys.jsonl")
    assert (tmp_path / "keys.jsonl").read_text() == FILE.read_text(), "Run make keys."
    assert tuple(TASKS) == TASK_NAMES


def test_the_page_of_keys_is_made_from_them():
    assert (ROOT / "docs" / "keys.md").read_text() == write_page(list_keys()), "Run make keys."


def test_with_another_version_of_a_package_or_another_key_of_ours_the_classes_are_asked(tmp_path):
    other = tmp_path / "keys.jsonl"
    for origin in ("trl", "tunebook"):
        other.write_text(FILE.read_text().replace(f'"{origin}": "', f'"{origin}": "0', 1))
        assert saved_keys.__wrapped__(other) is None


def test_a_wrong_key_is_answered_without_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True)
    assert done.stdout == "`learning_rat` is not a key. Did you mean learning_rate or muon_learning_rate? []\n"


def children_seconds() -> float:
    """Seconds of CPU that this process's children took; other tests may keep the clock waiting."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("words", "seconds", "code", "said"),
    [
        (["src/sft.py", "--config", "recipes/quickstart/sft.yaml", "--learning_rat", "1"], 1.5, 2, "learning_rate"),
        (["src/dpo.py", "--help"], 1, 0, "--beta  float"),
        (["-m", "tunebook.tools.cli", "sft", "recipes/quickstart/sft.yaml", "--beta", "1"], 1.5, 2, "key of dpo"),
        (["-m", "tunebook.tools.cli", "check", "recipes/quickstart/sft.yaml", "--beta", "1"], 1.5, 2, "key of dpo"),
        (["-m", "tunebook.tools.cli", "chekc"], 1.5, 2, "Did you mean 'check'"),
        (["-m", "tunebook.tools.cli", "--help"], 0.4, 0, "benchmark"),
        (["-m", "tunebook.tools.cli", "rm", "--help"], 0.4, 0, "tunebook schema rm --text"),
    ],
)
def test_help_and_mistakes_do_not_wait_for_the_libraries(words, seconds, code, said):
    before = children_seconds()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert children_seconds() - before < seconds


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_schema_takes_every_shipped_recipe(path):
    schema = json_schema(find_task(path), list_keys())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(read_recipe(path))


@pytest.mark.parametrize(
    "mistake",
    [{"learning_rat": 1}, {"learning_rate": -1}, {"packing": "maybe"}, {"eval_strategy": "now"}, {"torch_dtype": "x"}],
)
def test_the_schema_refuses_what_the_parser_refuses(mistake):
    recipe = read_recipe(ROOT / "recipes/quickstart/sft.yaml")
    with pytest.raises(RecipeError):
        parse("sft", recipe | mistake)
    assert not Draft202012Validator(json_schema("sft", list_keys())).is_valid(recipe | mistake)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_help_names_every_key_once_with_its_choices(task):
    text = help_text(task, saved_keys())
    for name in task_keys(task):
        assert text.count(f"  --{name}  ") <= 1
    assert "One of no, steps, epoch." in text and "Literal" not in text


def test_wrong_keys_of_file_and_command_line_are_said_at_once(tmp_path):
    recipe = tmp_path / "sft.yaml"
    recipe.write_text("_x: 1\nlr: 1e-5\nmodel_init_kwargs: {a: 1}\n1: 2\n")
    with pytest.raises(RecipeError) as error:
        refuse_wrong_keys("sft", ["--config", str(recipe), "--model_init_kwargs.b", "1", "--betta=3"])
    assert [line.split("`")[1] for line in str(error.value).splitlines()] == ["lr", "betta"]


def test_the_words_of_other_tools_are_answered_with_our_key():
    words = {"max_epochs": "num_train_epochs", "pretrain": "model_name_or_path"}
    for word, key in words.items():
        with pytest.raises(RecipeError, match=f"`{word}` is a word of OpenRLHF. Set `{key}`"):
            refuse_wrong_keys("sft", [f"--{word}", "1"])
    words = {"cutoff_len": "max_length", "sequence_len": "max_length", "base_model": "model_name_or_path"}
    words |= {
        "micro_batch_size": "per_device_train_batch_size",
        "lora_rank": "lora_r",
        "val_set_size": "test_split_size",
    }
    words |= {
        "num_epochs": "num_train_epochs",
        "lr": "learning_rate",
        "epochs": "num_train_epochs",
        "model": "model_name",
    }
    for word, key in words.items():
        with pytest.raises(RecipeError, match=f"`{word}` .*Set `{key}"):
            refuse_wrong_keys("sft", [f"--{word}", "1"])
