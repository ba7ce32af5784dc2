"""Reward models and DPO: objectives against independent computations, what is saved, merged and scored."""

import json
import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate import DeepSpeedPlugin
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
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    MambaConfig,
)
from typer.testing import CliRunner

import tunebook
from tunebook.errors import RecipeError
from tunebook.following.pairs import score_ids
from tunebook.packing.forward import RewardOutput
from tunebook.recipe import parse
from tunebook.scripts import dpo
from tunebook.tools.cli import app
from tunebook.tools.merge import merge
from tunebook.tools.score import load_scorer, score_file
from tunebook.training.models import load_reward_model
from tunebook.training.sharded import offloaded_parameters
from tunebook.training.trainers import PairPackingMixin

BENCHMARKED = {"do_eval": True, "test_split_size": 9}
LORA = {"use_peft": True, "lora_target_modules": ["q_proj"], "learning_rate": 0.05}


# ---- The reward model's loss ----


class FixedRewards(torch.nn.Module):
    """A model that answers with given rewards."""

    def __init__(self, rewards: torch.Tensor, aux_loss: float | None = None):
        super().__init__()
        self.rewards, self.aux_loss = rewards, aux_loss

    def forward(self, **inputs):
        return RewardOutput(logits=self.rewards[:, None], aux_loss=self.aux_loss and torch.tensor(self.aux_loss))


@pytest.fixture(scope="module")
def reward_trainer(tiny, pair_rows, tmp_path_factory):
    return train("rm", tiny, pair_rows, tmp_path_factory.mktemp("rm"), max_steps=1)


