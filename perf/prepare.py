"""Time TRL and tunebook from a file to tokenized rows, and the tokenizer alone, in turn and without a cache.

Writes the seconds to OUT as JSON.

python perf/prepare.py OUT MODEL FILES ROUNDS     FILES: the rows of each task, as JSON
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import datasets
import trl
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tunebook.data import load_data, load_recipe_tokenizer, read_sources
from tunebook.recipe import parse

TRL = {
    "sft": (trl.SFTConfig, trl.SFTTrainer),
    "rm": (trl.RewardConfig, trl.RewardTrainer),
    "dpo": (trl.DPOConfig, trl.DPOTrainer),
}


def prepare_with_trl(task: str, model: str, rows: str, split: str, output_dir: str) -> float:
    """Return the seconds of load_dataset, as in TRL's scripts, and of the trainer's `_prepare_dataset`."""
    config, trainer = TRL[task]
    tokenizer = AutoTokenizer.from_pretrained(model)
    # The trainer's constructor prepares the rows and needs a model: the smallest
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(output_dir)
    preparing = 0.0

    class TimedTrainer(trainer):
        def _prepare_dataset(self, *args, **kwargs):
            nonlocal preparing
            start = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            preparing = time.perf_counter() - start
            return prepared

    start = time.perf_counter()
    dataset = datasets.load_dataset("json", data_files=rows, split=split)
    loading = time.perf_counter() - start
    args = config(output_dir=output_dir, bf16=False, use_cpu=True, report_to="none")
    TimedTrainer(output_dir, args=args, train_dataset=dataset, processing_class=tokenizer)
    return loading + preparing


def prepare_with_tunebook(task: str, model: str, rows: str, split: str, output_dir: str) -> float:
    recipe = {"model_name_or_path": model, "dataset_name": rows, "dataset_train_split": split}
    recipe = parse(task, {**recipe, "output_dir": output_dir, "use_cpu": True})
    tokenizer = load_recipe_tokenizer(recipe)
    start = time.perf_counter()
    load_data(recipe, read_sources(recipe), tokenizer)
    return time.perf_counter() - start


def tokenize(task: str, model: str, rows: str, split: str, output_dir: str) -> float:
    """Return the seconds of what both sides need: `tokenizers`, on all cores, with the same texts."""
    lines = datasets.load_dataset("json", data_files=rows, split=split)
    answers = ("completion",) if task == "sft" else ("chosen", "rejected")
    texts = [row["prompt"] + row[answer] for row in lines for answer in answers]
    tokenizer = AutoTokenizer.from_pretrained(model).backend_tokenizer
    start = time.perf_counter()
    tokenizer.encode_batch(texts)
    return time.perf_counter() - start


def prepare(model: str, files: dict[str, str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return task -> side -> the seconds of each round."""
    datasets.disable_progress_bars()
    sides = {"trl": prepare_with_trl, "tunebook": prepare_with_tunebook, "tokenizer": tokenize}
    seconds = {task: {name: [] for name in sides} for task in files}
    for split in ["train[:16]"] + ["train"] * rounds:  # the first round, of 16 rows, also imports and starts things
        for task, rows in files.items():
            for name, side in sides.items():
                with tempfile.TemporaryDirectory() as folder, patch("datasets.config.HF_DATASETS_CACHE", Path(folder)):
                    seconds[task][name].append(side(task, model, rows, split, folder))
    return {task: {name: taken[1:] for name, taken in of_task.items()} for task, of_task in seconds.items()}


if __name__ == "__main__":
    out, model, files, rounds = sys.argv[1:]
    Path(out).write_text(json.dumps(prepare(model, json.loads(files), int(rounds))))
