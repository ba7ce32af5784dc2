"""tunebook: recipes for supervised fine-tuning, reward models and DPO on TRL.

From Python, with the recipe's keys as arguments: `from tunebook import dpo; dpo(model_name_or_path=..., beta=0.2)`.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

__version__ = "0.1.0"

# bitsandbytes 0.50 says at every import, on a CPU with bf16 instructions, that it lacks a kernel for 4-bit inference
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def run_script(task: str, keys: dict[str, Any]) -> "Trainer":
    """Run a task's script, "sft", "rm" or "dpo", on a recipe's keys; return its trainer."""
    from .recipe import parse

    return importlib.import_module(f".scripts.{task}", __name__).main(parse(task, keys))


def sft(**keys: Any) -> "Trainer":  # noqa: ANN401 - a recipe's keys
    """Run src/sft.py; return the trainer. Raises RecipeError (a ValueError) for keys that it would refuse."""
    return run_script("sft", keys)


def rm(**keys: Any) -> "Trainer":  # noqa: ANN401 - a recipe's keys
    """Run src/rm.py; see [`sft`]."""
    return run_script("rm", keys)


def dpo(**keys: Any) -> "Trainer":  # noqa: ANN401 - a recipe's keys
    """Run src/dpo.py; see [`sft`]."""
    return run_script("dpo", keys)
