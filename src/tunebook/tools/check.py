"""Before a run: what becomes of its rows, how long it is, and whether it fits, without loading weights or using a GPU.

The rows are read and tokenized exactly as for training (a sample of them, where there are many); the model is its
config. Every finding that needs a change is one line that says which.
"""

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from trl import get_peft_config
from trl.data_utils import pack_dataset

from ..data.layouts import Dropped, read_messages
from ..data.loading import Data, NothingToTrain, load_recipe_data
from ..data.rendering import Renderer, RenderSettings
from ..data.tokenizer import CHATML, end_of_turn_ids
from ..environment import Sharding, launched_sharding, unsharded, zero_sharding
from ..errors import RecipeError, user_errors
from ..files import read_yaml, shipped
from ..packing.batches import TokenBatchSampler, decides_sharing, list_offsets, pair_lengths
from ..recipe import Recipe
from ..recipe.configs import accumulation_steps, count_groups
from ..training.models import check_model
from ..training.run import set_up_logging
from .memory import Batch, Part, build_model, estimate, optimizer_size

SAMPLE = 3000  # rows that are tokenized, where not all are wanted
PAIRS = 200  # that a reward model compares
MIB = 2**20
DEVICES = {  # name -> bytes that nvidia-smi reports
    "rtx4090-24gb": 24564 * MIB,
    "a100-40gb": 40960 * MIB,
    "l40s-48gb": 46068 * MIB,
    "a100-80gb": 81920 * MIB,
    "h100-80gb": 81559 * MIB,
    "h200-141gb": 143771 * MIB,
    "b200-192gb": 183359 * MIB,
}
# Learning rates that trained something: of whole weights; an adapter takes ten times as much (https://thinkingmachines.ai/blog/lora)
LEARNING_RATES = {"sft": (5e-7, 1e-3), "rm": (5e-7, 1e-3), "dpo": (1e-8, 1e-4)}
CUT_SHARE = 0.1  # of the rows, above which it is said


# ---- Device and sharding -------------------------------------------------------------------------------------------


def find_device(name: str | None) -> tuple[str, str, float]:
    """Kind (cuda or cpu), name and bytes of a device: by its name, else the GPU here, else this machine's memory.

    Raises:
        RecipeError: for a name that is not in the table and does not end in -<N>gb.
    """
    if name is None and torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    if name in (None, "cpu"):
        return "cpu", "this machine's CPU", psutil.virtual_memory().total
    if name in DEVICES:
        return "cuda", name, DEVICES[name]
    if match := re.fullmatch(r".*-(\d+)gb", name):
        return "cuda", name, int(match[1]) * 1e9
    raise RecipeError(f"--device {name}: not cpu, one of {', '.join(DEVICES)}, or NAME-<N>gb.")


def read_sharding(config: str | None, processes: int | None) -> Sharding:
    """Return the sharding of an accelerate config: a file, or a name in configs/accelerate.

    Raises:
        RecipeError: when there is no such file.
    """
    if config is None:
        return unsharded(processes or 1)
    named = Path("configs/accelerate") / f"{config}.yaml"
    path = next((p for p in (Path(config), shipped(named)) if p.is_file()), None)
    if path is None:
        raise RecipeError(f"--accelerate-config {config}: no such file, nor {named}.")
    values = read_yaml(path.read_text(encoding="utf-8"), str(path))
    count = processes or values.get("num_processes", 1)
    deepspeed, fsdp = values.get("deepspeed_config") or {}, values.get("fsdp_config") or {}
    if name := deepspeed.get("deepspeed_config_file"):
        with user_errors(OSError):
            return zero_sharding(read_yaml(Path(name).read_text(encoding="utf-8"), name)["zero_optimization"], count)
    if deepspeed:
        offloads = {f"offload_{w}": {"device": deepspeed.get(f"offload_{w}_device")} for w in ("optimizer", "param")}
        return zero_sharding({**offloads, "stage": deepspeed["zero_stage"]}, count)
    if fsdp:
        offloads = bool(fsdp.get("fsdp_offload_params"))
        return Sharding("fsdp", count, 3, offloads, offloads)
    return unsharded(count)


