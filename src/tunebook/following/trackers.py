"""Trackers: Weights & Biases' settings, scores at a step that has passed, tables."""

import copy
import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps

import pandas as pd
from transformers import TrainerCallback, TrainerControl
from transformers.integrations import TensorBoardCallback

from ..checkpoints import optional
from ..files import markdown_table
from ..packing.context_parallel import TRLTrainer
from ..recipe.configs import RunConfig

logger = logging.getLogger(__name__)
warn_once = cache(logger.warning)

COUNTERS = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "epoch")  # what an evaluation also logs


def set_wandb_environment(args: RunConfig) -> None:
    """Hand a recipe's settings to wandb, which transformers configures by environment variables only.

    Raises:
        ValueError: one is given, and wandb is not among the trackers.
    """
    keys = ("wandb_entity", "wandb_project", "wandb_run_group")
    settings = {key: vars(args)[key] for key in keys if vars(args)[key]}
    if settings and "wandb" not in args.report_to:
        given = ", ".join(f"`{key}`" for key in settings)
        raise ValueError(f"{given} would have no effect: `report_to` is {args.report_to}. Add wandb to it.")
    os.environ |= {key.upper(): value for key, value in settings.items()}


def guard_trackers(trainer: TRLTrainer) -> None:
    """Let a run continue, with a warning, when a tracker finds the disk full."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__module__.startswith("transformers.integrations"):
            for event in ("on_train_begin", "on_log", "on_save", "on_train_end"):
                vars(callback)[event] = guarded(vars(type(callback)).get(event, vars(TrainerCallback)[event]), callback)


def guarded(event: Callable[..., object], callback: TrainerCallback) -> Callable[..., object]:
    @wraps(event)
    def call(*args: object, **kwargs: object) -> object:
        with optional(f"what {type(callback).__name__} writes"):
            return event(callback, *args, **kwargs)
        return None

    return call


def log_at_step(trainer: TRLTrainer, logs: dict[str, float], step: int) -> None:
    """Log to the trackers and the history at a step that may have passed. Call it on the main process alone."""
    state = copy.copy(trainer.state)
    state.global_step = step
    trainer.state.log_history.append({**logs, "step": step})
    # on_log clears should_log, which may be set for the loss of the current step: give it a control of its own
    trainer.callback_handler.on_log(trainer.args, state, TrainerControl(), dict(logs))


def log_table(trainer: TRLTrainer, name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Send rows as a table to the trackers that have tables: wandb, trackio, tensorboard (as Markdown)."""
    with optional(f"the table of {name}"):
        send_table(trainer, name, pd.DataFrame(rows))


def send_table(trainer: TRLTrainer, name: str, table: pd.DataFrame) -> None:
    step = trainer.state.global_step
    for tracker in trainer.args.report_to:
        if tracker in ("wandb", "trackio"):
            module = importlib.import_module(tracker)
            module.log({name: module.Table(dataframe=table), "train/global_step": step})
        elif tracker == "tensorboard":
            callbacks = trainer.callback_handler.callbacks
            writer = next(callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback))
            writer.add_text(name, markdown_table(list(table.columns), table.values.tolist()), step)
        else:
            warn_once("The table of %s is not sent to %s.", name, tracker)
