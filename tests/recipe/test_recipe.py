"""A recipe's key is honoured or refused, never ignored."""

import logging
import os
import re
import subprocess
import sys

import pytest
import trl
import yaml
from conftest import ROOT, launch

from tunebook.errors import RecipeError
from tunebook.recipe import TASKS, parse, parser, read_command_line, read_recipe
from tunebook.recipe.needs import TERM, holds
from tunebook.recipe.rules import NEEDS, RANGES, RULES

BASE = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "output_dir": "o", "bf16": False}
MIX = [{"path": "a", "probability": 0.5}, {"path": "b", "probability": 0.5}]

# task, the keys beside BASE, what the message must name (None of BASE: the key is taken away)
MISTAKES = [
    ("sft", {"learning_rte": 1e-5}, "learning_rte` is not a key. Did you mean learning_rate"),
    ("sft", {"zzzzqqq": 1}, "zzzzqqq` is not a key. See --help"),
    ("sft", {"torch_dtype": "bfloat16"}, "torch_dtype` was renamed. Set `dtype` instead."),
    ("sft", {"max_seq_length": 8}, "Set `max_length`"),
    ("sft", {"warmup_ratio": 0.1}, "Set `warmup_steps`"),
    ("sft", {"overwrite_output_dir": True}, "resume_from_checkpoint: never"),
    ("sft", {"hub_model_revision": "v1"}, "Set `hub_revision`"),
    ("sft", {"dataset_mixture": {}}, "Set `datasets`"),
    ("sft", {"gradient_checkpointing": False}, "follows from `activation_checkpointing`"),
    ("sft", {"wandb_api_key": "s"}, "WANDB_API_KEY"),
    ("sft", {"beta": 0.1}, "key of dpo, not of sft"),
    ("dpo", {"completion_column": "a"}, "key of sft, not of dpo"),
    ("rm", {"assistant_only_loss": True}, "key of sft, not of rm"),
    ("sft", {"learning_rate": "fast"}, "learning_rate`: input should be a valid number"),
    ("sft", {"learning_rate": -1}, "greater than 0"),
    ("sft", {"learning_rate": True}, "true is not a float"),
    ("sft", {"per_device_train_batch_size": 0}, "greater than or equal to 1"),
    ("sft", {"per_device_train_batch_size": 2.5}, "valid integer"),
    ("sft", {"max_length": -5}, "greater than or equal to 1"),
    ("sft", {"packing": "maybe"}, "packing`: input should be a valid boolean"),
    ("sft", {"lr_scheduler_type": "cosinus"}, "cosinus is not a valid SchedulerType"),
    ("sft", {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min": 0.1}}, "unexpected keyword"),
    ("sft", {"optim": "adamx"}, "adamx is not a valid OptimizerNames"),
    ("sft", {"eval_strategy": "sometimes"}, "sometimes is not a valid IntervalStrategy"),
    ("sft", {"packing": True, "packing_strategy": "ffd"}, "'ffd' is not one of bfd"),
    ("sft", {"dtype": "float8"}, "'float8' is not one of auto"),
    ("rm", {"loss_type": "hinge"}, "loss_type`: input should be 'sigmoid' or 'logexp'"),
    ("sft", {"lora_r": 8}, "lora_r` has no effect here. It needs use_peft: true"),
    ("sft", {"load_in_4bit": True}, "needs use_peft: true"),
    ("sft", {"eval_steps": 5}, "needs eval_strategy: steps"),
    ("sft", {"eval_dataset_name": "e"}, "needs eval_strategy"),
    ("sft", {"save_strategy": "epoch", "save_steps": 5}, "needs save_strategy: steps"),
    ("sft", {"packing_strategy": "bfd"}, "needs packing: true"),
    ("sft", {"wandb_project": "p"}, "needs report_to: wandb"),
    ("sft", {"max_steps": 5, "num_train_epochs": 2}, "needs no max_steps"),
    ("sft", {"global_batch_size": 8, "gradient_accumulation_steps": 2}, "needs no global_batch_size"),
    ("sft", {"global_batch_size": 9, "per_device_train_batch_size": 2}, "`global_batch_size` 9 is not a multiple"),
    ("sft", {"metric_for_best_model": "eval_loss"}, "needs load_best_model_at_end"),
    ("sft", {"test_split_size": 0.1, "do_eval": True, "eval_dataset_name": "e"}, "needs no eval_dataset_name"),
    ("sft", {"pretraining": True, "assistant_only_loss": True}, "needs pretraining: false"),
    ("sft", {"assistant_only_loss": True, "last_turn_only_loss": True}, "Set one of them"),
    ("sft", {"messages_column": "m", "completion_column": "c"}, "needs no messages_column"),
    ("sft", {"chat_template": "x", "chat_template_path": "y.jinja"}, "needs no chat_template_path"),
    ("sft", {"prompt_template": "Q: "}, "has no {}"),
    ("sft", {"padding_free": True}, "Set `packing: true`"),
    ("sft", {"bf16": True, "fp16": True}, "both true"),
    ("sft", {"hub_token": "hf_x"}, "HF_TOKEN"),
    ("sft", {"dataset_streaming": True}, "not supported"),
    ("sft", {"datasets": MIX}, "both set"),
    ("sft", {"dataset_name": None}, "`dataset_name` is missing"),
    ("sft", {"output_dir": None}, "`output_dir` is missing"),
    ("sft", {"model_name_or_path": None}, "`model_name_or_path` is missing"),
    (
        "sft",
        {"dataset_name": None, "datasets": [{"path": "a", "weight": 1}]},
        "datasets[0][weight]`: unexpected keyword",
    ),
    ("sft", {"dataset_name": None, "datasets": [MIX[0], {"path": "b"}]}, "for every entry or for none"),
    ("sft", {"dataset_name": None, "datasets": [MIX[0], MIX[0] | {"probability": 0.2}]}, "do not add up to 1"),
    ("sft", {"dataset_name": None, "datasets": MIX, "dataset_config": "x"}, "set name and split in each entry"),
    ("sft", {"mixture_stopping": "all_exhausted"}, "a probability for every entry"),
    ("dpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "needs loss_type: sigmoid"),
    ("dpo", {"label_smoothing": 0.6}, "less than 0.5"),
    ("dpo", {"ipo_reduction": "sum"}, "needs loss_type: ipo"),
    ("dpo", {"ref_model_revision": "v"}, "needs ref_model_name_or_path"),
    (
        "dpo",
        {"ref_offload": True, "precompute_ref_log_probs": True},
        "needs precompute_ref_log_probs: false",
    ),
    ("dpo", {"truncation_mode": "keep_end"}, "deprecated in TRL"),
    ("dpo", {"share_prefix": True}, "needs packing: true"),
    ("rm", {"packing": True, "train_sampling_strategy": "sequential"}, "balanced by tokens"),
    ("rm", {"train_sampling_strategy": "batch_rebalance"}, "cannot balance pairs"),
    ("dpo", {"packing": True, "neftune_noise_alpha": 5}, "depends on the length of the row"),
    ("dpo", {"sync_ref_model": True, "ref_offload": True}, "`ref_offload` keeps on the CPU"),
    ("rm", {"value_head_prefix": "v", "push_to_hub": True}, "Set `push_to_hub_revision` instead"),
    ("sft", {"do_train": False}, "a run always trains"),
    ("rm", {"margin_column": "m"}, "needs use_margin: true"),
    ("rm", {"calibrate_rewards": True}, "needs eval_strategy"),
    ("rm", {"use_peft": True, "lora_task_type": "CAUSAL_LM"}, "SEQ_CLS for reward models"),
]


@pytest.mark.parametrize(("task", "keys", "message"), MISTAKES)
def test_a_mistake_is_refused_by_name(task, keys, message):
    given = {name: value for name, value in (BASE | keys).items() if value is not None}
    with pytest.raises(RecipeError) as error:
        parse(task, given)
    assert message in str(error.value)


def test_all_mistakes_are_said_at_once():
    with pytest.raises(RecipeError) as error:
        parse("sft", BASE | {"learning_rte": 1, "torch_dtype": "x", "max_length": 0})
    assert len(str(error.value).splitlines()) == 3


def test_every_rule_names_keys_that_exist():
    known = {name for classes in TASKS.values() for cls in classes for name in parser.keys_of(cls)}
    assert {name for name, _ in NEEDS} <= known
    assert set(RANGES) <= known


def test_every_condition_is_read_and_names_keys_that_exist():
    known = {name for task in TASKS for name in parser.task_keys(task)} | {"task"}
    declared = [
        need for task in TASKS for field, _ in parser.task_keys(task).values() for need in parser.needs_of(field)
    ]
    for condition in [*declared, *(need for _, need in NEEDS), *(rule["if"] for rule in RULES["contradictions"])]:
        for term in re.split(", or | and ", condition.partition("; ")[0]):
            assert TERM.fullmatch(term)["key"] in known, condition


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
    live = {name for config in (trl.SFTConfig, trl.RewardConfig, trl.DPOConfig) for name in parser.keys_of(config)}
    assert {name for name, old in parser.old_keys().items() if old.kind == "chosen"} == live & parser.old_keys().keys()


def test_renamed_keys_are_not_offered_as_near_names():
    assert all("Did you mean" not in parser.unknown_key("sft", name) for name in parser.old_keys())


def test_yaml_anchors_merge_and_scientific_notation(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("_lora: &lora {lora_r: 8, lora_alpha: 16}\n<<: *lora\nuse_peft: true\nlearning_rate: 2e-5\n")
    recipe = parse("sft", BASE | read_recipe(path))
    assert (recipe.model.lora_r, recipe.model.lora_alpha, recipe.training.learning_rate) == (8, 16, 2e-5)


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


def test_no_is_a_word_and_not_false(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("save_strategy: no\npacking: yes\n")
    args = parse("sft", BASE | read_recipe(path), read_command_line(["--eval_strategy", "no"])[1]).training
    assert (args.save_strategy, args.eval_strategy, args.packing) == ("no", "no", True)


def test_nested_overrides_keep_the_recipes_other_entries():
    merged = parser.merge({"lr_scheduler_kwargs": {"a": 1, "b": 2}}, {"lr_scheduler_kwargs": {"b": 3}})
    assert merged == {"lr_scheduler_kwargs": {"a": 1, "b": 3}}


def test_a_recipes_key_that_the_command_line_makes_idle_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        parse("sft", BASE | {"num_train_epochs": 2}, {"max_steps": 5})
    assert "num_train_epochs" in caplog.text


def test_global_batch_size_sets_the_accumulation():
    args = parse("sft", BASE | {"global_batch_size": 32, "per_device_train_batch_size": 4}).training
    assert args.gradient_accumulation_steps == 8


def test_fsdp_on_a_cpu_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="FSDP needs a GPU"):
        parse("sft", BASE)


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
