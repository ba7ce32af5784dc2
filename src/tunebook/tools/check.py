"""Check a recipe before a run: what becomes of its rows, how long it is, and whether it fits, without weights or GPU.

The rows are read and tokenized exactly as for training (a sample of them, where there are many); the model is its
config. What is measured here is put into words by check.jinja, warnings included.
"""

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from datasets import Dataset
from jinja2 import Template
from rich.console import Console
from rich.table import Table
from transformers.trainer_utils import SaveStrategy

from ..data.audit import remedy
from ..data.loading import NothingToTrain, load_recipe_data, trains_throughout
from ..data.tokenizer import CHATML, end_of_turn_ids
from ..environment import Sharding, fsdp_sharding, launched_sharding, unsharded, zero_sharding
from ..errors import RecipeError, user_errors
from ..files import find_config, read_yaml, terminal
from ..following import validate_callbacks
from ..following.pairs import count_wins
from ..recipe import Recipe
from ..recipe.configs import accumulation_steps, count_groups
from ..training.models import check_model
from ..training.refusals import refuse, refuse_few_rows, refuse_new_tokens
from ..training.run import set_up_logging
from .lengths import form_batches, measure_rows
from .memory import estimate
from .score import load_scorer, score_ids
from .workload import Workload

SAMPLE = 3000  # rows that are tokenized without --full
PAIRS = 200  # pairs that a reward model compares
PAGE = Path(__file__).with_name("check.jinja")
MEBIBYTES = Path(__file__).with_name("devices.yaml")
DEVICES = {name: 2**20 * size for name, size in read_yaml(MEBIBYTES.read_text(), MEBIBYTES.name).items()}  # bytes
# Learning rates that trained something: of whole weights; an adapter takes ten times as much (https://thinkingmachines.ai/blog/lora)
LEARNING_RATES = {"sft": (5e-7, 1e-3), "rm": (5e-7, 1e-3), "dpo": (1e-8, 1e-4)}


def find_device(name: str | None) -> tuple[str, str, float]:
    """Return kind (cuda or cpu), name and bytes of a device: by its name, else the GPU here, else this machine's CPU.

    Raises:
        RecipeError: for a name that is not in devices.yaml and does not end in -<N>gb.
    """
    if name is None and torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    if name in (None, "cpu"):
        return "cpu", "this machine's CPU", psutil.virtual_memory().total
    if name in DEVICES:
        return "cuda", name, DEVICES[name]
    if match := re.fullmatch(r".*-(\d+)gb", name):
        return "cuda", name, int(match[1]) * 1e9
    raise RecipeError(f"--device {name}: not a known device. Name cpu, {', '.join(DEVICES)}, or NAME-<N>gb.")


def read_sharding(config: str | None, processes: int | None) -> Sharding:
    """Return the sharding of an accelerate config: a file, or a name in configs/accelerate.

    Raises:
        RecipeError: when there is no such file.
    """
    if config is None:
        return unsharded(processes or 1)
    path = find_config(config)
    values = read_yaml(path.read_text(encoding="utf-8"), str(path))
    count = processes or values.get("num_processes", 1)
    if deepspeed := values.get("deepspeed_config"):
        if name := deepspeed.get("deepspeed_config_file"):
            with user_errors(OSError):
                zero = read_yaml(Path(name).read_text(encoding="utf-8"), name)["zero_optimization"]
        else:
            zero = {f"offload_{w}": {"device": deepspeed.get(f"offload_{w}_device")} for w in ("optimizer", "param")}
            zero["stage"] = deepspeed["zero_stage"]
        return zero_sharding(zero, count)
    if fsdp := values.get("fsdp_config"):
        return fsdp_sharding(bool(fsdp.get("fsdp_offload_params")), count)
    return unsharded(count)


def judge_pairs(train: Dataset, reward_model: str, seed: int) -> tuple[float, int]:
    """Return the number of pairs whose chosen side gets the higher reward, ties counted half, and that of all pairs."""
    model, _ = load_scorer(reward_model)
    pairs = train.shuffle(seed=seed).select(range(min(PAIRS, len(train))))
    chosen, rejected = (
        score_ids(model, [pair.get("prompt_ids", []) + pair[side] for pair in pairs])
        for side in ("chosen_ids", "rejected_ids")
    )
    return float(count_wins(chosen, rejected).sum()), len(pairs)


