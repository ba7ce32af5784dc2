"""Settings of LLaMA-Factory, axolotl, ms-swift, open-instruct and TRL become recipes; none is taken for another's."""

import json

import pytest
from conftest import read_cases
from ruamel.yaml import YAML

from tunebook.errors import RecipeError
from tunebook.recipe import parse, read_recipe
from tunebook.tools.migrate import ORDER, migrate, read_table

CASES = read_cases("tools/peers.yaml")
INFO = {
    "talk": {
        "file_name": "talk.json",
        "formatting": "sharegpt",
        "columns": {"messages": "chats", "tools": "tools_of_it"},
        "tags": {"role_tag": "who", "content_tag": "text", "user_tag": "me", "assistant_tag": "it"},
    },
    "pairs": {"file_name": "pairs.json", "ranking": True},
    "org_pairs": {
        "hf_hub_url": "org/pairs",
        "subset": "all",
        "split": "train_prefs",
        "ranking": True,
        "columns": {"prompt": "question", "chosen": "chosen", "rejected": "rejected"},
    },
}
REFUSED = [
    ({"stage": "kto", "model_name_or_path": "m"}, "stage: kto is neither SFT nor a reward model nor DPO"),
    ({"stage": "dpo", "model_name_or_path": "m", "pref_loss": "orpo"}, "`pref_loss` orpo and simpo"),
    ({"stage": "sft", "model_name_or_path": "m", "image_max_pixels": 9}, "images or videos"),
    (
        {"stage": "sft", "model_name_or_path": "m", "finetuning_type": "oft"},
        "`finetuning_type: oft` has no counterpart",
    ),
    ({"base_model": "m", "rl": "grpo"}, "rl: grpo is neither SFT"),
    ({"base_model": "m", "adapter": "ia3"}, "`adapter`: only lora and qlora"),
    ({"learning_rate": 1}, "not recognized as a file of .*LLaMA-Factory"),
    ("swift rlhf --rlhf_type grpo --model m", "rlhf_type: grpo is neither SFT"),
    ("swift sft --model m --tuner_type boft", "`tuner_type`: only lora and full"),
    ("swift sft --model m\ntrl sft --model_name_or_path m", "found: 2. Choose one with --task"),
]


def written(case: dict, folder) -> str:
    """The path of a case's file, or its command."""
    if "command" in case:
        return case["command"]
    (folder / "data").mkdir()
    (folder / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    path = folder / f"{case['task']}.yaml"
    YAML(typ="safe").dump(case["settings"], path)
    return str(path)


def placed(value, folder):
    """A value with DIR/ in the place of the folder."""
    if isinstance(value, dict):
        return {key: placed(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [placed(part, folder) for part in value]
    return value.replace(str(folder), "DIR") if isinstance(value, str) else value


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['tool']} {case['task']}")
def test_settings_of_another_tool_become_a_recipe_that_parses(case, tmp_path):
    done = migrate(written(case, tmp_path))
    assert (done.task, placed(done.recipe, tmp_path)) == (case["task"], case["recipe"])
    assert done.sharding == f"configs/accelerate/{case['launch']}.yaml"
    assert [shown.partition(":")[0] for shown in done.left] == case["left"]
    (tmp_path / "recipe.yaml").write_text(str(done))
    if "dataset" not in case["left"]:
        assert done.to_do == []
        parse(done.task, read_recipe(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['tool']} {case['task']}")
def test_settings_are_those_of_one_tool_only(case, tmp_path, monkeypatch):
    carried = []
    monkeypatch.setattr("tunebook.tools.migrate.Migration.carry_over", lambda self, table, given: carried.append(table))
    migrate(written(case, tmp_path))
    assert [table["title"] for table in carried] == [case["tool"]]


@pytest.mark.parametrize(("source", "message"), REFUSED, ids=str)
def test_what_tunebook_does_not_train_is_refused_by_name(source, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        if isinstance(source, str):
            migrate(source)
        else:
            migrate(written({"settings": source, "task": "sft"}, tmp_path))


@pytest.mark.parametrize("name", [name for name in ORDER if name != "openrlhf"])
def test_every_setting_of_a_table_is_carried_over_or_listed(name):
    """Each with a value of its own kind; openrlhf's table is tried in test_migrate.py."""
    table = read_table(name)
    for setting, entry in table["settings"].items():
        assert {"keys", "set", "note", "cases"} & entry.keys(), setting
        if (
            "keys" not in entry
            and entry.get("set") != {}
            and not any(case.get("set") for case in entry.get("cases", ()))
        ):
            assert "note" in entry, setting


def test_names_of_data_sets_that_no_list_explains_are_to_be_replaced(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("stage: sft\nmodel_name_or_path: m\noutput_dir: o\ndataset: alpaca_demo\n")
    done = migrate(str(path))
    assert done.recipe["dataset_name"] == "alpaca_demo"
    assert done.to_do == [
        "dataset_info.json was not found: replace the names of data sets by files, folders or Hub ids."
    ]
