"""Measure the rows that a run trains on: the tokens of each, and the batches that training forms of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from ..errors import user_errors
from ..packing.batches import (
    TokenBatchSampler,
    count_per_row,
    decides_sharing,
    list_offsets,
    pack_like_training,
    pair_lengths,
)
from ..recipe import Recipe
from ..recipe.configs import DPOConfig, RewardConfig, SFTConfig
from .workload import Batch


@dataclass
class Lengths:
    """Tokens of each row: what is read only, and the completion or both answers, which are trained."""

    prompt: np.ndarray  # (rows,)
    answers: np.ndarray  # (rows, 1) or, of pairs, (rows, 2)
    scored: np.ndarray  # like answers: positions at which the loss reads the model; of a reward model, one
    ended: np.ndarray  # (rows,) whether an end of turn is trained; in a pair, in both answers
    saved: np.ndarray | None = None  # (rows,) of a pair, by sharing the prefix

    @property
    def total(self) -> np.ndarray:
        """(rows, 1 or 2): each sequence that the model reads."""
        return self.prompt[:, None] + self.answers

    def quantiles(self, task: str) -> list[tuple[str, float, float, int]]:
        """Return name, median, 95% quantile and maximum of each part of a row, and of whole sequences."""
        names = ["completion"] if task == "sft" else ["chosen", "rejected"]
        columns = {"prompt": self.prompt, **dict(zip(names, self.answers.T, strict=True)), "total": self.total}
        return [(name, *np.quantile(values, (0.5, 0.95)), values.max()) for name, values in columns.items()]


def measure_rows(task: str, dataset: Dataset, ends: Sequence[int], max_length: int | None) -> Lengths:
    """Count the tokens of tokenized rows; `ends` are the ids that end a turn."""
    table = dataset.with_format("arrow")[:]
    columns = {name: list_offsets(table[name]) for name in table.column_names if name.endswith(("_ids", "labels"))}
    counts = {name: np.diff(offsets) for name, (_, offsets) in columns.items()}
    if task == "sft":
        labels, offsets = columns["labels"]
        trained = count_per_row(labels != -100, offsets)
        ended = count_per_row(np.isin(labels, ends), offsets) > 0
        return Lengths(counts["labels"] - trained, trained[:, None], trained[:, None], ended)
    sides = ("chosen_ids", "rejected_ids")
    ended = np.all([ends_turn(*columns[side], ends) for side in sides], axis=0)
    saved = pair_lengths(dataset, max_length)[1]
    answers = np.stack([counts[side] for side in sides], axis=1)
    if task == "dpo":
        return Lengths(counts["prompt_ids"], answers, answers, ended, saved)
    return Lengths(saved, answers - saved[:, None], np.ones_like(answers), ended, saved)


def ends_turn(values: np.ndarray, offsets: np.ndarray, ends: Sequence[int], tail: int = 3) -> np.ndarray:
    """Return (rows,) whether one of the last tokens of each row ends a turn; a template may add a line break."""
    last = np.maximum(offsets[1:, None] - 1 - np.arange(tail), offsets[:-1, None])
    return np.asarray(np.isin(values[last], ends).any(axis=1))


@dataclass
class Batches:
    """The batches of an epoch."""

    largest: Batch  # that a device runs at a time
    count: int
    padding: float  # fraction of an unpacked batch that is padding
    filled: float | None = None  # fraction of a packed SFT row that holds tokens
    shared: float | None = None  # fraction of the tokens of pairs that sharing the prefix saves


def form_batches(recipe: Recipe, dataset: Dataset, lengths: Lengths) -> Batches:
    """Form the batches of an epoch of these rows as training does.

    Raises:
        RecipeError: when a pair is longer than `max_tokens_per_batch`.
    """
    args, total = recipe.training, lengths.total
    rows = args.per_device_train_batch_size
    order = np.random.default_rng(args.seed).permutation(len(total))
    groups = np.split(order, range(rows, len(order), rows))
    padded = sum(total[group].size * total[group].max() for group in groups)
    scored = max(int(lengths.scored[group].sum()) for group in groups)
    largest = Batch(total.shape[1] * min(rows, len(total)), int(total.max()), scored)
    shared = None if lengths.saved is None else lengths.saved.sum() / total.sum()
    batches = Batches(largest, len(groups), 1 - total.sum() / padded, shared=shared)
    if not args.packing:
        return batches
    return pack_texts(args, dataset, batches) if isinstance(args, SFTConfig) else pack_pairs(args, lengths, batches)


def pack_texts(args: SFTConfig, dataset: Dataset, batches: Batches) -> Batches:
    assert args.max_length is not None
    rows = args.per_device_train_batch_size
    packed = pack_like_training(dataset, args).with_format("arrow")[:]
    labels, offsets = list_offsets(packed["labels"])
    sizes, trained = np.diff(offsets), count_per_row(labels != -100, offsets)
    largest = Batch(1, int(np.sort(sizes)[-rows:].sum()), int(np.sort(trained)[-rows:].sum()), packed=True)
    filled = sizes.sum() / (len(sizes) * args.max_length)
    return replace(batches, largest=largest, count=-(-len(sizes) // rows), filled=filled)


def pack_pairs(args: RewardConfig | DPOConfig, lengths: Lengths, batches: Batches) -> Batches:
    assert lengths.saved is not None and batches.shared is not None
    pairs = lengths.total.sum(axis=1)
    shares = decides_sharing(args, batches.shared)
    packed = pairs - lengths.saved * shares
    tokens = args.max_tokens_per_batch
    rows = None if tokens else args.per_device_train_batch_size
    with user_errors():
        sampler = TokenBatchSampler(packed, rows, tokens, args.gradient_accumulation_steps, args.seed)
    groups = [np.array(group) for group in sampler]
    length, keys, scored = (max(int(n[group].sum()) for group in groups) for n in (packed, pairs, lengths.scored))
    return replace(batches, largest=Batch(1, length, scored, keys if shares else None, packed=True), count=len(groups))
