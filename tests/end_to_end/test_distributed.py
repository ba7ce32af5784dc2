"""Each task under DDP, ZeRO-2 and ZeRO-3 with two processes (gloo), against one process with the same global batch."""

import json

import pytest
from conftest import assert_same_weights, launch_runs, short_recipe, train
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tunebook import run_script
from tunebook.files import read_rows
from tunebook.following.generations import generate

pytestmark = pytest.mark.slow
REWARDS = ["rewards/accuracies", "logps/chosen"]
# task, keys, class of the saved model, metrics besides the losses
RUNS = {
    "sft": ("sft", {}, AutoModelForCausalLM, []),
    "rm": ("rm", {"packing": True}, AutoModelForSequenceClassification, ["accuracy", "margin"]),
    "dpo": ("dpo", {"packing": True, "ref_offload": True}, AutoModelForCausalLM, REWARDS),
    "dpo with LoRA": ("dpo", {"packing": True, "use_peft": True}, AutoPeftModelForCausalLM, REWARDS),
    "dpo further": ("dpo", {"use_peft": True, "adapter_name_or_path": "ADAPTER"}, AutoPeftModelForCausalLM, REWARDS),
}
FORCED = ["sft", "dpo", "dpo further"]  # are resumed from a checkpoint of another launch
KEYS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "do_eval": True, "test_split_size": 8}
KEYS |= {"global_batch_size": 8, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
# With dropout, so that the random state matters
EVALUATED = {"model_init_kwargs": {"attention_dropout": 0.3}, "eval_strategy": "steps", "eval_steps": 2}
EVALUATED |= {"learning_rate": 0.1}  # large, so that outputs differ between prompts
GREEDY = {"max_new_tokens": 6, "do_sample": False}
PROMPTS = ["what is 2 plus 3?", "what", "one and four make"]
GENERATING = {"eval_prompts": PROMPTS, "eval_generation_kwargs": GREEDY}


@pytest.fixture(scope="module")
def recipes(tiny, sft_rows, pair_rows, tmp_path_factory):
    """Task and recipe of each run, by the folder of all."""
    rows, adapter = {"sft": sft_rows, "rm": pair_rows, "dpo": pair_rows}, tmp_path_factory.mktemp("adapter")
    train("sft", tiny, sft_rows, adapter, use_peft=True, new_tokens=["<tool>"], learning_rate=0.01)

    def recipe(folder, task, changes):
        keys = {key: str(adapter) if value == "ADAPTER" else value for key, value in changes.items()}
        return task, short_recipe(tiny, rows[task], folder, **KEYS, **keys)

    return lambda folder: {name: recipe(folder / name, *run[:2]) for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def one_process(recipes, tmp_path_factory):
    """Folder of the runs of one process."""
    folder = tmp_path_factory.mktemp("one")
    for task, keys in recipes(folder).values():
        run_script(task, keys)
    return folder


@pytest.fixture(scope="module", params=["ddp", "zero2", "zero3"])
def two_processes(request, recipes, one_process, tmp_path_factory):
    """Folder of the runs of two processes, of one that resumes from a checkpoint of the first, of some that resume from
    one process's, and of two with evaluations, with and without generations."""
    folder = tmp_path_factory.mktemp(request.param)
    runs = recipes(folder)
    resumed = {"output_dir": str(folder / "resumed"), "resume_from_checkpoint": str(folder / "sft" / "checkpoint-2")}
    evaluated = runs["sft"][1] | EVALUATED
    more = [runs["sft"][1] | resumed, evaluated | {"output_dir": str(folder / "silent")}]
    more += [evaluated | GENERATING | {"output_dir": str(folder / "generating")}]
    runs |= {f"{name} of one process": of_another(*runs[name], one_process / name) for name in FORCED}
    launch_runs([*runs.values(), *(("sft", keys) for keys in more)], config=request.param, processes=2)
    return folder


def of_another(task, keys, run) -> tuple[str, dict]:
    """Task and recipe that resume from another launch's checkpoint after 2 steps."""
    changes = {"output_dir": f"{keys['output_dir']} of one process", "force_resume": True}
    return task, keys | changes | {"resume_from_checkpoint": str(run / "checkpoint-2")}


def metrics(folder, name) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    log.append(json.loads((folder / "eval_results.json").read_text()))
    return [entry[name] for entry in log if name in entry]


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_equal_one(run, one_process, two_processes):
    _, _, model, rewards = RUNS[run]
    for name in ["loss", "grad_norm", "eval_loss", *rewards]:
        expected = metrics(one_process / run, name)
        assert expected and metrics(two_processes / run, name) == pytest.approx(expected, abs=1e-4, rel=1e-4), name
    model.from_pretrained(two_processes / run / "checkpoint-4")


def test_two_processes_resume_from_their_checkpoint(two_processes):
    assert not (two_processes / "resumed" / "checkpoint-2").exists()
    assert metrics(two_processes / "resumed", "loss") == pytest.approx(metrics(two_processes / "sft", "loss"), rel=1e-6)


@pytest.mark.parametrize("run", FORCED)
def test_a_checkpoint_of_another_launch_is_resumed_by_force(run, one_process, two_processes, recipes, tmp_path):
    """The loss after the checkpoint is that of its weights; the steps after it have another optimizer's state."""
    expected = metrics(one_process / run, "loss")[:3]
    assert metrics(two_processes / f"{run} of one process", "loss")[:3] == pytest.approx(expected, rel=1e-4)
    task, keys = of_another(*recipes(tmp_path)[run], two_processes / run)
    run_script(task, keys)
    assert metrics(tmp_path / f"{run} of one process", "loss")[:3] == pytest.approx(expected, rel=1e-4)


def test_two_processes_generate_what_one_does_and_train_as_without(two_processes, tiny):
    assert_same_weights(two_processes / "generating", two_processes / "silent")
    rows = read_rows(two_processes / "generating" / "generations.jsonl")
    model = AutoModelForCausalLM.from_pretrained(two_processes / "generating")
    outputs = generate(model, AutoTokenizer.from_pretrained(tiny), PROMPTS, batch_size=1, **GREEDY)
    assert [(row["prompt"], row["output"]) for row in rows if row["step"] == 4] == [*zip(PROMPTS, outputs, strict=True)]
    assert len(set(outputs)) > 1
