"""Saving cannot fail at the end of a run for what was known at its start."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import logged, train
from hub_server import HubServer, reach_loopback
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from tunebook.training.resume import is_on_hub


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
        {"do_sample": False, "top_k": 5, "min_p": 0.1, "typical_p": 0.5},
    ],
)
def test_a_generation_config_that_transformers_would_not_save_is_repaired(values, tiny, sft_rows, tmp_path, caplog):
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    written = json.loads((model / "generation_config.json").read_text()) | values
    (model / "generation_config.json").write_text(json.dumps(written))
    train("sft", model, sft_rows, tmp_path / "o", save_strategy="steps", save_steps=3)
    for folder in (tmp_path / "o", tmp_path / "o" / "checkpoint-3"):
        GenerationConfig.from_pretrained(folder).validate(strict=True)
        AutoModelForCausalLM.from_pretrained(folder)
    assert "generation_config.json could not be saved as it is" in caplog.text


def test_a_generation_config_that_can_be_saved_is_kept(tiny, sft_rows, tmp_path, caplog):
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    written = json.loads((model / "generation_config.json").read_text()) | {"do_sample": True, "temperature": 0.6}
    (model / "generation_config.json").write_text(json.dumps(written))
    train("sft", model, sft_rows, tmp_path / "o", max_steps=1)
    assert GenerationConfig.from_pretrained(tmp_path / "o").temperature == 0.6
    assert "generation_config.json" not in caplog.text


@pytest.mark.parametrize("task", ["sft", "rm", "dpo"])
@pytest.mark.parametrize("peft", [False, True])
def test_no_card_has_a_path_none_or_a_placeholder_and_the_hub_takes_each(
    task, peft, tiny, task_rows, tmp_path, monkeypatch
):
    reach_loopback(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    keys = {"push_to_hub_revision": True, "hub_model_id": "me/mine", "hub_revision": "v", "hub_push_failure": "raise"}
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        train(task, tiny, task_rows, tmp_path / "o", **keys, use_peft=peft, save_strategy="steps", save_steps=3)
        assert {"v", "v-step-000000003"} <= server.repos["me/mine"].branches.keys()
    for folder in (tmp_path / "o", tmp_path / "o" / "checkpoint-3"):
        card = ModelCard.load(folder / "README.md")
        text = card.text.partition("## Recipe")[0]
        assert re.search("^# .*", text, re.MULTILINE)[0] == "# Model Card for mine"
        assert f"fine-tuned version of `{tiny.name}`" in text and str(tiny.parent) not in text
        assert "None" not in text and "Model ID" not in text and 'model="me/mine"' in text
        assert card.data.base_model is None and card.data.library_name == ("peft" if peft else "transformers")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_a_model_of_the_hub_is_named_as_the_base(name, tmp_path):
    assert is_on_hub(name)
    assert not any(map(is_on_hub, [f"/models/{name}", f"./{name}", f"a/b/{name}", str(tmp_path)]))


class CountEvaluations(TrainerCallback):
    steps: list[int] = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"eval_steps": 3}, [3]),
        ({"eval_steps": 2}, [2, 3]),
        ({"eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}, [1, 2, 3]),
        (
            {"eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
            | {"metric_for_best_model": "eval_loss", "greater_is_better": True},
            [1, 2, 3, 3],  # the last is of the best model
        ),
    ],
)
def test_the_last_step_is_evaluated_once(keys, expected, tiny, sft_rows, tmp_path):
    CountEvaluations.steps.clear()
    keys |= {"eval_strategy": "steps", "test_split_size": 8, "callbacks": ["test_saving:CountEvaluations"]}
    trainer = train("sft", tiny, sft_rows, tmp_path / "o", **keys)
    assert CountEvaluations.steps == expected
    results = json.loads((tmp_path / "o" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(logged(trainer, "eval_loss")[-1])
