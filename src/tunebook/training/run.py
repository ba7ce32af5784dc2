"""The life of a run that the three tasks share: [`prepare`] before the trainer is built, [`fit`] after."""

import ctypes
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import datasets
import transformers
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput

from .. import checkpoints
from ..data import Data, load_recipe_data
from ..data.loading import fingerprint
from ..errors import set_up_log, user_errors
from ..files import write_yaml
from ..following import build_callbacks, finish_callbacks, report_run, validate_callbacks
from ..following.generations import TABLE, Prompt, load_prompts
from ..following.hub import PUSHED
from ..following.report import RECORD_FILE, REPORT
from ..following.scores import ROWS_FILE
from ..following.trackers import guard_trackers, set_wandb_environment
from ..packing.forward import without_adapter
from ..recipe import Recipe
from ..recipe.configs import CausalLMConfig, SFTConfig, count_groups, has_fast_bf16
from ..recipe.content import masked
from .holding import SigtermCallback, from_main_process
from .identity import describe_run
from .models import check_model, check_positions
from .progress import show_progress
from .proof import VerifyModel
from .refusals import refuse, refuse_few_rows, refuse_new_tokens
from .resume import RunMixin

logger = logging.getLogger(__name__)

VERSIONS = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")


@dataclass
class Run:
    """What [`prepare`] settled."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: Data
    checkpoint: Path | None  # to resume from
    loads_optimizer: bool  # and its optimizer's state, too
    record: checkpoints.Record  # what the run is made of, for the checkpoints' manifests
    prompts: Sequence[Prompt]  # of `eval_prompts`

    @property
    def weights(self) -> Path | None:
        """Return the checkpoint to load the model from: one whose optimizer's state does not fit this launch."""
        return None if self.loads_optimizer else self.checkpoint


def prepare(recipe: Recipe) -> Run:
    """Do all that comes before the model: logs, seed, trackers, the resolved recipe, tokenizer and data.

    Raises:
        RecipeError: for a model, tokenizer, data set or checkpoint that does not fit the recipe.
    """
    args = recipe.training
    set_up_logging(args)
    with user_errors():
        count_groups(args.world_size, args.context_parallel_size)
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    checkpoint = from_main_process(lambda: checkpoints.find_checkpoint(output_dir, args.resume_from_checkpoint))
    with user_errors(ConnectionError):
        set_wandb_environment(args)
        validate_callbacks(args, resumes=checkpoint is not None)
    config = check_model(recipe.model.model_name_or_path, recipe.model.model_revision, args.trust_remote_code)
    refuse(recipe, config)
    record, loads_optimizer = describe_run(recipe, config), True
    if checkpoint is not None:
        loads_optimizer = checkpoints.check_resume(checkpoint, record, args.force_resume)
    log_resolved(recipe)
    tokenizer, data = load_recipe_data(recipe)
    refuse_new_tokens(recipe, tokenizer)
    refuse_few_rows(recipe, len(data.train))
    record |= describe_data(recipe, data)
    if checkpoint is not None:
        checkpoints.check_resume(checkpoint, record, args.force_resume)
        record["resumed_from"] = [*checkpoints.whole_manifest(checkpoint).get("resumed_from", []), checkpoint.name]
        logger.info("Resuming from %s (resume_from_checkpoint: %s).", checkpoint, args.resume_from_checkpoint)
    if PartialState().is_main_process:
        write_record(recipe, record, data)
    prompts = []
    if isinstance(args, CausalLMConfig) and args.eval_prompts:
        with user_errors():
            prompts = load_prompts(args.eval_prompts, data.raw_eval or {})
    return Run(recipe, tokenizer, data, checkpoint, loads_optimizer, record, prompts)


def describe_data(recipe: Recipe, data: Data) -> checkpoints.Record:
    """Return what [`describe_run`] cannot know before the rows are read, and how the run came about."""
    return {
        "data": fingerprint(data.train),
        "evaluation": None if data.eval is None else fingerprint(data.eval),
        "recipe": {name: masked(value) for name, value in recipe.given.items()},
        "rows": {split: str(counts) for split, counts in data.counts.items()},
        "versions": {name: version(name) for name in VERSIONS},
        "resumed_from": [],
    }


