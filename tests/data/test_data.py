"""Sources, mixtures, counts and loss masks; the masks against TRL's own labels."""

import json
import shutil

import datasets
import pytest
import trl
from conftest import CORPUS, build_tokenizer, read_cases, write_rows

from tunebook.data import load_data, read_sources, settle_template
from tunebook.data.layouts import Layout
from tunebook.data.loading import Reason, fingerprint, process
from tunebook.data.rendering import RenderSettings
from tunebook.data.sources import load_source
from tunebook.errors import RecipeError
from tunebook.recipe import parse

CASES = read_cases("data/cases.yaml")
LAYOUTS = CASES["layouts"]
CHAT, LONGER = (row["messages"] for row in LAYOUTS["conversations"])


def load(task, tokenizer, tmp_path, rows=None, **keys):
    """Load rows, or the data set that the keys name, with a tokenizer that is not in a folder."""
    base = {"model_name_or_path": "m", "output_dir": str(tmp_path / "o"), "bf16": False, "max_length": 200}
    if rows is not None:
        base["dataset_name"] = str(write_rows(tmp_path / "rows.jsonl", rows))
    return load_recipe(parse(task, base | keys), tokenizer)


def load_recipe(recipe, tokenizer):
    sources = read_sources(recipe)
    settle_template(tokenizer, bool(recipe.script.apply_chat_template) or sources.have_turns)
    return load_data(recipe, sources, tokenizer)


def trained(tokenizer, row) -> str:
    return tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100])


ROWS = [{"prompt": f"what is {i}?", "completion": f"five {i}"} for i in range(20)]
TABLE = datasets.Dataset.from_list(ROWS)


@pytest.mark.parametrize(
    ("source", "file", "write"),
    [
        ("rows.jsonl", "rows.jsonl", lambda path: write_rows(path, ROWS)),
        ("rows.json", "rows.json", lambda path: path.write_text(json.dumps(ROWS))),
        ("rows.csv", "rows.csv", TABLE.to_csv),
        ("rows.parquet", "rows.parquet", TABLE.to_parquet),
        ("rows.jsonl.gz", "rows.jsonl.gz", lambda path: TABLE.to_json(path, compression="gzip")),
        ("saved/*.arrow", "saved", TABLE.save_to_disk),
        ("saved", "saved", datasets.DatasetDict({"train": TABLE}).save_to_disk),
        ("folder", "folder/train.jsonl", lambda path: write_rows(path, ROWS)),
    ],
)
def test_every_source_gives_the_same_rows(source, file, write, tmp_path, tokenizer):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    write(tmp_path / file)
    (path,) = tmp_path.glob(source)
    train = load("sft", tokenizer, tmp_path, dataset_name=str(path)).train
    expected = [row["prompt"] + row["completion"] + "<|im_end|>" for row in ROWS]
    assert [tokenizer.decode(row["input_ids"]) for row in train] == expected


