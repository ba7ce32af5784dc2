"""Every recipe runs: two steps with nothing changed but the model, the rows, the device and the number of steps.

The model is a random one of the same architecture, the rows are local ones with the columns of the recipe's data set.
"""

import json
import math
from pathlib import Path

import pytest
import trl
from conftest import ROOT, TEMPLATE, build_model, build_tokenizer, logged, question, save_model, write_rows
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from tunebook import run_script
from tunebook.recipe import TASKS, read_recipe

RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))

QWEN3 = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
ARCHITECTURES = {  # folder of recipes -> the model's config, what is particular to it, chat template
    "quickstart": (LlamaConfig, {"tie_word_embeddings": True}, TEMPLATE),
    "smollm2-135m": (LlamaConfig, {"tie_word_embeddings": True}, TEMPLATE),
    "llama-3-8b": (LlamaConfig, {}, TEMPLATE),
    "mixtral-8x7b": (MixtralConfig, {"num_local_experts": 8, "num_experts_per_tok": 2}, None),
    "gemma-3-1b": (Gemma3TextConfig, {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}, TEMPLATE),
    "granite-4.0-micro": (
        GraniteMoeHybridConfig,
        {
            "layer_types": ["attention", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 4,
        },
        TEMPLATE,
    ),
    "qwen3-1.7b": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}, QWEN3.read_text()),
}


def turns(i: int, answer: str) -> list[dict]:
    return [{"role": "user", "content": question(i)}, {"role": "assistant", "content": answer}]


def pair(i: int) -> dict:
    return {"chosen": turns(i, "five " * (1 + i % 5)), "rejected": turns(i, "one")}


ROWS = {  # data set of a recipe -> a row with its columns
    "Open-Orca/OpenOrca": lambda i: {
        "id": str(i),
        "system_prompt": "be brief",
        "question": question(i),
        "response": "five " * (1 + i % 5),
    },
    "trl-lib/Capybara": lambda i: {
        "source": "Airoboros",
        "messages": turns(i, "five " * (1 + i % 5)) + turns(i, "four"),
        "num_turns": 2,
    },
    "trl-lib/ultrafeedback_binarized": lambda i: pair(i) | {"score_chosen": 8.0, "score_rejected": 6.5},
    "OpenRLHF/preference_dataset_mixture2_and_safe_pku": pair,
    "data/gsm8k/preferences.jsonl": lambda i: {"prompt": question(i), "chosen": f"A: {i}", "rejected": "A: one"},
}
ROWS["data/gsm8k/preferences_test.jsonl"] = ROWS["data/gsm8k/preferences.jsonl"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folder of recipes -> folder of a random model of the same architecture, and its tokenizer."""
    folders = {}
    for name, (config, particular, template) in ARCHITECTURES.items():
        tokenizer = build_tokenizer(template=template)
        model = build_model(len(tokenizer), config, **particular)
        folders[name] = save_model(tmp_path_factory.mktemp(name), model, tokenizer)
    return folders


@pytest.fixture(scope="module")
def local_rows(tmp_path_factory):
    """Data set of a recipe -> its local double: for one of the Hub a folder with a train and a test split, for a file
    that the user brings a file. Files that the repository ships are taken as they are."""
    folder = tmp_path_factory.mktemp("rows")
    for name, row in ROWS.items():
        double = folder / name
        for path in [double] if double.suffix else [double / "train.jsonl", double / "test.jsonl"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            count = 8 if "test" in path.stem else 512  # 512: two steps of the largest global batch
            write_rows(path, [row(i) for i in range(count)])
    return lambda name: str(folder / name if name in ROWS else ROOT / name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_a_recipe_trains_two_steps_and_its_model_loads(path, models, local_rows, tmp_path):
    recipe = read_recipe(path)
    recipe.pop("num_train_epochs", None)
    task = path.stem if path.stem in TASKS else path.parent.name
    changes = {
        "model_name_or_path": str(models[path.relative_to(ROOT / "recipes").parts[0]]),
        "output_dir": str(tmp_path / "o"),
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "max_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        **{key: local_rows(recipe[key]) for key in ("dataset_name", "eval_dataset_name") if key in recipe},
    }
    if "datasets" in recipe:
        changes["datasets"] = [source | {"path": local_rows(source["path"])} for source in recipe["datasets"]]
    trainer = run_script(task, recipe | changes)

    losses = logged(trainer, "loss")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert trainer.state.global_step == 2
    if recipe.get("do_eval") or "eval_strategy" in recipe:
        assert math.isfinite(json.loads((tmp_path / "o" / "eval_results.json").read_text())["eval_loss"])
    auto = {
        (False, False): AutoModelForCausalLM,
        (False, True): AutoModelForSequenceClassification,
        (True, False): AutoPeftModelForCausalLM,
        (True, True): AutoPeftModelForSequenceClassification,
    }[bool(recipe.get("use_peft")), task == "rm"]
    auto.from_pretrained(tmp_path / "o", **({"num_labels": 1} if task == "rm" else {}))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_a_recipe_says_its_hardware_and_is_in_the_table(path):
    assert path.read_text().startswith("# Hardware: ")
    assert f"]({path.relative_to(ROOT / 'recipes')})" in (ROOT / "recipes" / "README.md").read_text()
