"""A resumed run: each key acts or is refused, and nothing is loaded onto what it does not belong to."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights, copy_until, logged, read_cases, train
from safetensors.torch import load_file, save_file

from tunebook.errors import RecipeError
from tunebook.training.identity import BLOCK, BLOCKS, identify_weights

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "report_to": "none"}


@pytest.fixture(scope="module")
def first_part(tiny, sft_rows, tmp_path_factory):
    """The folder of a run of two steps, copied, by the keys that it was made with."""

    @functools.cache
    def made(keys: str) -> Path:
        folder = tmp_path_factory.mktemp("made") / "o"
        train("sft", tiny, sft_rows, folder, **SAVED | json.loads(keys))
        return folder

    def copied(folder: Path, **keys) -> Path:
        return Path(shutil.copytree(made(json.dumps(keys)), folder))

    return copied


@pytest.mark.parametrize(("made", "changed", "message", "forced"), read_cases("training/resumes.yaml"))
def test_what_a_checkpoint_does_not_fit_is_refused_by_name(
    made, changed, message, forced, first_part, tiny, sft_rows, tmp_path
):
    folder, keys = first_part(tmp_path / "o", **made), SAVED | {"max_steps": 3} | made | changed
    with pytest.raises(RecipeError, match=message):
        train("sft", tiny, sft_rows, folder, **keys)
    if forced:
        assert train("sft", tiny, sft_rows, folder, **keys, force_resume=True).state.global_step == 3
    elif forced is False:
        with pytest.raises(RecipeError, match=message):
            train("sft", tiny, sft_rows, folder, **keys, force_resume=True)


def test_a_new_optimizer_under_force_starts_with_an_empty_state(first_part, tiny, sft_rows, tmp_path):
    folder = first_part(tmp_path / "o")
    changed = {"optim": "rmsprop", "force_resume": True, "max_steps": 3, "lr_scheduler_type": "linear"}
    trainer = train("sft", tiny, sft_rows, folder, **SAVED | changed)
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {1.0}
    assert logged(trainer, "learning_rate")[-1] == pytest.approx(1e-3 * (1 - 2 / 3))


@pytest.mark.parametrize("optim", [None, "muon"])
def test_settings_of_the_optimizer_and_of_steps_act_after_a_resume(optim, first_part, tiny, sft_rows, tmp_path):
    folder = first_part(tmp_path / "o", **{"optim": optim} if optim else {})
    changed = {"learning_rate": 3e-4, "weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    changed |= {"max_steps": 8, "save_steps": 3, "logging_steps": 3, "optim": optim}
    trainer = train("sft", tiny, sft_rows, folder, **SAVED | changed)
    [adamw, plain] = [group for group in trainer.optimizer.param_groups if not group.get("use_muon")]
    assert (adamw["betas"], adamw["eps"], adamw["weight_decay"], plain["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.2, 0.0)
    entries = [entry for entry in trainer.state.log_history if "learning_rate" in entry and entry["step"] > 2]
    # Logged at each step is the rate of the step before the schedule's next one
    assert {entry["step"]: entry["learning_rate"] for entry in entries} == pytest.approx(
        {step: 3e-4 * (1 - (step - 1) / 8) for step in (3, 6, 8)}  # the last step is always logged
    )
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 3, 6, 8)}


def test_other_weights_under_the_same_name_are_refused_and_the_same_under_another_resume(tiny, sft_rows, tmp_path):
    model, folder = Path(shutil.copytree(tiny, tmp_path / "model")), tmp_path / "o"
    train("sft", model, sft_rows, folder, **SAVED)
    renamed = model.rename(tmp_path / "renamed")
    assert train("sft", renamed, sft_rows, folder, **SAVED | {"max_steps": 3}).state.global_step == 3
    weights = load_file(renamed / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, renamed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="the weights of .*renamed are not those of .*renamed then"):
        train("sft", renamed, sft_rows, folder, **SAVED | {"max_steps": 4})


def test_weights_are_identified_by_a_few_megabytes_of_them(tmp_path, monkeypatch):
    tensors = {"a": torch.zeros(8 * BLOCKS * BLOCK // 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    first = identify_weights(str(tmp_path), None)
    assert identify_weights(str(tmp_path), None) == first
    tensors["a"][-1] = 1  # of the last block
    save_file(tensors, tmp_path / "model.safetensors")
    assert identify_weights(str(tmp_path), None) != first


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "test_split_size": 8}
BEST |= {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 3}
BEST |= {"greater_is_better": True}  # so that the first step is the best


@pytest.fixture(scope="module")
def best(tiny, sft_rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("best") / "o"
    train("sft", tiny, sft_rows, folder, **BEST)
    return folder


def test_a_finished_run_with_a_best_model_trains_nothing_when_started_again(best, tiny, sft_rows, tmp_path):
    folder = Path(shutil.copytree(best, tmp_path / "o"))
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    trainer = train("sft", tiny, sft_rows, folder, **BEST)
    assert len(logged(trainer, "loss")) == 3 and trainer.state.global_step == 3
    assert_same_weights(folder, best)


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move], ids=["copied", "moved"])
def test_a_run_that_was_moved_or_copied_keeps_its_best_checkpoint(move, best, tiny, sft_rows, tmp_path, caplog):
    source = Path(shutil.copytree(best, tmp_path / "source"))
    folder = Path(move(source, tmp_path / "elsewhere"))
    trainer = train("sft", tiny, sft_rows, folder, **BEST | {"max_steps": 5})
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-1")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-5"}
    assert_same_weights(folder, best / "checkpoint-1")
    assert "does not exist" not in caplog.text


def test_a_best_checkpoint_that_is_gone_is_said_and_a_new_one_is_found(best, tiny, sft_rows, tmp_path, caplog):
    folder = Path(shutil.copytree(best, tmp_path / "o"))
    shutil.rmtree(folder / "checkpoint-1")
    trainer = train("sft", tiny, sft_rows, folder, **BEST | {"max_steps": 5})
    assert "is not there any more" in caplog.text
    assert trainer.state.best_global_step == 4


EARLY = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "test_split_size": 8}
EARLY |= {"early_stopping_patience": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def stopped(tiny, sft_rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "o"
    train("sft", tiny, sft_rows, folder, **EARLY, greater_is_better=True)  # so that the first step is the best
    return folder


def test_a_run_ends_after_as_many_evaluations_without_a_better_metric_as_it_may(stopped, tiny, sft_rows, tmp_path):
    state = json.loads((stopped / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["global_step"]) == (1, 3)
    assert {path.name for path in stopped.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert train("sft", tiny, sft_rows, tmp_path / "o", **EARLY).state.global_step == 6  # its loss falls all the time


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_ended_early_ends_at_the_same_step_when_it_is_resumed(step, stopped, tiny, sft_rows, tmp_path):
    copy_until(step, stopped, tmp_path / "o")
    trainer = train("sft", tiny, sft_rows, tmp_path / "o", **EARLY, greater_is_better=True)
    assert trainer.state.global_step == 3 and len(logged(trainer, "loss")) == 3
    assert_same_weights(tmp_path / "o", stopped)