@pytest.mark.parametrize(("name", "content", "message"), CASES["unreadable"])
def test_a_file_that_cannot_be_read_says_why(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_source(str(tmp_path / name), "train")


@pytest.mark.parametrize(("keys", "message"), CASES["refused"])
def test_what_does_not_fit_is_refused_by_name(keys, message, tmp_path, tokenizer):
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    keys = json.loads(json.dumps(keys).replace("ROWS", rows))
    with pytest.raises(RecipeError, match=message):
        load("sft", tokenizer, tmp_path, **keys)


@pytest.mark.parametrize(("row", "keys", "needs"), CASES["idle"])
def test_a_key_that_does_nothing_to_these_rows_is_refused(row, keys, needs, tmp_path, tokenizer):
    with pytest.raises(RecipeError, match=f"{next(iter(keys))}` has no effect on these rows.*{needs}"):
        load("sft", tokenizer, tmp_path, [row], **keys)


def test_every_dropped_row_is_counted_by_reason_and_a_cut_row_gets_no_false_eos(tmp_path, tokenizer):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": None, "completion": "x"},
        {"prompt": "a", "completion": 3},
        {"prompt": "a", "completion": ""},
        {"completion": "b"},
        {"prompt": "one " * 80, "completion": "b"},
        {"prompt": "a", "completion": "one " * 80},
    ]
    data = load("sft", tokenizer, tmp_path, rows, max_length=60)
    report = data.counts["train"]
    assert (report.read, report.kept, report.cut) == (7, 2, 1)
    assert report.dropped == {
        "missing prompt": Reason(2, 1),
        "completion is int, not str or list": Reason(1, 2),
        "empty answer": Reason(1, 3),
        "nothing to train on within max_length": Reason(1, 5),
    }
    cut = data.train[1]["input_ids"]
    assert len(cut) == 60 and tokenizer.eos_token_id not in cut
    data.write_report(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["train"]["read"] == 7


def test_a_template_that_rejects_a_role_order_says_which_row(tmp_path):
    strict = build_tokenizer(
        template="{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    data = load("sft", strict, tmp_path, [{"messages": CHAT}, {"messages": CHAT[::-1]}])
    assert data.counts["train"].dropped == {
        "the chat template fails": Reason(1, 1, "TemplateError: roles must alternate")
    }


# ---- Loss masks ----


@pytest.fixture(scope="module")
def marked_tokenizer():
    plain = build_tokenizer(template=None)
    settle_template(plain, has_turns=True)
    return plain


def assert_equals_trls(task, tokenizer, tiny, tmp_path, rows, **keys):
    """Our columns are those of the data set that TRL's own trainer prepares."""
    ours = load(task, tokenizer, tmp_path, rows, **keys).train
    trainer, config = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}[task]
    args = config(str(tmp_path / "trl"), bf16=False, use_cpu=True, report_to="none", max_length=200, **keys)
    rows = datasets.Dataset.from_list(rows)
    theirs = trainer(str(tiny), args=args, train_dataset=rows, processing_class=tokenizer).train_dataset
    for column in ours.column_names:
        assert ours[column][:] == theirs[column][:]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_labels_equal_trls(layout, tiny, tmp_path, tokenizer):
    assert_equals_trls("dpo" if layout == "pairs" else "sft", tokenizer, tiny, tmp_path, LAYOUTS[layout])


def test_assistant_only_by_the_templates_marks_equals_trls(tiny, tmp_path, marked_tokenizer):
    rows = LAYOUTS["conversations"]
    assert_equals_trls("sft", marked_tokenizer, tiny, tmp_path, rows, assistant_only_loss=True)
    row = load("sft", marked_tokenizer, tmp_path, rows, assistant_only_loss=True).train[1]
    assert trained(marked_tokenizer, row) == "five.<|im_end|>five too.<|im_end|>"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("assistant_only_loss", "five.<|im_end|>\nfive too.<|im_end|>\n"),
        ("last_turn_only_loss", "five too.<|im_end|>\n"),
    ],
)
def test_turns_are_trained_on_with_a_template_without_marks(key, text, tmp_path, tokenizer):
    row = load("sft", tokenizer, tmp_path, LAYOUTS["conversations"], **{key: True}).train[1]
    assert trained(tokenizer, row) == text


def test_assistant_only_is_refused_where_turns_have_no_certain_place(tmp_path):
    forgetful = build_tokenizer(
        template="{% for m in messages %}{{ m['role'] }}:{% if loop.last %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    )
    with pytest.raises(RecipeError, match="uncertain where an answer begins or ends"):
        load("sft", forgetful, tmp_path, [{"messages": LONGER}], assistant_only_loss=True)


@pytest.mark.parametrize(
    ("row", "keys", "text"),
    [
        ({"body": CORPUS[0]}, {"pretraining": True, "text_column": "body"}, CORPUS[0]),  # no template and no EOS
        (ROWS[0], {"completion_only_loss": False}, "what is 0?five 0<|im_end|>"),
    ],
)
def test_the_whole_row_is_trained_on(row, keys, text, tmp_path, tokenizer):
    row = load("sft", tokenizer, tmp_path, [row], **keys).train[0]
    assert row["labels"] == row["input_ids"] and tokenizer.decode(row["input_ids"]) == text


def test_columns_prompt_template_and_system_prompt(tmp_path, tokenizer):
    keys = {"rows": [{"q": "two plus three?", "a": "five"}], "prompt_column": "q", "completion_column": "a"}
    plain = load("sft", tokenizer, tmp_path, **keys, prompt_template="User: {}\nAssistant: ").train[0]
    assert tokenizer.decode(plain["input_ids"]) == "User: two plus three?\nAssistant: five<|im_end|>"
    named = load("sft", tokenizer, tmp_path, **keys | {"prompt_column": None}, prompt_template="[[{q}]] {a}: ").train[0]
    assert tokenizer.decode(named["input_ids"]) == "two plus three? five: five<|im_end|>"
    chat = load("sft", tokenizer, tmp_path, **keys, apply_chat_template=True, system_prompt="be brief").train[0]
    assert tokenizer.decode(chat["input_ids"]) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ntwo plus three?<|im_end|>\n"
        "<|im_start|>assistant\nfive<|im_end|>\n"
    )
    assert trained(tokenizer, chat) == "five<|im_end|>\n"


