"""A tokenizer is settled once: its EOS and pad tokens, its special tokens, what it adds to a text itself."""

import pytest
from conftest import TEMPLATE, build_model, build_tokenizer, save_model, train, write_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunebook.data.tokenizer import added_ids, end_of_turn_ids, load_recipe_tokenizer, settle_template
from tunebook.errors import RecipeError
from tunebook.recipe import parse

SPECIAL = ("<pad>", "<s>", "<|im_start|>", "<|im_end|>", "</s>")


def without_eos(template=None, special=SPECIAL):
    tokenizer = build_tokenizer(special, template)
    tokenizer.eos_token = None
    return tokenizer


@pytest.fixture
def settle(tmp_path):
    """The tokenizer of a run on a model with this tokenizer."""

    def settle(tokenizer, task="sft", has_turns=False, config=None, **keys):
        model = build_model(len(tokenizer), eos_token_id=config)
        folder = save_model(tmp_path / "model", model, tokenizer)
        base = {"model_name_or_path": str(folder), "dataset_name": "d", "output_dir": "o", "bf16": False}
        settled = load_recipe_tokenizer(parse(task, base | keys))
        settle_template(settled, has_turns, needs_eos=not keys.get("pretraining"))
        return settled

    return settle


@pytest.mark.parametrize(
    ("template", "config", "keys", "eos"),
    [
        (TEMPLATE, 4, {}, "<|im_end|>"),
        (None, 4, {}, "</s>"),
        (None, [8, 4], {}, "</s>"),
        (TEMPLATE, 4, {"eos_token": "</s>"}, "</s>"),
        (None, None, {"has_turns": True}, "<|im_end|>"),
        (None, None, {"pretraining": True}, None),
    ],
)
def test_a_tokenizer_without_eos_takes_the_one_that_its_model_has(template, config, keys, eos, settle):
    assert settle(without_eos(template), config=config, **keys).eos_token == eos


@pytest.mark.parametrize("config", [None, 0, 1, 9], ids=["none", "pad", "bos", "a letter"])
def test_without_any_eos_the_run_is_refused_and_the_key_named(config, settle):
    tokenizer = without_eos()
    tokenizer.bos_token = "<s>"
    with pytest.raises(RecipeError, match=r"no EOS token.*`eos_token`.*<\|im_end\|>"):
        settle(tokenizer, config=config)


@pytest.mark.parametrize("task", ["sft", "rm", "dpo"])
def test_a_model_whose_tokenizer_had_no_eos_is_saved_with_one(task, tmp_path, task_rows):
    tokenizer = without_eos(TEMPLATE)
    folder = save_model(tmp_path / "m", build_model(len(tokenizer), eos_token_id=None), tokenizer)
    trainer = train(task, folder, task_rows, tmp_path / "o", max_steps=1)
    saved = AutoTokenizer.from_pretrained(tmp_path / "o")
    assert saved.eos_token == "<|im_end|>" and trainer.model.config.eos_token_id == saved.eos_token_id
    if task != "rm":
        assert trainer.model.generation_config.eos_token_id == [saved.eos_token_id]


def test_pretraining_needs_no_eos(tmp_path):
    tokenizer = without_eos()
    folder = save_model(tmp_path / "m", build_model(len(tokenizer), eos_token_id=None), tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the quick brown fox"}] * 8)
    train("sft", folder, rows, tmp_path / "o", max_steps=1, pretraining=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o").config.eos_token_id is None


@pytest.mark.parametrize("around", ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<|im_start|> $A"])
def test_what_a_tokenizer_adds_to_a_text_is_known_and_logged(around, settle, caplog):
    tokenizer = build_tokenizer(SPECIAL)
    tokenizer.bos_token = "<s>"
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=ids)
    caplog.set_level("INFO", "tunebook")
    settled = settle(tokenizer)
    before, after = added_ids(settled)
    assert (settled.bos_token_id in before, settled.eos_token_id in after) == ("<s>" in around, "</s>" in around)
    assert ("before a text" in caplog.text) == (around != "$A")


def test_chatml_keeps_the_special_tokens_of_a_tokenizer(settle):
    tokenizer = build_tokenizer(("<pad>", "<eos>"), template=None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    settled = settle(tokenizer, has_turns=True)
    assert settled.decode(settled("<tool>five<|im_end|>")["input_ids"], skip_special_tokens=True) == "five"


@pytest.mark.parametrize("task", ["sft", "rm"])
def test_the_pad_token_is_spare_or_new_where_there_is_no_eos(task, settle):
    tokenizer = without_eos(TEMPLATE, SPECIAL[2:])
    tokenizer.pad_token = None
    settled = settle(tokenizer, task)
    assert (settled.pad_token, settled.eos_token) == ("<|im_end|>" if task == "sft" else "<|pad|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATE.replace("<|im_end|>", " <|im_end|>"), "<|im_end|>"),
        (TEMPLATE.replace("<|im_end|>", "!"), None),
        (TEMPLATE.replace("{{ m['content'] }}", ""), None),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}!", "</s>"),
        ("{{ raise_exception('no') }}", None),
        ("{{ messages[5].content + 1 }}", None),
        ("{{ 1 // 0 }}", None),
    ],
)
def test_the_end_of_a_turn_is_found_in_any_template_or_there_is_none(template, end):
    tokenizer = without_eos(template)
    assert tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer, None)) == ([end] if end else [])


def test_a_template_file_loses_its_byte_order_mark_and_line_ends(settle, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_bytes(("\ufeff" + TEMPLATE.replace("{% if", "\n{% if").replace("\n", "\r\n")).encode())
    settled = settle(build_tokenizer(), chat_template_path=str(path))
    assert settled.chat_template == TEMPLATE.replace("{% if", "\n{% if")
    path.write_bytes("{# e\n\xe9 #}".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"chat\.jinja, line 2: not UTF-8"):
        settle(build_tokenizer(), chat_template_path=str(path))