def settings(recipe: Recipe, config: PreTrainedConfig, device: str = "cpu") -> dict[str, Any]:
    """Arguments of [`estimate`] that stand in the recipe."""
    args, model_args = recipe.training, recipe.model
    # On a machine without a GPU, the config has unset what a GPU would take by default
    unset = device == "cuda" and args.use_cpu and not {"bf16", "fp16"} & recipe.given.keys()
    dtype = model_args.dtype
    if dtype in (None, "auto"):
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    reference = None
    if recipe.task == "dpo" and not args.precompute_ref_log_probs:
        if args.ref_model_name_or_path is not None:
            reference = load_config(args.ref_model_name_or_path, args.ref_model_revision, args.trust_remote_code)
        elif not model_args.use_peft:
            reference = config
    return {
        "dtype": dtype,
        "mixed": args.bf16 or args.fp16 or unset,
        "bits": 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16,
        "peft_config": get_peft_config(model_args),
        "num_layers_unfrozen": model_args.num_layers_unfrozen,
        "activation_checkpointing": args.activation_checkpointing,
        "activation_checkpointing_kwargs": args.activation_checkpointing_kwargs,
        "accumulates": args.gradient_accumulation_steps > 1,
        "optim": args.optim,
        "reference": reference,
        "ref_offload": recipe.task == "dpo" and args.ref_offload,
    }


def load_config(name: str, revision: str, trust_remote_code: bool) -> PreTrainedConfig:
    check_model(name, revision, trust_remote_code)
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


# ---- Rows ----------------------------------------------------------------------------------------------------------


@dataclass
class Lengths:
    """Tokens of each row, (rows,): context and answers; of a pair both answers (rows, 2), `saved` by sharing."""

    prompt: np.ndarray
    answers: np.ndarray  # (rows, 1) or (rows, 2)
    ended: np.ndarray  # (rows,) whether a trained token, or both answers, end the turn
    saved: np.ndarray | None = None

    @property
    def total(self) -> np.ndarray:
        """(rows, 1) or (rows, 2): each sequence that the model reads."""
        return self.prompt[:, None] + self.answers


def measure_rows(task: str, dataset: Dataset, ends: Sequence[int], max_length: int | None) -> Lengths:
    table = dataset.with_format("arrow")[:]
    columns = {name: list_offsets(table[name]) for name in table.column_names if name.endswith(("_ids", "labels"))}
    counts = {name: np.diff(offsets) for name, (_, offsets) in columns.items()}
    if task == "sft":
        labels, offsets = columns["labels"]
        trained = per_row(labels != -100, offsets)
        return Lengths(counts["input_ids"] - trained, trained[:, None], per_row(np.isin(labels, ends), offsets) > 0)
    sides = ("chosen_ids", "rejected_ids")
    ended = np.all([ends_turn(*columns[side], ends) for side in sides], axis=0)
    saved = pair_lengths(dataset, max_length)[1]
    answers = np.stack([counts[side] for side in sides], axis=1)
    if task == "dpo":
        return Lengths(counts["prompt_ids"], answers, ended, saved)
    return Lengths(saved, answers - saved[:, None], ended, saved)


