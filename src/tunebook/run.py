"""What the three scripts share: [`prepare`] before the trainer is built, [`fit`] after."""

import ctypes
import json
import logging
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml
from accelerate import PartialState
from huggingface_hub import HfApi
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import TrainOutput

from . import checkpoints
from .benchmarks import find_benchmark, is_benchmark_metric
from .callbacks import build_callbacks, finish_callbacks
from .configs import count_groups, has_fast_bf16
from .data import Data, fingerprint, load_data
from .generations import TABLE, load_metric, load_prompts, sweep
from .hub import PENDING, check_hub_revision
from .models import check_model, load_recipe_tokenizer, rename_head
from .preflight import check
from .progress import show_progress
from .recipe import Recipe, as_mistake
from .report import RECORD_FILE, report_run
from .scores import ROWS_FILE
from .trackers import set_wandb_environment

logger = logging.getLogger(__name__)

VERSIONS = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")


@dataclass
class Run:
    """What [`prepare`] settled: the tokenizer, the rows, where to go on from, the record for the checkpoints, and how
    the run is followed."""

    tokenizer: PreTrainedTokenizerBase
    data: Data
    checkpoint: Path | None
    record: dict[str, Any]
    following: dict[str, Any]


def prepare(recipe: Recipe) -> Run:
    """Everything before the model is loaded: log, seed, trackers, resolved recipe, tokenizer and data.

    Raises:
        RecipeError: for a model, tokenizer, data set or checkpoint that does not fit the recipe.
    """
    script_args, training_args, model_args = recipe.args
    set_up_logging(training_args)
    if training_args.dry_run:
        raise SystemExit(check(recipe))
    with as_mistake():
        count_groups(training_args.world_size, training_args.context_parallel_size)
    set_seed(training_args.seed)
    output_dir = Path(training_args.output_dir)
    checkpoint = checkpoints.find_checkpoint(output_dir, training_args.resume_from_checkpoint)
    with as_mistake(ConnectionError):
        set_wandb_environment(
            training_args.report_to,
            training_args.wandb_entity,
            training_args.wandb_project,
            training_args.wandb_run_group,
        )
        following = check_following(recipe, resumes=checkpoint is not None)
    model = model_args.model_name_or_path
    check_model(model, model_args.model_revision, training_args.trust_remote_code)
    tokenizer = load_recipe_tokenizer(recipe)
    log_resolved(recipe)
    data = load_data(recipe.task, script_args, training_args, tokenizer)
    record = {
        "task": recipe.task,
        "model": model,
        "data": fingerprint(data.train),
        "seed": training_args.seed if training_args.data_seed is None else training_args.data_seed,
        "max_tokens_per_batch": vars(training_args).get("max_tokens_per_batch"),
        "recipe": recipe.given,
        "rows": {split: str(report) for split, report in data.reports.items()},
        "versions": {name: version(name) for name in VERSIONS},
        "resumed_from": [],
    }
    if checkpoint is not None:
        deepspeed = training_args.deepspeed_plugin is not None
        checkpoints.check_resume(checkpoint, record, training_args.force_resume, deepspeed)
        record["resumed_from"] = [*checkpoints.read_manifest(checkpoint).get("resumed_from", []), checkpoint.name]
        logger.info("Going on from %s (resume_from_checkpoint: %s).", checkpoint, training_args.resume_from_checkpoint)
    if PartialState().is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if training_args.resume_from_checkpoint == "never":
            checkpoints.set_aside(output_dir, (ROWS_FILE, "benchmarks", f"{TABLE}.jsonl", "trainer_state.json"))
        with checkpoints.saving("recipe.yaml", output_dir):
            (output_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe.given, sort_keys=False), encoding="utf-8")
            (output_dir / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            data.write_report(output_dir / "data_report.json")
    if recipe.task != "rm" and training_args.eval_prompts:
        with as_mistake():
            following["eval_prompts"] = load_prompts(training_args.eval_prompts, data.raw_eval or {})
    return Run(tokenizer, data, checkpoint, record, following)


def set_up_logging(training_args) -> None:
    """Our lines and the libraries' warnings, on rank 0 only."""
    main = PartialState().is_main_process
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("tunebook").setLevel(logging.INFO if main else logging.ERROR)
    transformers.logging.set_verbosity(training_args.get_process_log_level() if main else logging.ERROR)
    if not main:
        datasets.disable_progress_bars()


def check_following(recipe: Recipe, resumes: bool) -> dict[str, Any]:
    """Arguments of [`build_callbacks`], checked before anything is loaded; prompts come with the data.

    Raises:
        ValueError: for a Hub revision that may not be written, an unknown benchmark or metric, or more than one sweep.
    """
    script_args, args, _ = recipe.args
    output_dir = Path(args.output_dir)
    if args.pushes_revisions and not resumes and PartialState().is_main_process:
        if any((output_dir / PENDING).glob("*")):
            raise ValueError(
                f"{output_dir} holds models of an earlier run that are not on the Hub. Push them (tunebook push "
                f"{output_dir}), remove {output_dir / PENDING}, or take another output_dir."
            )
        check_hub_revision(
            HfApi(),
            args.hub_model_id,
            args.hub_revision,
            push_to_main=args.hub_push_to_main,
            private=args.hub_private_repo,
            overwrite=args.overwrite_hub_revision,
            must_reach=args.hub_push_failure == "raise",
        )
    following = {
        "push_to_hub_revision": args.pushes_revisions,
        "hub_model_id": args.hub_model_id,
        "hub_revision": args.hub_revision,
        "hub_private_repo": True if args.hub_private_repo is None else args.hub_private_repo,
        "hub_push_failure": args.hub_push_failure,
        "hub_push_to_main": args.hub_push_to_main,
    }
    if args.benchmarks and recipe.task != "rm":
        benchmarks = [find_benchmark(name) for name in args.benchmarks]
        if args.benchmark_launcher == "slurm" and shutil.which("sbatch") is None:
            raise ValueError("`benchmark_launcher: slurm`: there is no sbatch on this machine. Set it to local.")
        beside = args.benchmark_launcher == "slurm" or args.benchmark_devices
        best = is_benchmark_metric(args.metric_for_best_model, benchmarks)
        following |= {
            "benchmarks": benchmarks,
            "benchmark_launcher": args.benchmark_launcher,
            "benchmark_schedule": args.benchmark_schedule
            or ("evaluation" if best else "beside" if beside else "after"),
            "benchmark_devices": args.benchmark_devices,
            "benchmark_timeout": args.benchmark_timeout,
        }
    if recipe.task != "rm" and args.eval_prompts:
        sweep(args.eval_generation_kwargs or {})
        if unknown := set(args.eval_generation_kwargs or {}) - set(GenerationConfig().to_dict()):
            raise ValueError(f"`eval_generation_kwargs`: {', '.join(sorted(unknown))}: not of GenerationConfig.")
        following |= {
            "eval_generation_kwargs": args.eval_generation_kwargs,
            "eval_metrics": [load_metric(name) for name in args.eval_metrics],
            "stop_sequences": args.stop_sequences,
            "apply_chat_template": bool(script_args.apply_chat_template),
            "system_prompt": script_args.system_prompt,
            "prompt_template": script_args.prompt_template,
        }
    return following


def log_resolved(recipe: Recipe) -> None:
    """What the recipe left open, and what it became, once."""
    _, args, model_args = recipe.args
    given = recipe.given
    origin = "recipe" if "bf16" in given or "fp16" in given else "default"
    if args.use_cpu and not has_fast_bf16():
        if args.bf16:
            logger.warning(
                "bf16: true on a CPU without bf16 instructions: ~80x slower than float32 (1.6 against 136 GFLOP/s)."
            )
        elif origin == "default":
            origin = "this CPU has no bf16 instructions"
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    logger.info("Precision: %s (%s), weights in %s.", precision, origin, model_args.dtype)
    if args.packing and model_args.attn_implementation is not None:
        logger.warning(
            "attn_implementation: %s is not used with packing, which takes flash-attn where it is installed.",
            model_args.attn_implementation,
        )
    if recipe.task != "sft" and args.max_tokens_per_batch:
        logger.info(
            "Batch: up to %s packed tokens a device x %d processes x %d accumulated.",
            f"{args.max_tokens_per_batch:,}",
            args.world_size,
            args.gradient_accumulation_steps,
        )
        return
    logger.info(
        "Batch: %d rows a step = %d a device x %d processes x %d accumulated%s.",
        args.per_device_train_batch_size * args.data_parallel_size * args.gradient_accumulation_steps,
        args.per_device_train_batch_size,
        args.world_size,
        args.gradient_accumulation_steps,
        f" / {args.context_parallel_size} that share a row" if args.context_parallel_size > 1 else "",
    )


def keep_freed_memory() -> None:
    """On a CPU, glibc returns large blocks to the kernel when they are freed, and each step waits for their pages to be
    mapped and cleared again: 4% to 8% of its time. Keep them instead (mallopt(3))."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def fit(trainer, run: Run) -> TrainOutput:
    """Train (or go on), evaluate, and save what is needed to use the model: weights, tokenizer with template,
    generation config, model card, metrics and the trainer's state."""
    args = trainer.args
    if args.use_cpu:
        keep_freed_memory()
    show_progress(trainer)
    callbacks = build_callbacks(trainer, **run.following)
    for callback in callbacks:
        trainer.add_callback(callback)
    result = trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
    with checkpoints.saving("The model", Path(args.output_dir)):
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        if args.do_eval:
            metrics = trainer.evaluate()
            trainer.log_metrics("eval", metrics)
            trainer.save_metrics("eval", metrics)
            if "calibrate_rewards" in vars(args) and args.calibrate_rewards:
                trainer.calibrate()
        trainer.save_state()

        # off in training, wanted by who generates
        trainer.accelerator.unwrap_model(trainer.model).config.use_cache = True
        trainer.save_model(args.output_dir)
        if vars(args).get("value_head_prefix", "score") != "score" and trainer.is_world_process_zero():
            rename_head(Path(args.output_dir), args.value_head_prefix)
        trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    try:
        finish_callbacks(trainer, callbacks, Path(args.output_dir))
    finally:
        if trainer.is_world_process_zero():
            report_run(Path(args.output_dir))
    logger.info("The model is in %s.", args.output_dir)
    trainer.end()
    return result
