"""What rows become is pinned to FORMAT_VERSION, on which the token cache depends."""

import hashlib
import json
from dataclasses import replace

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tunebook.data.layouts import Layout, choose_layout
from tunebook.data.rendering import FORMAT_VERSION, Renderer, RenderSettings
from tunebook.data.tokens import CUT, KEPT, process_batch

HASHES = {
    1: "499e471955fc6163eb1a58406985d7ff5b3647cca0c3d6a3ca086f57f9f75a66",
    2: "3df367b0aaebb705e6148ac06d8202b6be71748a6eced484fb8b1a79bc9eb0e0",
}

TEMPLATE = (
    "{{ mood }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}{% if 'name' in m %}{{ m['name'] }}{% endif %}>"
    "{{ m['content'] + '<e>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = TEMPLATE.replace(
    "{{ m['content'] + '<e>' }}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<e>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<e>' }}{% endif %}",
)
USER, ASSISTANT = {"role": "user", "content": "two plus three?"}, {"role": "assistant", "content": "fünf 五."}
SIX = {"role": "assistant", "content": "six"}
CHAT = [USER, ASSISTANT]
SHAREGPT = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]
MESSAGES = {"messages": [CHAT, [*CHAT, USER, SIX], [{"role": "system", "content": "brief"}, *CHAT], [USER], SHAREGPT]}
TOOLS = {
    "messages": [[USER | {"name": None}, SIX]],
    "tools": ['[{"name": "add"}]'],
    "chat_template_kwargs": [{"mood": 1}],
}
PROMPTS = {"prompt": ["2 + 3? ", "", "long " * 9], "completion": ["5", "one", "four"]}
TURNS = {"prompt": [[USER], [*CHAT, USER]], "completion": [[ASSISTANT], [SIX]]}
TEXTS = {"text": ["the quick brown fox", "", "zwölf <e>"]}
PAIRS = {"prompt": PROMPTS["prompt"], "chosen": ["5 and 6", "one", "four"], "rejected": ["5 and 7", "one", "three"]}
TURN_PAIRS = {"prompt": [[USER]], "chosen": [[ASSISTANT]], "rejected": [[SIX]]}
WHOLE_PAIRS = {"chosen": [CHAT, [USER, SIX]], "rejected": [[USER, SIX], CHAT]}
CALL = {"name": "add", "arguments": '{"a": 1, "b": "zwei"}'}
CALLS = {"conversations": [[*SHAREGPT, {"from": "function_call", "value": json.dumps(CALL)}, SHAREGPT[1]]]}
ALPACA = {"instruction": ["add"] * 2, "input": ["2 3", ""], "output": ["5"] * 2, "history": [[["1 1", "2"]], None]}
TOKENS = {"input_ids": [[1, 2, 3], [4, 5]], "labels": [[-100, 2, 3], [-100, 6]]}
SCORED_PAIRS = {**PAIRS, "margin": [0.5, "1", None], "subset": ["easy", "hard", 3]}


def tokenize_everything() -> dict[str, list]:
    """Return the trained rows of each layout under each setting, whole and cut, in the order of the rows."""
    # A token per byte, since a version of tokenizers may train differently from the next
    letters = ["<b>", "<e>", "<z>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.add_special_tokens(letters[:3])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing("<b> $A <z>", special_tokens=[("<b>", 0), ("<z>", 2)])
    plain, marked = (PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>") for _ in range(2))
    plain.chat_template, marked.chat_template = TEMPLATE, MARKED

    sft, rm, dpo = (RenderSettings(task, plain, None, Layout("", {})) for task in ("sft", "rm", "dpo"))
    cases = [(sft, rows) for rows in (MESSAGES, TOOLS, PROMPTS, TURNS, TEXTS)]
    cases += [(task, rows) for task in (rm, dpo) for rows in (PAIRS, TURN_PAIRS, WHOLE_PAIRS, SCORED_PAIRS)]
    cases += [
        (replace(sft, assistant_only_loss=True), MESSAGES),
        (replace(sft, assistant_only_loss=True, tokenizer=marked), MESSAGES),
        (replace(sft, assistant_only_loss=True, tokenizer=marked), TOOLS),
        (replace(sft, last_turn_only_loss=True, system_prompt="be brief"), MESSAGES),
        (replace(sft, completion_only_loss=False), PROMPTS),
        (sft, PROMPTS, "Q: {}\nA: "),
        (replace(sft, apply_chat_template=True, system_prompt="be brief"), PROMPTS),
        (replace(sft, pretraining=True), TEXTS),
        (replace(dpo, apply_chat_template=True), PAIRS, "Q: {}\nA: "),
        (replace(sft, assistant_only_loss=True), CALLS),
        (sft, ALPACA),
        (sft, TOKENS),
    ]
    tokens = {}
    for number, (settings, rows, *template) in enumerate(cases):
        given = dict.fromkeys(["prompt_template"], *template) | {"use_margin": "margin" in rows}
        given |= {"subset_column": "subset"} if "subset" in rows else {}
        layout = choose_layout(settings.task, list(rows), given)
        for max_length in (None, 40):
            batch = process_batch(rows, Renderer(replace(settings, layout=layout, max_length=max_length)))
            outcomes = batch.pop("outcome")
            tokens[f"{number} {max_length}"] = [
                dict(zip(batch, row, strict=True))
                for row, outcome in zip(zip(*batch.values(), strict=True), outcomes, strict=True)
                if outcome in (KEPT, CUT)
            ]
    return tokens


def test_the_format_version_is_raised_when_rows_become_other_tokens():
    digest = hashlib.sha256(json.dumps(tokenize_everything()).encode()).hexdigest()
    assert HASHES.get(FORMAT_VERSION) == digest and len(set(HASHES.values())) == len(HASHES), (
        "Rows become other tokens or labels than before. Raise FORMAT_VERSION in data/rendering.py, or users train on "
        f"what an older version cached, and add its hash here: {FORMAT_VERSION}: {digest!r}."
    )
