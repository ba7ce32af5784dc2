"""What others wrote, a model's folder or a template, fails in one message, whatever a library raises about it."""

import shutil

import pytest
from conftest import build_tokenizer, train

from tunebook.data.layouts import choose_layout
from tunebook.data.rendering import Renderer, RenderSettings
from tunebook.errors import RecipeError
from tunebook.following.generations import render_prompts
from tunebook.following.pairs import render_ids

TEMPLATES = {
    "division": "{{ 1 / 0 }}",
    "range": "{% for i in range(999999999) %}{{ i }}{% endfor %}",
    "substring": "{{ 'abc'.index('x') }}",
    "encoding": "{{ 'abc'.encode('nothing') }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "syntax": "{% for m in messages",
    "undefined": "{{ messages[9].content.a.b }}",
    "refusal": "{{ raise_exception('no system prompt') }}",
    "type": "{{ messages + 1 }}",
}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_raises_anything_is_one_message_for_prompts_and_scores(template):
    layout = choose_layout("sft", ["messages"], {})
    renderer = Renderer(RenderSettings("sft", build_tokenizer(template=template), None, layout))
    with pytest.raises(ValueError, match="`eval_prompts`: prompt 0"):
        render_prompts([TURNS[:1]], renderer)
    with pytest.raises(RecipeError, match="pairs, row 0"):
        render_ids([{"messages": TURNS}], renderer, "pairs")


DAMAGES = {"empty": lambda content: b"", "cut": lambda content: content[: len(content) // 3]}
DAMAGES |= {"other": lambda content: b'{"a": [1', "bytes": lambda content: b"\xff\xfe\x00\x01" * 9}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_model_folder_that_cannot_be_read_is_one_message(name, damage, tiny, sft_rows, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    content = (model / name).read_bytes()
    (model / name).unlink()
    (model / name).write_bytes(damage(content))
    with pytest.raises(RecipeError, match="cannot be loaded|not UTF-8"):
        train("sft", model, sft_rows, tmp_path / "o")
