"""Preference pairs by a reward model: the rewards of rows, and accuracy by subset."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from trl.trainer.utils import pad

from ..data.rendering import Renderer
from ..data.sources import load_source
from ..data.tokens import tokenize
from ..data.turns import Dropped
from ..errors import RecipeError, foreign
from ..packing.context_parallel import TRLTrainer
from ..recipe.configs import RewardConfig, RunConfig, ScriptArguments
from .generations import map_over_ranks, render_settings
from .scores import ROWS_FILE, BenchmarkRow, Metrics, write_scored_rows
from .trackers import log_at_step

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = tuple[object, object]  # prompt and completion, each a text or messages
Score = Callable[[list[Item]], list[float]]  # their rewards


def pair_accuracy(pairs: Sequence[dict[str, Any]], score: Score) -> dict[str, float]:
    """Return the share of preference pairs whose chosen side gets the higher reward; a tie counts half.

    Args:
        pairs: rows with `prompt`, `chosen`, `rejected` and, if they have one, `subset`: RewardBench's layout.

    Returns:
        `{"accuracy": ..., "accuracy_<subset>": ...}`, each a mean over pairs.
    """
    rewards = score([(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs])
    wins = pd.Series(count_wins(rewards[: len(pairs)], rewards[len(pairs) :]))
    names = pd.Series([f"accuracy_{pair['subset']}" if "subset" in pair else None for pair in pairs], dtype=object)
    by_subset = wins.groupby(names, sort=False).mean()
    return {"accuracy": float(wins.mean()), **{str(name): float(share) for name, share in by_subset.items()}}


def count_wins(chosen: ArrayLike, rejected: ArrayLike) -> NDArray[np.float64]:
    """Return 1 for each pair whose chosen side gets the higher reward, 0.5 for a tie, 0 otherwise."""
    return (np.sign(np.asarray(chosen, dtype=float) - np.asarray(rejected, dtype=float)) + 1) / 2


def show_accuracy(logged: Mapping[str, float]) -> str:
    """Return the pair accuracy of an evaluation in the log, or that all pairs tie: DPO's before its first step."""
    return "ties" if logged.get("eval_ties") == 1 else f"{logged['eval_accuracy']:.4g}"


def read_pairs(paths: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Read files of pairs in RewardBench's columns; return the name of each -> its rows.

    Raises:
        RecipeError: a file cannot be read or lacks a column.
    """
    benchmarks = {Path(path).stem: load_source(path, "train") for path in paths}
    for name, pairs in benchmarks.items():
        if missing := {"prompt", "chosen", "rejected"} - set(pairs.column_names):
            raise RecipeError(f"`pair_benchmarks`: {name} has no column {' and '.join(sorted(missing))}.")
    return {name: pairs.to_list() for name, pairs in benchmarks.items()}


class PairAccuracyCallback(TrainerCallback):
    """Measures a reward model at every evaluation: accuracy by subset on files of preference pairs.

    Pairs are rendered like the training rows, and split across ranks.
    """

    def __init__(self, trainer: TRLTrainer, script: ScriptArguments):
        self.trainer, self.benchmarks = trainer, read_pairs(cast(RewardConfig, trainer.args).pair_benchmarks)
        self.score: Score = partial(score_completions, trainer, Renderer(render_settings(trainer, script)))
        if trainer.args.context_parallel_size == 1:  # ranks that share a packed row need the same items
            self.score = partial(map_over_ranks, trainer.accelerator, self.score)
        self.step: int | None = None

    @staticmethod
    def validate(args: RewardConfig) -> None:
        """Raise a RecipeError for a file that cannot be read or has no pairs."""
        read_pairs(args.pair_benchmarks)

    def on_evaluate(self, args: RunConfig, state: TrainerState, control: object, metrics: Metrics, **_: object) -> None:  # type: ignore[override]
        if state.global_step == self.step:  # of several evaluation sets, the first
            return
        self.step = state.global_step
        for name, pairs in self.benchmarks.items():
            start = time.monotonic()
            row = BenchmarkRow(self.step, name, args.output_dir, scores={name: pair_accuracy(pairs, self.score)})
            row.seconds = round(time.monotonic() - start, 1)
            metrics |= row.tracker_scores()
            if state.is_world_process_zero:
                write_scored_rows(Path(args.output_dir) / ROWS_FILE, [row])
                log_at_step(self.trainer, row.tracker_scores(), self.step)


def score_completions(trainer: TRLTrainer, renderer: Renderer, items: list[Item]) -> list[float]:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in items]
    was_training = trainer.model.training
    ids = render_ids(rows, renderer, "benchmark")
    rewards = score_ids(trainer.model.eval(), ids, trainer.args.per_device_eval_batch_size)
    trainer.model.train(was_training)
    return rewards


def reported(items: Sequence[T], words: str) -> Iterator[T]:
    """Yield items, and log every 10 seconds how many of them are done."""
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said > 10:
            logger.info("%d of %d %s.", done, len(items), words)
            said = time.monotonic()
        yield item


@torch.inference_mode()
def score_ids(model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]], batch_size: int = 8) -> list[float]:
    """Return the reward of each row of token ids, read at its last token. Rows of like length share a batch."""
    pad_id, device = model.config.get_text_config().pad_token_id, model.device
    rewards = [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in reported(range(0, len(rows), batch_size), "batches of rows are scored"):
        batch = by_length[start : start + batch_size]
        # A model in training may share prefixes between the halves of a batch, so a batch has an even number of rows
        ids = [torch.tensor(rows[i]) for i in batch + batch[-1:] * (len(batch) % 2)]
        logits = model(
            input_ids=pad(ids, padding_value=pad_id).to(device),
            attention_mask=pad([torch.ones_like(row) for row in ids], padding_value=0).to(device),
            use_cache=False,
        ).logits
        for i, reward in zip(batch, logits[: len(batch), 0].float().tolist(), strict=True):
            rewards[i] = reward
    return rewards


def render_ids(rows: Iterable[dict[str, Any]], renderer: Renderer, name: str) -> list[list[int]]:
    """Return the token ids of rows.

    Raises:
        RecipeError: a row has no text (which one, and why).
    """
    texts = []
    for number, row in enumerate(rows):
        with foreign(f"{name}, row {number}", "cannot be rendered"):
            try:
                texts.append(renderer.sft(row))
            except Dropped as dropped:
                raise RecipeError(f"{name}, row {number}: {dropped}.") from dropped
    return [ids for ids, _ in tokenize(texts, renderer.settings.tokenizer)]