def write_record(recipe: Recipe, record: checkpoints.Record, data: Data) -> None:
    """Write recipe, record and row counts to output_dir. A run that starts anew sets aside what an earlier one left."""
    output_dir = Path(recipe.training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if recipe.training.resume_from_checkpoint == "never":
        checkpoints.set_aside(output_dir, (ROWS_FILE, "benchmarks", f"{TABLE}.jsonl", PUSHED, "trainer_state.json"))
    with checkpoints.saving("recipe.yaml", output_dir):
        (output_dir / "recipe.yaml").write_text(write_yaml(record["recipe"]), encoding="utf-8")
        (output_dir / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        data.write_report(output_dir / "data_report.json")


def set_up_logging(args: TrainingArguments) -> None:
    """Log our lines and the libraries' warnings, on rank 0 only; with `log_level: debug` ours in detail."""
    main = PartialState().is_main_process
    set_up_log()
    ours = logging.getLogger("tunebook")
    if not ours.isEnabledFor(logging.DEBUG):  # parse has seen log_level
        ours.setLevel(logging.INFO if main else logging.ERROR)
    transformers.logging.set_verbosity(args.get_process_log_level() if main else logging.ERROR)
    if not (main and sys.stderr.isatty()):
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    if args.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, once it loads, warns that it found no GPU


def log_resolved(recipe: Recipe) -> None:
    """Log what the recipe left open, and what it became."""
    args, model_args = recipe.training, recipe.model
    slow = args.use_cpu and not has_fast_bf16()
    if slow and args.bf16:
        logger.warning(
            "bf16: true on a CPU without bf16 instructions: ~80x slower than float32 (1.6, not 136 GFLOP/s)."
        )
    origin = "this CPU has no bf16 instructions" if slow and not args.bf16 else "default"
    origin = "recipe" if recipe.given.keys() & {"bf16", "fp16"} else origin
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    logger.info("Precision: %s (%s), weights in %s.", precision, origin, model_args.dtype)
    if args.packing and model_args.attn_implementation is not None:
        message = "attn_implementation: %s is ignored: with packing, flash-attn is used where it is installed."
        logger.warning(message, model_args.attn_implementation)
    rows = args.per_device_train_batch_size
    batch = f"{rows * args.data_parallel_size * args.gradient_accumulation_steps} rows per step = {rows}"
    if not isinstance(args, SFTConfig) and args.max_tokens_per_batch:
        batch = f"up to {args.max_tokens_per_batch:,} packed tokens"
    sharing = f" / {args.context_parallel_size} that share a row" if args.context_parallel_size > 1 else ""
    steps = args.gradient_accumulation_steps
    logger.info("Batch: %s per device x %d processes x %d accumulated%s.", batch, args.world_size, steps, sharing)


def keep_freed_memory() -> None:
    """Keep large blocks of memory when they are freed (mallopt(3)). glibc returns them to the kernel, and on a CPU each
    step waits for their pages to be mapped and cleared again: 4% to 8% of its time."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def fit(trainer: RunMixin, run: Run) -> TrainOutput:
    """Train from the start or the run's checkpoint, evaluate, and save what is needed to use the model: weights,
    tokenizer with template, generation config, model card, metrics and the trainer's state."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    if args.use_cpu:
        keep_freed_memory()
    show_progress(trainer)
    guard_trackers(trainer)
    model = without_adapter(trainer.accelerator.unwrap_model(trainer.model))
    with user_errors():
        check_positions(model, [rows for rows in (run.data.train, run.data.eval) if rows is not None], args.max_length)
    if args.verify_model:
        trainer.add_callback(VerifyModel(trainer, run.recipe.training))
    with user_errors():  # a prompt that the template cannot render
        callbacks = build_callbacks(trainer, run.recipe.script, run.prompts)
    for callback in [*callbacks, SigtermCallback(trainer)]:
        trainer.add_callback(callback)
    trainer.loads_optimizer, trainer.render_settings = run.loads_optimizer, run.data.sources[0][1]
    result = trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    with checkpoints.saving("The model", output_dir):
        (output_dir / "all_results.json").unlink(missing_ok=True)  # a full disk may have cut it; it is written anew
        trainer.save_metrics("train", result.metrics)
        if args.do_eval:
            metrics = trainer.evaluate_final()
            trainer.save_metrics("eval", metrics)
        trainer.save_final()
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    try:
        finish_callbacks(trainer, callbacks, output_dir)
    finally:
        if trainer.is_world_process_zero():
            report_run(output_dir)
    logger.info("The model is in %s, and what was logged in %s.", output_dir, output_dir / REPORT)
    trainer.end()
    return result
