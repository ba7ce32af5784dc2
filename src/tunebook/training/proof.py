"""The proof at the start of a run: what is about to train gives what the model's own forward gives, on two documents.

The tests build every architecture of transformers and compare. A run proves it on its own model: on remote code, and on
models that are newer than the tests.
"""

import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import user_errors
from ..packing.attention import own_attention
from ..packing.forward import without_adapter
from ..recipe.configs import RewardConfig
from ..recipe.schema import Training

logger = logging.getLogger(__name__)

TOKENS = 24  # of the longer document
LONGEST_WINDOW = 1024  # of a sliding window that a document proves
WINDOW = re.compile(r"((sliding|attention|local)_)?(attention_)?window(_size)?|attention_chunk_size")


class VerifyModel(TrainerCallback):
    """Refuse to train on other numbers than the model's own forward gives (`verify_model`)."""

    def __init__(self, trainer: Trainer, recipe_args: Training):
        self.trainer, self.recipe_args = trainer, recipe_args

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        with user_errors():
            verify_model(self.trainer, self.recipe_args)


def verify_model(trainer: Trainer, args: Training) -> None:
    """Prove the model of a run, as accelerate has prepared it, and log how far it is from its own forward.

    Raises:
        ValueError: when it is too far ([`Proof`]).
    """
    start, accelerator = time.perf_counter(), trainer.accelerator
    own = without_adapter(accelerator.unwrap_model(trainer.model))
    config = own.config.get_text_config().to_dict()
    window, pad = sliding_window(config), config.get("pad_token_id") or 0
    longest = args.max_length or sys.maxsize
    length = min(longest, window + 16 if window is not None and window <= LONGEST_WINDOW else TOKENS)
    tokens = torch.tensor(first_tokens(trainer.train_dataset, length, pad), device=accelerator.device)
    half = args.bf16 or args.fp16 or args.tf32 or own.dtype != torch.float32
    measured = measure(trainer.model_wrapped, own, tokens, pad, isinstance(args, RewardConfig), half)
    trained, padded, future = accelerator.gather(measured[None]).max(dim=0).values.tolist()
    proof = Proof(type(own).__name__, isinstance(args, RewardConfig), args.packing, half, trained, padded, future)
    proof.judge()
    seconds = time.perf_counter() - start
    logger.info("verify_model: %s differs by %.1e from its own forward (%.1f s).", proof.what, trained, seconds)
    if window is not None and length <= window < longest:
        logger.warning("verify_model: documents longer than the window of %d tokens are not proven.", window)


@dataclass(frozen=True)
class Proof:
    """How far a model is from its own forward: in half precision on average, in float32 at most."""

    model: str
    rewards: bool
    packing: bool
    half: bool
    trained: float  # of the forward that trains
    padded: float  # of its own forward, with padding
    future: float  # of log-probabilities, when a later token changes

    @property
    def what(self) -> str:
        return f"a {'reward' if self.rewards else 'log-probability'} of {self.model}"

    @property
    def allowed(self) -> float:
        """1e-3 in float32; in half precision 0.05, or five times what padding makes of the own forward."""
        return max(0.05, 5 * self.padded) if self.half else 1e-3

    def judge(self) -> None:
        """Refuse to train a model that is not proven.

        Raises:
            ValueError: with the difference, and its cause as far as it is known.
        """
        if not self.future <= self.allowed:
            raise ValueError(
                f"{self.what} changes by {self.future:.2g} with the token that follows: it is an encoder, or not "
                "causal by its config. Set is_decoder: true (or is_causal, use_bidirectional_attention) in "
                "model_init_kwargs, or take a decoder."
            )
        if self.trained <= self.allowed:
            return
        if self.packing:
            cause = "Documents are not kept apart in a packed row, or not at their positions. Set packing: false"
        elif not self.padded <= self.allowed:
            cause = f"Padding alone changes its own forward by {self.padded:.2g}. Take another model"
        else:
            cause = "The cause is not known. Take another model"
        raise ValueError(
            f"verify_model: {self.what} differs by {self.trained:.2g} between its own forward and the one that trains; "
            f"{self.allowed:.2g} is allowed. {cause}, or set verify_model: false to train it nevertheless."
        )