def wilson(wins: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share (Wilson 1927, doi:10.2307/2276774)."""
    middle, spread = wins + z**2 / 2, z * math.sqrt(wins * (count - wins) / count + z**2 / 4)
    return (middle - spread) / (count + z**2), (middle + spread) / (count + z**2)


@dataclass(frozen=True)
class Schedule:
    """The steps of a run."""

    groups: int  # devices, or groups of them that share a batch
    accumulated: int  # batches of each group in a step
    per_epoch: int
    steps: int
    warmup: int


def plan_schedule(recipe: Recipe, batches: float, processes: int) -> Schedule:
    """Plan the steps for a number of batches per epoch, over all devices.

    Raises:
        RecipeError: when the processes do not divide into groups, or the global batch does not over them.
    """
    args = recipe.training
    with user_errors():
        groups = count_groups(processes, args.context_parallel_size)
        accumulated = accumulation_steps(
            args.global_batch_size, args.per_device_train_batch_size, groups, args.gradient_accumulation_steps
        )
    per_epoch = max(1, math.ceil(math.ceil(batches / groups) / accumulated))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Schedule(groups, accumulated, per_epoch, steps, args.get_warmup_steps(steps))


@dataclass(frozen=True)
class Disk:
    """What a run writes, in bytes."""

    count: int  # checkpoints
    kept: int  # of them at a time
    checkpoint: float
    needed: float  # with the model
    free: float
    folder: Path


def plan_disk(recipe: Recipe, workload: Workload, steps: int) -> Disk:
    """Plan the checkpoints and the model. What is pushed to the Hub is linked, and takes nothing more."""
    args, count_parameters = recipe.training, workload.model.num_parameters
    model = workload.stored_size * count_parameters(only_trainable=recipe.model.use_peft)
    checkpoint = model
    if not args.save_only_model:
        checkpoint += workload.state_size * count_parameters(only_trainable=True)
        if workload.sharding.engine == "fsdp":
            checkpoint += model  # once more, for the run to resume from
    strategy = SaveStrategy(args.save_strategy).value
    every = {"steps": args.save_steps, "epoch": steps / args.num_train_epochs}.get(strategy, math.inf)
    count = math.ceil(steps / (math.ceil(every * steps) if every < 1 else every))
    # The oldest go when the new one is whole
    kept = count if args.save_total_limit is None else min(count, args.save_total_limit + 1)
    limit = math.inf if args.save_total_gb is None else args.save_total_gb * 1e9 + checkpoint
    output_dir = Path(args.output_dir).absolute()
    folder = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    needed = min(kept * checkpoint, limit) + model
    return Disk(count, kept, checkpoint, needed, shutil.disk_usage(folder).free, folder)


def check(
    recipe: Recipe,
    device: str | None = None,
    sharding: Sharding | None = None,
    full: bool = False,
    reward_model: str | None = None,
) -> int:
    """Print what a run would do, and what is wrong with it. Nothing is written but the cache of tokens.

    Args:
        device: see [`find_device`].
        sharding: default: that of this process.
        full: tokenize all rows, not a sample.
        reward_model: folder of a model that judges chosen against rejected.

    Returns:
        1 when the run would not fit or have nothing to train on, else 0.

    Raises:
        RecipeError: for a recipe that would not start.
    """
    args, model_args = recipe.training, recipe.model
    kind, device, capacity = find_device(device)
    sharding = sharding or launched_sharding(args)
    set_up_logging(args)
    console = Console(quiet=not PartialState().is_main_process)
    with user_errors():
        validate_callbacks(args, resumes=True)  # what the Hub has is asked when a run starts
    config = check_model(model_args.model_name_or_path, model_args.model_revision, args.trust_remote_code)
    refuse(recipe, config, has_accelerator=kind == "cuda")
    try:
        tokenizer, data = load_recipe_data(recipe, sample=None if full else SAMPLE)
    except NothingToTrain as error:
        console.print(f"[red]{terminal(str(error))}")
        return 1
    refuse_new_tokens(recipe, tokenizer)
    refuse_few_rows(recipe, len(data.train) / data.share)
    text_config = config.get_text_config()
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    ends = end_of_turn_ids(tokenizer, None)
    lengths = measure_rows(recipe.task, data.train, ends, args.max_length)
    batches = form_batches(recipe, data.train, lengths)
    schedule = plan_schedule(recipe, batches.count / data.share, sharding.processes)
    workload = Workload.from_recipe(recipe, config, batches.largest, sharding, kind, schedule.accumulated > 1)
    disk, parts = plan_disk(recipe, workload, schedule.steps), estimate(workload)
    needed = sum(part.bytes for part in parts)
    page = {
        **{"recipe": recipe, "data": data, "lengths": lengths, "batches": batches, "schedule": schedule, "disk": disk},
        "has_default_template": tokenizer.chat_template == CHATML,
        "ends": ", ".join(tokenizer.convert_ids_to_tokens(ends)),
        "trained_throughout": any(trains_throughout(settings) for _, settings in data.sources),
        "remedy": remedy,
        "judge": reward_model,
        "judged": judge_pairs(data.train, reward_model, args.seed) if reward_model and recipe.task != "sft" else None,
        "wilson": wilson,
        "rates": [rate * (10 if model_args.use_peft else 1) for rate in LEARNING_RATES[recipe.task]],
        **{"sharding": sharding, "device": device, "capacity": capacity, "needed": needed},
        "parts": {part.name: part for part in parts},
    }
    template = Template(PAGE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    show(template.render(page), console)
    return 0 if needed <= capacity and disk.needed <= disk.free else 1


def show(page: str, console: Console) -> None:
    """Print a rendered check.jinja: each section as a table, then the warnings."""
    *sections, warnings = page.split("## ")[1:]
    for section in sections:
        title, *facts = section.strip().splitlines()
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
        for fact in facts:
            table.add_row(*map(terminal, fact.split(" | ", 1)))
        console.print(table, "")
    for warning in warnings.split("\n- ")[1:]:
        console.print(f"[yellow]warning:[/] {terminal(' '.join(warning.split()))}", soft_wrap=True)
    if "\n- " not in warnings:
        console.print("[green]No warnings.")
