"""FSDP2 trains what DDP trains: two processes (gloo) without a GPU, all runs in one launch (tests/fsdp_runs.py)."""

import json
import math

import pytest
import torch
from conftest import build_model, launch, read_cases, save_model, short_recipe
from safetensors.torch import load_file
from transformers import AutoConfig, OPTConfig, Qwen3MoeConfig

import tunebook.recipe.configs
from tunebook.environment import Sharding
from tunebook.errors import RecipeError
from tunebook.recipe import parse
from tunebook.tools.check import plan_disk
from tunebook.tools.workload import Batch, Workload
from tunebook.training import prepare

pytestmark = pytest.mark.slow
CASES = read_cases("end_to_end/fsdp.yaml")
MODELS = {
    "tiny": {},
    "tied": {"tie_word_embeddings": True},
    "moe": {"config_class": Qwen3MoeConfig, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "opt": {"config_class": OPTConfig, "ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": False},
}
KEYS = {"max_steps": 3, "global_batch_size": 8, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
KEYS |= {"do_eval": True, "test_split_size": 8, "optim": "adamw_torch_fused", "activation_checkpointing": False}
NOT_COMPARED = ("runtime", "per_second", "mfu", "memory", "flos", "step_time")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer, sft_rows, pair_rows):
    """Folder of the runs, by engine and case."""
    folder = tmp_path_factory.mktemp("fsdp")
    models = {n: save_model(folder / n, build_model(len(tokenizer), **m), tokenizer) for n, m in MODELS.items()}
    listed = []
    for name, case in CASES.items():
        rows, model = sft_rows if case["task"] == "sft" else pair_rows, models[case.get("model", "tiny")]
        for engine in ["fsdp"] if "like" in case else ["fsdp", "ddp"]:
            places = {"DIR/": f"{folder}/fsdp/", "OTHER/": f"{folder}/{'ddp' if engine == 'fsdp' else 'fsdp'}/"}
            keys = {key: placed(value, places) for key, value in case["keys"].items()}
            listed.append((engine, case["task"], short_recipe(model, rows, folder / engine / name, **KEYS | keys)))
    done = launch("tests/fsdp_runs.py", json.dumps(listed), config="fsdp2", processes=2, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def placed(value: object, places: dict[str, str]) -> object:
    prefix = next((prefix for prefix in places if str(value).startswith(prefix)), None)
    return value if prefix is None else str(value).replace(prefix, places[prefix], 1)


def facts(folder) -> dict:
    found = json.loads((folder / "facts.json").read_text())
    assert "error" not in found, found["error"]
    return found


def log_of(folder) -> list[dict[str, float]]:
    """What a run logged, without what depends on the machine."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    log.append(json.loads((folder / "eval_results.json").read_text()))
    return [{k: v for k, v in entry.items() if not any(part in k for part in NOT_COMPARED)} for entry in log]


def generated(folder) -> list[str]:
    path = folder / "generations.jsonl"
    return [json.loads(line)["output"] for line in path.read_text().splitlines()] if path.exists() else []


def tolerance(name: str, half: bool) -> dict[str, float]:
    """In bf16 a model's numbers differ, but neither losses nor log-probabilities are rounded to it."""
    if not half:
        return {"rel": 1e-4, "abs": 1e-4}
    return {"rel": 5e-4, "abs": 0} if "loss" in name or "logps" in name else {"rel": 1e-2, "abs": 1e-2}


@pytest.mark.parametrize("name", CASES)
def test_fsdp2_logs_and_saves_what_ddp_does(name, runs):
    case = CASES[name]
    folder, like = runs / "fsdp" / name, runs / "ddp" / case.get("like", name)
    found = facts(folder)
    assert found["type"] == "FSDP" and found["sharded"] and facts(like)["type"] == "MULTI_CPU"
    assert found["whole_gradients"] == 0 and found["reference_units"] in (None, found["units"])
    half = case["keys"].get("bf16", False)
    log = log_of(folder)
    if case["task"] == "dpo" and "ref_model_name_or_path" not in case["keys"] and case.get("model") != "moe":
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the model is its own reference
    for entry, expected in zip(log, log_of(like), strict=True):
        assert entry.keys() == expected.keys()
        for metric, value in expected.items():
            if not (half and "accurac" in metric):  # of a few tokens or pairs, of which one may turn
                assert entry[metric] == pytest.approx(value, **tolerance(metric, half)), metric
    weights, expected = (load_file(next(f.glob("*.safetensors"))) for f in (folder, like))
    assert weights.keys() == expected.keys()
    atol = KEYS["max_steps"] * 2e-3 if half or case["keys"].get("optim") == "muon" else 1e-5
    assert generated(folder) == generated(like)
    for key, value in weights.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_a_checkpoint_is_refused_under_another_engine(engine, runs, sft_rows, tmp_path, monkeypatch):
    """With force_resume it is resumed, with a new optimizer: "of another engine" in fsdp.yaml."""
    if engine == "ddp":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
        monkeypatch.setattr(tunebook.recipe.configs, "check_fsdp_device", lambda: None)
    checkpoint = str(runs / engine / "sft best" / "checkpoint-2")
    recipe = parse("sft", short_recipe(runs / "tiny", sft_rows, tmp_path, resume_from_checkpoint=checkpoint))
    with pytest.raises(RecipeError, match="engine: .* -> .*force_resume"):
        prepare(recipe)


def test_check_counts_the_weights_that_a_checkpoint_of_fsdp_holds_twice(runs, sft_rows, tmp_path):
    recipe = parse("sft", short_recipe(runs / "tiny", sft_rows, tmp_path, save_strategy="steps", save_steps=3))
    config = AutoConfig.from_pretrained(runs / "tiny")
    workload = Workload.from_recipe(recipe, config, Batch(1, 8), Sharding("fsdp", 2, 3), "cpu", False)
    files = (runs / "fsdp" / "sft best" / "checkpoint-2").iterdir()
    saved = sum(path.stat().st_size for path in files if path.suffix in (".bin", ".safetensors"))
    assert plan_disk(recipe, workload, 3).checkpoint == pytest.approx(saved, rel=0.1)
