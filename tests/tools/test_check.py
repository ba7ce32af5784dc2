"""tunebook check: what it says of a recipe, and that it finds the faults that a newcomer makes."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TEMPLATE, build_model, launch, options, question, read_cases, short_recipe, train, write_rows
from measure import Recorder
from scipy.stats import binomtest
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

from tunebook.environment import Sharding
from tunebook.errors import RecipeError
from tunebook.files import read_rows
from tunebook.recipe import find_task, parse, read_recipe
from tunebook.tools import check as preflight
from tunebook.tools.check import DEVICES, LEARNING_RATES, check, find_device, read_sharding, wilson
from tunebook.tools.cli import app
from tunebook.tools.memory import Part

CASES = read_cases("tools/check_cases.yaml")
TEMPLATES = {
    "no system": TEMPLATE.replace("for m in messages %}", "for m in messages if m['role'] != 'system' %}"),
    "no end": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
}
HEALTHY = {"max_length": 128, "learning_rate": 2e-5}
HEALTHY |= {"max_steps": None, "save_strategy": None, "per_device_train_batch_size": None}  # the defaults


@pytest.fixture
def report(tiny, sft_rows, pair_rows, tmp_path, capsys):
    """Exit code and output of a check of a healthy recipe with some keys changed."""

    def run(task="sft", device="cpu", sharding=None, reward_model=None, full=False, rows=None, **keys):
        file = sft_rows if task == "sft" else pair_rows
        file = file if rows is None else write_rows(tmp_path / "rows.jsonl", rows)
        recipe = short_recipe(tiny, file, tmp_path / "out", **{**HEALTHY, **keys})
        code = check(parse(task, recipe), device, sharding, full, reward_model)
        return code, re.sub(r"\s+", " ", capsys.readouterr().out)

    return run


def chat(**turns: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns.items()]


def warnings(output: str) -> list[str]:
    return output.split("warning: ")[1:]


# ---- Faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"packing": True}, {"use_peft": True, "learning_rate": 2e-4}], ids=str)
@pytest.mark.parametrize("task", ["sft", "rm", "dpo"])
def test_a_healthy_recipe_gives_no_warning_and_code_0(report, task, keys):
    code, output = report(task, **keys)
    assert code == 0 and not warnings(output) and "No warnings." in output, output


ROWS = {
    "answers": [{"prompt": chat(user=question(i)), "completion": chat(assistant="five")} for i in range(8)],
    "brief": [
        {"prompt": chat(system="be brief", user="two?")[i % 2 :], "completion": chat(assistant="five")}
        for i in range(8)
    ],
    "conversations": [{"messages": chat(user=question(i), assistant="five")} for i in range(8)],
    "long": [{"prompt": "one ", "completion": "five " * (40 if i % 5 < 2 else 4)} for i in range(40)],
    "pairs": [
        {"prompt": chat(user="two?"), "chosen": chat(assistant=f"good {i}"), "rejected": chat(assistant=f"bad {i}")}
        for i in range(8)
    ],
}


@pytest.mark.parametrize(("task", "rows", "keys", "message"), CASES["faults"])
def test_a_fault_is_the_one_warning(report, task, rows, keys, message):
    keys = {name: TEMPLATES[value] if name == "chat_template" else value for name, value in keys.items()}
    [warning] = warnings(report(task, rows=ROWS.get(rows), **keys)[1])
    assert re.search(message, warning)
    assert rows == "conversations" or not warnings(report(task, rows=ROWS.get(rows))[1])


@pytest.mark.parametrize(("rate", "word"), [(2, "above"), (1e-9, "below")])
@pytest.mark.parametrize(
    ("task", "usual"),
    [
        ("sft", "SFT (5e-07 to 1e-03). Try 2e-05."),
        ("rm", "RM (5e-07 to 1e-03). Try 2e-05."),
        ("dpo", "DPO (1e-08 to 1e-04). Try 1e-06."),
    ],
)
def test_a_learning_rate_out_of_bounds_is_found(report, task, usual, rate, word):
    [warning] = warnings(report(task, learning_rate=rate)[1])
    assert warning.strip() == f"learning_rate {rate:g} is {word} the usual range for {usual}"


def test_an_adapter_takes_a_larger_learning_rate(report):
    high = LEARNING_RATES["sft"][1]
    assert warnings(report(learning_rate=2 * high)[1])
    assert not warnings(report(learning_rate=2 * high, use_peft=True)[1])
    assert "SFT with an adapter (5e-06 to 1e-02)" in warnings(report(learning_rate=2, use_peft=True)[1])[0]


def test_every_shipped_recipe_is_within_the_bounds():
    for path in ROOT.glob("recipes/**/*.yaml"):
        recipe = read_recipe(path)
        low, high = (bound * (10 if recipe.get("use_peft") else 1) for bound in LEARNING_RATES[find_task(path)])
        assert low <= recipe["learning_rate"] <= high, path


@pytest.fixture
def judge(tiny, tokenizer, pair_rows, tmp_path) -> str:
    """A reward model that is above 0 for a text with a token that only chosen answers have: its one layer averages over
    the text a number that only those tokens carry."""
    rows = read_rows(pair_rows)
    seen = {side: {i for row in rows for i in tokenizer(row[side])["input_ids"]} for side in ("chosen", "rejected")}
    config = LlamaConfig(**{**build_model(len(tokenizer)).config.to_dict(), "num_hidden_layers": 1, "num_labels": 1})
    config.pad_token_id = tokenizer.pad_token_id
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name))
        attention = model.model.layers[0].self_attn
        model.model.embed_tokens.weight[list(seen["chosen"] - seen["rejected"]), 0] = 1.0
        attention.v_proj.weight[0, 0] = attention.o_proj.weight[1, 0] = model.score.weight[0, 1] = 1.0
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    return str(tmp_path / "judge")


@pytest.mark.parametrize("task", ["rm", "dpo"])
def test_swapped_pairs_are_found_by_a_reward_model(report, judge, task):
    output = report(task, reward_model=judge)[1]
    assert "prefers chosen in 100% of 48 pairs (93% to 100%)" in output and not warnings(output)
    [warning] = warnings(report(task, reward_model=judge, chosen_column="rejected", rejected_column="chosen")[1])
    assert "prefers the rejected answer in 100% of 48 pairs" in warning and "chosen_column" in warning


@pytest.mark.parametrize(("wins", "count"), [(0, 20), (13, 48), (48, 48)])
def test_the_interval_of_a_share_is_wilsons(wins, count):
    interval = binomtest(wins, count).proportion_ci(method="wilson")
    assert wilson(wins, count) == pytest.approx((interval.low, interval.high), abs=1e-4)


# ---- Exit codes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama8b(tmp_path_factory, tokenizer) -> str:
    """A folder with the config of Llama-3.1-8B and a tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("llama8b")
    LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_that_cannot_fit_gives_code_1_and_the_first_thing_to_change(report, llama8b):
    keys = {"model_name_or_path": llama8b, "device": "h100-80gb", "save_strategy": "no"}
    code, output = report(**keys)
    [warning] = warnings(output)
    assert code == 1
    assert re.search(r"needs 1[23]\d\.\d GB, and h100-80gb has 85.5. First set use_peft: true", warning)
    assert report(**keys, use_peft=True, learning_rate=2e-4)[0] == 0
    assert report(**keys, sharding=Sharding("deepspeed", 8, 3))[0] == 0


