"""What cannot be trained or saved is refused before rows and weights are read, in the run as in check."""

import re
from inspect import getsource
from pathlib import Path

import pytest
from conftest import read_cases, short_recipe, train
from transformers import PreTrainedModel

from tunebook import run_script
from tunebook.errors import RecipeError
from tunebook.recipe import parse
from tunebook.tools import cli
from tunebook.tools.check import check
from tunebook.training.refusals import LOADING

CASES = read_cases("training/refusals.yaml")


def words(samples, prompts, outputs):
    return {"words": [len(output.split()) for output in outputs]}


def refuse_to_read(*args, **kwargs):
    raise AssertionError("rows are read")


@pytest.mark.parametrize(("task", "keys", "message"), CASES)
def test_it_is_refused_before_rows_and_weights(task, keys, message, tiny, sft_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("tunebook.training.run.load_recipe_data", refuse_to_read)
    monkeypatch.setattr("tunebook.tools.check.load_recipe_data", refuse_to_read)
    (tmp_path / "file").touch()
    recipe = short_recipe(tiny, sft_rows, tmp_path / "out") | keys
    recipe["output_dir"] = recipe["output_dir"].replace("<file>", str(tmp_path / "file"))
    for start in (lambda: run_script(task, recipe), lambda: check(parse(task, recipe), "cpu")):
        with pytest.raises(RecipeError) as error:
            start()
        assert message in str(error.value)
    assert not list((tmp_path / "out").glob("[!.]*"))  # nothing but its lock


def test_check_lets_a_gpu_do_what_this_machine_cannot(tiny, sft_rows, tmp_path):
    recipe = short_recipe(tiny, sft_rows, tmp_path / "out", activation_offloading=True)
    assert check(parse("sft", recipe), "h100-80gb") == 0


def test_the_arguments_of_from_pretrained_are_known():
    source = getsource(PreTrainedModel.from_pretrained)
    assert {name for name in re.findall(r'[^_]kwargs\.pop\("(\w+)"', source) if name[0] != "_"} <= LOADING


def test_a_metric_that_no_evaluation_has_ends_the_run_at_the_first_one_with_the_names(tiny, sft_rows, tmp_path):
    keys = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "test_split_size": 4}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_length", "eval_prompts": ["five"]}
    keys |= {"eval_metrics": ["test_refusals:words"], "eval_generation_kwargs": {"max_new_tokens": 2}}
    with pytest.raises(RecipeError, match=r"`metric_for_best_model` eval_length: the evaluation has loss, .*, words"):
        train("sft", tiny, sft_rows, tmp_path / "out", **keys)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


COMMANDS = {
    "score": lambda place: cli.score("none", "none.jsonl", place),
    "merge": lambda place: cli.merge(Path("none"), place),
    "benchmark": lambda place: cli.benchmark("none", ["gsm8k"], place),
    "preview": lambda place: cli.preview(None, Path("none.yaml"), html=place),
    "report": lambda place: cli.report([Path("none")], place),
    "migrate": lambda place: cli.migrate("none.yaml", place),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("above", ["/proc", "<file>"])
def test_a_command_refuses_a_place_that_cannot_be_written_first(command, above, tmp_path):
    (tmp_path / "file").touch()
    place = Path(above.replace("<file>", str(tmp_path / "file"))) / "page.html"
    with pytest.raises(RecipeError, match=f"{place} cannot be written"):
        COMMANDS[command](place)


def test_push_refuses_a_folder_in_which_nothing_waits(tmp_path):
    with pytest.raises(RecipeError, match="no models that wait"):
        cli.push(tmp_path / "none")
