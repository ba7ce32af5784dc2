"""An adapter as the model: what SFT with LoRA leaves is trained further, compared, and scored with."""

import json

import pytest
import torch
from conftest import logged, train, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tunebook.errors import RecipeError
from tunebook.tools.merge import merge
from tunebook.tools.score import score_file

LORA = {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 1e-1}
STILL = {"learning_rate": 1e-30, "max_steps": 1}


@pytest.fixture(scope="module")
def adapter(tiny, sft_rows, tmp_path_factory):
    """The adapter of an SFT run."""
    folder = tmp_path_factory.mktemp("adapter") / "sft"
    train("sft", tiny, sft_rows, folder, **LORA)
    return folder


def merged_weights(tiny, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter)
    return model.merge_and_unload().state_dict()


def test_dpo_on_an_adapter_starts_from_base_and_adapter_and_saves_whole_weights(adapter, tiny, pair_rows, tmp_path):
    trainer = train("dpo", adapter, pair_rows, tmp_path / "o", **STILL)
    expected, saved = merged_weights(tiny, adapter), load_file(tmp_path / "o" / "model.safetensors")
    assert all(torch.allclose(weight, expected[name], atol=1e-6) for name, weight in saved.items())
    base = load_file(next(tiny.glob("*.safetensors")))
    assert any(not torch.equal(weight, base[name]) for name, weight in saved.items() if name in base)
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-4)  # the reference is the same: log 2


def test_another_adapter_on_it_is_refused_with_the_command_that_merges(adapter, sft_rows, tmp_path):
    with pytest.raises(RecipeError, match="is an adapter(.*)tunebook merge"):
        train("sft", adapter, sft_rows, tmp_path / "o", use_peft=True)


def test_an_adapter_of_a_reward_model_scores_as_the_merged_model(tiny, pair_rows, tmp_path):
    train("rm", tiny, pair_rows, tmp_path / "rm", **LORA)
    merge(tmp_path / "rm", tmp_path / "merged")
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": "two plus three? ", "completion": "five"}, {"prompt": "a ", "completion": "b"}],
    )
    rewards = []
    for model in ("rm", "merged"):
        score_file(str(tmp_path / model), str(rows), tmp_path / f"{model}.jsonl")
        rewards.append([json.loads(line)["reward"] for line in (tmp_path / f"{model}.jsonl").read_text().splitlines()])
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4) and rewards[0][0] != rewards[0][1]
