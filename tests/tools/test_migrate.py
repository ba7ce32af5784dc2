"""Settings of other systems become a recipe that parses; nothing is dropped without a word."""

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, read_cases
from typer.testing import CliRunner

from tunebook.data.sources import load_source
from tunebook.errors import RecipeError
from tunebook.files import write_yaml
from tunebook.recipe import TASKS, parse, read_recipe, schema
from tunebook.tools.cli import app
from tunebook.tools.conversions import LAUNCH, share_of
from tunebook.tools.migrate import (
    CONVERSIONS,
    FALLBACK,
    Migration,
    choose_command,
    list_keys,
    migrate,
    new_names,
    read_table,
    recognize,
    systems,
    tables,
)

MIXTURE = Path(__file__).parent / "open_r1" / "sft" / "config.yaml"
DOTTED = Path(__file__).parent / "openrlhf" / "train_rm.sh"
OLD = """\
deepspeed --module openrlhf.cli.train_rm --pretrain org/sft --save_path ./rm --save_steps 50 --train_batch_size 256 \
--micro_train_batch_size 4 --dataset org/pairs,my.jsonl@part --dataset_probs 0.4,1.2 --apply_chat_template \
--max_len 8192 --adam_betas 0.9 0.99 --eval_dataset org/eval --eval_steps -1 --loss logexp --compute_fp32_loss \
--packing_samples --zero_stage 3 --zpg 8 2>&1 | tee log
"""
SFT = "openrlhf.cli.train_sft --pretrain org/base --dataset my.jsonl "
DEFAULT = {"prompt_template": "User: {}\nAssistant: ", LAUNCH: "configs/accelerate/zero2.yaml"}
CASES = read_cases("tools/migrate_cases.yaml")
PUBLIC_KEYS = read_cases("tools/public_keys.yaml")
UNKNOWN = {  # misspelled there, or without a meaning
    "axolotl": ["context_parapllel_size", "test_value"],
}


@pytest.fixture(scope="module")
def mixture():
    return migrate(str(MIXTURE))


