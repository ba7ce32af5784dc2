"""optim: muon: its arithmetic against an independent one, which weights it trains, its schedule, resume, DeepSpeed."""

import math
import re
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from conftest import (
    assert_same_weights,
    build_model,
    copy_until,
    launch,
    logged,
    options,
    save_model,
    short_recipe,
    train,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, LlamaConfig, LlamaForSequenceClassification, MixtralConfig

from tunebook.errors import RecipeError
from tunebook.recipe import parse
from tunebook.recipe.rules import check_muon
from tunebook.training.optimizers import MuonWithAdamW, hidden_matrices


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic iteration of https://kellerjordan.github.io/posts/muon/, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.to(matrix.dtype)


def polar_factor(matrix: torch.Tensor) -> torch.Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((a - b).norm() / b.norm()).item()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def muon_group(parameter) -> dict:
    return {"params": [parameter], "use_muon": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}


def adamw_group(parameter, **changes) -> dict:
    return {"params": [parameter], "use_muon": False, "lr": 0.1, **changes}


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_two_updates_are_those_of_the_post(shape):
    """Nesterov momentum as an average, decoupled weight decay, sqrt(rows / columns) for tall matrices. torch iterates
    in bf16, of which a unit in the last place is 0.4%."""
    start, momentum = random(*shape, seed=1), torch.zeros(shape, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.float())
    optimizer = MuonWithAdamW([muon_group(parameter), adamw_group(torch.nn.Parameter(torch.ones(3)))])
    expected = start.clone()
    for step in range(2):
        gradient = random(*shape, seed=2 + step)
        parameter.grad = gradient.float()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = newton_schulz(0.9 * momentum + 0.1 * gradient)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * math.sqrt(max(1, shape[0] / shape[1])) * direction
    decayed = (1 - 0.1 * 0.5) ** 2 * start
    assert distance(parameter.detach().double() - decayed, expected - decayed) < 0.03


def test_an_update_is_about_orthogonal_whatever_the_gradients_scale():
    gradient, updates = random(24, 24), []
    for scale in (1, 1e-4):
        parameter = torch.nn.Parameter(torch.zeros(24, 24))
        optimizer = MuonWithAdamW([muon_group(parameter), adamw_group(torch.nn.Parameter(torch.ones(3)))])
        parameter.grad = gradient.float() * scale
        optimizer.step()
        updates.append(parameter.detach().double() / -0.1)
    assert distance(updates[0], polar_factor(gradient)) < 0.35  # singular values of about 0.7 to 1.2
    assert distance(updates[1], updates[0]) < 0.03


def test_the_other_half_is_torchs_adamw_to_the_last_bit():
    ours, theirs = (torch.nn.Parameter(random(5, 3).float()) for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.3}
    matrix = muon_group(torch.nn.Parameter(torch.ones(2, 2)))
    both = [
        MuonWithAdamW([adamw_group(ours, **settings), matrix]),
        torch.optim.AdamW([theirs], **settings, fused=True),
    ]
    for step in range(3):
        for parameter, optimizer in zip((ours, theirs), both, strict=True):
            parameter.grad = random(5, 3, seed=step).float()
            optimizer.step()
    assert torch.equal(ours, theirs)


def build(config_class=LlamaConfig, **changes):
    return build_model(64, config_class, num_hidden_layers=1, **changes)


def lora(**changes):
    modules = {"target_modules": "all-linear", **changes}
    return get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", **modules))


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("build_case", "modules"),
    [
        (build, ATTENTION + MLP),
        (lambda: build(tie_word_embeddings=True), ATTENTION + MLP),
        (lambda: build(GPTNeoXConfig), ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
        (lambda: build(MixtralConfig), ATTENTION),
        (lambda: LlamaForSequenceClassification(build(num_labels=1).config), ATTENTION + MLP),
        (lora, []),
        (lambda: lora(target_modules=ATTENTION, modules_to_save=["down_proj", "lm_head"]), ["down_proj"]),
    ],
    ids=["llama", "tied", "gpt-neox", "mixtral", "reward-model", "lora", "lora-and-whole"],
)
def test_muon_trains_the_hidden_matrices_and_nothing_else(build_case, modules):
    model = build_case()
    hidden = hidden_matrices(model)
    names = [name for name, p in model.named_parameters() if p in hidden]
    leaves = [name.removesuffix(".weight").removesuffix(".modules_to_save.default").split(".")[-1] for name in names]
    assert sorted(leaves) == sorted(modules)


MUON = {"optim": "muon", "max_steps": 4}


@pytest.fixture(scope="module")
def run(tiny, sft_rows, tmp_path_factory):
    """One uninterrupted run, saved at every step."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    changes = MUON | {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    return train("sft", tiny, sft_rows, output_dir, **changes), output_dir, changes


def test_both_learning_rates_follow_the_schedule(run):
    """Warm-up of two steps, then half a cosine; Muon's is 0.2 sqrt(32) times as large."""
    trainer, _, _ = run
    shares = [0, 0.5, 1, 0.5]
    assert logged(trainer, "learning_rate") == pytest.approx([1e-3 * share for share in shares])
    muon = [1e-3 * 0.2 * math.sqrt(32) * share for share in shares]
    assert logged(trainer, "muon_learning_rate") == pytest.approx(muon)


def test_every_parameter_is_in_one_group(run):
    trainer, _, _ = run
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trainer.model.parameters())