def test_sharegpt_turns_are_read(tmp_path, tokenizer):
    turns = [{"from": "human", "value": "two plus three?"}, {"from": "gpt", "value": "five."}]
    rows = [{"conversations": turns}], [{"messages": CHAT}]
    ours, same = (load("sft", tokenizer, tmp_path, given).train[0] for given in rows)
    assert ours == same


def test_inline_chatml_is_given_to_a_tokenizer_without_template(tmp_path):
    bare = build_tokenizer(special=("<pad>", "<eos>"), template=None)
    load("sft", bare, tmp_path, [{"messages": CHAT}])
    assert bare.eos_token == "<|im_end|>" and bare.convert_tokens_to_ids("<|im_start|>") != bare.unk_token_id


# ---- Mixtures and splits ----


@pytest.fixture
def two_sources(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", [{"q": f"a {i}", "r": "x"} for i in range(40)])
    b = write_rows(tmp_path / "b.jsonl", [{"messages": CHAT}] * 10)
    return {"path": str(a), "columns": {"q": "prompt", "r": "completion"}}, {"path": str(b)}


def share_of_a(tokenizer, dataset) -> float:
    return sum("<|im_start|>" not in tokenizer.decode(row["input_ids"]) for row in dataset) / len(dataset)


def test_a_mixture_of_two_layouts_has_all_rows_of_both(two_sources, tmp_path, tokenizer):
    data = load("sft", tokenizer, tmp_path, datasets=list(two_sources))
    assert len(data.train) == 50 and share_of_a(tokenizer, data.train) == 0.8


def test_fractions_are_shares_of_the_largest_mixture_without_repeats(two_sources, tmp_path, tokenizer):
    data = load("sft", tokenizer, tmp_path, datasets=[source | {"fraction": 0.5} for source in two_sources])
    assert len(data.train) == 20 and share_of_a(tokenizer, data.train) == 0.5


@pytest.mark.parametrize(("stopping", "at_least"), [("first_exhausted", 10), ("all_exhausted", 40)])
def test_probabilities_with_either_stopping_rule(two_sources, stopping, at_least, tmp_path, tokenizer):
    mixture = [source | {"probability": 0.5} for source in two_sources]
    data = load("sft", tokenizer, tmp_path, datasets=mixture, mixture_stopping=stopping)
    assert len(data.train) >= at_least
    assert 0.3 < share_of_a(tokenizer, data.train) < 0.7


def test_the_seed_decides_the_mixture(two_sources, tmp_path, tokenizer):
    mixture = [source | {"probability": 0.5} for source in two_sources]
    prints = [fingerprint(load("sft", tokenizer, tmp_path, datasets=mixture, seed=s).train) for s in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]


def test_a_mixture_is_split_before_rows_are_drawn_twice(two_sources, tmp_path, tokenizer):
    a, _ = two_sources
    mixture = [a | {"probability": 0.9}, a | {"probability": 0.1, "max_samples": 5}]
    keys = {"test_split_size": 0.2, "do_eval": True}
    data = load("sft", tokenizer, tmp_path, datasets=mixture, mixture_stopping="all_exhausted", **keys)
    one = load("sft", tokenizer, tmp_path, datasets=[a], **keys)
    texts = [{tokenizer.decode(row["input_ids"]) for row in split} for split in (one.train, one.eval)]
    assert not texts[0] & texts[1] and len(texts[0]) + len(texts[1]) == 40
    assert len(data.eval) == 9  # a fifth of 40 and a fifth of 5


def test_max_samples_and_an_evaluation_set_of_its_own(tmp_path, tokenizer):
    other = write_rows(tmp_path / "e.jsonl", ROWS[5:])
    keys = {"max_train_samples": 7, "max_eval_samples": 3, "eval_dataset_name": str(other), "do_eval": True}
    data = load("sft", tokenizer, tmp_path, ROWS, **keys)
    assert len(data.train) == 7 and len(data.eval) == 3
    assert data.eval[0]["input_ids"] == data.train[5]["input_ids"]


def test_an_evaluation_set_on_the_command_line_replaces_the_recipes_split(tmp_path, tokenizer):
    rows, other = write_rows(tmp_path / "r.jsonl", ROWS), write_rows(tmp_path / "e.jsonl", ROWS[5:])
    recipe = {"model_name_or_path": "m", "output_dir": "o", "bf16": False, "dataset_name": str(rows)}
    given = parse("sft", recipe | {"test_split_size": 4, "do_eval": True}, {"eval_dataset_name": str(other)})
    data = load_recipe(given, tokenizer)
    assert len(data.train) == 20 and len(data.eval) == 15


# ---- Preferences ----


def test_a_prompt_is_found_in_both_sides_of_conversations(tmp_path, tokenizer):
    other = [{"role": "assistant", "content": "six."}]
    explicit = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": other}
    implicit = {"prompt": "two plus three?", "chosen": CHAT, "rejected": CHAT[:1] + other}
    one, other = (load("dpo", tokenizer, tmp_path, [row]).train[0] for row in (explicit, implicit))
    assert one == other
    assert tokenizer.decode(one["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_useless_pairs_are_dropped_and_counted(tmp_path, tokenizer):
    rows = [
        {"prompt": "a ", "chosen": "x", "rejected": "y"},
        {"prompt": "a ", "chosen": "x", "rejected": "x"},
        {"prompt": "one " * 30, "chosen": "x", "rejected": "y"},
        {"prompt": "a ", "chosen": "one " * 30 + "x", "rejected": "one " * 30 + "y"},
        {"prompt": "a ", "chosen": "x", "rejected": None},
    ]
    dpo = load("dpo", tokenizer, tmp_path, rows, max_length=20).counts["train"]
    assert dpo.kept == 1
    assert {reason: entry.first_row for reason, entry in dpo.dropped.items()} == {
        "chosen equals rejected": 1,
        "the prompt fills max_length": 2,
        "chosen equals rejected within max_length": 3,
        "missing rejected": 4,
    }
    rm = load("rm", tokenizer, tmp_path, rows, max_length=20).counts["train"]
    assert rm.dropped["longer than max_length"].rows == 2


def test_a_margin_column_is_never_ignored_in_silence(pair_rows, tmp_path, tokenizer, caplog):
    data = load("rm", tokenizer, tmp_path, dataset_name=str(pair_rows))
    assert "margin" not in data.train.column_names
    assert "columns that are not used: margin" in caplog.text
    assert load("rm", tokenizer, tmp_path, dataset_name=str(pair_rows), use_margin=True).train[1]["margin"] == 0.5


def test_a_rewards_row_ends_with_eos(pair_rows, tmp_path, tokenizer):
    row = load("rm", tokenizer, tmp_path, dataset_name=str(pair_rows)).train[0]
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer.eos_token_id


# ---- The cache ----


def test_the_cache_is_used_again_and_depends_on_template_and_keys(tmp_path, monkeypatch):
    tokenizer, path = build_tokenizer(), str(write_rows(tmp_path / "r.jsonl", [{"messages": CHAT}]))
    first = load("sft", tokenizer, tmp_path, dataset_name=path).train[0]
    monkeypatch.setattr("tunebook.data.loading.process_batch", lambda *a, **k: pytest.fail("tokenized again"))
    assert load("sft", build_tokenizer(), tmp_path, dataset_name=path).train[0] == first
    monkeypatch.undo()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|>!")
    assert load("sft", tokenizer, tmp_path, dataset_name=path).train[0] != first


def test_several_workers_give_the_same_rows(tmp_path, tokenizer):
    layout = Layout("prompt and completion", {"prompt": "prompt", "completion": "completion"})
    settings = RenderSettings("sft", tokenizer, 200, layout)
    rows = datasets.concatenate_datasets([TABLE] * 3)
    one, _ = process(rows, settings)
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE / "tunebook")
    two, outcomes = process(rows, settings, num_proc=2)
    assert len(outcomes) == 60 and one[:] == two[:]
