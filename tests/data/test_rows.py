"""The model trains on what the row says, or the row is counted: random conversations through every template of TRL,
templates that mislead, and every layout."""

import json
import re
from pathlib import Path

import pytest
import trl
from conftest import ROOT, build_tokenizer, read_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunebook.data.layouts import choose_layout
from tunebook.data.rendering import Renderer, RenderSettings
from tunebook.data.tokens import KEPT, process_batch

SHIPPED = Path(trl.__file__).with_name("chat_templates")
CASES = read_cases("data/rows.yaml")
TEMPLATES = {path.stem: path.read_text() for path in sorted(SHIPPED.glob("*.jinja"))} | CASES["templates"]
COLUMNS = ("system_column", "prompt_template", "prompt_column", "message_mapping")


def tokenizer_for(template: str | None):
    """Build a tokenizer to which what looks like a special token in a template is one."""
    special = dict.fromkeys(re.findall(r"<[|｜]?[\w▁-]+[|｜]?>|<[\w]+\|>|<\|[\w]+>|\[/?[A-Z_]+\]", template or ""))
    tokenizer = build_tokenizer(special=("<pad>", "<s>", "</s>", *special), template=template)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def process(task, tokenizer, row, **keys):
    """Return the columns, the outcome and the note of a row."""
    chosen = {name: keys.pop(name) for name in COLUMNS[:3] if name in keys}
    layout = choose_layout(task, list(row), chosen)
    settings = RenderSettings(task, tokenizer, None, layout, **keys)
    return {
        name: column[0] for name, column in process_batch({k: [v] for k, v in row.items()}, Renderer(settings)).items()
    }


def trained(tokenizer, out) -> str:
    ids = [i for i in out["labels"] if i != -100] if "labels" in out else out["chosen_ids"]
    return tokenizer.decode(ids)


def squash(text: str) -> str:
    return "".join(text.split())


# Each text of a conversation has a word of its own, which is in no template
LETTERS = st.text(alphabet="aé🎉 \nक्‍ó́<>{}\"'%|", max_size=12)
ROUNDS = st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=3)
MODES = ["prompt and completion", "assistant_only_loss", "last_turn_only_loss", "pair", "throughout"]


def conversation(rounds, system):
    turns = [{"role": "system", "content": system + " SYSTEM"}] if system is not None else []
    for i, (question, answer) in enumerate(rounds):
        turns += [
            {"role": "user", "content": f"{question}QUESTION{i}{question}"},
            {"role": "assistant", "content": f"{answer}ANSWER{i}{answer}"},
        ]
    return turns


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_hold_the_answers_and_no_question_or_the_row_is_counted(name):
    tokenizer = tokenizer_for(TEMPLATES[name])

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(ROUNDS, st.one_of(st.none(), LETTERS), st.sampled_from(MODES))
    def check(rounds, system, mode):
        turns, answers = conversation(rounds, system), [f"ANSWER{i}" for i in range(len(rounds))]
        if mode == "pair":
            other = {"role": "assistant", "content": "REJECTED"}
            out = process("dpo", tokenizer, {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [other]})
        elif mode == "prompt and completion":
            out = process("sft", tokenizer, {"prompt": turns[:-1], "completion": turns[-1:]})
        else:
            out = process("sft", tokenizer, {"messages": turns}, **({mode: True} if mode != "throughout" else {}))
        if out["outcome"] != KEPT:
            assert re.search("fails|uncertain|differently|behind the answer", out["outcome"]), (out["outcome"], turns)
            return
        expected = answers if mode in ("assistant_only_loss", "throughout") else answers[-1:]
        text = trained(tokenizer, out)
        found = re.findall(r"ANSWER\d", text)
        contents = [turn["content"] for turn in turns if turn["role"] == "assistant"][-len(expected) :]
        whole = all(squash(content) in squash(text) for content in contents)
        assert out["note"] or (found == expected and whole), (text, turns)
        if mode != "throughout":
            assert "QUESTION" not in text and "SYSTEM" not in text, (text, turns)
        if mode == "pair":
            assert "REJECTED" in tokenizer.decode(out["rejected_ids"]) and "QUESTION" in tokenizer.decode(
                out["prompt_ids"]
            )

    check()


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.endswith("_training")])
def test_a_templates_own_conversation_is_trained_whole(name):
    turns = conversation([("", ""), ("", "")], None)
    tokenizer = tokenizer_for(TEMPLATES[name])
    out = process("sft", tokenizer, {"prompt": turns[:-1], "completion": turns[-1:]})
    assert (out["outcome"], out["note"]) == tuple(CASES["imperfect"].get(name, [KEPT, None]))


@pytest.mark.parametrize("case", CASES["rows"], ids=lambda case: case["is"])
def test_a_row_is_trained_as_it_says_or_counted(case):
    template = case.get("template", "chatml")
    tokenizer = tokenizer_for(None if template is None else TEMPLATES.get(template, template))
    if "bos" in case:
        tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    out = process(case.get("task", "sft"), tokenizer, case["row"], **case.get("keys", {}))
    if "outcome" in case:
        assert re.search(case["outcome"], out["outcome"])
        return
    assert out["outcome"] == KEPT
    if "note" in case:
        assert re.search(case["note"], out["note"] or "")
    else:
        assert out["note"] is None
    if "trained" in case:
        assert trained(tokenizer, out) == case["trained"]
    if "text" in case:
        ids = out["input_ids"] if "input_ids" in out else out.get("prompt_ids", []) + out["chosen_ids"]
        assert tokenizer.decode(ids) == case["text"]


DOCUMENTED = re.findall(r"```json\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", DOCUMENTED)
def test_a_row_of_the_docs_is_trained(block):
    row = json.loads(block)
    for task in ("dpo", "rm") if "rejected" in block else ("sft",):
        out = process(task, tokenizer_for(TEMPLATES["calls"]), row)
        assert (out["outcome"], out["note"]) == (KEPT, None)
