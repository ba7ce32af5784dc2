"""The embeddings of `new_tokens` are trained, saved, loaded again and merged, with LoRA and without."""

import pytest
import torch
from conftest import build_model, build_tokenizer, save_model, short_recipe, train, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tunebook.data.tokenizer import load_recipe_tokenizer
from tunebook.errors import RecipeError
from tunebook.recipe import parse
from tunebook.tools.merge import merge
from tunebook.training.models import load_model

NEW = ["<tool>", "→"]
ROW = {"prompt": "what <tool> is ", "completion": "five <tool>", "chosen": "→ five", "rejected": "two <tool>→"}
COLUMNS = {"sft": ("prompt", "completion"), "rm": ("prompt", "chosen", "rejected")}
LORA = {"use_peft": True, "lora_target_modules": ["q_proj"]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("task", ["sft", "rm", "dpo"])
def test_the_embeddings_of_new_tokens_are_trained_and_saved(task, lora, tied, tmp_path):
    tokenizer = build_tokenizer()
    size = len(tokenizer)
    model = save_model(tmp_path / "m", build_model(size, tie_word_embeddings=tied), tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl", [{name: ROW[name] for name in COLUMNS.get(task, COLUMNS["rm"])}] * 8)
    keys = {"new_tokens": NEW, "max_steps": 2, "learning_rate": 0.05, **lora}
    trainer = train(task, model, rows, tmp_path / "o", **keys)
    saved = AutoTokenizer.from_pretrained(tmp_path / "o")
    ids = saved.convert_tokens_to_ids(NEW)
    assert ids == [size, size + 1] and saved("two<tool>→")["input_ids"][-2:] == ids

    if lora:
        merge(tmp_path / "o", tmp_path / "merged")
    architecture = AutoModelForSequenceClassification if task == "rm" else AutoModelForCausalLM
    recipe = parse(task, short_recipe(model, rows, tmp_path / "o", **keys))
    untrained, _ = load_model(architecture, recipe, load_recipe_tokenizer(recipe))
    loaded = architecture.from_pretrained(tmp_path / ("merged" if lora else "o"))
    trained = trainer.model.get_input_embeddings()
    trained = trained.modules_to_save["default"] if lora else trained
    used = ids[:1] if task == "sft" else ids
    for model_of, name in ((lambda m: m.get_input_embeddings(), "in"), (lambda m: m.get_output_embeddings(), "out")):
        if model_of(loaded) is not None:
            before, after = model_of(untrained).weight[used], model_of(loaded).weight[used]
            assert (before - after).abs().amax(1).min() > 1e-3, name
    assert torch.equal(loaded.get_input_embeddings().weight[ids], trained.weight[ids])


def settle(tiny, sft_rows, tmp_path, **keys):
    return load_recipe_tokenizer(parse("sft", short_recipe(tiny, sft_rows, tmp_path / "o", **keys)))


def test_a_token_of_the_vocabulary_is_not_added_again_and_said_so(tiny, sft_rows, tmp_path, tokenizer, caplog):
    settled = settle(tiny, sft_rows, tmp_path, new_tokens=["<|im_end|>", "a", "<tool>", "<tool>"])
    assert len(settled) == len(tokenizer) + 1
    assert "'<|im_end|>' is in the vocabulary already, with the id 2" in caplog.text and "<tool>" not in caplog.text


def test_a_new_token_may_be_eos(tiny, sft_rows, tmp_path):
    assert settle(tiny, sft_rows, tmp_path, new_tokens=["<end>"], eos_token="<end>").eos_token == "<end>"


@pytest.mark.parametrize(("text", "message"), [("", "empty text"), ("é", "calls another token so")])
def test_what_cannot_be_a_new_token_is_refused(text, message, tiny, sft_rows, tmp_path):
    """The vocabulary of bytes calls the byte E9 "é"."""
    with pytest.raises(RecipeError, match=message):
        settle(tiny, sft_rows, tmp_path, new_tokens=[text])


def test_new_tokens_need_embeddings_that_are_trained(tiny, sft_rows, tmp_path):
    with pytest.raises(ValueError, match="new_tokens.*num_layers_unfrozen"):
        settle(tiny, sft_rows, tmp_path, new_tokens=NEW, num_layers_unfrozen=1)
