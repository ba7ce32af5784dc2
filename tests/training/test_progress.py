"""The line that one sees while it trains, tokens per second, and model FLOPs against PyTorch's own count."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model, logged, train
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from tunebook.training import progress
from tunebook.training.models import freeze_layers
from tunebook.training.progress import ThroughputMixin, model_flops, peak_flops, token_lengths


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


EVALUATED = {"max_steps": 4, "logging_steps": 2, "disable_tqdm": None, "test_split_size": 8}
EVALUATED |= {"eval_strategy": "steps", "eval_steps": 4}
SAVED = EVALUATED | {"save_strategy": "steps", "save_steps": 3}


def test_without_a_terminal_each_logging_step_and_evaluation_is_one_plain_line(
    tiny, sft_rows, tmp_path, caplog, capsys
):
    trainer = train("sft", tiny, sft_rows, tmp_path / "o", **SAVED)
    lines = [record.message for record in caplog.records if record.name == "tunebook.training.progress"]
    patterns = [
        r"Training starts: 4 steps, ([\d,]+) of \1 parameters\.",
        r"step 2/4  loss \S+  [\d,]+ tokens/s  \d\d:\d\d left  checkpoint at 3",
        r"step 4/4  loss \S+  [\d,]+ tokens/s  00:00 left  checkpoint at 4",
        r"step 4/4  evaluation: loss \S+, .*mean_token_accuracy \S+",
    ]
    assert [bool(re.fullmatch(*pair)) for pair in zip(patterns, lines, strict=True)] == [True] * 4
    loss, speed = (logged(trainer, name)[0] for name in ("loss", "tokens_per_second"))
    assert f"loss {loss:.4g}  {speed:,.0f} tokens/s" in lines[1]
    assert "{'loss'" not in "".join(capsys.readouterr())


def test_a_run_shorter_than_logging_steps_logs_its_loss(tiny, sft_rows, tmp_path, caplog):
    trainer = train("sft", tiny, sft_rows, tmp_path / "o", max_steps=3, logging_steps=10)
    assert len(logged(trainer, "loss")) == 1 and "step 3/3  loss" in caplog.text


def test_on_a_terminal_the_line_is_live(tiny, sft_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    trainer = train("sft", tiny, sft_rows, tmp_path / "o", **EVALUATED | {"save_strategy": "epoch"})
    shown = [part for part in re.split(r"[\r\n]", terminal.getvalue()) if part.startswith("4/4")]
    for part in (f"loss {logged(trainer, 'loss')[-1]:.4g}", "checkpoint after epoch 1", "left"):
        assert part in shown[-1]
    assert "step 4/4  evaluation: loss" in terminal.getvalue()


def test_disable_tqdm_gives_plain_lines_on_a_terminal_too(tiny, sft_rows, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    train("sft", tiny, sft_rows, tmp_path / "o", **SAVED | {"disable_tqdm": True})
    assert "step 4/4  loss" in caplog.text and not re.search(r"\d/4 .* left", terminal.getvalue())


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Steps:
    """What the mixin needs of a trainer: steps of 2 s and 100 tokens, evaluations of 50 s, saves of 7 s."""

    def __init__(self, clock: Clock):
        self.clock, self.logged, self._total_train_tokens = clock, [], 0
        self.args = SimpleNamespace(world_size=2)

    def training_step(self):
        self.clock.now += 2
        self._total_train_tokens += 100

    def count_tokens(self):
        return self._total_train_tokens

    def evaluate(self):
        self.clock.now += 50

    def _save_checkpoint(self):
        self.clock.now += 7

    def log(self, logs):
        self.logged.append(logs)


class MeasuredSteps(ThroughputMixin, Steps):
    flops_per_token = None


def test_the_speed_is_of_training_alone(monkeypatch):
    monkeypatch.setattr(progress, "time", clock := Clock())
    trainer = MeasuredSteps(clock)
    trainer.evaluate()
    for _ in range(3):
        trainer.training_step()
        trainer.training_step()
        trainer.log({"loss": 1.0})
        trainer.evaluate()
        trainer._save_checkpoint()
        trainer.log({"eval_loss": 1.0})
    assert [logs["tokens_per_second"] for logs in trainer.logged[::2]] == [50.0] * 3
    assert "tokens_per_second" not in trainer.logged[1]


def test_mfu_is_the_flops_a_second_over_the_peak_of_all_devices(monkeypatch):
    monkeypatch.setattr(progress, "time", clock := Clock())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    trainer = MeasuredSteps(clock)
    trainer.flops_per_token = 1e12
    trainer.training_step()
    trainer.log({"loss": 1.0})
    assert trainer.logged[0]["mfu"] == pytest.approx(50 * 1e12 / (2 * 989e12))


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_the_peak_is_found_by_the_device_name(monkeypatch, device, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert peak_flops() == peak


def test_an_unknown_device_has_no_mfu_and_is_logged_once(tiny, sft_rows, tmp_path, monkeypatch, caplog):
    trainer = train("sft", tiny, sft_rows, tmp_path / "o", max_steps=1)
    assert not logged(trainer, "mfu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus 3000")
    vars(trainer).pop("flops_per_token", None)
    assert trainer.flops_per_token is trainer.flops_per_token is None
    assert caplog.text.count("No MFU: the peak of Abacus 3000 is not known.") == 1


WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "attn_implementation": "eager"}


def count_flops(model, tokens: int, reference=None) -> float:
    """PyTorch's count of a training step, by token. `attn_implementation: eager`, so that attention is matmuls."""
    ids = torch.arange(tokens)[None] % 300
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
        if reference is not None:
            with torch.no_grad():
                reference(input_ids=ids)
    return counter.get_total_flops() / tokens


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [16, 256])
def test_model_flops_of_full_training_are_those_that_pytorch_counts(tied, tokens):
    model = build_model(320, tie_word_embeddings=tied, **WIDE)
    assert model_flops(model, tokens) == pytest.approx(count_flops(model, tokens), rel=0.01)


