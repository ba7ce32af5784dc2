"""What one sees while it trains: a line with loss, speed, time left and the next checkpoint. Every log has tokens/s
and, on a GPU whose peak is known, model FLOPs utilization (MFU)."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Never

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_model_param_count
from trl.trainer.utils import get_peak_flops

from ..following.trackers import COUNTERS
from ..packing.batches import pair_lengths
from ..packing.forward import without_adapter

if TYPE_CHECKING:
    from .resume import RunMixin
else:
    RunMixin = object

logger = logging.getLogger(__name__)


class Progress(ProgressCallback):
    """Show a live line on a terminal; elsewhere, or with `disable_tqdm`, a plain line at each logging step. Evaluations
    are a line of their own. On rank 0."""

    training_bar: "tqdm[Never] | None"  # type: ignore[assignment]

    def on_train_begin(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        model: PreTrainedModel | PeftModel,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero:
            first, last = state.global_step, state.max_steps
            self.start, self.first_step = time.monotonic(), first
            if first < last:
                trained, total = count_parameters(model)
                steps = f"{last} steps" if first == 0 else f"steps {first + 1} to {last}"
                logger.info("Training starts: %s, %s of %s parameters.", steps, f"{trained:,}", f"{total:,}")
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                disable=args.disable_tqdm or None,  # None: where stderr is not a terminal
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} {bar:20} {remaining} left{postfix}",
            )
        self.current_step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        # The last steps may be fewer than `logging_steps`; a short run would log no loss at all
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True

    def on_prediction_step(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        place = f"step {state.global_step}/{state.max_steps}"
        evaluation = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if not state.is_world_process_zero:
            return
        if evaluation:
            shown = (f"{name} {value:.4g}" for name, value in evaluation.items() if name not in COUNTERS)
            self.write(f"{place}  evaluation: {', '.join(shown)}")
        elif "loss" in logs and self.training_bar is not None:
            speed = [f"loss {logs['loss']:.4g}", f"{logs['tokens_per_second']:,.0f} tokens/s"]
            speed += [f"MFU {logs['mfu']:.1%}"] if "mfu" in logs else []
            if self.training_bar.disable:
                seconds = (time.monotonic() - self.start) / max(state.global_step - self.first_step, 1)
                left = tqdm.format_interval(seconds * (state.max_steps - state.global_step))
                self.write("  ".join([place, *speed, f"{left} left", *next_checkpoint(args, state)]))
            else:
                self.training_bar.set_postfix_str("  ".join([*speed, *next_checkpoint(args, state)]))

    def write(self, line: str) -> None:
        if self.training_bar is None or self.training_bar.disable:
            logger.info(line)
        else:
            self.training_bar.write(line, file=sys.stderr)


def next_checkpoint(args: TrainingArguments, state: TrainerState) -> list[str]:
    """Return when the next checkpoint is saved, in words; nothing where that is not known or there is none."""
    if args.save_strategy == "steps":
        step = math.ceil(state.global_step / state.save_steps) * state.save_steps
        return [f"checkpoint at {min(step, state.max_steps)}"]
    return [f"checkpoint after epoch {math.ceil(state.epoch)}"] if args.save_strategy == "epoch" else []


def show_progress(trainer: Trainer) -> None:
    """Replace transformers' line, which prints each log as a dict, by ours."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())


