"""What is not a number ends a run, and is never saved, scored or counted as trained."""

import pytest
import torch
from conftest import build_model, save_model, train, write_rows
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

from tunebook.errors import RecipeError
from tunebook.files import read_rows
from tunebook.recipe import parse
from tunebook.tools.check import check
from tunebook.tools.score import score_file
from tunebook.training.finite import NotFiniteError


class Poison(TrainerCallback):
    """Makes a weight infinite after the second step."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            next(model.parameters()).data.view(-1)[0] = float("inf")


@pytest.mark.parametrize("task", ["sft", "rm", "dpo"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_checkpoint(task, packing, tiny, task_rows, tmp_path):
    keys = {"learning_rate": 4e9, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
    keys |= {"weight_decay": 0.0, "packing": packing, "max_length": 64}
    with pytest.raises(NotFiniteError, match=r"Step 2: the (loss|gradient norm) is (nan|inf).*checkpoint-1 is whole"):
        train(task, tiny, task_rows, tmp_path / "o", **keys)
    assert {path.name for path in (tmp_path / "o").glob("checkpoint-*")} == {"checkpoint-1"}
    assert not list((tmp_path / "o").glob("*.safetensors"))
    assert NotFiniteError.exit_code == 1


def test_weights_that_are_not_finite_are_never_a_checkpoint_nor_a_result(tiny, sft_rows, tmp_path):
    for name, keys in (("saved", {"save_strategy": "steps", "save_steps": 2}), ("final", {"max_steps": 2})):
        with pytest.raises(NotFiniteError, match="Step 2: the weights are not finite .*embed_tokens"):
            train("sft", tiny, sft_rows, tmp_path / name, callbacks=["test_finite:Poison"], **keys)
        assert not list((tmp_path / name).glob("**/*.safetensors"))


def test_score_writes_no_reward_that_is_not_a_number(tokenizer, tmp_path):
    config = LlamaConfig(**{**build_model(len(tokenizer)).config.to_dict(), "num_labels": 1})
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight[:] = float("nan")
    folder, rows = save_model(tmp_path / "m", model, tokenizer), write_rows(tmp_path / "r.jsonl", [{"text": "five"}])
    with pytest.raises(RecipeError, match="row 0: the reward is nan"):
        score_file(str(folder), str(rows), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("task", ["sft", "rm", "dpo"])
def test_a_run_without_a_full_batch_is_refused(task, tiny, task_rows, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", read_rows(task_rows)[:3])
    keys = {"dataloader_drop_last": True, "max_steps": None, "num_train_epochs": 1}
    with pytest.raises(RecipeError, match="drops the only batch"):
        train(task, tiny, few, tmp_path / "o", **keys)
    with pytest.raises(RecipeError, match="drops the only batch"):
        train(task, tiny, few, tmp_path / "o", **keys, packing=True, max_length=64)
    recipe = {
        "model_name_or_path": str(tiny),
        "dataset_name": str(few),
        "output_dir": str(tmp_path / "c"),
        "bf16": False,
    }
    with pytest.raises(RecipeError, match="drops the only batch"):
        check(parse(task, recipe | {"dataloader_drop_last": True}), "cpu")
