"""Run a training script in this process and write the time, memory and batches of its steps to OUT as JSON.

python perf/measure.py OUT train SCRIPT ARGUMENTS...
python perf/measure.py OUT scale SCRIPT RECIPE...     run one recipe after the other
"""

import json
import resource
import runpy
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
import transformers
from transformers import Trainer, TrainerCallback

RSS_UNIT = 1024 if sys.platform == "linux" else 1  # bytes per unit of ru_maxrss; macOS counts in bytes


class Trained(Exception):
    """Stops a script after its last step. Saving and the model card are not measured."""


class Recorder(TrainerCallback):
    """Records times and batches of the steps of every trainer that is built inside its `with` block."""

    def __init__(self):
        self.times: list[float] = []  # start of the first step, then the end of every step
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

        callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, self]
        self.patches = ExitStack()
        self.patches.enter_context(patch.object(Trainer, "training_step", recorded))
        self.patches.enter_context(patch.object(transformers.trainer, "DEFAULT_CALLBACKS", callbacks))
        return self

    def __exit__(self, exception, *args) -> bool:
        self.patches.close()
        return exception is Trained

    def result(self) -> dict:
        steps = zip(self.times, self.times[1:], self.batches, strict=False)
        return {
            "seconds_to_first_step": self.seconds_to_first_step,
            "peak_memory": self.peak_memory,
            "steps": [{"seconds": end - start, **describe(batch)} for start, end, batch in steps],
        }


def describe(batch: dict[str, torch.Tensor]) -> dict:
    """Return the size of a batch.

    Returns:
        padded: positions, with the padding.
        lengths: tokens of each row or document.
        shared: tokens of each row that the first row of its pair has too.
        scored: positions that the LM head must score.
    """
    from tunebook.packing.forward import pack_rows  # imported here, because TRL's side starts without it

    if "attention_mask" not in batch:  # packed by TRL's collator
        lengths = batch["cu_seq_lens_q"].diff()
    else:
        lengths = batch["attention_mask"].sum(dim=1)
    if "labels" in batch:
        shared = torch.zeros_like(lengths)
        scored = (batch["labels"][:, 1:] != -100).sum()
    else:
        packed, _ = pack_rows(batch["input_ids"], batch["attention_mask"], share_prefix=True)
        shared = lengths - packed["cu_seq_lens_q"].diff()
        scored = batch["completion_mask"].sum() if "completion_mask" in batch else 0
    return {
        "padded": batch["input_ids"].numel(),
        "lengths": lengths.tolist(),
        "shared": shared.tolist(),
        "scored": int(scored),
    }


def train(script: str, *arguments: str) -> dict:
    """Run a script, given as a file or a module's name, as the command line would."""
    with Recorder() as recorder, patch.object(sys, "argv", [script, *arguments]):
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    return recorder.result()


def scale(script: str, *recipes: str) -> list[dict]:
    return [train(script, "--config", recipe) for recipe in recipes]


if __name__ == "__main__":
    out, command, *arguments = sys.argv[1:]
    result = {"train": train, "scale": scale}[command](*arguments)
    Path(out).write_text(json.dumps(result))
