"""Compare Muon with AdamW: the loss on held-out rows after a short fine-tuning, at four learning rates each.

python perf/muon.py --gsm8k DATA   train 8 times on the CPU, write perf/results/muon-gsm8k.json, print the table

Only the top 6 layers are trained, so nearly all trained parameters belong to one optimizer. The AdamW half of Muon, the
norms, keeps one learning rate. Muon's learning rates are multiples of 0.2 sqrt(hidden_size), the factor in the default
of `muon_learning_rate`. The best learning rate of each side is neither its first nor its last. A run that perf/results
holds with the same settings is not repeated.
"""

import argparse
import json
import math
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from tunebook.recipe import parse
from tunebook.scripts import sft

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf/results/muon-gsm8k.json"
ADAMW = (1e-4, 3e-4, 1e-3, 3e-3)
MUON = (3e-4, 1e-3, 3e-3, 1e-2)  # multiples of the factor
NORMS = 3e-4
RECIPE = {
    "prompt_column": "question",
    "completion_column": "answer",
    "num_layers_unfrozen": 6,
    "max_length": 512,
    "packing": True,
    "activation_checkpointing": False,
    "bf16": True,
    "per_device_train_batch_size": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "do_eval": True,
    "per_device_eval_batch_size": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "resume_from_checkpoint": "never",
    "seed": 42,
}


def train(recipe: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe and return its loss per token on the held-out rows and on each batch."""
    with tempfile.TemporaryDirectory() as folder:
        history = sft.main(parse("sft", {**recipe, "output_dir": folder})).state.log_history
    return {
        "eval_loss": [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1],
        "losses": [entry["loss"] for entry in history if "loss" in entry],
    }


def show(results: dict[str, Any]) -> Table:
    table = Table("optimizer", "learning_rate", "muon_learning_rate", "loss on held-out rows")
    for run in results["runs"]:
        given = run["given"]
        muon = given.get("muon_learning_rate")
        loss = f"{run['eval_loss']:.4f}"
        best = min(other["eval_loss"] for other in results["runs"] if other["given"]["optim"] == given["optim"])
        table.add_row(
            "Muon" if muon else "AdamW",
            f"{given['learning_rate']:g}",
            f"{muon:.3g}" if muon else "",
            f"[bold]{loss}" if run["eval_loss"] == best else loss,
        )
    return table


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--eval-rows", type=int, default=32)
    arguments = parser.parse_args(argv)
    recipe = RECIPE | {
        "model_name_or_path": arguments.model,
        "dataset_name": str(arguments.gsm8k / "train.jsonl"),
        "eval_dataset_name": str(arguments.gsm8k / "test.jsonl"),
        "max_steps": arguments.steps,
        "max_train_samples": 8 * arguments.steps,
        "max_eval_samples": arguments.eval_rows,
    }
    factor = 0.2 * math.sqrt(AutoConfig.from_pretrained(arguments.model).hidden_size)
    sweep: list[dict[str, Any]] = [{"optim": "adamw_torch_fused", "learning_rate": rate} for rate in ADAMW]
    sweep += [{"optim": "muon", "learning_rate": NORMS, "muon_learning_rate": factor * rate} for rate in MUON]
    results = {
        "steps": arguments.steps,
        "eval_rows": arguments.eval_rows,
        "packages": {name: version(name) for name in ("torch", "transformers", "trl")},
        "runs": [],
    }
    if RESULTS.exists() and (before := json.loads(RESULTS.read_text())) | {"runs": []} == results:
        results = before
    for given in sweep[len(results["runs"]) :]:
        results["runs"].append({"given": given, **train({**recipe, **given})})
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(show(results))


if __name__ == "__main__":
    main(sys.argv[1:])
