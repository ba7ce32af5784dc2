"""Every shipped recipe, for two steps: nothing changed but the model (a tiny one of the same architecture), the data (a
local file of the same columns), the device, the folder and the number of steps."""

import math
import sys

import pytest
import torch
from conftest import ROOT, build_model, build_tokenizer, write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tunebook.recipe import parse, read_recipe

sys.path.insert(0, str(ROOT / "src"))
import dpo  # noqa: E402
import rm  # noqa: E402
import sft  # noqa: E402

SCRIPTS = {"sft": sft, "rm": rm, "dpo": dpo}
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
ARCHITECTURES = {"llama": "llama", "smollm2": "llama", "mixtral": "mixtral", "qwen3": "qwen3", "quickstart": "llama"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each architecture."""
    tokenizer, folder = build_tokenizer(), tmp_path_factory.mktemp("architectures")
    torch.manual_seed(0)
    vocabulary = len(tokenizer)
    built = {
        "llama": build_model(vocabulary),
        "mixtral": MixtralForCausalLM(
            MixtralConfig(vocab_size=vocabulary, num_hidden_layers=1, num_local_experts=2, **SMALL)
        ),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, num_hidden_layers=1, head_dim=16, **SMALL)),
    }
    for name, model in built.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def row_like(data: str, i: int) -> dict:
    """A row with the columns, and the kinds of values, of a recipe's data set."""
    question, good, bad = f"what is {i} plus 1?", f"five {i}", f"one {i} and four"
    if data == "Open-Orca/OpenOrca":
        return {"system_prompt": "", "question": question, "response": good}
    if data in ("trl-lib/Capybara", "data/quickstart/sft_train.jsonl"):
        return {"messages": user(question) + assistant(good)}
    if data == "data/quickstart/preferences_train.jsonl":
        return {"prompt": user(question), "chosen": assistant(good), "rejected": assistant(bad), "subset": "home"}
    if data in ("trl-lib/ultrafeedback_binarized", "OpenRLHF/preference_dataset_mixture2_and_safe_pku"):
        return {"chosen": user(question) + assistant(good), "rejected": user(question) + assistant(bad)}
    assert data == "data/gsm8k/preferences.jsonl", f"say here what the rows of {data} are like"
    return {"prompt": question, "chosen": good, "rejected": bad}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes").with_suffix("")))
def test_a_recipe_runs_for_two_steps(path, models, tmp_path):
    keys = read_recipe(path)
    task = path.stem if path.parent.name == "quickstart" else path.parent.name
    family = next(name for name in ARCHITECTURES if path.relative_to(ROOT / "recipes").parts[0].startswith(name))
    count = (
        max(2 * keys.get("global_batch_size", keys["per_device_train_batch_size"]), keys.get("test_split_size", 0)) + 40
    )
    rows = write_rows(tmp_path / "rows.jsonl", [row_like(keys["dataset_name"], i) for i in range(count)])
    changes = {
        "model_name_or_path": str(models / ARCHITECTURES[family]),
        "dataset_name": str(rows),
        "output_dir": str(tmp_path / "o"),
        "bf16": False,
        "dtype": "float32",
        "max_steps": 2,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    if "eval_dataset_name" in keys:
        changes["eval_dataset_name"] = str(rows)
    elif keys.get("eval_strategy") and "test_split_size" not in keys:
        changes |= {"dataset_test_split": "train", "max_eval_samples": 4}  # a local file has one split
    trainer = SCRIPTS[task].main(parse(task, keys, changes))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    if not keys.get("use_peft"):
        head = AutoModelForSequenceClassification if task == "rm" else AutoModelForCausalLM
        head.from_pretrained(tmp_path / "o")
