"""Each task under DDP, ZeRO-2 and ZeRO-3 with two processes (gloo), against one process with the same global batch."""

import json

import pytest
from conftest import launch_runs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tunebook import run_script
from tunebook.recipe import TASKS

pytestmark = pytest.mark.slow
HEADS = {"sft": AutoModelForCausalLM, "rm": AutoModelForSequenceClassification, "dpo": AutoModelForCausalLM}


def recipe(task, tiny, rows, output_dir) -> dict:
    return {
        "model_name_or_path": str(tiny),
        "dataset_name": str(rows),
        "output_dir": str(output_dir),
        "bf16": False,
        "max_steps": 4,
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "do_eval": True,
        "test_split_size": 8,
        "per_device_eval_batch_size": 4,
        "disable_tqdm": True,
        **({} if task == "sft" else {"packing": True}),
        **({"ref_offload": True} if task == "dpo" else {}),
    }


@pytest.fixture(scope="module")
def recipes(tiny, sft_rows, pair_rows):
    """Recipes of all tasks by their output folder."""
    rows = {"sft": sft_rows, "rm": pair_rows, "dpo": pair_rows}
    return lambda folder: {task: recipe(task, tiny, rows[task], folder / task) for task in TASKS}


@pytest.fixture(scope="module")
def one_process(recipes, tmp_path_factory):
    """Folder of the runs of one process."""
    folder = tmp_path_factory.mktemp("one")
    for task, keys in recipes(folder).items():
        run_script(task, keys)
    return folder


@pytest.fixture(scope="module", params=["ddp", "zero2", "zero3"])
def two_processes(request, recipes, tmp_path_factory):
    """Folder of the runs of two processes, and of one more that goes on from a checkpoint of the first."""
    folder = tmp_path_factory.mktemp(request.param)
    runs = recipes(folder)
    resumed = {"output_dir": str(folder / "resumed"), "resume_from_checkpoint": str(folder / "sft" / "checkpoint-2")}
    launch_runs([*runs.items(), ("sft", runs["sft"] | resumed)], config=request.param, processes=2)
    return folder


def metrics(folder, name) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    log.append(json.loads((folder / "eval_results.json").read_text()))
    return [entry[name] for entry in log if name in entry]


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_equal_one(task, one_process, two_processes):
    names = {"rm": ["accuracy", "margin"], "dpo": ["rewards/accuracies", "logps/chosen"]}
    for name in ["loss", "grad_norm", "eval_loss", *names.get(task, [])]:
        expected = metrics(one_process / task, name)
        assert expected and metrics(two_processes / task, name) == pytest.approx(expected, abs=1e-4, rel=1e-4), name
    HEADS[task].from_pretrained(two_processes / task / "checkpoint-4")


def test_two_processes_go_on_from_their_checkpoint(two_processes):
    assert not (two_processes / "resumed" / "checkpoint-2").exists()
    assert metrics(two_processes / "resumed", "loss") == pytest.approx(metrics(two_processes / "sft", "loss"), rel=1e-6)