def test_model_flops_of_dpo_have_the_reference_on_top():
    model, reference = build_model(320, **WIDE), build_model(320, **WIDE)
    assert model_flops(model, 64, reference_passes=1) == pytest.approx(count_flops(model, 64, reference), rel=0.01)


def test_model_flops_of_lora_leave_out_the_gradients_of_frozen_weights():
    """The inputs of the first layer need no gradient under LoRA; that part of 1/8 is not modelled."""
    model = get_peft_model(build_model(320, **WIDE), LoraConfig(task_type="CAUSAL_LM", r=4))
    assert model_flops(model, 64) == pytest.approx(count_flops(model, 64), rel=0.05)


def test_model_flops_of_the_top_layers_leave_out_the_gradients_below():
    model = build_model(320, **WIDE)
    freeze_layers(model, 2)
    assert model_flops(model, 64) == pytest.approx(count_flops(model, 64), rel=0.02)


def test_lengths_weigh_rows_by_their_tokens():
    rows = Dataset.from_dict({"input_ids": [[1] * 2, [1] * 6]})
    assert token_lengths(rows, None, shares_prefix=False) == (5.0, 1.0)  # 2 tokens see 2, 6 tokens see 6
    packed = Dataset.from_dict({"input_ids": [[1] * 8], "seq_lengths": [[2, 6]]})
    assert token_lengths(packed, None, shares_prefix=False) == (5.0, 1.0)


def test_a_shared_prefix_is_run_once():
    pairs = Dataset.from_dict({"chosen_ids": [[1, 2, 3, 4]], "rejected_ids": [[1, 2, 5, 6]]})
    assert token_lengths(pairs, None, shares_prefix=True) == (4.0, 1 - 2 / 8)
    assert token_lengths(pairs, None, shares_prefix=False) == (4.0, 1.0)