def test_the_reward_loss_equals_float64_arithmetic_on_random_cases(reward_trainer):
    """Every combination of loss, margin, centering and balancing loss, 200 random cases."""
    generator = torch.Generator().manual_seed(0)
    args = reward_trainer.args
    for case in range(200):
        pairs = 1 + case % 5
        rewards = torch.randn(2 * pairs, generator=generator) * 4
        margin = torch.rand(pairs, generator=generator) if case % 2 else None
        args.loss_type = ["sigmoid", "logexp"][case // 2 % 2]
        args.center_rewards_coefficient = [None, 0.3][case // 4 % 2]
        args.router_aux_loss_coef = [None, 0.7][case // 8 % 2]
        inputs = {"attention_mask": torch.ones(2 * pairs, 3)} | ({} if margin is None else {"margin": margin})
        loss = reward_trainer.compute_loss(FixedRewards(rewards, 1.25).train(), inputs).item()
        expected = 0.0
        for i in range(pairs):
            chosen, rejected = rewards[i].item(), rewards[pairs + i].item()
            difference = chosen - rejected - (0 if margin is None else margin[i].item())
            expected += math.log1p(math.exp(-difference)) / pairs
            expected += (args.center_rewards_coefficient or 0) * (chosen + rejected) ** 2 / pairs
        expected += 1.25 * (args.router_aux_loss_coef or 0)
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6), case
    args.loss_type, args.center_rewards_coefficient, args.router_aux_loss_coef = "sigmoid", None, None


def test_fp32_loss_keeps_what_bf16_would_lose(reward_trainer):
    rewards = torch.tensor([8.0, 0.03125], dtype=torch.bfloat16)
    inputs = {"attention_mask": torch.ones(2, 3)}
    losses = {}
    for fp32 in (True, False):
        reward_trainer.args.fp32_loss = fp32
        losses[fp32] = reward_trainer.compute_loss(FixedRewards(rewards).train(), dict(inputs))
    reward_trainer.args.fp32_loss = True
    assert losses[True].dtype == torch.float32 and losses[False].dtype == torch.bfloat16
    assert losses[True].item() == pytest.approx(math.log1p(math.exp(0.03125 - 8)), rel=1e-3)


@pytest.mark.parametrize(
    ("task", "config", "trainer_class"),
    [("rm", trl.RewardConfig, trl.RewardTrainer), ("dpo", trl.DPOConfig, trl.DPOTrainer)],
)
def test_without_our_keys_the_run_equals_trls(task, config, trainer_class, tiny, pair_rows, tmp_path):
    """Same rows, seed and hyperparameters under TRL's own RewardTrainer and DPOTrainer."""
    rows = [json.loads(line) for line in pair_rows.read_text().splitlines()]
    dataset = Dataset.from_list(rows).select_columns(["prompt", "chosen", "rejected"])
    same = short_recipe(tiny, pair_rows, tmp_path / "theirs", model_name_or_path=None, dataset_name=None)
    theirs = trainer_class(str(tiny), args=config(use_cpu=True, report_to="none", **same), train_dataset=dataset)
    theirs.train()
    ours = train(task, tiny, pair_rows, tmp_path / "ours")
    for name in ("loss", "grad_norm"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-4), name


# ---- The reward model as saved ----


@pytest.fixture(scope="module")
def reward_model(tiny, pair_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm") / "calibrated"
    keys = {"do_eval": True, "test_split_size": 9, "per_device_eval_batch_size": 4, "subset_column": "subset"}
    return train("rm", tiny, pair_rows, folder, calibrate_rewards=True, **keys), folder


def test_calibration_and_accuracy_by_subset_equal_a_loop_over_the_pairs(reward_model):
    trainer, folder = reward_model
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rewards = [
        [model(torch.tensor([row[side]])).logits.item() for side in ("chosen_ids", "rejected_ids")]
        for row in trainer.eval_dataset
    ]
    flat = torch.tensor(rewards, dtype=torch.float64).flatten()
    assert model.config.mean == pytest.approx(flat.mean().item(), abs=1e-5)
    assert model.config.std == pytest.approx(flat.std().item(), rel=1e-4)
    metrics = json.loads((folder / "eval_results.json").read_text())
    won = [chosen > rejected for chosen, rejected in rewards]
    assert metrics["eval_accuracy"] == pytest.approx(sum(won) / len(won))
    names = trainer.eval_dataset.features["subset"].names
    for number, name in enumerate(names):
        of_subset = [w for w, row in zip(won, trainer.eval_dataset, strict=True) if row["subset"] == number]
        assert metrics[f"eval_accuracy_{name}"] == pytest.approx(sum(of_subset) / len(of_subset))


def test_the_reward_is_read_at_eos_although_pad_is_eos(pair_rows, tmp_path):
    """Many models are published with their EOS token as the pad token."""
    tokenizer = build_tokenizer(special=("<|im_start|>", "<|im_end|>"))
    tokenizer.pad_token = tokenizer.eos_token
    model = build_model(len(tokenizer), pad_token_id=tokenizer.eos_token_id)
    save_model(tmp_path / "m", model, tokenizer)
    trainer = train("rm", tmp_path / "m", pair_rows, tmp_path / "o", do_eval=True, test_split_size=8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o")
    assert tokenizer.pad_token != tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "o")
    row = trainer.eval_dataset[0]["chosen_ids"]
    assert row[-1] == tokenizer.eos_token_id
    at_eos = model.score(model.model(torch.tensor([row])).last_hidden_state[0, -1]).item()
    assert model(torch.tensor([row])).logits.item() == pytest.approx(at_eos, abs=1e-6)
    padded = torch.tensor([row + [tokenizer.pad_token_id] * 3])
    mask = (padded != tokenizer.pad_token_id).long()
    assert model(padded, attention_mask=mask).logits.item() == pytest.approx(at_eos, abs=1e-5)


def test_another_head_name_is_saved_and_found_again(tiny, pair_rows, tmp_path):
    trainer = train("rm", tiny, pair_rows, tmp_path / "o", value_head_prefix="value_head")
    assert "value_head.weight" in load_file(tmp_path / "o" / "model.safetensors")
    again = load_reward_model(str(tmp_path / "o"))
    assert torch.equal(again.score.weight, trainer.model.score.weight)


def test_lora_trains_and_merges_the_reward_head(tiny, pair_rows, tmp_path):
    trainer = train("rm", tiny, pair_rows, tmp_path / "o", **LORA)
    head = trainer.model.base_model.model.score.modules_to_save["default"].weight
    assert head.requires_grad and trainer.model.peft_config["default"].task_type == "SEQ_CLS"
    rows = [row["chosen_ids"] for row in trainer.train_dataset]
    before = score_ids(trainer.model.eval(), rows)
    merge(tmp_path / "o", tmp_path / "merged")
    model, _ = load_scorer(str(tmp_path / "merged"))
    assert score_ids(model, rows) == pytest.approx(before, abs=1e-5)
    assert torch.equal(model.score.weight, head)
    with pytest.raises(RecipeError, match="exists"):
        merge(tmp_path / "o", tmp_path / "merged")


def test_merging_into_another_base_is_noticed(tiny, pair_rows, tmp_path):
    train("dpo", tiny, pair_rows, tmp_path / "o", **LORA)
    merge(tmp_path / "o", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    queries = [model.model.layers[0].self_attn.q_proj.weight for model in (merged, build_model(320))]
    assert not torch.equal(*queries)
    with pytest.raises(RecipeError, match="holds no adapter"):
        merge(tmp_path / "merged", tmp_path / "again")


def test_score_writes_raw_and_normalized_rewards_of_a_file(reward_model, tmp_path):
    _, folder = reward_model
    rows = [{"prompt": "what is 1? ", "completion": "five"}, {"prompt": "what? ", "completion": "one and four " * 3}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--out", str(tmp_path / "r.jsonl"), "--batch-size", "2"]
    done = CliRunner().invoke(app, ["score", str(folder), str(path), *options])
    assert done.exit_code == 0, done.output
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row, line in zip(rows, (tmp_path / "r.jsonl").read_text().splitlines(), strict=True):
        scored = json.loads(line)
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        expected = model(ids).logits.item()
        assert scored["reward"] == pytest.approx(expected, abs=1e-5)
        assert scored["normalized_reward"] == pytest.approx((expected - model.config.mean) / model.config.std, rel=1e-3)


@pytest.mark.parametrize("templated", [False, True])
def test_a_reward_model_is_benchmarked_on_files_of_pairs(templated, tiny, pair_rows, tmp_path):
    """On text like the rows it trains on."""
    keys = {"packing": True, "do_eval": True, "test_split_size": 9, "per_device_eval_batch_size": 5}
    benchmarks = {"apply_chat_template": templated, "pair_benchmarks": [str(pair_rows)]}
    trainer = train("rm", tiny, pair_rows, tmp_path / "o", **keys, **benchmarks)
    [row] = [json.loads(line) for line in (tmp_path / "o" / "benchmarks.jsonl").read_text().splitlines()]
    model, tokenizer = load_scorer(str(tmp_path / "o"))
    won = {}
    for line in pair_rows.read_text().splitlines():
        pair = json.loads(line)
        answers = [pair[side] for side in ("chosen", "rejected")]
        texts = [pair["prompt"] + answer + tokenizer.eos_token for answer in answers]
        if templated:
            user = {"role": "user", "content": pair["prompt"]}
            turns = [[user, {"role": "assistant", "content": answer}] for answer in answers]
            texts = tokenizer.apply_chat_template(turns, tokenize=False)
        chosen, rejected = score_ids(model, tokenizer(texts)["input_ids"])
        won.setdefault(pair["subset"], []).append(chosen > rejected)
    for subset, wins in won.items():
        assert row["scores"]["pairs"][f"accuracy_{subset}"] == pytest.approx(sum(wins) / len(wins))
    assert logged(trainer, "eval_bench_pairs_accuracy")


def test_a_row_that_cannot_be_scored_is_named(reward_model, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": ""}])
    with pytest.raises(RecipeError, match="row 1: empty text"):
        score_file(str(reward_model[1]), str(path), tmp_path / "r.jsonl")


# ---- DPO's losses ----


@pytest.fixture(scope="module")
def dpo_trainer(tiny, pair_rows, tmp_path_factory):
    keys = {"max_steps": 1, "per_device_train_batch_size": 2}
    trainer = train("dpo", tiny, pair_rows, tmp_path_factory.mktemp("dpo"), **keys)
    trainer.precompute_ref_logps = True  # `dpo_loss` brings the reference's
    return trainer


def dpo_loss(trainer, logps, ref, mask) -> float:
    """`logps`: (2B, L), of a model's tokens; `ref`: (2B,) summed; `mask`: (2B, L)."""
    zeros = torch.zeros_like(logps)
    output = trl.trainer.utils.FusedCausalLMOutput(
        log_probs=logps * mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    ones = torch.ones(len(logps), logps.shape[1] + 1, dtype=torch.long)
    prompt = torch.zeros(len(mask), 1, dtype=torch.long)
    inputs = {"input_ids": ones, "attention_mask": ones, "completion_mask": torch.cat([prompt, mask], dim=1)}
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref.chunk(2)
    return trainer.compute_loss(lambda **inputs: output, inputs).item()


def random_cases(seed: int, count: int):
    """Arguments of `dpo_loss` after the trainer."""
    generator, length = torch.Generator().manual_seed(seed), 7
    for _ in range(count):
        batch = int(torch.randint(1, 5, (), generator=generator))
        lengths = torch.randint(1, length + 1, (2 * batch,), generator=generator)
        mask = (torch.arange(length) < lengths[:, None]).long()
        logps = -torch.rand(2 * batch, length, generator=generator) * 3
        yield logps, torch.randn(2 * batch, generator=generator) * 4 - 5, mask


def settle(trainer, **changes):
    """The trainer's objective as its constructor settles it from the arguments."""
    defaults = dict(loss_type=["sigmoid"], loss_weights=None, label_smoothing=0.0)
    vars(trainer.args).update({**defaults, "ipo_reduction": "mean", "nll_loss_coef": None, **changes})
    trainer.beta = trainer.args.beta
    trainer.settle_objective()


def expected_loss(logps, ref, mask, beta, loss_type, epsilon=0.0, nll=0.0) -> float:
    logps, ref, mask = logps.double(), ref.double(), mask.double()
    half = len(logps) // 2
    total = 0.0
    for i in range(half):
        sums = [(logps[j] * mask[j]).sum().item() for j in (i, half + i)]
        delta = (sums[0] - ref[i].item()) - (sums[1] - ref[half + i].item())
        x = beta * delta
        if loss_type == "sigmoid":
            total += (1 - epsilon) * math.log1p(math.exp(-x)) + epsilon * math.log1p(math.exp(x))
        else:
            total += (delta - 1 / (2 * beta)) ** 2
        total += nll * -sums[0] / mask[i].sum().item()
    return total / half


OBJECTIVES = {
    "cDPO": {},
    "cDPO and the chosen side's NLL": {"nll_loss_coef": 0.3},  # a mean over tokens, then over pairs
    "IPO on sums": {"loss_type": ["ipo"], "ipo_reduction": "sum"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_equals_float64_arithmetic_on_random_cases(name, dpo_trainer):
    changes = OBJECTIVES[name]
    ipo, nll = name == "IPO on sums", changes.get("nll_loss_coef", 0.0)
    for case, (logps, ref, mask) in enumerate(random_cases(seed=1, count=200)):
        epsilon = 0.0 if ipo else case % 10 / 21
        settle(dpo_trainer, label_smoothing=epsilon, **changes)
        expected = expected_loss(logps, ref, mask, dpo_trainer.beta, "ipo" if ipo else "sigmoid", epsilon, nll)
        tolerance = {"rel": 1e-5, "abs": 1e-5 if ipo else None}
        assert dpo_loss(dpo_trainer, logps, ref, mask) == pytest.approx(expected, **tolerance), case


def test_cdpo_equals_trls_aot_at_one_pair(dpo_trainer):
    """aot sorts the batch before it pairs; with one pair there is nothing to sort."""
    for case in random_cases(seed=2, count=20):
        one = [torch.stack([x[0], x[len(x) // 2]]) for x in case]
        settle(dpo_trainer, label_smoothing=0.2)
        ours = dpo_loss(dpo_trainer, *one)
        settle(dpo_trainer, label_smoothing=0.2, loss_type=["aot"])
        assert ours == pytest.approx(dpo_loss(dpo_trainer, *one), rel=1e-5)


def test_the_three_terms_combine_with_trls_losses_and_weights(dpo_trainer):
    for logps, ref, mask in random_cases(seed=5, count=20):
        combined = dict(loss_type=["sigmoid", "ipo", "hinge"], loss_weights=[0.5, 0.1, 2.0], nll_loss_coef=0.3)
        settle(dpo_trainer, **combined, ipo_reduction="sum", label_smoothing=0.1)
        ours = dpo_loss(dpo_trainer, logps, ref, mask)
        settle(dpo_trainer, loss_type=["hinge"])
        hinge = dpo_loss(dpo_trainer, logps, ref, mask)
        beta = dpo_trainer.beta
        expected = 0.5 * expected_loss(logps, ref, mask, beta, "sigmoid", 0.1) + 2.0 * hinge
        expected += 0.1 * expected_loss(logps, ref, mask, beta, "ipo")
        with_nll, without = (expected_loss(logps, ref, mask, beta, "sigmoid", nll=nll) for nll in (1, 0))
        expected += 0.3 * (with_nll - without)
        assert ours == pytest.approx(expected, rel=1e-4)


LOSSES = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop"


@pytest.mark.parametrize("loss_type", [*LOSSES.split(), "sft", "sigmoid_norm"])
def test_every_loss_of_trl_trains_packed_as_padded(loss_type, tiny, pair_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(PairPackingMixin, "_get_train_sampler", trl.DPOTrainer._get_train_sampler)  # the same batches
    smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust", "aot") else {}
    keys = {"loss_type": loss_type, "max_steps": 2, **smoothing}
    padded = train("dpo", tiny, pair_rows, tmp_path / "a", **keys)
    packed = train("dpo", tiny, pair_rows, tmp_path / "b", packing=True, share_prefix=True, **keys)
    assert logged(packed, "loss") == pytest.approx(logged(padded, "loss"), rel=1e-4, abs=1e-6)
    assert logged(packed, "grad_norm") == pytest.approx(logged(padded, "grad_norm"), rel=1e-3)


# ---- DPO's reference ----


def test_ref_offload_under_zero3_offloads_the_reference_and_not_the_policy():
    plugin = DeepSpeedPlugin(zero_stage=3)
    with offloaded_parameters(SimpleNamespace(ref_offload=True, deepspeed_plugin=plugin, world_size=1)):
        plugin.deepspeed_config = deepcopy(plugin.deepspeed_config)  # as the trainer's constructor does
        assert plugin.deepspeed_config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert plugin.deepspeed_config["zero_optimization"]["offload_param"]["device"] == "none"


def test_precomputed_offloaded_and_plain_references_are_the_same(tiny, pair_rows, tmp_path):
    """With `ld_alpha` too, after a run that leaves log-probs of the same rows and model in the cache."""

    def losses(**keys):
        return logged(train("dpo", tiny, pair_rows, tmp_path / ("-".join(keys) or "plain"), **keys), "loss")

    plain = losses()
    assert losses(precompute_ref_log_probs=True) == pytest.approx(plain, rel=1e-5)
    assert losses(ref_offload=True) == plain
    precomputed = losses(ld_alpha=0.5, precompute_ref_log_probs=True)
    assert precomputed == pytest.approx(losses(ld_alpha=0.5), rel=1e-5)


def test_another_reference_model_is_used(tiny, pair_rows, tmp_path):
    other = build_model(320)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    save_model(tmp_path / "ref", other, AutoTokenizer.from_pretrained(tiny))
    same = train("dpo", tiny, pair_rows, tmp_path / "a")
    another = train("dpo", tiny, pair_rows, tmp_path / "b", ref_model_name_or_path=str(tmp_path / "ref"))
    assert logged(same, "loss")[0] == pytest.approx(math.log(2), rel=1e-6)  # policy and reference are equal
    assert logged(another, "loss")[0] != pytest.approx(math.log(2), rel=1e-3)


def test_under_lora_the_reference_is_the_model_without_its_adapter(tiny, pair_rows, tmp_path):
    trainer = train("dpo", tiny, pair_rows, tmp_path / "o", **LORA)
    assert trainer.ref_model is None
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), rel=1e-6)
    assert logged(trainer, "rewards/margins")[2] != 0


TOKENS = {"packing": True, "per_device_train_batch_size": None}


@pytest.mark.parametrize("task", ["rm", "dpo"])
@pytest.mark.parametrize("batch", [{"packing": True}, TOKENS | {"max_tokens_per_batch": 200}], ids=str)
def test_preference_runs_resume_bit_for_bit(task, batch, tiny, pair_rows, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 7, "max_steps": 14, **batch}
    train(task, tiny, pair_rows, tmp_path / "whole", **keys)
    copy_until(7, tmp_path / "whole", tmp_path / "parts")
    train(task, tiny, pair_rows, tmp_path / "parts", **keys)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_the_saving_is_logged_and_decides_the_default(tiny, pair_rows, tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer = train("dpo", tiny, pair_rows, tmp_path / "o", packing=True)
    assert trainer.shares_prefix
    assert "Sharing the prefix of chosen and rejected saves" in caplog.text


def test_a_batch_of_tokens_holds_no_more(tiny, pair_rows, tmp_path):
    trainer = train("rm", tiny, pair_rows, tmp_path / "o", **TOKENS, max_tokens_per_batch=150)
    assert all(trainer.batches.lengths[batch].sum() <= 150 for batch in trainer.batches)
    with pytest.raises(RecipeError, match="max_tokens_per_batch is 10, but the longest row"):
        train("rm", tiny, pair_rows, tmp_path / "p", **TOKENS, max_tokens_per_batch=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"per_device_train_batch_size": 8}, "global_batch_size: 4"), ({"share_prefix": False}, "share_prefix: true")],
)
def test_batches_that_would_be_balanced_in_another_way_are_not_resumed(change, message, tiny, pair_rows, tmp_path):
    keys = {"packing": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    train("rm", tiny, pair_rows, tmp_path / "o", **keys)
    with pytest.raises(RecipeError, match=f"was made with {message}.*Set {message}"):
        train("rm", tiny, pair_rows, tmp_path / "o", **keys | change | {"max_steps": 2})


@pytest.mark.parametrize(
    ("task", "keys", "message"),
    [
        ("rm", {"router_aux_loss_coef": 0.01}, "not a mixture of experts"),
        ("rm", BENCHMARKED | {"pair_benchmarks": ["sides.jsonl"]}, "sides has no column prompt"),
        ("dpo", {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_what_does_not_go_together_is_refused(task, keys, message, tiny, pair_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "sides.jsonl", [{"chosen": "a", "rejected": "b"}])
    with pytest.raises(RecipeError, match=message):
        train(task, tiny, pair_rows, tmp_path / "o", **keys)


def build_encoder(vocab_size: int):
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return BertForSequenceClassification(BertConfig(vocab_size=vocab_size, num_labels=1, **small))


@pytest.mark.parametrize(
    ("task", "build", "packing", "message"),
    [
        ("dpo", lambda size: build_model(size, MambaConfig), True, "Set packing: false"),
        ("rm", build_encoder, True, "not a causal model with one linear head"),
        ("rm", build_encoder, False, "not a causal model with one linear head"),
    ],
)
def test_a_model_of_another_kind_is_refused(task, build, packing, message, tokenizer, pair_rows, tmp_path):
    folder = save_model(tmp_path / "m", build(len(tokenizer)), tokenizer)
    with pytest.raises(RecipeError, match=message):
        train(task, folder, pair_rows, tmp_path / "o", packing=packing)


def test_from_python_is_the_same_run(tiny, pair_rows, tmp_path):
    keys = short_recipe(tiny, pair_rows, tmp_path / "a", beta=0.2)
    script = dpo.main(parse("dpo", keys | {"output_dir": str(tmp_path / "b")}))
    assert logged(tunebook.dpo(**keys), "loss") == logged(script, "loss")
    with pytest.raises(ValueError, match="Did you mean beta"):
        tunebook.dpo(**keys | {"betta": 1, "output_dir": str(tmp_path / "c")})