@pytest.mark.parametrize(("largest", "task", "keys", "change"), CASES["changes"])
def test_the_first_thing_to_change_makes_the_largest_part_smaller(report, monkeypatch, largest, task, keys, change):
    names = ["weights", "gradients", "optimizer", "activations"] + ["reference"] * (largest == "reference")
    sharding = Sharding(keys["sharding"], 2) if "sharding" in keys else None
    parts = [Part(name, 1e18 if name == largest else 1.0, "") for name in names]
    monkeypatch.setattr(preflight, "estimate", lambda workload: parts)
    code, output = report(task, **keys | {"sharding": sharding})
    assert code == 1 and f"First {change}" in warnings(output)[-1]


def test_checkpoints_that_fill_the_disk_give_code_1(report, monkeypatch):
    usage = preflight.shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)
    code, output = report()
    assert code == 1 and "Set save_total_limit: 1" in warnings(output)[0]


def test_rows_of_which_none_can_be_trained_on_give_code_1(report):
    code, output = report("rm", max_length=2)
    assert code == 1 and "No row of" in output and "longer than max_length" in output


@pytest.mark.slow
def test_the_command_gives_code_2_for_a_recipe_error(tmp_path):
    recipe = tmp_path / "sft.yaml"
    recipe.write_text("learning_rte: 2")
    command = [sys.executable, "-c", "from tunebook.tools.cli import app; app()", "check", str(recipe)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
    assert (run.returncode, run.stderr.count("Did you mean learning_rate")) == (2, 1)


def test_the_command_takes_overrides_and_finds_task_and_sharding(tiny, sft_rows, tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(short_recipe(tiny, sft_rows, tmp_path / "out")))
    overrides = ["--learning_rate", "2", "--max_steps", "7"]
    machine = ["--device", "h100-80gb", "--accelerate-config", "zero3", "--num-processes", "4"]
    result = CliRunner().invoke(app, ["check", str(path), *machine, *overrides])
    assert result.exit_code == 0 and "learning_rate 2 is above" in result.output
    assert re.search(r"steps +7 \(.*x 4 devices", result.output, re.DOTALL)


@pytest.mark.slow
def test_dry_run_checks_from_the_script_and_writes_nothing(tiny, sft_rows, tmp_path):
    run = launch("src/sft.py", *options(short_recipe(tiny, sft_rows, tmp_path / "out", dry_run=True)))
    assert run.returncode == 0, run.stderr
    assert "No warnings." in run.stdout
    assert not (tmp_path / "out").exists()


# ---- Facts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("sft", {"num_train_epochs": 2, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}),
        ("sft", {"packing": True, "max_length": 64, "per_device_train_batch_size": 2}),
        ("dpo", {"packing": True, "per_device_train_batch_size": 7}),
        ("rm", {"packing": True, "max_tokens_per_batch": 200}),
    ],
    ids=str,
)
def test_a_run_has_the_steps_and_the_largest_batch_that_check_shows(report, tiny, task_rows, tmp_path, task, keys):
    keys = {"num_train_epochs": 1, "save_strategy": "no", "report_to": "none", **keys}
    output = report(task, **keys)[1]
    with Recorder() as recorder:
        train(task, tiny, task_rows, tmp_path / "out", **{**HEALTHY, **keys})
    steps = recorder.result()["steps"]
    assert int(re.search(r"steps (\d+) \(", output)[1]) == len(recorder.times) - 1
    rows, tokens = map(int, re.search(r"largest batch (\d+) x (\d+) tokens", output).groups())
    if not keys.get("packing"):
        assert max(step["padded"] for step in steps) <= rows * tokens
    elif task == "sft":
        assert max(sum(step["lengths"]) for step in steps) <= tokens
    else:
        assert max(sum(step["lengths"]) - sum(step["shared"]) for step in steps) == tokens


