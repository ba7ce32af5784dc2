"""A recipe's key is honoured or refused, never ignored."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from enum import Enum

import pytest
import trl
import yaml
from conftest import ROOT, launch, read_cases
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tunebook.errors import RecipeError
from tunebook.recipe import TASKS, command_line, find_task, parse, parser, read_command_line, read_recipe, schema
from tunebook.recipe.keys import old_keys, unknown_key
from tunebook.recipe.needs import TERM, holds
from tunebook.recipe.rules import CHOICES, NEEDS, RANGES, RULES

BASE = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "output_dir": "o", "bf16": False}
KEYS = {name for task in TASKS for name in schema.task_keys(task)}


@pytest.mark.parametrize(("task", "keys", "message"), read_cases("recipe/mistakes.yaml"))
def test_a_mistake_is_refused_by_name(task, keys, message):
    given = {name: value for name, value in (BASE | keys).items() if value is not None}
    with pytest.raises(RecipeError) as error:
        parse(task, given)
    assert message in str(error.value)


@pytest.mark.parametrize("branch", ["refs/pr/1", "v 1", "-x", "v1.lock", "a..b", "/a", "a/", "a.", "a~1", ".a", "a//b"])
def test_what_cannot_be_a_branch_is_refused(branch):
    keys = {"push_to_hub_revision": True, "hub_model_id": "me/mine", "hub_revision": branch}
    with pytest.raises(RecipeError, match="cannot be a branch on the Hub"):
        parse("sft", BASE | keys)
    assert parse("sft", BASE | keys | {"hub_revision": "run-1.10/a_b"}).training.hub_revision == "run-1.10/a_b"


def test_the_losses_of_dpo_are_trls():
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    assert set(CHOICES["loss_type"]) == set(re.findall(r'loss_type == "(\w+)"', source))
    assert set(CHOICES["f_divergence_type"]) == set(re.findall(r'f_divergence_type == "(\w+)"', source))


def test_the_trackers_are_transformers():
    assert set(CHOICES["report_to"]) - {"none", "all"} == set(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize(
    "name", sorted(schema.PATHS - {"datasets", "deepspeed", "fsdp_config", "accelerator_config", "eval_prompts"})
)
def test_a_path_may_begin_with_a_variable_or_the_home_folder(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    task = next(task for task in TASKS if name in schema.task_keys(task))
    field, hint = schema.task_keys(task)[name]
    paths = {"~/a": "/home/me/a", "$SCRATCH/a": "/scratch/a", "${SCRATCH}/a": "/scratch/a", "a/~b": "a/~b"}
    for written, expected in paths.items():
        value = schema.read_value(name, written, field, hint)
        assert value in (expected, [expected])
    for written in ("$NOWHERE/a", "${NOWHERE}/a", "~nobody_here/a"):
        with pytest.raises(RecipeError, match=f"`{name}`.*is not set in the environment"):
            schema.read_value(name, written, field, hint)


def test_paths_in_a_mixture_and_of_prompts_are_expanded_and_prompts_are_not(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    keys = {"datasets": [{"path": "$SCRATCH/a", "data_dir": "$SCRATCH/b"}], "dataset_name": None, "do_eval": True}
    recipe = parse("sft", {**BASE, **keys, "eval_prompts": ["$SCRATCH/p.txt"]})
    assert (recipe.script.datasets[0].path, recipe.script.datasets[0].data_dir) == ("/scratch/a", "/scratch/b")
    assert recipe.training.eval_prompts == ["/scratch/p.txt"]
    assert parse("sft", {**BASE, "do_eval": True, "eval_prompts": ["It costs $NOWHERE."]}).training.eval_prompts


ODD = [0, -1, 1.5, float("inf"), float("nan"), 2**63, "", "nope", "a" * 5000, "[]", [], {}, [None], {1: 2}, True, None]


@pytest.mark.parametrize("task", TASKS)
def test_an_odd_value_of_any_key_is_taken_or_refused_in_a_message_with_the_key(task):
    for name in schema.task_keys(task):
        for value in ODD:
            try:
                parse(task, {**BASE, name: value})
            except RecipeError as error:
                assert name in str(error) and len(str(error)) < 2000, (name, value)


@pytest.mark.parametrize("task", TASKS)
def test_a_key_that_is_set_to_its_default_is_never_refused(task):
    names = schema.task_keys(task).keys() - old_keys().keys() - BASE.keys()
    for name in names:
        value = schema.default(schema.task_keys(task)[name][0])
        assert parse(task, {**BASE, name: value.value if isinstance(value, Enum) else value})


def test_all_mistakes_are_said_at_once():
    with pytest.raises(RecipeError) as error:
        parse("sft", BASE | {"learning_rte": 1, "torch_dtype": "x", "max_length": 0})
    assert len(str(error.value).splitlines()) == 3


def test_every_rule_and_condition_names_keys_that_exist():
    assert {name for name, _ in NEEDS} | set(RANGES) <= KEYS
    fields = [field for task in TASKS for field, _ in schema.task_keys(task).values()]
    conditions = [need for field in fields for need in field.metadata.get("needs", ())] + [need for _, need in NEEDS]
    for condition in conditions + [rule["if"] for rule in RULES["contradictions"]]:
        for term in re.split(", or | and ", condition.partition("; ")[0]):
            assert TERM.fullmatch(term)["key"] in KEYS | {"task"}, condition


@pytest.mark.parametrize(
    ("condition", "holding", "failing"),
    [
        ("a: x or y, or b: true; because", [{"a": "y", "b": False}, {"a": "z", "b": True}], [{"a": "z", "b": False}]),
        ("a: x, y or z", [{"a": ["q", "z"]}], [{"a": ["q"]}, {}]),
        ("a other than no", [{"a": None}, {"a": "yes"}], [{"a": "no"}]),
        ("a of 2 or more", [{"a": 2}], [{"a": 1}, {}]),
        ("a and no b", [{"a": 0.1}, {"a": [1], "b": None}], [{"a": -1}, {"a": "x", "b": 1}]),
        ("a: false", [{}, {"a": False}], [{"a": True}, {"a": None}]),
    ],
)
def test_a_condition_holds_as_it_reads(condition, holding, failing):
    assert all(holds(condition, values) for values in holding)
    assert not any(holds(condition, values) for values in failing)


def test_a_key_that_trl_or_transformers_still_has_is_never_called_gone():
    live = {name for config in (trl.SFTConfig, trl.RewardConfig, trl.DPOConfig) for name in schema.keys_of(config)}
    assert {name for name, old in old_keys().items() if old.kind == "chosen"} == live & old_keys().keys()


def test_renamed_keys_are_not_offered_as_near_names():
    assert all("Did you mean" not in unknown_key("sft", name, schema.known_names()) for name in old_keys())


def test_a_file_is_yaml_1_2_with_anchors(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "_lora: &lora {lora_r: 8, lora_alpha: 16}\n<<: *lora\nuse_peft: true\nlearning_rate: 2e-5\n"
        "save_strategy: no\npacking: yes\n"
    )
    recipe = parse("sft", BASE | read_recipe(path), read_command_line(["--eval_strategy", "no"])[1])
    model, training = recipe.model, recipe.training
    assert (model.lora_r, model.lora_alpha, training.learning_rate) == (8, 16, 2e-5)
    assert (training.save_strategy, training.eval_strategy, training.packing) == ("no", "no", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: 1\na: 2\n", "line 2: `a` stands twice"), ("a: [1\n", "is not YAML"), ("- a\n", "a recipe is a mapping")],
)
def test_a_broken_file_is_refused(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_the_command_line_overrides_lists_flags_and_nested_keys():
    config, overrides = read_command_line(
        ["--config", "r.yaml", "--learning-rate=3e-4", "--packing", "--report_to", "wandb", "tensorboard"]
        + ["--lr_scheduler_kwargs.min_lr_rate", "0.1", "--system_prompt", "Be brief: yes."]
    )
    assert config == "r.yaml"
    assert overrides == {
        "learning_rate": 3e-4,
        "packing": True,
        "report_to": ["wandb", "tensorboard"],
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "system_prompt": "Be brief: yes.",
    }


def test_nested_overrides_keep_the_recipes_other_entries():
    merged = command_line.merge({"lr_scheduler_kwargs": {"a": 1, "b": 2}}, {"lr_scheduler_kwargs": {"b": 3}})
    assert merged == {"lr_scheduler_kwargs": {"a": 1, "b": 3}}


@pytest.fixture(scope="module")
def shipped_recipes() -> list[tuple[str, dict]]:
    return [(find_task(path), read_recipe(path)) for path in sorted(ROOT.glob("recipes/**/*.yaml"))]


@pytest.mark.parametrize("words", read_cases("recipe/overrides.yaml"))
def test_the_command_line_wins_over_every_shipped_recipe(words, shipped_recipes, monkeypatch, caplog):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    typed = read_command_line(shlex.split(words))[1]
    recipes = [(task, recipe) for task, recipe in shipped_recipes if typed.keys() <= schema.task_keys(task).keys()]
    assert recipes
    for task, recipe in recipes:
        caplog.clear()
        parsed = parse(task, recipe, typed)
        values = {
            name: value for part in (parsed.script, parsed.model, parsed.training) for name, value in vars(part).items()
        }
        wanted = schema.read_values(task, typed)[0]
        held = {name: values[name] for name in typed if name not in ("report_to", "lr_scheduler_kwargs")}
        assert held == {name: wanted[name] for name in held}
        lost = {name for name in recipe if name not in parsed.given}
        changed = {name for name in recipe.keys() - typed.keys() - lost if parsed.given[name] != recipe[name]}
        lines = [record.getMessage() for record in caplog.records if "The command line wins" in record.getMessage()]
        assert len(lines) == bool(lost | changed)
        assert all(f"{name}: " in lines[0] for name in lost | changed)


@pytest.mark.parametrize(("recipe", "words", "dropped", "put"), read_cases("recipe/displaced.yaml"))
def test_the_command_line_displaces_what_contradicts_it_and_nothing_else(recipe, words, dropped, put):
    typed = read_command_line(shlex.split(words))[1]
    given = command_line.overridden("sft", BASE | recipe, typed)
    assert given == {name: value for name, value in (BASE | recipe | typed | put).items() if name not in dropped}


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ({}, "--eval_steps 50", "`eval_steps` has no effect here. It needs eval_strategy: steps"),
        ({}, "--eval_steps 50 --eval_strategy no", "`eval_steps` has no effect here"),
        ({"bf16": None}, "--bf16 true --fp16 true", "both true"),
        ({"lora_r": 4}, "--learning_rate 1", "`lora_r` has no effect here"),
        ({"datasets": [{"path": "a"}]}, "--seed 1", "both set"),
    ],
)
def test_a_contradiction_within_one_place_is_refused(recipe, words, message):
    with pytest.raises(RecipeError, match=message):
        parse("sft", BASE | recipe, read_command_line(shlex.split(words))[1])


def test_text_has_the_characters_that_were_typed():
    words = "--run_name 7 --hub_revision 1.10 --output_dir 2024-11-30 --stop_sequences 1 yes --prompt_template '[Q] {}'"
    words += " --system_prompt '' --eos_token null --loss_weights 1 0.5"
    assert read_command_line(shlex.split(words))[1] == {
        **{"run_name": "7", "hub_revision": "1.10", "output_dir": "2024-11-30", "stop_sequences": ["1", "yes"]},
        **{"prompt_template": "[Q] {}", "system_prompt": "", "eos_token": None, "loss_weights": [1, 0.5]},
    }


def test_global_batch_size_sets_the_accumulation():
    args = parse("sft", BASE | {"global_batch_size": 32, "per_device_train_batch_size": 4}).training
    assert args.gradient_accumulation_steps == 8


def test_open_r1s_callback_is_our_key():
    args = parse(
        "sft", BASE | {"callbacks": ["push_to_hub_revision"], "hub_model_id": "a/b", "hub_revision": "v"}
    ).training
    assert args.push_to_hub_revision and args.callbacks == []


def test_fsdp_on_a_cpu_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="FSDP needs a GPU"):
        parse("sft", BASE)


@pytest.mark.parametrize(
    "variables, keys, message",
    [
        (
            {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            {},
            "fsdp_state_dict_type: SHARDED_STATE_DICT no model is saved",
        ),
        ({}, {}, "fsdp_state_dict_type: SHARDED_STATE_DICT no model is saved"),  # FSDP2's default
        ({"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, {"optim": "adafactor"}, "optim: adafactor"),
    ],
)
def test_what_fsdp2_cannot_train_or_save_is_refused(variables, keys, message, monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tunebook.recipe.configs.check_fsdp_device", lambda: None)
    with pytest.raises(RecipeError, match=message):
        parse("sft", BASE | keys)


def test_help_lists_our_keys_apart(capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse_command_line("dpo", ["--help"])
    ours, upstream = capsys.readouterr().out.split("trl's keys")
    assert end.value.code == 0
    assert "--nll_loss_coef" in ours and "--beta" in upstream and "--beta" not in ours


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_recipe_parses(path, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    assert path.read_text().startswith("# "), "the first line says which hardware it is for"
    parse(path.parent.name if path.parent.name in TASKS else path.stem, read_recipe(path))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/accelerate/*.yaml")), ids=lambda p: p.stem)
def test_every_accelerate_config_loads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


@pytest.mark.slow
def test_two_processes_say_it_once_without_a_traceback_of_ours(tmp_path):
    done = launch("src/sft.py", "--learning_rte", "1", "--output_dir", tmp_path / "o", config="ddp", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: `learning_rte` is not a key. Did you mean learning_rate") == 1
    assert "tunebook/recipe" not in done.stderr  # the launcher reports in its own way that a process ended
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_script_itself_ends_with_code_2_and_one_line_and_shows_the_traceback_on_request(tmp_path):
    def run(*keys, **variables) -> str:
        command = [sys.executable, "src/sft.py", "--learning_rte", "1", *keys]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables})
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: `learning_rte` is not a key. Did you mean learning_rate")
        return done.stderr

    assert "Traceback" not in run()
    assert "Traceback" in run("--log_level", "debug") and "Traceback" in run(TUNEBOOK_LOG_LEVEL="debug")
