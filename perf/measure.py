"""What one side of the comparison does in a process of its own, and writes down in OUT as JSON.

python perf/measure.py train OUT SCRIPT ARGUMENTS...
python perf/measure.py scale OUT SCRIPT RECIPE...
python perf/measure.py prepare OUT TASK MODEL ROWS ROUNDS
"""

import contextlib
import json
import resource
import runpy
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import datasets
import psutil
import torch
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from tunebook.data import load_data
from tunebook.models import load_tokenizer
from tunebook.packing import pack_rows
from tunebook.recipe import parse

RSS_UNIT = 1024 if sys.platform == "linux" else 1  # bytes; getrusage(2) of macOS counts in bytes


class Trained(Exception):
    """The last step is done: what a script does after it (saving, the card) is not measured."""


class Recorder(TrainerCallback):
    """Times and batches of the steps of whatever trainer is built while it is in place."""

    def __init__(self):
        self.times: list[float] = []  # the first step's start, and every step's end
        self.batches: list[dict[str, torch.Tensor]] = []
        self.seconds_to_first_step = self.peak_memory = 0.0

    def on_step_begin(self, *args, **kwargs):
        if not self.times:
            self.seconds_to_first_step = time.time() - psutil.Process().create_time()
            self.times.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())

    def on_train_end(self, *args, **kwargs):
        self.peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
        raise Trained

    def __enter__(self):
        training_step = Trainer.training_step

        def recorded(trainer, model, inputs, *args, **kwargs):
            self.batches.append(dict(inputs))
            return training_step(trainer, model, inputs, *args, **kwargs)

        self.patches = contextlib.ExitStack()
        self.patches.enter_context(patch.object(Trainer, "training_step", recorded))
        callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, self]
        self.patches.enter_context(patch.object(transformers.trainer, "DEFAULT_CALLBACKS", callbacks))
        return self

    def __exit__(self, exception, *args) -> bool:
        self.patches.close()
        return exception is Trained

    def result(self) -> dict:
        ends = zip(self.times[1:], self.times[:-1], self.batches, strict=True)
        return {
            "seconds_to_first_step": self.seconds_to_first_step,
            "peak_memory": self.peak_memory,
            "steps": [{"seconds": end - start, **describe(batch)} for end, start, batch in ends],
        }


def describe(batch: dict[str, torch.Tensor]) -> dict:
    """Of a batch: how many places it has with its padding, tokens of each row or document, tokens of each second row
    of a pair that the first has too, and positions that the LM head must score."""
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(dim=1)
    else:
        lengths = batch["cu_seq_lens_q"].diff()
    shared = torch.zeros_like(lengths)
    if "labels" in batch:
        scored = batch["labels"][:, 1:] != -100
    else:
        packed, _ = pack_rows(ids, batch["attention_mask"], share_prefix=True)
        shared = lengths - packed["cu_seq_lens_q"].diff()
        scored = batch.get("completion_mask", torch.zeros(1))
    return {
        "padded": ids.numel(),
        "lengths": lengths.tolist(),
        "shared": shared.tolist(),
        "scored": int(scored.sum()),
    }


def train(script: str, *arguments: str) -> dict:
    """Run a script as from the command line: a file, or a module's name."""
    with Recorder() as recorder, patch.object(sys, "argv", [script, *arguments]):
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    return recorder.result()


def scale(script: str, *recipes: str) -> list[dict]:
    return [train(script, "--config", recipe) for recipe in recipes]


def prepare(task: str, model: str, rows: str, rounds: str) -> dict[str, list[float]]:
    """Seconds from a file to tokenized rows, without a cache, of each side in turn."""
    datasets.disable_progress_bars()
    sides = {"trl": prepare_trl, "tunebook": prepare_tunebook}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round in range(int(rounds) + 1):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as cache, patch("datasets.config.HF_DATASETS_CACHE", Path(cache)):
                taken = side(task, model, rows, "train" if round else "train[:16]")  # the first time imports
            if round:
                seconds[name].append(taken)
    return seconds


def prepare_trl(task: str, model: str, rows: str, split: str) -> float:
    config, trainer = {
        "sft": (trl.SFTConfig, trl.SFTTrainer),
        "rm": (trl.RewardConfig, trl.RewardTrainer),
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
    }[task]
    taken = 0.0

    class Timed(trainer):
        def _prepare_dataset(self, *args, **kwargs):
            nonlocal taken
            start = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            taken += time.perf_counter() - start
            return prepared

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tiny = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    start = time.perf_counter()
    dataset = datasets.load_dataset("json", data_files=rows, split=split)
    taken += time.perf_counter() - start
    model = LlamaForCausalLM(tiny)
    if task == "rm":
        model = transformers.LlamaForSequenceClassification(tiny)
    with tempfile.TemporaryDirectory() as output_dir:
        args = config(output_dir=output_dir, bf16=False, use_cpu=True, report_to="none")
        Timed(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    return taken


def prepare_tunebook(task: str, model: str, rows: str, split: str) -> float:
    with tempfile.TemporaryDirectory() as output_dir:
        recipe = parse(
            task,
            {
                "model_name_or_path": model,
                "dataset_name": rows,
                "dataset_train_split": split,
                "output_dir": output_dir,
                "use_cpu": True,
            },
        )
        script_args, training_args, model_args = recipe.args
        tokenizer = load_tokenizer(model, "main", False, None, None, None, distinct_pad=task == "rm")
        start = time.perf_counter()
        load_data(task, script_args, training_args, tokenizer)
        return time.perf_counter() - start


if __name__ == "__main__":
    command, out, *arguments = sys.argv[1:]
    result = {"train": train, "scale": scale, "prepare": prepare}[command](*arguments)
    Path(out).write_text(json.dumps(result))
