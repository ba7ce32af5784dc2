"""Speed, memory and start of tunebook's scripts against TRL's own, side by side, on the CPU in float32.

python perf/compare.py                      everything; writes perf/results/<machine>.json and .png, docs/performance.md
python perf/compare.py --only rm-gsm8k      one case; writes nothing
python perf/compare.py --docs               only write the tables of docs/performance.md again from perf/results

Each case trains the same model on the same rows with the same batch, in one process a side, in turn: TRL, tunebook,
TRL, tunebook. TRL runs at its defaults, which recompute activations in the backward pass; once without that.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import rows
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tunebook.quickstart import materialize

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf/results"
DOCS = ROOT / "docs/performance.md"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
TRL_SCRIPTS = {"sft": "trl.scripts.sft", "rm": "trl.scripts.reward", "dpo": "trl.scripts.dpo"}


@dataclass(frozen=True)
class Case:
    name: str
    task: str
    model: str
    rows: str  # a function of rows.py
    batch: int
    steps: int  # timed; one more comes before them


CASES = (
    Case("sft-gsm8k", "sft", "SmolLM2-135M", "gsm8k", 8, 3),
    Case("sft-gsm8k-16", "sft", "SmolLM2-135M", "gsm8k", 16, 2),
    Case("rm-gsm8k", "rm", "SmolLM2-135M", "gsm8k_preferences", 8, 2),
    Case("dpo-gsm8k", "dpo", "SmolLM2-135M", "gsm8k_preferences", 8, 2),
    Case("sft-long-tail", "sft", "10M", "long_tail", 8, 6),
    Case("rm-shared-prompts", "rm", "10M", "shared_prompts", 8, 4),
    Case("dpo-shared-prompts", "dpo", "10M", "shared_prompts", 8, 4),
)
LENGTHS, BATCHES = (256, 512, 1024, 2048, 4096), (1, 2, 4, 8)  # of scaling; a batch's rows have 512 tokens
PREPARED_ROWS = 2000


@dataclass(frozen=True)
class Size:
    """Of a model: parameters in products with every token, in the LM head, and width of all attention layers."""

    body: int
    head: int
    attention: int


# ---- Measuring -----------------------------------------------------------------------------------------------------


class Bench:
    """Runs everything in processes of its own, in a folder that is thrown away."""

    def __init__(self, folder: Path, models: dict[str, Path], gsm8k: Path | None, rounds: int, quick: bool):
        self.folder, self.models, self.gsm8k, self.rounds, self.quick = folder, models, gsm8k, rounds, quick
        self.runs = 0

    def new_folder(self) -> Path:
        self.runs += 1
        return self.folder / str(self.runs)

    def run(self, script: str, *arguments: str | Path) -> Any:
        """What perf/`script` writes down. The data caches are empty; the number of threads is the environment's."""
        out = self.new_folder().with_suffix(".json")
        env = {**os.environ, "HF_DATASETS_CACHE": str(self.new_folder()), "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
        before, after = arguments[:1] if script == "measure.py" else (), arguments[script == "measure.py" :]
        command = [sys.executable, str(ROOT / "perf" / script), *before, out, *after]
        process = subprocess.run(list(map(str, command)), env=env, cwd=ROOT, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"{shlex.join(map(str, command))} failed:\n{process.stderr[-4000:]}")
        return json.loads(out.read_text())
