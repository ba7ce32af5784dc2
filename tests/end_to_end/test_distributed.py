"""Each task under DDP, ZeRO-2 and ZeRO-3 with two processes (gloo), against one process with the same global batch."""

import json
import shutil
import sys

import pytest
from conftest import ROOT, launch, options
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tunebook.recipe import parse

sys.path.insert(0, str(ROOT / "src"))
import dpo  # noqa: E402
import rm  # noqa: E402
import sft  # noqa: E402

pytestmark = pytest.mark.slow
SCRIPTS = {"sft": sft, "rm": rm, "dpo": dpo}
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
def one_process(tiny, sft_rows, pair_rows, tmp_path_factory):
    """History of a run of each task on one process."""
    folder, rows = tmp_path_factory.mktemp("one"), {"sft": sft_rows, "rm": pair_rows, "dpo": pair_rows}
    trainers = {
        task: script.main(parse(task, recipe(task, tiny, rows[task], folder / task)))
        for task, script in SCRIPTS.items()
    }
    return rows, {task: trainer.state.log_history for task, trainer in trainers.items()}


def history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def metrics(log, *names):
    return [entry[name] for entry in log for name in names if name in entry]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("task", SCRIPTS)
def test_two_processes_equal_one(task, strategy, one_process, tiny, tmp_path):
    rows, expected = one_process
    keys = recipe(task, tiny, rows[task], tmp_path / "o")
    done = launch(task, *options(keys), config=strategy, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    log = history(tmp_path / "o")
    names = {"rm": ["accuracy", "margin"], "dpo": ["rewards/accuracies", "logps/chosen"]}
    for name in ["loss", "grad_norm", *names.get(task, [])]:
        assert metrics(log, name) == pytest.approx(metrics(expected[task], name), abs=1e-4, rel=1e-4), name
    evaluated = json.loads((tmp_path / "o" / "eval_results.json").read_text())["eval_loss"]
    assert evaluated == pytest.approx(metrics(expected[task], "eval_loss")[-1], rel=1e-4)
    HEADS[task].from_pretrained(tmp_path / "o" / "checkpoint-4")

    if strategy == "zero3" and task == "sft":
        shutil.rmtree(tmp_path / "o" / "checkpoint-4")
        done = launch(task, *options(keys), config=strategy, processes=2)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "checkpoint-2" in done.stderr
        assert metrics(history(tmp_path / "o"), "loss") == pytest.approx(metrics(log, "loss"), rel=1e-6)
