"""Pairs from Python and in evaluation: rows as they are, each pair counted once, and a tie counted half."""

import numpy as np
import pytest
import torch
from conftest import logged, train
from datasets import load_dataset

from tunebook.following.pairs import count_wins, show_accuracy
from tunebook.training.objectives import reward_loss
from tunebook.training.trainers import pair_metrics

EVALUATED = {"eval_strategy": "steps", "eval_steps": 3, "test_split_size": 11, "eval_on_start": True}
EVALUATED |= {"per_device_eval_batch_size": 4}


@pytest.fixture(scope="module")
def trainers(tiny, sft_rows, pair_rows, tmp_path_factory):
    """Task -> its trainer after a run, and its rows as they are."""

    def trained(task: str, rows):
        keys = EVALUATED | ({"subset_column": "subset"} if task == "rm" else {})
        trainer = train(task, tiny, rows, tmp_path_factory.mktemp(task) / "o", **keys)
        return trainer, load_dataset("json", data_files=str(rows), split="train").select(range(10))

    return {task: trained(task, sft_rows if task == "sft" else pair_rows) for task in ("sft", "rm", "dpo")}


@pytest.mark.parametrize("task", ["sft", "rm", "dpo"])
def test_a_trainer_evaluates_and_predicts_rows_as_they_are_and_sets_of_them(task, trainers):
    trainer, rows = trainers[task]
    one = trainer.evaluate(rows)
    assert trainer.evaluate(rows)["eval_loss"] == one["eval_loss"]
    assert trainer.evaluate({"a": rows, "b": trainer.eval_dataset})["eval_a_loss"] == one["eval_loss"]
    prediction = trainer.predict(rows)
    assert prediction.metrics["test_loss"] == pytest.approx(one["eval_loss"])
    assert len(prediction.predictions) == 10
    if task != "sft":
        assert one["eval_accuracy"] == pytest.approx(count_wins(*prediction.predictions.T).mean())


def test_dpo_evaluates_over_pairs_and_says_ties_before_its_first_step(trainers):
    """In the last batch are 3 of 11 pairs: the mean over batches is another."""
    trainer, _ = trainers["dpo"]
    first, *_ = entries = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert (first["eval_accuracy"], first["eval_ties"], first["eval_rewards/accuracies"]) == (0.5, 1.0, 0.0)
    assert show_accuracy(first) == "ties" and show_accuracy(entries[-1]) != "ties"
    assert (11 * np.array(logged(trainer, "eval_accuracy")[1:])) % 0.5 == pytest.approx(0)


def test_a_tie_counts_half_however_accuracy_is_counted():
    chosen, rejected = [2.0, 1.0, 3.0, 9.0], [1.0, 1.0, 5.0, 0.0]
    metrics = pair_metrics(torch.tensor([chosen, rejected]).T)
    assert (metrics["accuracy"], metrics["ties"]) == (2.5 / 4, 1 / 4)
    assert count_wins(chosen, rejected).mean() == 2.5 / 4


def test_the_logexp_loss_holds_at_any_difference():
    args = type("Args", (), {"loss_type": "logexp", "center_rewards_coefficient": None})
    difference = torch.tensor([-200.0, -1.0, 0.0, 1.0, 88.7, 200.0])
    expected = np.logaddexp(0, -difference.double().numpy() + 0.5)
    losses = [reward_loss(d[None], torch.zeros(1), 0.5, args).item() for d in difference]
    assert losses == pytest.approx(expected, rel=1e-5)
