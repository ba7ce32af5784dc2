"""`tunebook chat`: what the model is given, and what the terminal shows."""

import pytest
import torch
from conftest import train
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tunebook.tools.cli import app


def talk(*words, typed: str | None = None):
    return CliRunner().invoke(app, ["chat", *map(str, words), "--max-new-tokens", "6", "--temperature", "0"], typed)


def continuation(model, tokenizer, turns: list[tuple[str, str]]) -> str:
    """What the model itself makes of a conversation in ChatML, token by token."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + "<|im_start|>assistant\n"
    ids, start = tokenizer(text, add_special_tokens=False)["input_ids"], None
    start, ends = len(ids), {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    for _ in range(6):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token in ends:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def adapter(tiny, sft_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "lora"
    train("sft", tiny, sft_rows, folder, use_peft=True, learning_rate=0.1)
    return folder


def test_a_prompt_is_answered_as_the_model_goes_on_after_its_template(tiny):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    expected = continuation(model, tokenizer, [("system", "be kind"), ("user", "what is 2 plus 3?")])
    done = talk(tiny, "--prompt", "what is 2 plus 3?", "--system", "be kind")
    assert done.exit_code == 0 and done.stdout.strip() == expected.strip()


def test_a_conversation_has_what_was_said_before(tiny):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    first = continuation(model, tokenizer, [("user", "one")])
    second = continuation(model, tokenizer, [("user", "one"), ("assistant", first), ("user", "two")])
    assert talk(tiny, typed="one\n\ntwo\n").stdout.split() == f"{first} {second}".split()


def test_an_adapter_answers_on_its_base_model(tiny, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter)
    expected = continuation(model, AutoTokenizer.from_pretrained(adapter), [("user", "what is 2 plus 3?")])
    assert talk(adapter, "--prompt", "what is 2 plus 3?").stdout.strip() == expected.strip()


def test_a_model_without_a_template_continues_and_takes_no_system_turn(tiny, tokenizer, tmp_path, caplog):
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tiny)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    assert talk(tmp_path, "--prompt", "one plus").exit_code == 0 and "it continues each text" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [False, True])
def test_a_reward_model_is_refused(use_peft, tiny, pair_rows, tmp_path, monkeypatch):
    train("rm", tiny, pair_rows, tmp_path / "rm", use_peft=use_peft, max_steps=1)
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    done = talk(tmp_path / "rm", "--prompt", "one")
    assert done.exit_code == 2 and "is a reward model. Run tunebook score" in done.output
