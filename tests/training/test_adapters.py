"""An adapter as the model: what SFT with LoRA leaves is trained further, compared, and scored with."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_same_weights,
    build_model,
    build_tokenizer,
    copy_until,
    logged,
    save_model,
    short_recipe,
    train,
    write_rows,
)
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunebook.data.tokenizer import load_recipe_tokenizer
from tunebook.errors import RecipeError
from tunebook.recipe import parse
from tunebook.tools.check import check
from tunebook.tools.merge import merge
from tunebook.tools.score import score_file
from tunebook.training.models import load_reward_model
from tunebook.training.trainers import DPOTrainer, RewardTrainer

LORA = {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 1e-1}
STILL = {"learning_rate": 1e-30, "max_steps": 1}
SAVES = {"save_strategy": "steps", "save_steps": 1}


def further(adapter, **keys):
    """The keys of a run that trains an adapter further."""
    return {"use_peft": True, "adapter_name_or_path": str(adapter), "learning_rate": 1e-2} | keys


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


def test_another_adapter_on_it_is_refused_with_the_keys_and_the_command_for_it(adapter, sft_rows, tmp_path):
    keys = f"`adapter_name_or_path: {adapter}` and `model_name_or_path: .*tiny`"
    with pytest.raises(RecipeError, match=f"is an adapter(.*)set {keys}(.*)tunebook merge"):
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


# ---- An adapter that is trained further ----


def recorded(monkeypatch, trainer_class) -> list[dict]:
    """The batches that a trainer takes its loss of, in their order."""
    batches, compute_loss = [], trainer_class.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        batches.append(dict(inputs))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer_class, "compute_loss", record)
    return batches


def plain_model(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    return model.eval() if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def plain_log_probs(model, batch):
    """The log-probabilities of both sides' answers, (2, B), by transformers and PEFT alone."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (log_probs * batch["completion_mask"][:, 1:]).sum(1).view(2, -1)


