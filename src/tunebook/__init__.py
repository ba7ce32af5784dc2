"""tunebook: recipes for supervised fine-tuning, reward models and DPO on TRL.

From Python, with the recipe's keys as arguments: `from tunebook import dpo; dpo(model_name_or_path=..., beta=0.2)`.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# bitsandbytes 0.50 says at every import, on a CPU with bf16 instructions, that it lacks a kernel for 4-bit inference
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def run_script(task: str, keys: dict[str, Any]):
    from .recipe import parse

    here = Path(__file__).parent
    path = here.parent / f"{task}.py"  # a checkout; an installed package carries the scripts inside
    spec = importlib.util.spec_from_file_location(task, path if path.exists() else here / "scripts" / f"{task}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main(parse(task, keys))


def sft(**keys):
    """The run of src/sft.py; returns the trainer. Raises RecipeError (a ValueError) for keys that it would refuse."""
    return run_script("sft", keys)


def rm(**keys):
    """The run of src/rm.py; see [`sft`]."""
    return run_script("rm", keys)


def dpo(**keys):
    """The run of src/dpo.py; see [`sft`]."""
    return run_script("dpo", keys)