def per_row(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(rows,) how many values of a row are true."""
    return np.diff(np.concatenate(([0], values.cumsum()))[offsets])


def ends_turn(values: np.ndarray, offsets: np.ndarray, ends: Sequence[int], tail: int = 3) -> np.ndarray:
    """(rows,) whether one of the last tokens of a row (a template may put a line break behind) ends a turn."""
    last = np.maximum(offsets[1:, None] - 1 - np.arange(tail), offsets[:-1, None])
    return np.isin(values[last], ends).any(axis=1)


def dropped_systems(rows: Dataset, settings: RenderSettings, count: int = 200) -> tuple[int, int]:
    """Of the first rows: how many have a system turn, and how many of those lose its text in the template."""
    renderer, seen, lost = Renderer(settings), 0, 0
    roles = [
        column for role, column in settings.columns.items() if column is not None and role not in ("margin", "subset")
    ]
    for row in rows.select(range(min(count, len(rows)))):
        try:
            turns = [t for name in roles if isinstance(row[name], list) for t in read_messages(row[name], "user")]
            texts = [renderer.sft(row)] if settings.task == "sft" else renderer.pair(row)
        except Dropped:
            continue
        systems = {turn["content"] for turn in turns if turn["role"] == "system"}
        if not systems and settings.system_prompt is not None and texts[0].templated:
            systems = {settings.system_prompt}
        if systems:
            seen += 1
            lost += any(system.strip() not in texts[0].text for system in systems)
    return seen, lost


@dataclass
class Batches:
    """`largest` on a device at a time; how many there are; shares: of an unpacked batch that is `padding`, of a packed
    row that is `filled`, of a pair's tokens that both sides have (`shared`)."""

    largest: Batch
    count: int
    padding: float
    filled: float | None = None
    shared: float | None = None


def form_batches(task: str, args: Any, dataset: Dataset, lengths: Lengths) -> Batches:
    """The batches of an epoch of these rows, as training forms them."""
    rows, total = args.per_device_train_batch_size, lengths.total
    order = np.random.default_rng(args.seed).permutation(len(total))
    groups = np.array_split(order, range(rows, len(order), rows))
    longest = np.array([total[group].max() for group in groups])
    tokens = np.array([total[group].sum() for group in groups])
    padding = 1 - tokens.sum() / sum(total[group].size * top for group, top in zip(groups, longest, strict=True))
    width = total.shape[1]
    share = None if lengths.saved is None else lengths.saved.sum() / total.sum()

    def scored(batches: Sequence[np.ndarray]) -> int:
        if task == "rm":
            return width * max(map(len, batches))
        return max(int(lengths.answers[batch].sum()) for batch in batches)

    if not args.packing:
        largest = Batch(width * min(rows, len(total)), int(total.max()), scored(groups))
        return Batches(largest, len(groups), padding, shared=share)
    if task == "sft":
        packed = pack_dataset(dataset, args.max_length, args.packing_strategy).with_format("arrow")[:]
        labels, offsets = list_offsets(packed["labels"])
        sizes, trained = np.diff(offsets), per_row(labels != -100, offsets)
        largest = Batch(1, int(np.sort(sizes)[-rows:].sum()), int(np.sort(trained)[-rows:].sum()), packed=True)
        return Batches(largest, -(-len(sizes) // rows), padding, sizes.sum() / (len(sizes) * args.max_length))
    shares = decides_sharing(args, share)
    pairs = total.sum(axis=1)
    packed = pairs - lengths.saved * shares
    with user_errors():
        sampler = TokenBatchSampler(
            packed,
            None if args.max_tokens_per_batch else rows,
            args.max_tokens_per_batch,
            args.gradient_accumulation_steps,
            args.seed,
        )
    batches = [np.array(batch) for batch in sampler]
    length = max(int(packed[batch].sum()) for batch in batches)
    keys = max(int(pairs[batch].sum()) for batch in batches) if shares else None
    return Batches(Batch(1, length, scored(batches), keys, packed=True), len(batches), padding, shared=share)


# ---- The check -----------------------------------------------------------------------------------------------------


class Findings:
    """What is printed: tables of facts, and warnings, each of which names what to do."""

    def __init__(self, console: Console):
        self.console, self.warnings = console, []

    def show(self, title: str, facts: dict[str, str]) -> None:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
        for name, fact in facts.items():
            table.add_row(name, escape(fact))
        self.console.print(table, "")

    def warn(self, wrong: bool, message: str) -> None:
        if wrong:
            self.warnings.append(message)


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
        reward_model: of a folder, to judge chosen against rejected.

    Returns:
        1 when the run would not fit or have nothing to train on, else 0.

    Raises:
        RecipeError: for a recipe that would not start.
    """
    args, model_args = recipe.training, recipe.model
    kind, name, capacity = find_device(device)
    sharding = sharding or launched_sharding(args)
    set_up_logging(args)
    findings = Findings(Console(quiet=not PartialState().is_main_process))
    config = load_config(model_args.model_name_or_path, model_args.model_revision, args.trust_remote_code)
    try:
        tokenizer, data = load_recipe_data(recipe, sample=None if full else SAMPLE)
    except NothingToTrain as error:
        findings.console.print(f"[red]{escape(str(error))}")
        return 1
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    ends = end_of_turn_ids(tokenizer, None)
    lengths = measure_rows(recipe.task, data.train, ends, args.max_length)
    batches = form_batches(recipe.task, args, data.train, lengths)

    show_rows(findings, data, lengths, recipe)
    show_template(findings, data, lengths, recipe, tokenizer, ends)
    show_batches(findings, batches)
    if reward_model is not None and recipe.task != "sft":
        show_preferences(findings, data.train, reward_model, args.seed)
    with user_errors():
        groups = count_groups(sharding.processes, args.context_parallel_size)
        accumulated = accumulation_steps(
            args.global_batch_size, args.per_device_train_batch_size, groups, args.gradient_accumulation_steps
        )
    steps = show_schedule(findings, recipe, data, batches, groups, accumulated)
    how = settings(recipe, config, kind) | {"accumulates": accumulated > 1}
    fits_disk = show_disk(findings, recipe, how, config, sharding.engine == "deepspeed", steps)
    largest = replace(batches.largest, length=-(-batches.largest.length // args.context_parallel_size))
    parts = estimate(config, recipe.task, largest, sharding, kind, **how)
    fits = show_memory(findings, recipe, parts, sharding, name, capacity)
    for warning in findings.warnings:
        findings.console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    if not findings.warnings:
        findings.console.print("[green]Nothing to warn of.")
    return 0 if fits and fits_disk else 1


def quantiles(values: np.ndarray) -> str:
    return f"{np.quantile(values, 0.5):,.0f} / {np.quantile(values, 0.95):,.0f} / {values.max():,}"


def show_rows(findings: Findings, data: Data, lengths: Lengths, recipe: Recipe) -> None:
    args, facts = recipe.training, {}
    for split, report in data.counts.items():
        facts[split] = str(report)
    if data.share < 1:
        facts["sample"] = f"{data.share:.1%} of the training rows, drawn with the seed; --full reads all"
    facts["prompt tokens"] = quantiles(lengths.prompt) + "  (median / 95% / max)"
    names = ["completion"] if recipe.task == "sft" else ["chosen", "rejected"]
    for name, values in zip(names, lengths.answers.T, strict=True):
        facts[f"{name} tokens"] = quantiles(values)
    facts["total tokens"] = quantiles(lengths.total)
    findings.show("Rows", facts)

    report = data.counts["train"]
    lost = report.read - report.kept
    findings.warn(
        report.cut > CUT_SHARE * report.read,
        f"{report.cut / report.read:.0%} of the rows are cut at max_length {args.max_length}, and their ends are not "
        "trained. Set a larger max_length.",
    )
    reasons = "; ".join(f"{entry['rows'] / report.read:.0%} {reason}" for reason, entry in report.dropped.items())
    findings.warn(
        lost > CUT_SHARE * report.read,
        f"{lost / report.read:.0%} of the rows are dropped ({reasons}). Mend them, or the recipe's columns and "
        "max_length.",
    )


def show_template(
    findings: Findings,
    data: Data,
    lengths: Lengths,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
) -> None:
    args = recipe.training
    checked = [dropped_systems(source.rows, settings) for source, settings in data.sources]
    seen, lost = (sum(counts) for counts in zip(*checked, strict=True))
    script = recipe.script
    origin = "none: text as it is"
    if script.apply_chat_template or any(source.has_turns for source, _ in data.sources):
        origin = "the tokenizer's"
        if script.chat_template is not None:
            origin = "the recipe's chat_template"
        elif args.chat_template_path is not None:
            origin = args.chat_template_path
        elif tokenizer.chat_template == CHATML:
            origin = "ChatML, as the tokenizer has none"
    words = ", ".join(tokenizer.convert_ids_to_tokens(ends))
    ended = lengths.ended.mean()
    facts = {"chat template": origin, "ends of turn": f"{words}: trained in {ended:.0%} of the rows"}
    if seen:
        facts["system turns"] = f"in {seen} of the first rows, {lost} of them lost in the template"
    findings.show("Template", facts)
    findings.warn(
        ended == 0 and not (recipe.task == "sft" and args.pretraining),
        f"The end of an answer ({words}) is never trained: the model will not learn to stop. Set eos_token to what "
        "ends an answer in the rows, or a chat_template that writes it.",
    )
    findings.warn(
        lost > 0,
        f"The chat template drops the system turn of {lost} of {seen} rows that have one. Set chat_template or "
        "chat_template_path to one that writes it, or put its text into the user's turn.",
    )


def show_batches(findings: Findings, batches: Batches) -> None:
    largest, facts = batches.largest, {"padding": f"{batches.padding:.0%} of an unpacked batch"}
    if batches.filled is not None:
        facts["packing"] = f"{batches.filled:.0%} of a packed row is filled"
    if batches.shared is not None:
        facts["shared prefix"] = f"{batches.shared:.0%} of the tokens are in both sides"
    facts["largest batch"] = f"{largest.rows} x {largest.length:,} tokens, {largest.scored:,} of them scored"
    findings.show("Batches", facts)


def show_preferences(findings: Findings, train: Dataset, reward_model: str, seed: int) -> None:
    """The share of pairs in which a reward model prefers the chosen side, with Wilson's 95% interval."""
    from .score import load_scorer, score_ids

    model, tokenizer = load_scorer(reward_model)
    pairs = train.shuffle(seed=seed).select(range(min(PAIRS, len(train))))
    prompts = pairs["prompt_ids"] if "prompt_ids" in pairs.column_names else [[]] * len(pairs)
    sides = [
        score_ids(model, [[*prompt, *answer] for prompt, answer in zip(prompts, pairs[f"{side}_ids"], strict=True)])
        for side in ("chosen", "rejected")
    ]
    wins, count = int(np.sum(np.greater(*sides))), len(pairs)
    low, high = wilson(wins, count)
    findings.show(
        "Preferences",
        {reward_model: f"prefers chosen in {wins / count:.0%} of {count} pairs ({low:.0%} to {high:.0%})"},
    )
    findings.warn(
        high < 0.5,
        f"{reward_model} prefers the rejected answer in {1 - wins / count:.0%} of {count} pairs: chosen and rejected "
        "look swapped. Exchange chosen_column and rejected_column.",
    )


def wilson(wins: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927, doi:10.2307/2276774)."""
    middle, spread = wins + z**2 / 2, z * math.sqrt(wins * (count - wins) / count + z**2 / 4)
    return (middle - spread) / (count + z**2), (middle + spread) / (count + z**2)


def show_schedule(
    findings: Findings, recipe: Recipe, data: Data, batches: Batches, groups: int, accumulated: int
) -> int:
    """Returns the number of steps. `groups`: devices, or groups of them that share a batch."""
    args, model_args = recipe.training, recipe.model
    epoch = max(1, math.ceil(math.ceil(batches.count / data.share / groups) / accumulated))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    warmup, rate = args.get_warmup_steps(steps), args.learning_rate
    findings.show(
        "Schedule",
        {
            "steps": f"{steps:,} ({steps / epoch:.3g} x {epoch:,} an epoch)",
            "rows a step": f"{args.per_device_train_batch_size} x {groups} devices x {accumulated} accumulated",
            "learning rate": f"{rate:g}, {args.lr_scheduler_type.value}, {warmup:,} steps of warm-up",
        },
    )
    low, high = LEARNING_RATES[recipe.task]
    low, high = (low * 10, high * 10) if model_args.use_peft else (low, high)
    what = f"learning_rate {rate:g} is {{}} than has trained {'an adapter' if model_args.use_peft else 'a model'}"
    findings.warn(rate > high, f"{what.format('larger')}: above {high:g}. Set it to {math.sqrt(low * high):.0e} or so.")
    findings.warn(rate < low, f"{what.format('smaller')}: below {low:g}. Set it to {math.sqrt(low * high):.0e} or so.")
    findings.warn(
        warmup >= steps,
        f"warmup_steps is {warmup:,}, but the run has {steps:,} steps: it never reaches its learning rate. Set "
        "warmup_steps: 0.1, a share of the steps.",
    )
    return steps


def show_disk(
    findings: Findings, recipe: Recipe, how: dict[str, Any], config: Any, deepspeed: bool, steps: int
) -> bool:
    """Whether checkpoints and model fit. What is pushed to the Hub is linked, and takes nothing more."""
    args, model_args = recipe.training, recipe.model
    parameters = list(
        build_model(
            config, recipe.task, getattr(torch, how["dtype"]), how["peft_config"], how["num_layers_unfrozen"]
        ).parameters()
    )
    trained = [p for p in parameters if p.requires_grad]
    size = 2 if how["mixed"] and deepspeed else getattr(torch, how["dtype"]).itemsize
    model = size * sum(p.numel() for p in (trained if model_args.use_peft else parameters))
    states = optimizer_size(how["optim"], size, deepspeed) * sum(p.numel() for p in trained)
    checkpoint = model + (0 if args.save_only_model else states)
    every = {"steps": args.save_steps, "epoch": steps / args.num_train_epochs}.get(str(args.save_strategy.value), None)
    if every is not None and every < 1:
        every = math.ceil(every * steps)
    count = 0 if every is None else math.ceil(steps / every)
    # The oldest go when the new one is whole
    kept = count if args.save_total_limit is None else min(count, args.save_total_limit + 1)
    need = kept * checkpoint
    if args.save_total_gb is not None:
        need = min(need, args.save_total_gb * 1e9 + checkpoint)
    folder = next(
        p for p in (Path(args.output_dir).absolute(), *Path(args.output_dir).absolute().parents) if p.exists()
    )
    need, free = need + model, shutil.disk_usage(folder).free
    findings.show(
        "Disk",
        {
            "checkpoints": f"{count:,} of {checkpoint / 1e9:.2f} GB, at most {kept} at a time",
            "needed": f"{need / 1e9:.1f} GB with the model; {free / 1e9:,.0f} GB free in {folder}",
        },
    )
    findings.warn(
        need > free,
        f"The checkpoints need {need / 1e9:,.0f} GB, and {folder} has {free / 1e9:,.0f} GB free. Set "
        "save_total_limit: 1, save_only_model: true, or another output_dir.",
    )
    return need <= free


def show_memory(
    findings: Findings, recipe: Recipe, parts: Sequence[Part], sharding: Sharding, name: str, capacity: float
) -> bool:
    total = sum(part.bytes for part in parts)
    facts = {part.name: f"{part.bytes / 1e9:8.2f} GB  {part.reason}" for part in parts}
    facts["total"] = f"{total / 1e9:8.2f} GB of {capacity / 1e9:.1f}"
    findings.show(f"Memory of {name}", facts)
    findings.warn(
        total > capacity,
        f"The run needs {total / 1e9:.1f} GB, and {name} has {capacity / 1e9:.1f}. First "
        + first_change(recipe, parts, sharding),
    )
    return total <= capacity


def first_change(recipe: Recipe, parts: Sequence[Part], sharding: Sharding) -> str:
    """What takes the most off the largest part, and changes the training least."""
    args, model_args = recipe.training, recipe.model
    sizes = {part.name: part.bytes for part in parts}
    if sizes["activations"] > sizes["weights"] + sizes["gradients"] + sizes["optimizer"]:
        if not args.activation_checkpointing:
            return "set activation_checkpointing: true."
        if "selective" in (args.activation_checkpointing_kwargs or {}):
            return "leave out selective in activation_checkpointing_kwargs."
        if args.per_device_train_batch_size > 1 and not (recipe.task != "sft" and args.max_tokens_per_batch):
            return "set per_device_train_batch_size: 1; global_batch_size keeps the rows of a step."
        return (
            "set a smaller max_length."
            if not (recipe.task != "sft" and args.max_tokens_per_batch)
            else "set a smaller max_tokens_per_batch."
        )
    if sizes.get("reference", 0) > sizes["activations"]:
        return "set precompute_ref_log_probs: true, and the reference is not kept."
    if sharding.processes > 1 and sharding.stage < 3:
        return "shard the weights: --accelerate-config zero3."
    if not model_args.use_peft:
        return "set use_peft: true, or shard over more devices: --accelerate-config zero3 --num-processes 8."
    if not model_args.load_in_4bit:
        return "set load_in_4bit: true."
    return "take a smaller model, or shard over more devices (--accelerate-config zero3)."