REFERENCES = {
    "padded": {},
    "packed": {"packing": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "another model": {"ref_model_name_or_path": "tiny"},
}


@pytest.mark.parametrize("name", REFERENCES)
def test_dpo_has_the_losses_of_two_loaded_models(name, adapter, tiny, pair_rows, tmp_path, monkeypatch):
    """The adapter as each step left it, against the adapter before DPO, or the model that the recipe names."""
    keys = {key: str(tiny) if value == "tiny" else value for key, value in REFERENCES[name].items()}
    batches = recorded(monkeypatch, DPOTrainer)
    trainer = train("dpo", tiny, pair_rows, tmp_path / "o", **further(adapter, beta=0.5, **SAVES, **keys))
    reference = plain_model(tiny) if "ref_model_name_or_path" in keys else plain_model(tiny, adapter)
    per_step, losses = keys.get("gradient_accumulation_steps", 1), []
    for step in range(3):
        policy = plain_model(tiny, tmp_path / "o" / f"checkpoint-{step}" if step else adapter)
        of_step = batches[step * per_step : (step + 1) * per_step]
        ratios = torch.cat([plain_log_probs(policy, b) - plain_log_probs(reference, b) for b in of_step], dim=1)
        losses.append(-F.logsigmoid(0.5 * (ratios[0] - ratios[1])).mean().item())
    assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_the_reference_has_no_dropout_and_the_policy_is_as_before_it(adapter, tiny, pair_rows, tmp_path, monkeypatch):
    batches = recorded(monkeypatch, DPOTrainer)
    keys = further(adapter, lora_dropout=0.5, disable_dropout=False)
    trainer = train("dpo", tiny, pair_rows, tmp_path / "o", **keys)
    assert trainer.model.peft_config["default"].lora_dropout == 0.5
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    found = torch.stack(trainer.compute_ref_log_probs(trainer.model.train(), batches[-1]))
    assert torch.allclose(found, plain_log_probs(plain_model(tiny, adapter), batches[-1]), atol=1e-4)
    assert trainer.model.training
    assert all(tensor.equal(before[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(task, adapter, tiny, task_rows, tmp_path):
    """DPO's reference stays the adapter, and does not become the checkpoint."""
    keys = further(adapter, max_steps=4, activation_checkpointing=task == "dpo", **SAVES)
    whole = train(task, tiny, task_rows, tmp_path / "a", **keys)
    copy_until(2, tmp_path / "a", tmp_path / "b")
    resumed = train(task, tiny, task_rows, tmp_path / "b", **keys)
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_a_run_does_not_resume_with_another_adapter(adapter, tiny, sft_rows, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    keys = further(tmp_path / "adapter", **SAVES)
    train("sft", tiny, sft_rows, tmp_path / "o", **keys)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 32', '"lora_alpha": 31'))
    with pytest.raises(RecipeError, match=r"made from something else \(adapter: "):
        train("sft", tiny, sft_rows, tmp_path / "o", **keys)


def test_what_is_saved_is_one_adapter_of_the_base_model_the_best_one(adapter, tiny, pair_rows, tmp_path):
    keys = {"eval_strategy": "steps", "eval_steps": 1, "test_split_size": 8, "load_best_model_at_end": True, **SAVES}
    keys |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first
    train("dpo", tiny, pair_rows, tmp_path / "o", **further(adapter, **keys))
    assert len(list((tmp_path / "o").rglob("adapter_model.safetensors"))) == 1 + 3
    assert PeftConfig.from_pretrained(tmp_path / "o").base_model_name_or_path == str(tiny)
    assert_same_weights(tmp_path / "o", tmp_path / "o" / "checkpoint-1")


def make_adapter(folder, base, **config):
    """An adapter that PEFT made, with random weights, and no tokenizer."""
    torch.manual_seed(1)
    defaults = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**defaults | config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


KINDS = {
    "rank-stabilized": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "with magnitudes": {"use_dora": True},
    "with a trained head": {"modules_to_save": ["lm_head"]},
    "of embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "of single tokens": {"trainable_token_indices": [*range(200, 320)]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_is_its_own_reference_and_saved_as_it_is(kind, tiny, pair_rows, tmp_path, monkeypatch):
    batches = recorded(monkeypatch, DPOTrainer)
    adapter = make_adapter(tmp_path / "a", tiny, **KINDS[kind])
    trainer = train("dpo", tiny, pair_rows, tmp_path / "o", **further(adapter, learning_rate=0.1))
    assert logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-5) != logged(trainer, "loss")[2]
    found = torch.stack(trainer.compute_ref_log_probs(trainer.model, batches[-1]))
    assert torch.allclose(found, plain_log_probs(plain_model(tiny, adapter), batches[-1]), atol=1e-4)
    saved, before = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "o", adapter))
    assert saved.keys() == before.keys() and any(not weight.equal(before[name]) for name, weight in saved.items())
    config, before = (PeftConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "o", adapter))
    assert config | {"revision": None} == before


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_tokens_that_an_adapter_added_stay(tied, sft_rows, pair_rows, tmp_path):
    tokenizer = build_tokenizer()
    base = save_model(tmp_path / "m", build_model(len(tokenizer), tie_word_embeddings=tied), tokenizer)
    train("sft", base, sft_rows, tmp_path / "a", **LORA, new_tokens=["<tool>"])
    train("dpo", base, pair_rows, tmp_path / "o", **further(tmp_path / "a", **STILL))
    assert_same_weights(tmp_path / "o", tmp_path / "a")
    assert AutoTokenizer.from_pretrained(tmp_path / "o").convert_tokens_to_ids("<tool>") == len(tokenizer)
    keys = further(tmp_path / "a", new_tokens=["<tool>", "<other>"])
    for start in (train, lambda *args, **changes: check(parse(args[0], short_recipe(*args[1:], **changes)), "cpu")):
        with pytest.raises(RecipeError, match="was trained without the tokens <other>"):
            start("dpo", base, pair_rows, tmp_path / "p", **keys)


def test_an_adapter_without_tokenizer_is_trained_with_that_of_the_model(tiny, sft_rows, tmp_path, tokenizer):
    keys = further(make_adapter(tmp_path / "a", tiny))
    loaded = load_recipe_tokenizer(parse("sft", short_recipe(tiny, sft_rows, tmp_path / "o", **keys)))
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_the_head_of_a_reward_adapter_is_trained_further(tiny, pair_rows, tmp_path, monkeypatch):
    train("rm", tiny, pair_rows, tmp_path / "a", **LORA)
    batches = recorded(monkeypatch, RewardTrainer)
    trainer = train("rm", tiny, pair_rows, tmp_path / "o", **further(tmp_path / "a", packing=True))
    model = load_reward_model(str(tmp_path / "a"))
    rows = [
        ids[mask.bool()] for ids, mask in zip(*(batches[0][x] for x in ("input_ids", "attention_mask")), strict=True)
    ]
    chosen, rejected = torch.cat([model(row[None]).logits for row in rows]).chunk(2)
    assert logged(trainer, "loss")[0] == pytest.approx(-F.logsigmoid(chosen - rejected).mean().item(), abs=1e-5)
    heads = [load_reward_model(str(tmp_path / name)).score.weight for name in "ao"]
    assert not torch.equal(*heads)


def test_check_counts_the_parameters_of_the_adapter(tiny, pair_rows, tmp_path, capsys):
    adapter = make_adapter(tmp_path / "a", tiny, r=3)
    recipe = parse("dpo", short_recipe(tiny, pair_rows, tmp_path / "o", **further(adapter)))
    assert check(recipe, "cpu") == 0
    trained = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    page = capsys.readouterr().out
    assert f"{trained:,} trained parameters" in page and "the adapter as it was" in page


REFUSED = [
    ("sft", {"lora_r": 8}, "`lora_r` 8: .* was trained with 16, which cannot change"),
    ("sft", {"use_dora": True}, "`use_dora` True: .* was trained with False"),
    ("sft", {"lora_target_modules": ["q_proj"]}, "`lora_target_modules` .* was trained with .*k_proj"),
    ("rm", {}, "has no reward head that was trained with it. Run tunebook merge"),
    ("sft", {"adapter_name_or_path": "head"}, "changes the head, whose weights the loss reads. Run tunebook merge"),
    ("sft", {"adapter_name_or_path": "tiny"}, "`adapter_name_or_path` .*tiny is not an adapter"),
    ("sft", {"adapter_name_or_path": "/no/where"}, "`adapter_name_or_path` /no/where is not a folder"),
    ("sft", {"adapter_name_or_path": "ia3"}, "is an adapter of IA3; only those of LoRA"),
    ("sft", {"model_name_or_path": "other"}, "`adapter_name_or_path` .* does not fit .*other"),
    ("sft", {"use_peft": False}, "`adapter_name_or_path` has no effect here. It needs use_peft: true"),
]


@pytest.mark.parametrize(("task", "keys", "message"), REFUSED)
def test_what_the_adapter_is_not_is_refused(task, keys, message, adapter, tiny, task_rows, tmp_path):
    folders = {name: tmp_path / name for name in ("ia3", "other", "head")} | {"tiny": tiny}
    make_adapter(tmp_path / "head", tiny, target_modules=["lm_head"])
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), ia3).save_pretrained(tmp_path / "ia3")
    save_model(tmp_path / "other", build_model(320, hidden_size=64), build_tokenizer())
    keys = {name: str(folders.get(str(value), value)) if "path" in name else value for name, value in keys.items()}
    with pytest.raises(ValueError, match=message):
        train(task, tiny, task_rows, tmp_path / "o", **further(adapter, **keys))


def test_the_keys_that_the_adapter_was_trained_with_may_stay(adapter, tiny, sft_rows, tmp_path, caplog):
    moved = shutil.copytree(tiny, tmp_path / "moved")
    keys = {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear", "lora_task_type": "CAUSAL_LM"}
    train("sft", moved, sft_rows, tmp_path / "o", **further(adapter, **STILL, **keys))
    assert f"was trained on {tiny}, not on {moved}" in caplog.text
