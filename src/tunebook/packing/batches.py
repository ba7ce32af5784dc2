"""Packed rows, and batches of preference pairs with an even number of packed tokens."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl.data_utils import pack_dataset

from ..recipe.configs import DPOConfig, RewardConfig, SFTConfig

logger = logging.getLogger(__name__)

WINDOW = 16  # optimizer steps whose batches are balanced with one another


def pair_lengths(dataset: Dataset, max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of each pair, chosen and rejected together, and how many of them `share_prefix` saves: two
    arrays of (rows,). The packed length of a pair is the first less, where the prefix is shared, the second.

    Args:
        dataset: TRL's processed columns, chosen_ids and rejected_ids (RM), and prompt_ids (DPO).
        max_length: where the collator cuts each side (truncation_mode: keep_start).
    """
    columns = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in dataset.column_names]
    tokens, saved = [], []
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        prompt = np.diff(list_offsets(table["prompt_ids"])[1]) if "prompt_ids" in columns else 0
        sides = [list_offsets(table[name]) for name in ("chosen_ids", "rejected_ids")]
        lengths = [np.diff(offsets) for _, offsets in sides]
        shared = np.minimum(*lengths)
        row = np.repeat(np.arange(len(shared)), shared)
        column = np.arange(len(row)) - (shared.cumsum() - shared)[row]
        chosen, rejected = (values[offsets[row] + column] for values, offsets in sides)
        differ = chosen != rejected
        np.minimum.at(shared, row[differ], column[differ])
        cut = np.iinfo(np.int64).max if max_length is None else max_length
        chosen, rejected, shared = (np.minimum(prompt + length, cut) for length in (*lengths, shared))
        tokens.append(chosen + rejected)
        saved.append(np.minimum(shared, rejected - 1))
    return np.concatenate(tokens), np.concatenate(saved)


def decides_sharing(args: RewardConfig | DPOConfig, saves: float) -> bool:
    """Return whether the prefix is shared: as `share_prefix` says; where it is unset, if sharing `saves` at least 5% of
    the tokens and no dropout would be shared with it."""
    return bool(saves >= 0.05 and args.disable_dropout) if args.share_prefix is None else args.share_prefix


