"""Selective checkpointing: the same gradients, nothing expensive computed twice, less kept than without any."""

import pytest
import torch
from conftest import assert_same_weights, build_model, train
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from tunebook.errors import RecipeError
from tunebook.recipe import TASKS
from tunebook.tools.memory import estimate
from tunebook.tools.workload import Batch, Workload
from tunebook.training.activation_checkpointing import accept_selective, keep_products

LAYERS, HIDDEN, INTERMEDIATE, KEYS_AND_VALUES, ROWS, LENGTH = 3, 64, 128, 2 * 32, 2, 48
SELECTIVE = {"selective": True}


def build(checkpointing: dict | None):
    model = build_model(100, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS).train()
    accept_selective(model)
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
    return model


def train_once(model) -> int:
    """Operations of a forward and backward."""
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 100
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def test_gradients_are_those_without_checkpointing_to_the_last_bit():
    model, expected = build(SELECTIVE), build(None)
    train_once(model), train_once(expected)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_of_the_products_only_those_around_attention_are_computed_again():
    without, selective, full = (train_once(build(x)) for x in (None, SELECTIVE, {"selective": False}))
    queries_and_output, gate_and_up = 2 * HIDDEN, 2 * INTERMEDIATE
    again = LAYERS * 2 * ROWS * LENGTH * HIDDEN * (queries_and_output + KEYS_AND_VALUES)
    assert selective - without == again
    assert full - without == again + LAYERS * 2 * ROWS * LENGTH * HIDDEN * gate_and_up


def test_it_stays_when_checkpointing_is_turned_off_and_on():
    model = build(SELECTIVE)
    expected = train_once(model)
    model.activation_checkpointing_disable()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=SELECTIVE)  # as TRL does after it generates
    assert train_once(model) == expected


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(RecipeError, match="selective needs use_reentrant: false"):
        build({**SELECTIVE, "use_reentrant": True})


def test_the_estimate_of_memory_counts_what_is_kept():
    def activations(**checkpointing):
        workload = Workload(config, "sft", Batch(1, 4096, packed=True), device="cpu", **checkpointing)
        return next(part.bytes for part in estimate(workload) if part.name == "activations")

    config = build(None).config
    without, full = activations(activation_checkpointing=False), activations()
    selective = activations(activation_checkpointing_kwargs=SELECTIVE)
    # For each token attention's output and its normalizer of each head, gate and up; in all layers but the one that is
    # computed again at the peak, which is there as a whole either way
    kept = 4096 * 4 * (HIDDEN + 4 + 2 * INTERMEDIATE) * (LAYERS - 1)
    assert selective - full == pytest.approx(kept, rel=0.01)
    assert selective < 0.7 * without


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_that_wants_both_is_a_mistake(task, tiny, task_rows, tmp_path):
    with pytest.raises(RecipeError, match="selective.*reentrant"):
        train(task, tiny, task_rows, tmp_path, activation_checkpointing_kwargs={**SELECTIVE, "use_reentrant": True})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_run_ends_with_the_weights_of_one_without_checkpointing(task, tiny, task_rows, tmp_path):
    """One layer in two. DPO with LoRA: its reference pass turns checkpointing off and on in each step."""
    same = {"max_steps": 2, "use_peft": task == "dpo"}
    selective = {**SELECTIVE, "every_n_layers": 2}
    trainer = train(task, tiny, task_rows, tmp_path / "selective", **same, activation_checkpointing_kwargs=selective)
    layers = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert layers[0]._gradient_checkpointing_func.keywords["context_fn"].args == (keep_products,)

    train(task, tiny, task_rows, tmp_path / "without", **same, activation_checkpointing=False)
    assert_same_weights(tmp_path / "selective", tmp_path / "without")