def test_a_sample_says_nearly_what_all_rows_say(report, monkeypatch):
    rows = [{"prompt": "one ", "completion": "five " * (1 + i % 50)} for i in range(1000)]
    keys = {"rows": rows, "max_length": 40, "packing": True}
    monkeypatch.setattr(preflight, "SAMPLE", 300)
    sampled, whole = report(**keys)[1], report(**keys, full=True)[1]
    assert "30.0% of the training rows" in sampled and "of the training rows" not in whole
    steps, cut = (
        [float(re.search(pattern, text)[1]) for text in (sampled, whole)]
        for pattern in (r"steps (\d+) \(", r"(\d+)% of the rows are cut")
    )
    assert steps[0] == pytest.approx(steps[1], rel=0.05)
    assert cut[0] == pytest.approx(cut[1], abs=6)


def test_tokens_are_counted_as_the_trainer_gets_them(report, tokenizer, pair_rows):
    rows = read_rows(pair_rows)
    texts = [row["prompt"] + row[side] + "<|im_end|>" for side in ("chosen", "rejected") for row in rows]
    total = np.array([len(tokenizer(text)["input_ids"]) for text in texts])
    expected = f"total tokens {np.median(total):.0f} / {np.quantile(total, 0.95):.0f} / {total.max()}"
    assert expected in report("dpo")[1]


def test_every_accelerate_config_is_understood():
    expected = CASES["sharding"]
    assert expected.keys() == {path.stem for path in ROOT.glob("configs/accelerate/*.yaml")}
    for name, values in expected.items():
        assert read_sharding(name, None) == Sharding(*values)
    assert read_sharding("zero2", 2).processes == 2
    with pytest.raises(RecipeError, match="no accelerate config zero4"):
        read_sharding("zero4", None)


def test_a_device_is_one_of_the_table_or_says_its_size():
    assert find_device("a100-40gb") == ("cuda", "a100-40gb", DEVICES["a100-40gb"])
    assert find_device("tpu-16gb")[2] == 16e9
    for name, size in DEVICES.items():
        assert size == pytest.approx(find_device(f"x-{name.split('-')[1]}")[2], rel=0.1)
    with pytest.raises(RecipeError, match="h100-80gb"):
        find_device("h100")