def test_interrupted_and_resumed_is_bit_for_bit_the_uninterrupted_run(run, tiny, sft_rows, tmp_path):
    _, whole, changes = run
    copy_until(2, whole, tmp_path / "parts")
    train("sft", tiny, sft_rows, tmp_path / "parts", **changes)
    assert_same_weights(tmp_path / "parts", whole)


def test_the_log_says_what_each_side_got(tiny, sft_rows, tmp_path, caplog):
    with caplog.at_level("INFO", "tunebook"):
        trainer = train("sft", tiny, sft_rows, tmp_path, optim="muon", max_steps=1, muon_learning_rate=0.02)
    sizes = [p.numel() for name, p in trainer.model.named_parameters() if "_proj" in name]
    muon = f"Muon trains {sum(sizes):,} parameters in {len(sizes)} matrices (learning rate 0.02)"
    assert f"{muon}, AdamW {trainer.model.num_parameters() - sum(sizes):,} (0.001)." in caplog.text
    assert "max_grad_norm 1 hardly limits the hidden matrices" in caplog.text


def test_stacked_experts_go_to_adamw_with_a_warning(tiny, sft_rows, tokenizer, tmp_path, caplog):
    model = build_model(len(tokenizer), MixtralConfig, num_local_experts=2)
    moe = save_model(tmp_path / "moe", model, tokenizer)
    train("sft", moe, sft_rows, tmp_path / "out", optim="muon", max_steps=1)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert f"{experts:,} parameters of AdamW's are stacked experts" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_torch", "muon_momentum": 0.9}, "`muon_momentum` has no effect here. It needs optim: muon"),
        ({"muon_momentum": 1.0}, "`muon_momentum`: input should be less than 1"),
        ({"optim_args": "ns_steps=6"}, "`optim_args` has no effect here"),
        ({"use_peft": True}, "`use_peft` leaves none: LoRA's matrices go to AdamW"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_parsed(tiny, sft_rows, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse("sft", short_recipe(tiny, sft_rows, tmp_path, **MUON | changes))


def test_a_run_with_nothing_for_muon_is_refused(tiny, sft_rows, tmp_path):
    with pytest.raises(RecipeError, match="has nothing to train"):
        train("sft", tiny, sft_rows, tmp_path, optim="muon", num_layers_unfrozen=0)


@pytest.mark.parametrize(
    ("config", "max_grad_norm", "message"),
    [
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, 0, "offloaded to the CPU"),
        ({"zero_optimization": {"stage": 2}}, 1, "Set max_grad_norm: 0"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, 0, "Remove the section"),
    ],
)
def test_what_deepspeed_cannot_do_right_is_refused(tiny, sft_rows, tmp_path, config, max_grad_norm, message):
    args = parse("sft", short_recipe(tiny, sft_rows, tmp_path, **MUON, max_grad_norm=max_grad_norm)).training
    args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=config)
    with pytest.raises(ValueError, match=message):
        check_muon(args)


@pytest.mark.slow
def test_deepspeed_routes_the_same_weights_and_takes_the_steps_of_one_process(tiny, sft_rows, tmp_path):
    """What each weight moved by, of two processes under ZeRO-2, and of one without DeepSpeed on the same batches. Its
    iteration is the one above, because DeepSpeed iterates in float32 on a CPU: the gradients of a tiny model are far
    from full rank, and torch's bf16 makes noise of what is nearly zero."""
    same = {"optim": "muon", "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    recipe = short_recipe(tiny, sft_rows, tmp_path / "sharded", per_device_train_batch_size=2, **same)
    done = launch("src/sft.py", *options(recipe), config="zero2", processes=2)
    assert done.returncode == 0, done.stderr
    with patch("torch.optim._muon._zeropower_via_newtonschulz", lambda gradient, *_: newton_schulz(gradient)):
        train("sft", tiny, sft_rows, tmp_path / "whole", **same)
    start, whole, sharded = (
        load_file(folder / "model.safetensors") for folder in (tiny, tmp_path / "whole", tmp_path / "sharded")
    )
    sizes = [weight.numel() for name, weight in whole.items() if "_proj" in name]
    assert f"Muon trains {sum(sizes):,} parameters in {len(sizes)} matrices" in done.stderr
    for name, weight in start.items():
        assert distance(sharded[name] - weight, whole[name] - weight) < 0.005, name