def list_offsets(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a column of lists, one list after the other, and where the lists start, (rows + 1,)."""
    lengths = pc.list_value_length(column).to_numpy()
    return pc.list_flatten(column).to_numpy(), np.concatenate(([0], lengths.cumsum()))


def count_per_row(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return (rows,) how many values of each row are true."""
    return np.diff(np.concatenate(([0], values.cumsum()))[offsets])


def drop_unlabelled(packed: Dataset) -> Dataset:
    """Return packed rows without those in which nothing is trained: pieces of long prompts, which have no loss."""
    labels, offsets = list_offsets(packed.with_format("arrow")["labels"][:])
    trained = count_per_row(labels != -100, offsets) > 0
    if trained.all():
        return packed
    left_out = len(packed) - int(trained.sum())
    logger.info("%d of %d packed rows have nothing to train on and are left out.", left_out, len(packed))
    return packed.select(np.flatnonzero(trained))


def pack_like_training(dataset: Dataset, args: SFTConfig) -> Dataset:
    """Return the packed rows that the trainer makes of tokenized ones."""
    assert args.max_length is not None
    return drop_unlabelled(pack_dataset(dataset, args.max_length, args.packing_strategy))


@dataclass(eq=False, repr=False)
class TokenBatchSampler(BatchRebalanceSampler):
    """Batches with an even number of packed tokens, for one rank.

    An epoch's batches depend on the seed and the epoch only, and are as many in every epoch, so that skipping the first
    of them resumes it. Every row is seen once per epoch. Where the last batches cannot have the same number of rows on
    each rank, they are completed with up to world_size - 1 rows from the epoch's beginning, like accelerate's.

    With `rows_per_batch`, each epoch is shuffled and cut into windows of `WINDOW` optimizer steps. A window is dealt
    into steps, and a step into batches of nearly equal tokens. Which rows a step has depends on its number of rows
    only, not on how they are split over ranks and accumulation. With `max_tokens`, a batch has as many rows as fit, the
    same number on every rank. The batches are formed once, as TRL's packing forms its rows, and each epoch shuffles
    them. A loss that is a mean over the batch (RM, DPO) then gives more weight to a row of a batch with fewer rows.

    It is a `BatchRebalanceSampler` so that the Trainer takes it in place of a sampler. transformers' own counts padded
    tokens and gives the ranks different numbers of rows, which TRL's metrics cannot gather.

    Raises:
        ValueError: a row is longer than max_tokens.
    """

    lengths: np.ndarray  # type: ignore[assignment] # (rows,) packed tokens of each row or pair
    rows_per_batch: int | None = None
    max_tokens: int | None = None  # the most packed tokens in a batch, in place of rows_per_batch
    gradient_accumulation_steps: int = 1  # batches that a rank has in an optimizer step
    seed: int = 0  # the same on all ranks
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False  # leave out the last batches where they would have to be completed
    epoch: int = field(default=0, init=False)  # BatchRebalanceSampler.set_epoch
    filled: list[np.ndarray] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.max_tokens is None:
            return
        if (longest := self.lengths.max()) > self.max_tokens:
            raise ValueError(
                f"max_tokens_per_batch is {self.max_tokens}, but the longest row has {longest} packed tokens. "
                f"Set it to {longest} or more, or lower max_length."
            )
        self.filled = self._fill(np.random.default_rng(self.seed), self.max_tokens)

    def __len__(self) -> int:
        if self.filled is not None:
            return len(self.filled)
        assert self.rows_per_batch is not None
        rows = self.rows_per_batch * self.world_size
        return len(self.lengths) // rows if self.drop_last else -(-len(self.lengths) // rows)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        if self.filled is None:
            batches: Iterable[np.ndarray] = self._balance(generator)
        else:
            batches = (self.filled[i] for i in generator.permutation(len(self.filled)))
        for of_ranks in batches:
            yield of_ranks[self.rank].tolist()

    def _balance(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the batches of all ranks, (world_size, rows) each."""
        order = generator.permutation(len(self.lengths))
        assert self.rows_per_batch is not None
        rows_of_ranks = self.rows_per_batch * self.world_size
        rows_of_step = rows_of_ranks * self.gradient_accumulation_steps
        rows_of_window = WINDOW * rows_of_step
        for window in np.split(order, range(rows_of_window, len(order), rows_of_window)):
            whole = len(window) // rows_of_step * rows_of_step
            steps = generator.permutation(self._deal(window[:whole], whole // rows_of_step))
            for step in (*steps, window[whole:]):
                whole = len(step) // rows_of_ranks * rows_of_ranks
                batches = self._deal(step[:whole], whole // self.rows_per_batch)
                yield from batches.reshape(-1, self.world_size, self.rows_per_batch)
                if (rest := len(step) - whole) and not self.drop_last:
                    completed = np.append(step[whole:], np.resize(order, -rest % self.world_size))
                    yield self._deal(completed, self.world_size)

    def _fill(self, generator: np.random.Generator, max_tokens: int) -> list[np.ndarray]:
        """Return the batches of all ranks, (world_size, rows) each, none with more than max_tokens."""
        order = generator.permutation(len(self.lengths))
        if rest := len(order) % self.world_size:
            order = order[:-rest] if self.drop_last else np.append(order, np.resize(order, self.world_size - rest))
        total = self.lengths[order].cumsum()
        filled, start = [], 0
        while start < len(order):
            before = total[start] - self.lengths[order[start]]
            end = np.searchsorted(total, before + max_tokens * self.world_size, side="right")
            for rows in range((end - start) // self.world_size, 0, -1):
                batches = self._deal(order[start : start + rows * self.world_size], self.world_size)
                if self.lengths[batches].sum(axis=1).max() <= max_tokens:
                    break
            filled.append(batches)
            start += batches.size
        return filled

    def _deal(self, rows: np.ndarray, groups: int) -> np.ndarray:
        """Return (groups, rows / groups): in each round, the longest row left goes to the group with fewest tokens."""
        longest_first = rows[np.argsort(-self.lengths[rows], kind="stable")]
        dealt = longest_first.reshape(len(rows) // max(groups, 1), groups)
        tokens = np.zeros(groups, dtype=np.int64)
        for i, rows in enumerate(dealt):
            group = np.argsort(tokens, kind="stable")
            dealt[i, group] = rows.copy()
            tokens[group] += self.lengths[dealt[i, group]]
        return dealt.T