def parsed(done, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(str(done))
    assert read_recipe(path) == done.recipe
    recipe = parse(done.task, read_recipe(path))
    return vars(recipe.script) | vars(recipe.training) | vars(recipe.model)


def test_an_open_r1_recipe_parses_and_trains_with_the_same_numbers(mixture, tmp_path):
    values = parsed(mixture, tmp_path)
    assert values.items() >= CASES["open_r1"].items() and "chat_template: |-\n" in str(mixture)
    first, second = values["datasets"]
    assert (first.path, first.name, first.split, first.columns) == ("org/a", "all", "train_sft[:50%]", ["messages"])
    assert (second.path, second.split) == ("org/b", "train")
    assert mixture.to_do == []


def test_what_an_open_r1_recipe_loses_is_listed_with_the_reason(mixture):
    left = "\n".join(mixture.remarks())
    assert "overwrite_output_dir: true: Open-R1 resumes" in left
    assert "push_to_hub: true: `push_to_hub_revision` pushes" in left
    assert "per_device_eval_batch_size: 4: `per_device_eval_batch_size` would have no effect. It needs eval" in left
    assert "benchmarks: lcb_v4: Not all are in configs/benchmarks" in left
    assert "mystery: 7: `mystery` is not a key" in left
    assert "hub_token: ***" in left and "hf_secret" not in str(mixture)


def test_a_test_set_in_rows_is_shared_by_the_sources_that_are_split_one_by_one(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(MIXTURE.read_text().replace("eval_strategy: 'no'", "eval_strategy: epoch"))
    assert parsed(migrate(str(path)), tmp_path)["test_split_size"] == 1000 / 2


def test_the_mixer_of_older_recipes_becomes_a_data_set_with_its_splits(tmp_path):
    path = tmp_path / "dpo.yaml"
    path.write_text(
        "model_name_or_path: m\noutput_dir: o\ndo_eval: true\npadding_free: true\nmax_length: 64\n"
        "dataset_mixer: {org/pairs: 0.25}\ndataset_splits: [train_prefs, test_prefs]\ndataset_configs: [all]\n"
    )
    expected = {"dataset_name": "org/pairs", "dataset_config": "all", "packing": True}
    expected |= {"dataset_train_split": "train_prefs[:25%]", "dataset_test_split": "test_prefs"}
    assert parsed(migrate(str(path)), tmp_path).items() >= expected.items()


def test_old_and_new_flags_of_openrlhf_give_the_same_recipe():
    new, old = migrate(str(DOTTED)), migrate(OLD)
    assert new.recipe == old.recipe
    assert list(new.left.values()) == list(old.left.values())
    assert list(new.left) == ["--ds.zpg 8"] and list(old.left) == ["--zpg 8"]
    assert "configs/accelerate/zero3.yaml src/rm.py" in str(new)
    assert new.to_do == old.to_do == []


def test_openrlhfs_settings_and_defaults_arrive_in_the_configs(tmp_path):
    values = parsed(migrate(OLD), tmp_path)
    sources = [(source.path, source.data_dir, source.probability) for source in values["datasets"]]
    assert sources == [("org/pairs", None, 0.25), ("my.jsonl", "part", pytest.approx(0.75))]
    assert values | CASES["openrlhf"] == values


@pytest.mark.parametrize(("flags", "keys"), CASES["flags"])
def test_a_flag_means_here_what_it_meant_there(flags, keys):
    keys = {LAUNCH if name == "LAUNCH" else name: value for name, value in keys.items()}
    done = migrate(SFT + flags)
    got = done.recipe | {LAUNCH: done.sharding}
    assert {name: got.get(name) for name in DEFAULT | keys} == DEFAULT | keys
    assert f"# {LAUNCH} {done.sharding} src/sft.py" in str(done) and (ROOT / done.sharding).exists()


def test_what_depends_on_the_machine_is_not_held_against_the_recipe():
    assert migrate(SFT + "--ring_attn_size 2 --packing_samples").to_do == []


def test_a_weight_is_a_part_of_a_split_that_loads(tmp_path, sft_rows):
    rows = load_source(str(sft_rows), "train")
    assert load_source(str(sft_rows), share_of("train", 0.25))["prompt"] == rows["prompt"][: len(rows) // 4]
    assert share_of("train", 1.0) == "train"


@pytest.mark.parametrize("task", TASKS)
def test_every_flag_is_carried_over_or_listed(task):
    table = read_table("openrlhf")
    values = {name: value for defaults in table["defaults"].values() for name, value in defaults.items()}
    for name, entry in table["settings"].items():
        for flag in [name, *entry.get("older", "").split()]:
            value = values.get(name, 1)
            words = " ".join(map(str, value)) if isinstance(value, list) else f"'{value}'"
            done = migrate(f"train_{task} --{flag} {words}" + " --dataset d" * (name != "data.dataset"))
            told = re.search(rf"--{re.escape(flag)}(?!\w|\.\w)", str(done))
            assert told or name in ("ds.zero_stage", "data.dataset_split"), flag


@pytest.fixture
def folder(tmp_path):
    """A folder in which LLaMA-Factory's names of data sets are known."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(CASES["dataset_info"]))
    return tmp_path


@pytest.mark.parametrize("case", CASES["tools"], ids=lambda case: f"{case['tool']}-{case['task']}")
def test_each_setting_of_a_tool_arrives_with_its_value_or_is_listed(case, folder):
    path = folder / (f"{case['task']}.yaml" if "given" in case else "run.sh")
    path.write_text(write_yaml(case["given"]) if "given" in case else case["command"])
    done = migrate(str(path))
    wanted = json.loads(json.dumps(case["keys"]).replace("INFO", str(folder / "data")))
    assert done.recipe == wanted and done.task == case["task"] and done.to_do == case.get("to_do", [])
    assert done.sharding == f"configs/accelerate/{case.get('sharding', 'ddp')}.yaml" and (ROOT / done.sharding).exists()
    for words in case.get("says", []):
        assert words in str(done)
    parse(done.task, done.recipe)


@pytest.mark.parametrize("case", CASES["tools"], ids=lambda case: f"{case['tool']}-{case['task']}")
def test_a_tool_is_never_taken_for_another(case):
    found = recognize(case["given"], "it") if "given" in case else choose_command(case["command"], None).tool
    assert found == case["tool"]


@pytest.mark.parametrize(("given", "why"), CASES["refused"])
def test_what_cannot_be_trained_says_why_not(given, why, folder):
    (folder / "settings.yaml").write_text(write_yaml(given))
    with pytest.raises(RecipeError, match=re.escape(why)):
        migrate(str(folder / "settings.yaml"))


def test_instruction_and_input_are_joined_as_llamafactory_joins_them(folder):
    def migrated(names):
        given = {"model_name_or_path": "m", "stage": "sft", "dataset": names}
        (folder / "sft.yaml").write_text(write_yaml(given))
        return migrate(str(folder / "sft.yaml"))

    assert migrated("instructions").recipe["prompt_template"] == "{instruction}[[\n{input}]]"
    done = migrated("instructions,mixed")
    assert "prompt_template" not in done.recipe and "joined by an empty line" in done.differs[0]
    assert done.recipe["datasets"][1]["columns"] == {"question": "instruction", "answer": "output"}


def test_names_of_data_sets_that_no_list_explains_are_to_be_replaced(tmp_path):
    given = {"model_name_or_path": "m", "stage": "sft", "dataset": "chats", "dataset_dir": str(tmp_path / "nowhere")}
    (tmp_path / "sft.yaml").write_text(write_yaml(given))
    done = migrate(str(tmp_path / "sft.yaml"))
    assert done.recipe["dataset_name"] == "chats" and "dataset_info.json was not found" in done.to_do[0]


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (
            "llamafactory-cli train {} learning_rate=2.0e-6",
            {"model_name_or_path": "m", "stage": "dpo", "dataset": "pairs"},
        ),
        ("trl dpo --config {} --learning_rate 2e-6", {"model_name_or_path": "m", "dataset_name": "pairs"}),
        ("swift rlhf {} --learning_rate 2e-6", {"model": "m", "dataset": ["pairs"], "learning_rate": 1}),
        (
            "accelerate launch -m axolotl.cli.train {} --learning-rate=2e-6",
            {"base_model": "m", "rl": "dpo", "datasets": [{"path": "pairs", "type": "chatml.ultra"}]},
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_command_reads_its_file_and_its_flags_win(command, file, suffix, folder):
    (folder / f"settings.{suffix}").write_text(json.dumps(file))
    (folder / "run.sh").write_text(f"cd somewhere\n{command.format('settings.' + suffix)}\n")
    done = migrate(str(folder / "run.sh"))
    assert done.task == "dpo" and done.recipe["learning_rate"] == 2e-6 and done.recipe["model_name_or_path"] == "m"
    assert done.recipe["dataset_name"].endswith(("pairs", "pairs.json")) and done.to_do == []


@pytest.mark.parametrize(("modules", "expected", "told"), CASES["modules"])
def test_a_pattern_of_modules_becomes_their_names(modules, expected, told, tmp_path):
    given = {"base_model": "m", "adapter": "lora", "lora_r": 8, "lora_target_modules": modules, "learning_rate": 1e-5}
    (tmp_path / "a.yml").write_text(write_yaml(given | {"datasets": [{"path": "d", "type": "chat_template"}]}))
    done = migrate(str(tmp_path / "a.yml"))
    assert done.recipe.get("lora_target_modules") == expected and told in str(done)


def names_of(tool):
    """Every name, old or new, of a tool's settings."""
    return {*read_table(tool)["settings"], *new_names(tool)}


@pytest.mark.parametrize("tool", PUBLIC_KEYS)
def test_every_setting_of_the_public_examples_has_an_entry_or_is_a_key_of_the_same_name(tool):
    known = {name for task in TASKS for name in schema.task_keys(task)} | names_of(tool)
    assert [name for name in PUBLIC_KEYS[tool].split() if name not in known] == UNKNOWN.get(tool, [])


@pytest.mark.parametrize("tool", systems())
def test_a_tool_is_recognized_by_names_that_no_other_has(tool):
    marks = {other: set(read_table(other)["marks"]) for other in systems() if other != FALLBACK}
    others = {name for other in marks if marks[other] and other != tool for name in names_of(other)}
    assert not others & marks.get(tool, set())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tool", systems())
def test_each_setting_with_any_value_is_carried_over_or_listed(tool, task, tmp_path):
    table = read_table(tool)
    context = {"command": "", "folder": str(tmp_path), "types": table.get("types", {})}
    for name, entry in table["settings"].items():
        silent = [case for case in (entry, *entry.get("cases", ())) if case.get("set") == {}]
        for value in (1, 0.5, "some", ["some"], {"some": 1}, True):
            done = Migration(task, "it")
            with suppress(RecipeError):
                done.carry_over(tool, {name: value}, context, flags=False)
                shown = (*done.origins.values(), *done.left, *done.differs, *done.to_do, *done.recipe)
                told = any(name in words for words in shown) or done.sharding != table["sharding"] or done.differs
                assert told or silent, (name, value)


def test_every_key_and_field_that_the_tables_name_exists():
    known = {name for classes in TASKS.values() for cls in classes for name in schema.keys_of(cls)}
    fields = set("keys values set cases convert when matches otherwise note caveat older".split())
    entries = [entry for tool in systems() for entry in read_table(tool)["settings"].values()]
    entries += [case for entry in entries for case in entry.get("cases", ())]
    assert {key for entry in entries for key in re.split(", | or ", list_keys(entry))} - known == {"", LAUNCH}
    assert {field for entry in entries for field in entry} == fields
    assert {entry["convert"] for entry in entries if "convert" in entry} == CONVERSIONS.keys()


def test_a_secret_is_in_no_recipe_and_a_shell_variable_must_be_filled_in():
    done = migrate("train_dpo --dataset $DATA --use_wandb s3cr3t --pretrain m")
    assert "s3cr3t" not in str(done) and done.recipe["report_to"] == ["wandb"]
    assert done.left["--dataset $DATA"] == "It holds a variable of the shell. Fill in the value."
    assert done.to_do[0].startswith("`dataset_name` is missing")


@pytest.mark.parametrize(("source", "message"), CASES["unreadable"])
def test_what_cannot_be_read_is_refused(source, message):
    with pytest.raises(RecipeError, match=message):
        migrate(source)


def test_the_command_writes_a_recipe_and_tells_what_is_left(tmp_path):
    out = tmp_path / "rm.yaml"
    done = CliRunner().invoke(app, ["migrate", OLD, "--out", str(out)])
    assert done.exit_code == 0 and "--zpg 8: This is a setting of DeepSpeed" in done.stderr
    assert parse("rm", read_recipe(out)).training.output_dir == "./rm"


def test_the_page_holds_the_tables():
    page = (ROOT / "docs" / "migrating.md").read_text()
    assert page[page.index("## ") :] == tables(), "write tables() into docs/migrating.md, from its first table on"


def test_what_openrlhf_leaves_off_or_does_differently_is_carried_over_or_said():
    data = "--model.model_name_or_path m --data.dataset d"
    assert migrate(f"train_sft {data}").recipe["router_aux_loss_coef"] == 0
    assert migrate(f"train_dpo {data} --model.aux_loss_coef 0.1").recipe["router_aux_loss_coef"] == 0.1
    rewards = migrate(f"train_rm {data} --data.max_len 64 --model.margin_loss_enable --model.loss_type logexp")
    assert "use_margin" not in rewards.recipe and "router_aux_loss_coef" not in rewards.recipe
    assert any("logexp ignores the margin" in line for line in rewards.remarks())
    assert "OpenRLHF cuts longer pairs of a reward model, tunebook drops them" in str(rewards)
    assert migrate(f"train_rm {data} --model.margin_loss_enable").recipe["use_margin"] is True