@torch.no_grad()
def measure(
    model: nn.Module, own: PreTrainedModel, tokens: torch.Tensor, pad: int, rewards: bool, half: bool
) -> torch.Tensor:
    """Return `trained`, `padded` and `future` of a [`Proof`], (3,), from two documents that start alike. Modes and the
    random state are as before.

    Args:
        model: what trains, prepared by accelerate.
        own: the transformers model in it.
        tokens: (N,), of the longer document; none is `pad`.
    """
    forward = forward_rewards if rewards else forward_log_probs
    shared = tokens[: TOKENS // 3]
    documents, training = [tokens, torch.cat([shared, shared.flip(0)])[: len(tokens)]], model.training
    altered = torch.cat([tokens[:-1], tokens[tokens != tokens[-1]][:1], tokens[:1]])[: len(tokens)]
    model.eval()
    with torch.random.fork_rng([tokens.device] if tokens.is_cuda else []):
        trained = forward(model, documents, pad, own=False)  # first: FSDP2 and PEFT settle at the first forward
        with own_attention(own):
            alone = [forward(model, [document], pad, own=True)[0] for document in documents]
            padded = forward(model, documents, pad, own=True)
            early = [] if rewards else [(forward(model, [altered], pad, own=True)[0] - alone[0])[:-1]]
    model.train(training)
    differences = [[a - b for a, b in zip(x, alone, strict=True)] for x in (trained, padded)]
    return torch.stack([_size(x, half).to(tokens.device) for x in (*differences, early)])


def sliding_window(config: Mapping[str, object]) -> int | None:
    """Return the tokens of a model's sliding window, or chunk, by any name; None where it has none."""
    sizes = [value for key, value in config.items() if WINDOW.fullmatch(key) and isinstance(value, int) and value > 0]
    return max(sizes, default=None)


def first_tokens(dataset: Dataset, count: int, pad: int) -> list[int]:
    """Return the first tokens of tokenized rows but `pad`, again and again where there are too few."""
    columns = [name for name in ("input_ids", "prompt_ids", "chosen_ids") if name in dataset.column_names]
    tokens: list[int] = []
    for row in dataset.select_columns(columns):
        tokens += [token for name in columns for token in row[name] if token != pad]
        if len(tokens) >= count:
            break
    return (tokens * count)[:count]


def _batch(documents: Sequence[torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    mask = pad_sequence([torch.ones_like(document) for document in documents], batch_first=True)
    ids = pad_sequence(list(documents), batch_first=True, padding_value=pad)
    return {"input_ids": ids, "attention_mask": mask}


def forward_log_probs(model: nn.Module, documents: Sequence[torch.Tensor], pad: int, own: bool) -> list[torch.Tensor]:
    """Return the log-probabilities of each document's tokens but the first, by the model's own forward or by the one
    that trains."""
    batch = _batch(documents, pad)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if own:
        logits = model(**batch, use_cache=False).logits
        logits = logits[:, -labels.shape[1] :][:, :-1]  # PEFT's virtual tokens come first
        log_probs = -F.cross_entropy(logits.float().transpose(1, 2), labels[:, 1:].to(logits.device), reduction="none")
    else:
        log_probs = model(**batch, use_cache=False, labels=labels, fused_lm_head=True).log_probs
        log_probs = log_probs[:, 1 - labels.shape[1] :]
    return [row[: len(document) - 1] for row, document in zip(log_probs, documents, strict=True)]


def forward_rewards(model: nn.Module, documents: Sequence[torch.Tensor], pad: int, own: bool) -> list[torch.Tensor]:
    """Return the reward of each document, by the model's own forward or by the one that trains."""
    return list(model(**_batch(documents, pad), use_cache=False, own_forward=own).logits.float())


def _size(differences: list[torch.Tensor], half: bool) -> torch.Tensor:
    """Return the mean difference in half precision, the largest in float32; 0 where there is none."""
    if not any(len(x) for x in differences):
        return torch.zeros(())
    values = torch.cat(differences).abs()
    return values.mean() if half else values.max()
