"""Whole runs of src/sft.py on a tiny model: what is saved, what is equal to what, what a run can be resumed from."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_weights,
    build_model,
    build_tokenizer,
    copy_until,
    logged,
    options,
    save_model,
    short_recipe,
    train,
    write_rows,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from tunebook import checkpoints, run_script
from tunebook.errors import RecipeError
from tunebook.recipe import parse, read_recipe
from tunebook.scripts import sft
from tunebook.tools.preview import preview_rows
from tunebook.training.models import end_of_turn_ids, freeze_layers

LONG = {"max_steps": 6, "learning_rate": 1e-2}
SAVED = LONG | {"save_strategy": "steps", "save_steps": 2}


def train_saved(model, rows, output_dir, **changes):
    """SFT of 6 steps, saved every 2."""
    return train("sft", model, rows, output_dir, **SAVED | changes)


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of the folder of `run`."""
    return shutil.copytree(run[1], tmp_path / "o")


@pytest.fixture(scope="module")
def run(tiny, sft_rows, tmp_path_factory):
    """One uninterrupted run of 6 steps, evaluated and saved every 2."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    evaluation = {"test_split_size": 8, "eval_strategy": "steps", "eval_steps": 2, "report_to": "tensorboard"}
    return train_saved(tiny, sft_rows, output_dir, **evaluation), output_dir


def test_the_model_loads_and_generates_from_its_folder(run):
    _, folder = run
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and model.config.use_cache
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    prompt = tokenizer("what is 1 plus 1? ", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]


def test_a_run_leaves_card_metrics_recipe_and_counts(run):
    trainer, folder = run
    card = (folder / "README.md").read_text()
    assert "learning_rate: 0.01" in card and "40 of 40 rows kept" in card
    first = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert json.loads((folder / "eval_results.json").read_text())["eval_loss"] < first
    assert json.loads((folder / "train_results.json").read_text())["train_loss"] > 0
    assert "max_steps: 6" in (folder / "recipe.yaml").read_text()
    assert json.loads((folder / "data_report.json").read_text())["eval"]["kept"] == 8
    assert list((folder / "runs").rglob("events.out.tfevents.*"))


def test_the_resolved_recipe_gives_the_same_run(run, tmp_path):
    trainer, folder = run
    again = run_script("sft", read_recipe(folder / "recipe.yaml") | {"output_dir": str(tmp_path / "again")})
    assert_same_weights(folder, tmp_path / "again")
    assert logged(again, "loss") == logged(trainer, "loss")


def test_the_loss_is_the_same_at_any_split_of_the_batch(tiny, sft_rows, tmp_path):
    """Token-weighted over the accumulation window: the rows have different lengths."""
    whole = train("sft", tiny, sft_rows, tmp_path / "4", **LONG)
    for size, steps in ((2, 2), (1, 4)):
        split = {"per_device_train_batch_size": size, "global_batch_size": 4}
        parts = train("sft", tiny, sft_rows, tmp_path / str(size), **LONG, **split)
        assert parts.args.gradient_accumulation_steps == steps
        assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)


def test_the_first_loss_equals_a_plain_computation(tiny, sft_rows, tmp_path):
    trainer = train("sft", tiny, sft_rows, tmp_path / "a", max_steps=1, per_device_train_batch_size=48)
    model, rows = AutoModelForCausalLM.from_pretrained(tiny), trainer.train_dataset
    total = count = 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    assert logged(trainer, "loss")[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_pieces_without_a_label_do_not_lower_the_evaluations_loss(strategy, tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "one two three " * 12, "completion": "five"}] * 4)
    keys = {"packing": True, "packing_strategy": strategy, "max_length": 16, "per_device_eval_batch_size": 1}
    keys |= {"eval_dataset_name": str(rows), "do_eval": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    _, report = preview_rows(parse("sft", short_recipe(tiny, rows, tmp_path / "o", **keys)), count=4)
    trainer = train("sft", tiny, rows, tmp_path / "o", learning_rate=1e-30, **keys)
    assert report.endswith(f"packed into {len(trainer.train_dataset)}")
    rows = trainer.eval_dataset.to_list()
    assert rows and all(set(row["labels"]) != {-100} for row in rows)
    if strategy == "wrapped":  # each row is one document
        model = AutoModelForCausalLM.from_pretrained(tiny)
        losses = [model(torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss for r in rows]
        assert logged(trainer, "eval_loss")[0] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_interrupted_and_resumed_is_bit_for_bit_the_uninterrupted_run(tiny, sft_rows, tmp_path):
    """Dropout is on and the order of rows is shuffled, so the random state and the position must both come back."""
    same = {"save_steps": 1, "model_init_kwargs": {"attention_dropout": 0.2}, "lr_scheduler_type": "cosine"}
    train_saved(tiny, sft_rows, tmp_path / "whole", **same)
    for step in (1, 3, 4):
        parts = tmp_path / f"from-{step}"
        copy_until(step, tmp_path / "whole", parts)
        assert train_saved(tiny, sft_rows, parts, **same).state.global_step == 6
        assert_same_weights(tmp_path / "whole", parts)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save_then_started_again(tiny, sft_rows, tmp_path):
    """SIGKILL as soon as the second checkpoint's folder appears, with save_total_limit 1."""
    keys = SAVED | {"save_total_limit": 1}
    command = [sys.executable, "src/sft.py", *options(short_recipe(tiny, sft_rows, tmp_path / "killed", **keys))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint-4").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints.find_checkpoint(tmp_path / "killed", "auto") is not None
    for name in ("killed", "whole"):
        train("sft", tiny, sft_rows, tmp_path / name, **keys)
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_an_incomplete_checkpoint_is_never_resumed_from(copied, caplog):
    (copied / "checkpoint-6" / "optimizer.pt").write_bytes(b"cut")
    assert checkpoints.find_checkpoint(copied, "auto") == copied / "checkpoint-4"
    assert "checkpoint-6 is ignored" in caplog.text
    with pytest.raises(RecipeError, match="not a complete checkpoint"):
        checkpoints.find_checkpoint(copied, str(copied / "checkpoint-6"))


def test_rotation_keeps_the_newest_and_the_best(copied):
    checkpoints.rotate(copied, limit=2, max_gb=None, best=str(copied / "checkpoint-2"))
    assert {p.name for p in copied.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    checkpoints.rotate(copied, limit=None, max_gb=1e-6, best=None)
    assert {p.name for p in copied.glob("checkpoint-*")} == {"checkpoint-6"}


def test_another_split_of_the_batch_resumes_at_the_same_sample(tiny, sft_rows, tmp_path, monkeypatch):
    """6 steps of 4 rows, and 4 steps of 4 rows followed by 1 step of 8: the same rows are seen."""
    seen = []

    class Recorder(sft.SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.extend([token for token in row if token] for row in inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    assert train_saved(tiny, sft_rows, tmp_path / "parts", max_steps=4).state.global_step == 4
    monkeypatch.setattr(sft, "SFTTrainer", Recorder)
    train_saved(tiny, sft_rows, tmp_path / "parts", max_steps=3, per_device_train_batch_size=8)
    resumed = seen[:]
    seen.clear()
    train_saved(tiny, sft_rows, tmp_path / "whole")
    assert resumed == seen[16:24]


def test_what_must_not_change_is_refused_unless_forced(copied, tiny, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "a ", "completion": f"b {i}"} for i in range(48)])
    with pytest.raises(RecipeError, match="made from something else.*data: "):
        train_saved(tiny, other, copied)
    assert train_saved(tiny, other, copied, seed=7, force_resume=True).state.global_step == 6


def test_a_finished_run_is_not_trained_further(run, copied, tiny, sft_rows):
    train_saved(tiny, sft_rows, copied, test_split_size=8, do_eval=True)
    assert_same_weights(run[1], copied)


def test_a_changed_recipe_is_logged(copied, tiny, sft_rows, caplog):
    train_saved(tiny, sft_rows, copied, test_split_size=8, do_eval=True, learning_rate=1e-4, max_steps=7)
    assert "learning_rate: 0.01 -> 0.0001" in caplog.text


def test_never_starts_anew(copied, tiny, sft_rows):
    (copied / "benchmarks.jsonl").write_text("{}\n")
    trainer = train_saved(tiny, sft_rows, copied, max_steps=2, save_total_limit=1, resume_from_checkpoint="never")
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    assert [path.name for path in copied.glob("checkpoint-*")] == ["checkpoint-2"]
    left = {path.name for path in copied.glob("before-*/*")}
    assert left == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "benchmarks.jsonl", "trainer_state.json"}


def test_what_another_program_left_is_neither_used_nor_deleted(tiny, sft_rows, tmp_path):
    for name in ("checkpoint-9", "checkpoint-2-merged"):
        (tmp_path / "o" / name).mkdir(parents=True)
        (tmp_path / "o" / name / "model.safetensors").touch()
    (tmp_path / "o" / "checkpoint-9.tar").touch()
    checkpoints.begin(tmp_path / "o" / "checkpoint-1")  # its save was interrupted
    train_saved(tiny, sft_rows, tmp_path / "o", max_steps=2)
    left = {path.name for path in (tmp_path / "o").glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-9", "checkpoint-2-merged", "checkpoint-9.tar"}


def test_a_checkpoint_without_the_optimizer_is_resumed_from_only_when_forced(tiny, sft_rows, tmp_path):
    train_saved(tiny, sft_rows, tmp_path / "o", max_steps=2, save_only_model=True)
    with pytest.raises(RecipeError, match="no optimizer state.*force_resume: true"):
        train_saved(tiny, sft_rows, tmp_path / "o", max_steps=4)
    assert train_saved(tiny, sft_rows, tmp_path / "o", max_steps=4, force_resume=True).state.global_step == 4


# ---- Models ----


def train_bare(tmp_path, spare: int = 0, tied: bool = False, **changes):
    """One step on turns of a model whose tokenizer has no template; returns its tokenizer."""
    bare = build_tokenizer(special=("<pad>", "<eos>"), template=None)
    model = save_model(tmp_path / "m", build_model(len(bare) + spare, tie_word_embeddings=tied), bare)
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    rows = write_rows(tmp_path / "r.jsonl", [{"messages": turns}] * 8)
    train("sft", model, rows, tmp_path / "o", max_steps=1, **changes)
    return bare


def test_a_model_without_template_gets_chatml_and_larger_embeddings(tmp_path):
    bare = train_bare(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o")
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_start|>" in tokenizer.chat_template
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == len(bare) + 2
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_the_end_of_turn_joins_the_generation_configs_eos():
    """A template may end a turn with another token than the tokenizer's EOS (Llama 3's <|eot_id|>)."""
    tokenizer = build_tokenizer(special=("<pad>", "<|im_start|>", "<|im_end|>", "<eos>"))
    assert end_of_turn_ids(tokenizer, None) == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("tied", [True, False])
def test_num_layers_unfrozen_trains_the_top_only(tied):
    model = build_model(320, num_hidden_layers=3, tie_word_embeddings=tied)
    freeze_layers(model, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name for name, _ in model.named_parameters() if "layers.2." in name} | {"model.norm.weight"}
    assert trained == expected | (set() if tied else {"lm_head.weight"})


def test_frozen_layers_do_not_move(tiny, sft_rows, tmp_path):
    train("sft", tiny, sft_rows, tmp_path / "o", num_layers_unfrozen=1, **LONG)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path / "o"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "layers.1." in name} | {"model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"use_rslora": True}, {"load_in_4bit": True}], ids=str)
def test_lora_trains_and_saves_the_adapter_only(tiny, sft_rows, tmp_path, extra):
    lora = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
    train("sft", tiny, sft_rows, tmp_path / "o", max_steps=2, **lora, **extra)
    assert not (tmp_path / "o" / "model.safetensors").exists()
    saved = load_file(tmp_path / "o" / "adapter_model.safetensors")
    assert all(re.search(r"\.[qv]_proj\.lora_", name) for name in saved)
    assert all(saved[name].any() for name in saved if "lora_B" in name)  # which start at 0


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}, {}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_of_a_reward_model_with_lora_has_the_dtype_of_its_inputs(bits, dtype, tiny, pair_rows, tmp_path):
    trainer = train("rm", tiny, pair_rows, tmp_path / "o", max_steps=1, use_peft=True, dtype=dtype, **bits)
    [head] = [p for name, p in trainer.model.named_parameters() if "modules_to_save" in name and p.requires_grad]
    assert str(head.dtype) == f"torch.{dtype}" and head.grad is None  # after a step
    assert trainer.get_num_trainable_parameters() > head.numel()


def test_a_compiled_model_trains_the_same(tiny, pair_rows, tmp_path):
    plain, compiled = (
        logged(train("dpo", tiny, pair_rows, tmp_path / str(len(keys)), max_steps=2, **keys), "loss")
        for keys in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    )
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("spare", [0, 8])
def test_a_new_token_is_trained_under_lora(spare, tmp_path):
    """Also where the embeddings have rows to spare for it."""
    train_bare(tmp_path, spare, tied=True, use_peft=True, lora_target_modules=["q_proj"])
    assert any("embed_tokens" in name for name in load_file(tmp_path / "o" / "adapter_model.safetensors"))


@pytest.mark.parametrize("task", ["sft", "rm"])
def test_the_balancing_loss_of_a_mixture_of_experts_is_added(task, tmp_path, tokenizer, task_rows):
    model = build_model(len(tokenizer), MixtralConfig, num_local_experts=4, num_experts_per_tok=2)
    moe = save_model(tmp_path / "moe", model, tokenizer)
    without, with_loss = (
        train(task, moe, task_rows, tmp_path / str(c), router_aux_loss_coef=c, max_steps=1) for c in (0.0, 0.5)
    )
    expected = logged(without, "loss")[0] + 0.5 * logged(with_loss, "aux_loss")[0]
    assert logged(with_loss, "loss")[0] == pytest.approx(expected, rel=1e-5)


def test_no_token_reaches_a_file(tiny, sft_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789secret")
    monkeypatch.chdir(tmp_path)
    wandb = {"wandb_project": "p", "wandb_run_group": "g", "wandb_entity": "e"}
    trackers = {"report_to": ["wandb", "tensorboard", "trackio"], "project": "p", **wandb}
    train_saved(tiny, sft_rows, tmp_path / "o", max_steps=2, **trackers)
    folders = (tmp_path, Path(os.environ["TRACKIO_DIR"]))
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert any("offline-run" in str(path) for path in files)
    assert any(path.suffix == ".db" for path in files)
    assert not any(b"secret" in path.read_bytes() for path in files)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a property of glibc")
def test_what_a_step_frees_is_there_for_the_next_without_page_faults():
    code = """
import resource, torch, tunebook.training.run
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
returned = faults(), faults()
tunebook.training.run.keep_freed_memory()
# glibc may keep the few bytes that pad an aligned block out of its neighbours, some 10 times until its cache is full
kept = [faults() for _ in range(60)][-10:]
print(min(returned), max(kept))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.splitlines()[-1].split())
    assert returned > 100 * max(kept, 1)


def test_an_evaluation_changes_nothing_in_4_bits(tiny, sft_rows, tmp_path):
    """bitsandbytes evaluates in a layout whose products have no gradients, on a CPU with bf16 instructions."""
    keys = {"use_peft": True, "lora_dropout": 0.0, "load_in_4bit": True, "test_split_size": 8, "max_steps": 4}
    for name, evaluation in {"with": {"eval_strategy": "steps", "eval_steps": 1}, "without": {"do_eval": True}}.items():
        train("sft", tiny, sft_rows, tmp_path / name, **keys, **evaluation)
    assert_same_weights(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_quantized_model_with_a_trained_head_generates_in_bf16(bits, task, tiny, task_rows, tmp_path):
    """The head is bf16 and what it reads float32, outside of autocast (huggingface/peft#1515)."""
    keys = {"use_peft": True, bits: True, "bf16": True, "lora_modules_to_save": ["lm_head"], "new_tokens": ["<t>"]}
    keys |= {"eval_strategy": "steps", "eval_steps": 1, "test_split_size": 8, "max_steps": 1}
    prompts = {"eval_prompts": ["what is 2 plus 3?"], "eval_generation_kwargs": {"max_new_tokens": 4}}
    train(task, tiny, task_rows, tmp_path / "o", **keys, **prompts)
    assert (tmp_path / "o" / "generations.jsonl").read_text().count("\n") == 1
