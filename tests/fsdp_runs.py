"""Runs under FSDP2 or DDP in one launch, without a GPU: `accelerate launch --config_file configs/accelerate/fsdp2.yaml
--num_processes 2 tests/fsdp_runs.py '[["fsdp", "sft", {"learning_rate": 1e-3, ...}], ["ddp", ...], ...]'`.

FSDP2 runs on a CPU with gloo, once two answers are other than for users: accelerate gives FSDP to GPU types only, and
tunebook refuses it on a CPU for that reason. Plugin, wrapping, state dicts and clipping are accelerate's and torch's.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, trainer

import tunebook.recipe.configs
import tunebook.training.run
from tunebook import run_script

start = AcceleratorState.__init__


def start_on_cpu(self, *args, **kwargs):
    """Tell accelerate, where it asks whether FSDP is wanted, that the processes' type is one of GPUs."""
    shared = PartialState._shared_state
    if os.environ["ACCELERATE_USE_FSDP"] == "true" and shared["distributed_type"] == DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_GPU
    start(self, *args, **kwargs)


class WholeGradients(TrainerCallback):
    """Counts the elements of gradients that a process keeps whole between the micro-batches of a step."""

    most = 0

    def on_substep_end(self, args, state, control, model, **kwargs):
        units = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
        parameters = [p for unit in units if unit is not None for p in unit.fsdp_params]
        grads = [grad for p in parameters for grad in (p.unsharded_accumulated_grad, p.unsharded_param.grad)]
        WholeGradients.most = max(WholeGradients.most, sum(g.numel() for g in grads if g is not None))


def count_units(model: torch.nn.Module) -> int:
    return sum(isinstance(module, FSDPModule) for module in model.modules())


def facts(run) -> dict[str, object]:
    """What shows that a run was FSDP2's, and how its models are sharded."""
    reference = vars(run).get("ref_model")
    return {
        "type": run.accelerator.distributed_type.value,
        "sharded": all(isinstance(p, DTensor) for p in run.model.parameters()),
        "units": count_units(run.model),
        "reference_units": None if reference is None else count_units(reference),
        "whole_gradients": WholeGradients.most,
    }


AcceleratorState.__init__ = start_on_cpu
os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # accelerate's default, which a user's config may have
trainer.DEFAULT_CALLBACKS.append(WholeGradients)
Accelerator.end_training = lambda self: None  # would end the processes' group after the first run
tunebook.recipe.configs.check_fsdp_device = lambda: None
tunebook.training.run.report_run = lambda *args: None  # its figures take two thirds of the time
gc.freeze()  # accelerate collects garbage after each run, a quarter of the time
for engine, task, keys in json.loads(sys.argv[1]):
    os.environ["ACCELERATE_USE_FSDP"] = "true" if engine == "fsdp" else "false"
    WholeGradients.most = 0
    try:
        result = facts(run_script(task, keys))
    except Exception:  # noqa: BLE001 - only the test of this run fails
        result = {"error": traceback.format_exc()}
    if PartialState().is_main_process:
        Path(keys["output_dir"]).mkdir(parents=True, exist_ok=True)
        Path(keys["output_dir"], "facts.json").write_text(json.dumps(result))
PartialState().destroy_process_group()