class ThroughputMixin(RunMixin):
    """Mixin before [`RunMixin`] that logs `tokens_per_second`, over all devices, counting both sides of a pair, and on
    CUDA `mfu`, a share. The time of evaluations and saves is not counted."""

    since: float | None = None  # start of what the next log measures, later by the pauses in it
    counted = 0  # tokens before that
    reference_passes = 0  # of a model of the same size, per step

    def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
        if self.since is None:
            self.since, self.counted = time.perf_counter(), self.count_tokens()
        return super().training_step(*args, **kwargs)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.since is not None:
            self.since += time.perf_counter() - start

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        with self._pause():
            return super().evaluate(*args, **kwargs)  # type: ignore[arg-type]

    def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
        # PATCH(transformers<5.25): no hook comes before a save. Waits for transformers/trainer.py:3363. Delete when one
        # does.
        with self._pause():
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], *args: float | None) -> None:
        if "loss" in logs and self.since is not None:
            now = time.perf_counter()
            tokens = self.count_tokens()
            rate = (tokens - self.counted) / (now - self.since)
            logs["tokens_per_second"] = round(rate, 1)
            if self.flops_per_token is not None:
                logs["mfu"] = rate * self.flops_per_token / (peak_flops() * self.args.world_size)
            self.since, self.counted = now, tokens
        super().log(logs, *args)

    @cached_property
    def flops_per_token(self) -> float | None:
        """FLOPs of a trained token; None, with one line in the log, where there is no MFU."""
        if not torch.cuda.is_available():
            return None
        if peak_flops() is None:
            logger.info("No MFU: the peak of %s is not known.", torch.cuda.get_device_name())
            return None
        model = self.accelerator.unwrap_model(self.model)
        if "num_experts_per_tok" in model.config.get_text_config().to_dict():
            logger.info("No MFU: which experts of a mixture run is not counted.")
            return None
        length, share = token_lengths(self.train_dataset, self.args.max_length, self.shares_prefix)
        return share * model_flops(model, length, self.reference_passes)


def peak_flops() -> float | None:
    """Return the FLOP/s of this GPU's dense bf16 matrix products; None where TRL does not know the GPU."""
    return get_peak_flops(torch.cuda.get_device_name(), "bfloat16")


def token_lengths(dataset: Dataset, max_length: int | None, shares_prefix: bool) -> tuple[float, float]:
    """Return the length of the row that a token is in, averaged over tokens, and the share of tokens that are run."""
    if "chosen_ids" in dataset.column_names:
        tokens, saved = pair_lengths(dataset, max_length)
        lengths, share = tokens / 2, 1 - shares_prefix * saved.sum() / tokens.sum()
    else:
        packed = "seq_lengths" in dataset.column_names  # by TRL
        column, take = ("seq_lengths", pc.list_flatten) if packed else ("input_ids", pc.list_value_length)
        tables = dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000)
        lengths, share = np.concatenate([take(table[column]) for table in tables]).astype(float), 1.0
    return float((lengths**2).sum() / lengths.sum()), float(share)


def count_parameters(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """Return how many parameters a model has that are trained, and in all."""
    if isinstance(model, PeftModel):  # counts quantized weights right
        trained, total = model.get_nb_trainable_parameters()
        return trained, total
    return get_model_param_count(model, trainable_only=True), get_model_param_count(model)


def model_flops(model: PreTrainedModel | PeftModel, length: float, reference_passes: int = 0) -> float:
    """Return the FLOPs of a trained token: 6N + 12LHQT in full training (PaLM, appendix B,
    https://arxiv.org/abs/2204.02311), for N parameters, L layers of H heads of size Q, and rows of T tokens.

    The forward takes 2N, and 4LHQT for attention, which is counted without its causal mask. The gradients of the
    activations take as much (attention twice that), and those of the weights 2 per trained parameter, so that LoRA
    takes about 4N. An untied embedding is a look-up and not in N. As usual, neither recomputed activations nor
    unlabelled positions, which the LM head skips, change the count.

    Args:
        length: T.
        reference_passes: forward passes of a reference model of the same size: 1 in DPO, which takes 8N.
    """
    trained, total = count_parameters(model)
    own = without_adapter(model)
    embeddings, head = own.get_input_embeddings(), own.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        looked_up = get_model_param_count(embeddings)
        total, trained = total - looked_up, trained - looked_up * embeddings.weight.requires_grad
    config = own.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (config.to_dict().get("head_dim") or config.hidden_size // heads)
    attention = 4 * config.num_hidden_layers * width * length
    # The gradient stops at the lowest layer that is trained
    passed = 1.0 if isinstance(model, PeftModel) else trained / total
    return (1 + reference_passes) * (2 * total + attention) + passed * (2 * total + 2 * attention) + 2 * trained
